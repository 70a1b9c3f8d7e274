"""LoRA as PEFT writes it: y = W x + s B A x, with s folded into B. `plan` needs no torch.

Formats and rules: huggingface/peft:src/peft/tuners/lora/{config,model,layer}.py and
src/peft/utils/save_and_load.py, version 0.21.2. LoRA: arXiv 2106.09685; rank-stabilised: arXiv
2312.03732.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polyadapt.adapters.adapter import (
    AdapterPlan,
    BaseWeights,
    Delta,
    TensorRead,
    Traits,
    keeps_keys_and_values,
)
from polyadapt.adapters.peft_modules import ModuleTargets, PatternTable, find_site
from polyadapt.errors import AdapterRejected, Problem
from polyadapt.types import BaseSpec, SiteSpec
from polyadapt_store.checkpoint import Checkpoint, RawTensor, TensorInfo
from polyadapt_store.strict_json import shown

if TYPE_CHECKING:
    import torch

_MAX_RANK = 1 << 16
_MAX_SCALE = 1e30  # keeps s B inside float32 for every trained B

# The end of a tensor's name -> the part it plays. Old files still carry the adapter's name
# "default".
_ENDINGS = {
    ("lora_A", "weight"): "a",
    ("lora_A", "default", "weight"): "a",
    ("lora_B", "weight"): "b",
    ("lora_B", "default", "weight"): "b",
    ("lora_B", "bias"): "b_bias",
    ("lora_B", "default", "bias"): "b_bias",
    ("lora_embedding_A",): "embedding_a",
    ("lora_embedding_A", "default"): "embedding_a",
    ("lora_embedding_B",): "embedding_b",
    ("lora_embedding_B", "default"): "embedding_b",
    ("base_layer", "bias"): "new_bias",
    ("bias",): "new_bias",
    ("base_layer", "weight"): "base_weight",
    ("weight",): "base_weight",
}
_LOW_RANK = {"linear": ("a", "b"), "embedding": ("embedding_a", "embedding_b")}
_TENSOR_NAMES = {
    "a": "lora_A.weight",
    "b": "lora_B.weight",
    "b_bias": "lora_B.bias",
    "embedding_a": "lora_embedding_A",
    "embedding_b": "lora_embedding_B",
}
_FOREIGN = {
    "lora_magnitude_vector": "it belongs to DoRA",
    "trainable_tokens_delta": "it replaces rows of the embedding (trainable_token_indices)",
    "lora_E": "it belongs to AdaLoRA",
    "lora_diag": "it belongs to KaSA",
    "modules_to_save": "it replaces a whole module (modules_to_save)",
}

# Config keys that change the output in a way this family does not compute, with the reason.
_REFUSED = {
    "use_dora": "DoRA renormalises every row of W + BA, which is not a low-rank addition",
    "modules_to_save": "it replaces whole modules of the base; train without it",
    "trainable_token_indices": "it replaces rows of the embedding; train without it",
    "alora_invocation_tokens": "the adapter acts only behind an invocation sequence",
    "target_parameters": "it adapts bare parameters such as fused experts, not modules",
    "layer_replication": "it repeats layers, so it needs another base model",
    "use_qalora": "its A works on groups of inputs",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes tokens between several adapters",
    "kasa_config": "it removes singular components from the base",
    "monteclora_config": "it stores a sampler beside A and B",
    "velora_config": "it stores projections beside A and B",
    "megatron_config": "it needs Megatron's parallel layers as the base",
}
# What only training reads. Said in the notes when set to anything.
_TRAINING_ONLY = ("lora_dropout", "eva_config", "corda_config", "lora_ga_config", "loftq_config")
# Keys that are read below, or that say where the adapter came from.
_KNOWN = frozenset(
    {
        *_REFUSED,
        *_TRAINING_ONLY,
        *("peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode", "revision"),
        *("base_model_name_or_path", "runtime_config", "megatron_core", "qalora_group_size"),
        *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "bias"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("fan_in_fan_out", "init_lora_weights", "ensure_weight_tying"),
    }
)
_PLAIN_INITS = frozenset({"gaussian", "orthogonal", "eva", "mica"})
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")


class Lora:
    """The family `lora`; see Family in adapters/adapter.py."""

    name = "lora"

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether PEFT calls it LORA."""
        return config.get("peft_type") == "LORA"

    def plan(
        self, config: Mapping[str, Any], header: Mapping[str, TensorInfo], base: BaseSpec
    ) -> AdapterPlan:
        """See Family.plan."""
        problems: list[Problem] = []
        notes: list[str] = []
        settings = _read_settings(config, base, problems, notes)
        sites = _sort_tensors(header, base, problems)
        ranks: dict[int, int] = {}
        num_elements = 0
        for site_id, tensors in sorted(sites.items()):
            site = base.sites[site_id]
            rank = _check_site(site, tensors, header, problems)
            if rank is not None:
                ranks[site_id] = rank
                num_elements += rank * (site.in_features + site.out_features)
            if "new_bias" in tensors or "b_bias" in tensors:
                num_elements += site.out_features
        if not ranks and not problems:
            problems.append(Problem("no_tensors", "the checkpoint holds no lora_A and lora_B"))
        if settings is not None:
            _check_settings(settings, sites, ranks, base, problems, notes)
        if problems:
            raise AdapterRejected(problems)
        reads = tuple(
            TensorRead(key, site_id, role)
            for site_id, tensors in sorted(sites.items())
            for role, key in tensors.items()
        )
        replaced = tuple(
            f"{base.sites[read.site_id].path}.bias" for read in reads if read.role == "new_bias"
        )
        return AdapterPlan(
            family=self.name,
            rank=max(ranks.values()),
            target_modules=tuple(
                sorted({base.sites[site_id].path.rpartition(".")[2] for site_id in ranks})
            ),
            num_elements=num_elements,
            reads=reads,
            notes=tuple(notes),
            traits=Traits(
                is_scalable=not replaced,
                is_kv_neutral=keeps_keys_and_values((read.site_id for read in reads), base),
                replaced=replaced,
            ),
        )

    def read(
        self,
        config: Mapping[str, Any],
        checkpoint: Checkpoint,
        base: BaseSpec,
        weights: BaseWeights,
    ) -> dict[int, Delta]:
        """See Family.read.

        A replaced bias becomes the difference to the base's. A stored copy of an embedding or head
        weight must equal the base's in the base's dtype, and is dropped.
        """
        plan = self.plan(config, checkpoint.header, base)
        settings = _read_settings(config, base, [], [])
        assert settings is not None  # plan() would have raised
        problems: list[Problem] = []
        tensors: dict[int, dict[str, torch.Tensor]] = {}
        for read in plan.reads:
            tensor = _to_float32(checkpoint.take(read.key))
            if not _is_finite(tensor):
                problems.append(_non_finite(read.key))
            elif read.role == "base_weight":
                problems += _compare_weight(read, tensor, weights)
            else:
                tensors.setdefault(read.site_id, {})[read.role] = tensor
        for key in checkpoint.drained():
            problems.append(Problem("unread_tensor", f"nothing reads tensor {shown(key)}", key))
        modules: dict[int, Delta] = {}
        if not problems:
            for site_id, parts in tensors.items():
                site = base.sites[site_id]
                modules[site_id] = _low_rank(site_id, site, parts, settings.scale(site), weights)
                if not _is_finite(modules[site_id].b):
                    problems.append(_non_finite(f"{site.path}: B times the scale"))
        if problems:
            raise AdapterRejected(problems)
        return modules


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a config says about the numbers."""

    rank: int
    alpha: float
    is_rank_stabilised: bool
    has_lora_bias: bool
    bias: str  # none | all | lora_only
    is_head_tied: bool  # the head's LoRA is that of the embedding, transposed
    ranks: PatternTable
    alphas: PatternTable
    targets: ModuleTargets

    def site_rank(self, site: SiteSpec) -> int:
        """The rank that PEFT gives this module."""
        found = self.ranks.find(site.path)
        return self.rank if found is None else found

    def scale(self, site: SiteSpec) -> float:
        """alpha / r, or alpha / sqrt(r) if rank-stabilised, with the module's own alpha and r."""
        found = self.alphas.find(site.path)
        alpha = self.alpha if found is None else found
        rank = self.site_rank(site)
        return float(alpha / math.sqrt(rank) if self.is_rank_stabilised else alpha / rank)


