"""Arrow: plain LoRAs side by side, of which a row takes the k whose own directions it points along.

p_e, the direction of expert e at a module, is the right singular vector of B_e A_e with the largest
singular value, found when the adapter is read. |p_e x| is expert e's score; the k largest are kept,
of equal ones the first; w = softmax(scores / temperature) over those, and
y = W x + sum_e w_e s_e B_e A_e x with each LoRA's own s_e. GenKnowSub first takes the mean of the
general adapters' A from every A, and of their B from every B.

arXiv 2405.11157 and aclanthology.org/2025.acl-short.54; huggingface/peft:src/peft/tuners/lora/
{arrow,variants}.py, version 0.21.2. PEFT puts the LoRAs together when it runs and has no file for
the result, so the directory is of our own: adapter_config.json holds PEFT's `arrow_config` and the
configs of the LoRAs as `experts` and `general`, whose tensors are called experts.<number>.<PEFT's
name> and general.<number>.<PEFT's name>. PEFT ends its search for p_e after 15 steps from a random
start; here it is what that search converges to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from polyadapt.adapters.adapter import (
    AdapterPlan,
    BaseWeights,
    Delta,
    TensorRead,
    Traits,
    keeps_keys_and_values,
)
from polyadapt.adapters.deltas import is_finite, low_rank, to_float32
from polyadapt.adapters.families.lora import Lora, LoraSettings
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import TensorForm
from polyadapt.errors import AdapterRejected, Problem
from polyadapt.ops import cells
from polyadapt.ops.cells import Router, Routing
from polyadapt.types import BaseSpec
from polyadapt_store.checkpoint import Checkpoint, TensorInfo
from polyadapt_store.manifest import PEFT_FORM, FileForm
from polyadapt_store.strict_json import shown

if TYPE_CHECKING:
    import torch

PEFT_TYPE = "POLYADAPT_ARROW"
MAX_EXPERTS = 64

_GROUPS = ("experts", "general")
_MIN_TEMPERATURE = 1e-20  # keeps a score divided by it inside float32
_LEFT_OUT = "Arrow takes A and B of its LoRAs alone, so that this would be left out"


class _Member(Lora):
    """One of the LoRAs, as it is alone but for the beginning of its tensors' names."""

    forms: ClassVar = {
        "a": TensorForm("lora_A.weight", ("rank", "in")),
        "b": TensorForm("lora_B.weight", ("out", "rank")),
    }
    refused_keys: ClassVar = {
        **Lora.refused_keys,
        **dict.fromkeys(
            (
                *("use_dora", "lora_bias", "alora_invocation_tokens", "use_bdlora", "kasa_config"),
                *("target_parameters", "modules_to_save", "trainable_token_indices"),
            ),
            _LEFT_OUT,
        ),
    }
    foreign: ClassVar = {
        **Lora.foreign,
        "lora_embedding_A": "an embedding has no input that a router could read",
        "lora_embedding_B": "an embedding has no input that a router could read",
        "lora_magnitude_vector": _LEFT_OUT,
    }

    def __init__(self, label: str) -> None:
        self.label = label  # experts.<number> or general.<number>

    def settings(self, reader: ConfigReader, base: BaseSpec) -> LoraSettings:
        """See PeftFamily.settings."""
        settings = super().settings(reader, base)
        if reader.config.get("bias", "none") != "none":
            reader.refuse("bias", f"bias is not served: {_LEFT_OUT}")
        if settings.init:
            reader.refuse(
                "init_lora_weights",
                f"init_lora_weights = {shown(settings.init)} makes an adapter of another base; "
                "`polyadapt convert --from pissa` makes an ordinary one of it",
            )
        return settings

    def places(self, settings: LoraSettings, base: BaseSpec) -> dict[str, int]:
        """See PeftFamily.places."""
        return {
            f"{self.label}.{prefix}{path}": site_id
            for path, site_id in super().places(settings, base).items()
            for prefix in ("", "base_model.model.")
        }


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a config says about the numbers."""

    top_k: int
    temperature: float
    configs: Mapping[str, Mapping[str, Any]]  # of the LoRAs, by label and in order

    def labels(self, group: str) -> list[str]:
        """The labels of the experts, or of the general adapters."""
        return [label for label in self.configs if label.startswith(f"{group}.")]


@dataclass(frozen=True, slots=True)
class _Draft:
    settings: _Settings
    plan: AdapterPlan


class Arrow:
    """The family `arrow`."""

    name: ClassVar[str] = "arrow"
    peft_types: ClassVar[frozenset[str]] = frozenset({PEFT_TYPE})
    summary: ClassVar[str] = (
        "low rank, routed: each row takes the k LoRAs whose main direction its input points along"
    )
    scaling: ClassVar[str] = "yes"
    overrides: ClassVar[int] = 0
    files: ClassVar[tuple[FileForm, ...]] = (PEFT_FORM,)

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether the config is that of a directory which `polyadapt convert --from arrow` made."""
        return config.get("peft_type") == PEFT_TYPE

    def plan(
        self, config: Mapping[str, Any], header: Mapping[str, TensorInfo], base: BaseSpec
    ) -> AdapterPlan:
        """See Family.plan."""
        return self._draft(config, header, base).plan

    def read_probe(
        self, config: Mapping[str, Any], checkpoint: Checkpoint, base: BaseSpec
    ) -> tuple[torch.Tensor, ...]:
        """See Family.read_probe: each row's own input is what weighs it."""
        return ()

    def read(
        self,
        config: Mapping[str, Any],
        checkpoint: Checkpoint,
        base: BaseSpec,
        weights: BaseWeights,
    ) -> dict[int, Delta]:
        """See Family.read."""
        draft = self._draft(config, checkpoint.header, base)
        problems: list[Problem] = []
        by_site: dict[int, list[TensorRead]] = {}
        for read in draft.plan.reads:
            by_site.setdefault(read.site_id, []).append(read)
        members = [
            _Member(label).settings(ConfigReader(draft.settings.configs[label], [], []), base)
            for label in draft.settings.labels("experts")
        ]
        deltas: dict[int, Delta] = {}
        # Module by module: whoever takes a tensor gives way to the steps, and a module's directions
        # are the work.
        for site_id, reads in by_site.items():
            site = base.sites[site_id]
            tensors = {read.role: to_float32(checkpoint.take(read.key)) for read in reads}
            bad = [read.key for read in reads if not is_finite(tensors[read.role])]
            problems += [_non_finite(shown(key)) for key in bad]
            if bad:
                continue
            scales = [member.scale(site) for member in members]
            deltas[site_id] = delta = _delta(tensors, scales, draft.settings)
            if not (is_finite(delta.a) and is_finite(delta.b)):
                problems.append(_non_finite(f"{site.path}: A, or B times the scale"))
        for key in checkpoint.drained():
            problems.append(Problem("unread_tensor", f"nothing reads tensor {shown(key)}", key))
        if problems:
            raise AdapterRejected(problems)
        return deltas

    # ------------------------------------------------------------------ the plan
    def _draft(
        self, config: Mapping[str, Any], header: Mapping[str, TensorInfo], base: BaseSpec
    ) -> _Draft:
        problems: list[Problem] = []
        notes: list[str] = []
        reader = ConfigReader(config, problems, notes)
        reader.judge(read={"arrow_config", *_GROUPS})
        settings = _read_settings(reader)
        reads: list[TensorRead] = []
        ranks: dict[str, dict[int, int]] = {}  # label -> site -> rank
        parts: dict[str, dict[str, TensorInfo]] = {}  # label -> its part of the header
        for key, info in header.items():
            parts.setdefault(".".join(key.split(".", 2)[:2]), {})[key] = info
        for label, own in settings.configs.items():
            try:
                plan = _plan_of(label, own, parts.pop(label, {}), base)
            except AdapterRejected as error:
                problems += [
                    Problem(p.code, f"{label}: {p.message}", p.where) for p in error.problems
                ]
                continue
            notes += [note for note in plan.notes if note not in notes]
            reads += [TensorRead(r.key, r.site_id, f"{label}.{r.role}") for r in plan.reads]
            ranks[label] = {r.site_id: header[r.key].shape[0] for r in plan.reads if r.role == "a"}
        for key in sorted(key for part in parts.values() for key in part):
            problems.append(
                Problem(
                    "unread_tensor",
                    f"nothing reads tensor {shown(key)}: its name begins with none of "
                    f"{', '.join(settings.configs) or 'experts.0'}",
                    shown(key),
                )
            )
        if not problems:
            _compare(ranks, len(settings.labels("experts")), base, problems)
        if problems:
            raise AdapterRejected(problems)
        rank = ranks[settings.labels("experts")[0]]
        return _Draft(settings, _plan(self.name, settings, rank, base, reads, notes))