# --------------------------------------------------------------------------- the config
def _read_settings(
    config: Mapping[str, Any], base: BaseSpec, problems: list[Problem], notes: list[str]
) -> _Settings | None:
    """Return the settings, or None with everything that is wrong with the config in `problems`."""
    before = len(problems)
    _judge_keys(config, base, problems, notes)
    rank = config.get("r", 8)  # PEFT's defaults, for configs that leave a key out
    alpha = config.get("lora_alpha", 8)
    bias = config.get("bias", "none")
    if not _is_rank(rank):
        _invalid(problems, "r", rank, f"a whole number from 1 to {_MAX_RANK}")
    if not _is_alpha(alpha):
        _invalid(problems, "lora_alpha", alpha, "a finite number")
    if bias not in ("none", "all", "lora_only"):
        _invalid(problems, "bias", bias, "none, all or lora_only")
    for key in ("use_rslora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying"):
        if config.get(key) not in (None, True, False):
            _invalid(problems, key, config[key], "true or false")
    ranks = _read_table(config, "rank_pattern", _is_rank, "ranks", problems)
    alphas = _read_table(config, "alpha_pattern", _is_alpha, "finite numbers", problems)
    targets = ModuleTargets.read(config, problems)
    if len(problems) > before or targets is None:
        return None
    return _Settings(
        rank=rank,
        alpha=alpha,
        is_rank_stabilised=bool(config.get("use_rslora")),
        has_lora_bias=bool(config.get("lora_bias")),
        bias=bias,
        is_head_tied=bool(config.get("ensure_weight_tying")) and base.is_tied,
        ranks=ranks,
        alphas=alphas,
        targets=targets,
    )