def _plan(
    name: str,
    settings: _Settings,
    rank: Mapping[int, int],
    base: BaseSpec,
    reads: list[TensorRead],
    notes: list[str],
) -> AdapterPlan:
    num_experts, code = len(settings.labels("experts")), _routing(settings).code
    sites = {site_id: base.sites[site_id] for site_id in rank}
    return AdapterPlan(
        family=name,
        rank=max(rank.values()) * num_experts,
        target_modules=tuple(sorted({s.path.rpartition(".")[2] for s in sites.values()})),
        num_elements=sum(
            cells.num_elements(s.in_features, s.out_features, rank[i] * num_experts, 0, code)
            for i, s in sites.items()
        ),
        reads=tuple(reads),
        notes=tuple(notes),
        traits=Traits(is_kv_neutral=keeps_keys_and_values(rank, base)),
    )


def _plan_of(
    label: str, config: Mapping[str, Any], header: Mapping[str, TensorInfo], base: BaseSpec
) -> AdapterPlan:
    """What one of the LoRAs is by itself; raises AdapterRejected."""
    if not Lora().claims(config):
        kind = shown(config.get("peft_type"))
        reason = f"peft_type is {kind}, and Arrow chooses between ordinary LoRAs"
        raise AdapterRejected([Problem("unsupported_config", reason, "peft_type")])
    plan = _Member(label).plan(config, header, base)
    copies = [read.key for read in plan.reads if read.role not in _Member.forms]
    if copies:
        reason = "is the base's own; save the LoRA with save_embedding_layers=False"
        raise AdapterRejected(
            [Problem("unread_tensor", f"{shown(key)} {reason}", shown(key)) for key in copies]
        )
    return plan