def _judge_keys(
    config: Mapping[str, Any], base: BaseSpec, problems: list[Problem], notes: list[str]
) -> None:
    for key, value in config.items():
        if key in _REFUSED and value:
            problems.append(
                Problem("unsupported_config", f"{key} is not served: {_REFUSED[key]}", key)
            )
        elif key in _TRAINING_ONLY and value:
            notes.append(f"{key} has no effect when serving")
        elif key not in _KNOWN and value:
            problems.append(
                Problem(
                    "unknown_config_key",
                    f"config key {shown(key)} = {shown(value)} is unknown and might change the "
                    "output; remove it if it does not",
                    shown(key),
                )
            )
        elif key not in _KNOWN:
            notes.append(f"unknown config key {shown(key)} is empty and was ignored")
    _judge_init(config.get("init_lora_weights", True), problems)
    origin = config.get("base_model_name_or_path")
    if origin and origin != base.name:
        notes.append(f"trained on {shown(origin)}, served on {base.name}; all shapes agree")
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        notes.append(f"task_type {shown(task)} is served as CAUSAL_LM")


def _judge_init(init: Any, problems: list[Problem]) -> None:
    if init is None or isinstance(init, bool):
        return
    lowered = init.lower() if isinstance(init, str) else ""
    if lowered.startswith(_BASE_CHANGING_INITS):
        problems.append(
            Problem(
                "unsupported_config",
                f"init_lora_weights = {shown(init)} changed the base's own weights when training "
                "began, so "
                "the file is no addition to this base; save it with "
                "path_initial_model_for_weight_conversion to convert it",
                "init_lora_weights",
            )
        )
    elif lowered not in _PLAIN_INITS:
        _invalid(problems, "init_lora_weights", init, "true, false or an initialisation of PEFT's")


def _read_table(
    config: Mapping[str, Any], key: str, is_valid: Any, expected: str, problems: list[Problem]
) -> PatternTable:
    table = config.get(key) or {}
    if not isinstance(table, dict):
        _invalid(problems, key, table, f"an object of patterns and {expected}")
        table = {}
    for pattern, value in table.items():
        if not is_valid(value):
            _invalid(problems, f"{key}[{shown(pattern)}]", value, f"one of {expected}")
    return PatternTable(key, table, problems)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _MAX_RANK


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _MAX_SCALE


def _invalid(problems: list[Problem], key: str, value: Any, expected: str) -> None:
    problems.append(Problem("invalid_config", f"{key} is {shown(value)}, expected {expected}", key))