def _compare(
    ranks: Mapping[str, Mapping[int, int]],
    num_experts: int,
    base: BaseSpec,
    problems: list[Problem],
) -> None:
    """Every LoRA adapts the modules of the first, with its ranks, and all fit one cell."""
    first, expected = next(iter(ranks.items()))
    for site_id, rank in sorted(expected.items()):
        if rank * num_experts > cells.MAX_ROUTED:
            path = base.sites[site_id].path
            problems.append(
                Problem(
                    "invalid_rank",
                    f"{path} has {rank * num_experts} components of all experts, at most "
                    f"{cells.MAX_ROUTED} can be routed",
                    path,
                )
            )
    for label, own in ranks.items():
        for site_id in sorted(expected.keys() | own.keys()):
            path, ours, theirs = base.sites[site_id].path, own.get(site_id), expected.get(site_id)
            if ours is None or theirs is None:
                one, other = (label, first) if ours is None else (first, label)
                problems.append(
                    Problem(
                        "missing_tensor",
                        f"{one} adapts no {path}, which {other} does; all adapt the same modules",
                        path,
                    )
                )
            elif ours != theirs:
                problems.append(
                    Problem(
                        "rank_mismatch",
                        f"{path} has rank {ours} in {label} and {theirs} in {first}; at a module "
                        "all have one rank",
                        path,
                    )
                )


# --------------------------------------------------------------------------- the config
def _read_settings(reader: ConfigReader) -> _Settings:
    given = reader.config.get("arrow_config")
    if given is not None and not isinstance(given, dict):
        reader.invalid("arrow_config", given, "null or an object, as PEFT's ArrowConfig")
        given = None
    inner = ConfigReader(given or {}, reader.problems, reader.notes)
    inner.judge(
        read={"top_k", "router_temperature", "use_gks"},
        training={"rng_seed", "task_adapter_names", "gks_adapter_names"},
    )
    configs = {
        f"{group}.{number}": own
        for group in _GROUPS
        for number, own in enumerate(_configs(reader, group))
    }
    top_k, temperature = inner.rank("top_k", 3), inner.number("router_temperature", 1.0)
    settings = _Settings(top_k, temperature, configs)
    num_experts, num_general = (len(settings.labels(group)) for group in _GROUPS)
    if num_experts and top_k > num_experts:
        inner.invalid("top_k", top_k, f"at most the number of experts, which is {num_experts}")
    if temperature < _MIN_TEMPERATURE:
        inner.invalid("router_temperature", temperature, f"at least {_MIN_TEMPERATURE:g}")
    if inner.flag("use_gks") != bool(num_general):
        inner.invalid(
            "use_gks", inner.flag("use_gks"),
            f"{'true' if num_general else 'false'} beside {num_general} general adapters",
        )  # fmt: skip
    return settings


def _configs(reader: ConfigReader, group: str) -> list[Mapping[str, Any]]:
    given = reader.config.get(group)
    given, least = [] if given is None else given, 1 if group == "experts" else 0
    is_list = isinstance(given, list) and all(isinstance(own, dict) for own in given)
    if is_list and least <= len(given) <= MAX_EXPERTS:
        return list(given)
    reader.invalid(group, given, f"a list of {least} to {MAX_EXPERTS} configs of LoRAs")
    return []


# --------------------------------------------------------------------------- the numbers
def _routing(settings: _Settings) -> Routing:
    num_experts = len(settings.labels("experts"))
    return Routing(Router.MAGNITUDE, num_experts, settings.top_k, value=settings.temperature)


def _delta(tensors: Mapping[str, torch.Tensor], scales: list[float], settings: _Settings) -> Delta:
    """One module's Delta of its LoRAs' A [r, in] and B [out, r], as stored."""
    import torch

    experts, general = (settings.labels(group) for group in _GROUPS)
    a = torch.stack([tensors[f"{label}.a"] for label in experts])  # [experts, r, in]
    b = torch.stack([tensors[f"{label}.b"] for label in experts])  # [experts, out, r]
    if general:
        a = a - torch.stack([tensors[f"{label}.a"] for label in general]).mean(0)
        b = b - torch.stack([tensors[f"{label}.b"] for label in general]).mean(0)
    router = torch.stack([_direction(*pair) for pair in zip(a, b, strict=True)])
    b = b * torch.tensor(scales)[:, None, None]
    return low_rank(
        a.flatten(0, 1), b.transpose(0, 1).flatten(1), routing=_routing(settings), router=router
    )


def _direction(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The right singular vector [in] of B A with the largest singular value, of either sign; zeros
    where B A is zero. B A is never formed: it is Qb (Rb Ra') Qa' with A' = Qa Ra and B = Qb Rb.
    """
    import torch

    qa, ra = torch.linalg.qr(a.double().t())
    _, rb = torch.linalg.qr(b.double())
    _, values, right = torch.linalg.svd(rb @ ra.t())
    direction = qa @ right[0]
    return torch.where(values[0] > 0, direction, torch.zeros_like(direction)).float()


def _non_finite(what: str) -> Problem:
    return Problem("non_finite", f"tensor {what} holds NaN or infinity", what)