# --------------------------------------------------------------------------- the tensors
def _sort_tensors(
    header: Mapping[str, TensorInfo], base: BaseSpec, problems: list[Problem]
) -> dict[int, dict[str, str]]:
    """Return site id -> role -> tensor name, for every tensor that has a place in the base."""
    site_ids = {site.path: site_id for site_id, site in enumerate(base.sites)}
    sites: dict[int, dict[str, str]] = {}
    for key in sorted(header):
        parts = key.split(".")
        ending = next((n for n in (3, 2, 1) if tuple(parts[-n:]) in _ENDINGS), None)
        split = len(parts) - (ending or 0)
        path, role = ".".join(parts[:split]), _ENDINGS.get(tuple(parts[split:]), "")
        site_id = find_site(path, site_ids) if role else None
        reason = next((_FOREIGN[part] for part in parts if part in _FOREIGN), None)
        if site_id is None and (reason is not None or not role):
            problems.append(
                Problem(
                    "unread_tensor",
                    f"nothing reads tensor {shown(key)}: {reason or 'its name is no LoRA name'}",
                    shown(key),
                )
            )
        elif site_id is None:
            problems.append(
                Problem(
                    "unknown_module",
                    f"tensor {shown(key)} belongs to module {shown(path)}, which the base "
                    f"{base.name} ({base.architecture}) does not have",
                    shown(key),
                )
            )
        elif role in sites.setdefault(site_id, {}):
            problems.append(
                Problem(
                    "duplicate_tensor",
                    f"tensors {shown(sites[site_id][role])} and {shown(key)} are the same "
                    f"part of {base.sites[site_id].path}",
                    shown(key),
                )
            )
        else:
            misfit = _misfit(role, base.sites[site_id], base)
            if misfit is None:
                sites[site_id][role] = key
            else:
                problems.append(Problem("unread_tensor", f"{shown(key)}: {misfit}", shown(key)))
    return {site_id: tensors for site_id, tensors in sites.items() if tensors}


def _misfit(role: str, site: SiteSpec, base: BaseSpec) -> str | None:
    """Why a tensor of this role has no meaning at this module, or None."""
    if role == "base_weight":
        if site.path in (base.embedding_path, base.head_path):
            return None
        return f"it replaces the weight of {site.path} (modules_to_save), which is not served"
    if role == "new_bias":
        return None if site.has_bias else f"{site.path} of the base has no bias to replace"
    expected = _LOW_RANK.get(site.kind)
    if expected is None:
        return f"{site.path} is a normalisation; only its bias can be replaced"
    if role in expected or (role == "b_bias" and site.kind == "linear"):
        return None
    names = " and ".join(_TENSOR_NAMES[part] for part in expected)
    return f"{site.path} is of kind {site.kind} and takes {names}"


def _check_site(
    site: SiteSpec,
    tensors: Mapping[str, str],
    header: Mapping[str, TensorInfo],
    problems: list[Problem],
) -> int | None:
    """Check partners and shapes of one module; return its rank, or None if it has no usable A and
    B.
    """
    rank: int | None = None
    pair: tuple[str, ...] = _LOW_RANK.get(site.kind, ())
    present = [role for role in pair if role in tensors]
    if len(present) == 1:
        (missing,) = set(pair) - set(present)
        problems.append(
            Problem(
                "missing_tensor",
                f"{site.path} has {shown(tensors[present[0]])} and no {_TENSOR_NAMES[missing]}",
                shown(tensors[present[0]]),
            )
        )
    elif not present and "b_bias" in tensors:
        problems.append(
            Problem(
                "missing_tensor",
                f"{site.path} has lora_B.bias and neither lora_A.weight nor lora_B.weight",
                shown(tensors["b_bias"]),
            )
        )
    if len(present) == 2:
        shape = header[tensors[pair[0]]].shape
        rank = shape[0] if shape else None
        if rank == 0:
            problems.append(
                Problem(
                    "invalid_rank",
                    f"{shown(tensors[pair[0]])} has rank 0; a partitioned export must be gathered "
                    "before it is saved",
                    shown(tensors[pair[0]]),
                )
            )
    shown_rank = "rank" if rank is None else rank
    expected: dict[str, tuple[Any, ...]] = {
        "b_bias": (site.out_features,),
        "new_bias": (site.out_features,),
        "base_weight": (
            (site.in_features, site.out_features)
            if site.kind == "embedding"
            else (site.out_features, site.in_features)
        ),
    }
    if pair:
        expected[pair[0]] = (shown_rank, site.in_features)
        expected[pair[1]] = (site.out_features, shown_rank)
    fits = True
    for role, key in tensors.items():
        given, wanted = header[key].shape, expected[role]
        if len(given) != len(wanted) or any(
            isinstance(size, int) and size != shape
            for size, shape in zip(wanted, given, strict=True)
        ):
            fits = False
            problems.append(
                Problem(
                    "shape_mismatch",
                    f"{shown(key)} has shape {list(given)}, {site.path} of the base needs "
                    f"[{', '.join(map(str, wanted))}]",
                    shown(key),
                )
            )
    return rank if fits and rank else None


def _check_settings(
    settings: _Settings,
    sites: Mapping[int, Mapping[str, str]],
    ranks: Mapping[int, int],
    base: BaseSpec,
    problems: list[Problem],
    notes: list[str],
) -> None:
    """Compare what the config announces with the tensors that are there."""
    targeted = {
        site_id
        for site_id, site in enumerate(base.sites)
        if site.kind != "bias" and settings.targets.selects(site, base)
    }
    if settings.is_head_tied:
        # PEFT takes the head out of target_modules when it gives it the embedding's LoRA.
        targeted |= {site_id for site_id in ranks if base.sites[site_id].path == base.head_path}
    for site_id, rank in sorted(ranks.items()):
        site, tensors = base.sites[site_id], sites[site_id]
        if site_id not in targeted:
            problems.append(
                Problem(
                    "not_targeted",
                    f"the checkpoint adapts {site.path}, target_modules and its companions in "
                    "adapter_config.json do not select it",
                    site.path,
                )
            )
        if settings.site_rank(site) != rank:
            problems.append(
                Problem(
                    "rank_mismatch",
                    f"{site.path} has rank {rank} in the checkpoint and "
                    f"{settings.site_rank(site)} by r and rank_pattern",
                    site.path,
                )
            )
        has_bias = "b_bias" in tensors
        if site.kind == "linear" and settings.has_lora_bias != has_bias:
            problems.append(
                Problem(
                    "config_mismatch",
                    f"lora_bias is {settings.has_lora_bias} and the checkpoint holds "
                    f"{'a' if has_bias else 'no'} lora_B.bias of {site.path}",
                    "lora_bias",
                )
            )
    for site_id, tensors in sorted(sites.items()):
        if "new_bias" not in tensors:
            continue
        is_allowed = settings.bias == "all" or (
            settings.bias == "lora_only" and site_id in targeted
        )
        if not is_allowed:
            problems.append(
                Problem(
                    "config_mismatch",
                    f"bias is {settings.bias!r} and the checkpoint holds "
                    f"{shown(tensors['new_bias'])}",
                    "bias",
                )
            )
    left = sorted(base.sites[site_id].path for site_id in targeted - set(ranks))
    if left and ranks:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        notes.append(
            f"no tensors for {', '.join(left[:5])}{more}, which target_modules selects; "
            "they stay as in the base"
        )


# --------------------------------------------------------------------------- the numbers
def _to_float32(raw: RawTensor) -> torch.Tensor:
    """Return a copy of the tensor in float32; exact, as every accepted dtype is a subset of it."""
    import torch

    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[raw.dtype]
    # Copied out of the mapping: a tensor in a file may lie at an address that its dtype cannot
    # have.
    return torch.frombuffer(bytearray(raw.data), dtype=dtype).reshape(raw.shape).float()


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite.

    Either would show in the sum, which is a tenth of the work; a sum may also overflow by itself.
    """
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def _low_rank(
    site_id: int,
    site: SiteSpec,
    parts: Mapping[str, torch.Tensor],
    scale: float,
    weights: BaseWeights,
) -> Delta:
    """Fold the scale into B and lora_B.bias, and turn a replaced bias into a difference."""
    import torch

    pair = _LOW_RANK.get(site.kind, ("a", "b"))
    if pair[0] in parts:
        a, b = parts[pair[0]], parts[pair[1]] * scale
    else:
        a, b = torch.zeros(0, site.in_features), torch.zeros(site.out_features, 0)
    bias: torch.Tensor | None = None
    if "b_bias" in parts:
        bias = parts["b_bias"] * scale
    if "new_bias" in parts:
        current = weights.bias(site_id)
        assert current is not None  # the plan saw has_bias
        # PEFT loads the new bias into the base's parameter, hence its dtype.
        replaced = parts["new_bias"].to(current.device, current.dtype).float() - current.float()
        bias = replaced.cpu() if bias is None else bias + replaced.cpu()
    return Delta(a.contiguous(), b.contiguous(), bias)


def _compare_weight(read: TensorRead, copy: torch.Tensor, weights: BaseWeights) -> list[Problem]:
    import torch

    current = weights.weight(read.site_id)
    # In the precision that is served, whatever narrower form the base is stored in.
    if torch.equal(copy.to(current.device, weights.dtype), current.to(weights.dtype)):
        return []
    return [
        Problem(
            "base_weight_differs",
            f"{shown(read.key)} is a copy of a base weight that differs from this base's: the "
            "embedding "
            "was trained or resized, or the base is another one; save with "
            "save_embedding_layers=False "
            "if neither is so",
            shown(read.key),
        )
    ]


def _non_finite(key: str) -> Problem:
    return Problem("non_finite", f"tensor {shown(key)} holds NaN or infinity", shown(key))
