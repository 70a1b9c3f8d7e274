"""LoRA as PEFT writes it: y = W x + s B A x, with s folded into B, and its variants.

Formats and rules: huggingface/peft:src/peft/tuners/lora/{config,model,layer,dora,variants}.py and
src/peft/utils/save_and_load.py, version 0.21.2. LoRA: arXiv 2106.09685; rank-stabilised: arXiv
2312.03732; DoRA: arXiv 2402.09353; PiSSA: arXiv 2404.02948; OLoRA: arXiv 2406.01775; activated:
arXiv 2504.12397; KaSA: arXiv 2412.06071.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import SiteBase, low_rank
from polyadapt.adapters.peft_config import ConfigReader, is_number, is_rank
from polyadapt.adapters.peft_family import MisfitError, Module, PeftFamily, TensorForm
from polyadapt.adapters.peft_modules import PatternTable, endings
from polyadapt.errors import Problem
from polyadapt.ops import cells
from polyadapt.types import BaseSpec, SiteSpec
from polyadapt_store.strict_json import shown

if TYPE_CHECKING:
    import torch

_PLAIN_INITS = frozenset({"gaussian", "orthogonal", "eva", "mica"})
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
_RECOMPUTED_INITS = frozenset({"pissa", "olora"})
_NOT_WITH_PARAMETERS = (
    *("lora_dropout", "fan_in_fan_out", "lora_bias", "use_dora", "use_bdlora"),
    "alora_invocation_tokens",
)


@dataclass(frozen=True, slots=True)
class _Blocks:
    """BD-LoRA: of which modules A or B is block-diagonal."""

    a: tuple[str, ...]
    b: tuple[str, ...]
    num: int

    def of(self, path: str) -> tuple[int, int]:
        """Blocks of A and of B of the module at `path`; PEFT looks for the names anywhere in it."""
        num_a = self.num if any(name in path for name in self.a) else 1
        return num_a, self.num if any(name in path for name in self.b) else 1


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """What a config says about the numbers."""

    rank: int
    alpha: float
    is_rank_stabilised: bool
    is_weight_decomposed: bool
    has_lora_bias: bool
    init: str  # one of _RECOMPUTED_INITS, or ""
    is_head_tied: bool  # the head's LoRA is that of the embedding, transposed
    is_embedding_saved: bool  # modules_to_save names it
    invocation: tuple[int, ...]
    ranks: PatternTable
    alphas: PatternTable
    blocks: _Blocks | None
    parameters: Mapping[str, int]  # path of a wrapper of an expert parameter -> site id
    is_truncating: bool  # KaSA

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


class Lora(PeftFamily[LoraSettings]):
    """The family `lora`."""

    name = "lora"
    peft_types = frozenset({"LORA"})
    summary = "A and B as stored, alpha / r folded into B; DoRA adds one scale per output"
    scaling = "yes, except DoRA and KaSA"
    forms: ClassVar = {
        "a": TensorForm("lora_A.weight", ("rank", "in"), ("linear", "experts")),
        "b": TensorForm("lora_B.weight", ("out", "rank"), ("linear", "experts")),
        "b_bias": TensorForm("lora_B.bias", ("out",), is_optional=True),
        "embedding_a": TensorForm("lora_embedding_A", ("rank", "in"), ("embedding",)),
        "embedding_b": TensorForm("lora_embedding_B", ("out", "rank"), ("embedding",)),
        "magnitude": TensorForm(
            "lora_magnitude_vector", ("out",), ("linear", "embedding"), is_optional=True,
            aliases=("lora_magnitude_vector.weight",),
        ),
        "diagonal": TensorForm("lora_diag", ("rank",), is_optional=True),
    }  # fmt: skip
    read_keys = frozenset(
        {
            *("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "rank_pattern"),
            *("alpha_pattern", "init_lora_weights", "ensure_weight_tying", "fan_in_fan_out"),
            *("alora_invocation_tokens", "use_bdlora", "megatron_core", "qalora_group_size"),
            "target_parameters",
            "kasa_config",
        }
    )
    training_keys = frozenset(
        {"lora_dropout", "eva_config", "corda_config", "lora_ga_config", "loftq_config"}
    )
    refused_keys: ClassVar = {
        "layer_replication": "it repeats layers, so it needs another base model",
        "use_qalora": "its A works on groups of inputs",
        "arrow_config": "it routes tokens between several adapters, which "
        "`polyadapt convert --from arrow` puts together",
        "monteclora_config": "it stores a sampler beside A and B",
        "velora_config": "it stores projections beside A and B",
        "megatron_config": "it needs Megatron's parallel layers as the base",
    }
    foreign: ClassVar = {
        "lora_E": "it belongs to AdaLoRA",
    }

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether PEFT calls it LORA and it does not call itself nested, which is another family's
        mark.
        """
        return super().claims(config) and not config.get("nested")

    def settings(self, reader: ConfigReader, base: BaseSpec) -> LoraSettings:
        """See PeftFamily.settings. PEFT's defaults stand for keys that are left out."""
        for key in ("fan_in_fan_out",):
            reader.flag(key)
        invocation = reader.numbers("alora_invocation_tokens", "null or a list of token ids")
        if any(token_id >= base.vocab_size for token_id in invocation):
            reader.invalid(
                "alora_invocation_tokens", list(invocation), f"token ids below {base.vocab_size}"
            )
        is_dora = reader.flag("use_dora")
        blocks = _read_blocks(reader)
        init, parameters = _read_init(reader), _read_parameters(reader, base)
        if is_dora and (invocation or blocks or init or reader.flag("lora_bias")):
            reader.refuse(
                "use_dora",
                "use_dora is not served together with aLoRA, BD-LoRA, PiSSA, OLoRA or lora_bias",
            )
        if invocation:
            _refuse_ungated(reader, init)
        if parameters:
            _refuse_beside_parameters(reader, init)
        is_truncating = _read_truncating(reader)
        if is_truncating and (is_dora or invocation or blocks or init or parameters):
            reader.refuse(
                "kasa_config",
                "kasa_config is not served together with DoRA, aLoRA, BD-LoRA, PiSSA, OLoRA or "
                "target_parameters",
            )
        return LoraSettings(
            rank=reader.rank("r"),
            alpha=reader.number("lora_alpha", 8),
            is_rank_stabilised=reader.flag("use_rslora"),
            is_weight_decomposed=is_dora,
            has_lora_bias=reader.flag("lora_bias"),
            init=init,
            is_head_tied=reader.flag("ensure_weight_tying") and base.is_tied,
            is_embedding_saved=any(
                base.embedding_path.endswith(name) for name in reader.words("modules_to_save")
            ),
            invocation=invocation,
            ranks=reader.table("rank_pattern", is_rank, "ranks"),
            alphas=reader.table("alpha_pattern", is_number, "finite numbers"),
            blocks=blocks,
            parameters=parameters,
            is_truncating=is_truncating,
        )

    def shape(self, role: str, site: SiteSpec, settings: LoraSettings) -> tuple[int | str, ...]:
        """See PeftFamily.shape: of a block-diagonal factor only the blocks are stored."""
        if settings.blocks is not None and role in ("a", "b"):
            num_a, num_b = settings.blocks.of(site.path)
            if role == "a" and num_a > 1:
                return ("rank", site.in_features // num_a)
            if role == "b" and num_b > 1:
                return ("out", settings.site_rank(site) // num_b)
        return self.forms[role].shape

    def cell(self, module: Module, settings: LoraSettings) -> tuple[int, int]:
        """See PeftFamily.cell."""
        site, rank = module.site, module.sizes["rank"]
        parts = cells.BIAS if "b_bias" in module.keys else 0
        if "magnitude" in module.keys:
            parts |= cells.OUT_SCALE
            parts |= cells.BIAS if site.has_bias else 0
        if settings.is_truncating:
            if site.kind == "embedding" or rank >= min(site.in_features, site.out_features):
                raise MisfitError(f"KaSA needs a linear of more than r = {rank} components")
            rank *= 2
        if settings.blocks is not None and site.kind == "linear":
            num_a, num_b = settings.blocks.of(site.path)
            num_in, num_out = site.in_features, site.out_features
            if rank % num_a or rank % num_b or num_in % num_a or num_out % num_b:
                raise MisfitError(
                    f"rank {rank}, {num_in} inputs or {num_out} outputs are no "
                    f"multiple of {max(num_a, num_b)} blocks"
                )
        if settings.init and site.kind == "linear":
            rank += settings.site_rank(site)
        return rank, parts

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: LoraSettings,
        base: SiteBase,
    ) -> Delta:
        """See PeftFamily.delta."""
        site, scale = module.site, settings.scale(module.site)
        if site.kind == "embedding":
            a, b = tensors["embedding_a"], tensors["embedding_b"] * scale
        else:
            a, b = tensors["a"], tensors["b"] * scale
            if site.kind == "experts":
                b = _by_expert(b, site.num_experts)
            elif settings.blocks is not None:
                num_a, num_b = settings.blocks.of(site.path)
                a, b = _block_diagonal(a, num_a), _block_diagonal(b, num_b)
        bias = tensors["b_bias"] * scale if "b_bias" in tensors else None
        if "diagonal" in tensors:
            return _without_tail(a, b * tensors["diagonal"], bias, base)
        # PEFT starts an embedding as plain LoRA whatever the config says.
        if settings.init and site.kind == "linear":
            return _beside_intact_base(a, b, bias, settings, site, base)
        if "magnitude" in tensors:
            return _weight_decomposed(a, b, tensors["magnitude"], site, base)
        return low_rank(a, b, bias=bias)

    def replaced_whole(
        self, modules: Mapping[int, Module], settings: LoraSettings, base: BaseSpec
    ) -> tuple[str, ...]:
        """See PeftFamily.replaced_whole: PEFT saves a tied head with the embedding, unnamed."""
        paths = [module.site.path for module in modules.values() if "new_weight" in module.keys]
        is_saved = settings.is_head_tied and settings.is_embedding_saved
        return (base.head_path,) if is_saved and base.embedding_path in paths else ()

    def targets(self, settings: LoraSettings, base: BaseSpec) -> set[int]:
        """PEFT takes the head out of target_modules when it gives it the embedding's LoRA."""
        targeted = set(settings.parameters.values())
        if settings.is_head_tied:
            targeted |= {i for i, site in enumerate(base.sites) if site.path == base.head_path}
        return targeted

    def places(self, settings: LoraSettings, base: BaseSpec) -> dict[str, int]:
        """See PeftFamily.places."""
        return {**super().places(settings, base), **settings.parameters}

    def multiplies(self, settings: LoraSettings) -> bool:
        """See PeftFamily.multiplies: KaSA takes components out of the base, and no other may."""
        return settings.is_truncating

    def traits(self, settings: LoraSettings) -> dict[str, Any]:
        """See PeftFamily.traits."""
        return {"invocation": settings.invocation}

    def check(
        self,
        modules: Mapping[int, Module],
        settings: LoraSettings,
        base: BaseSpec,
        problems: list[Problem],
        notes: list[str],
    ) -> None:
        """See PeftFamily.check."""
        for _, module in sorted(modules.items()):
            rank, site = module.sizes.get("rank"), module.site
            if rank is None:
                continue
            num_experts = site.num_experts or 1
            if settings.site_rank(site) * num_experts != rank:
                times = f" for each of {num_experts} experts" if site.num_experts else ""
                problems.append(
                    Problem(
                        "rank_mismatch",
                        f"{site.path} has rank {rank} in the checkpoint and "
                        f"{settings.site_rank(site)} by r and rank_pattern{times}",
                        site.path,
                    )
                )
            has_bias, has_magnitude = "b_bias" in module.keys, "magnitude" in module.keys
            if site.kind == "linear" and settings.has_lora_bias != has_bias:
                problems.append(
                    Problem(
                        "config_mismatch",
                        f"lora_bias is {settings.has_lora_bias} and the checkpoint holds "
                        f"{'a' if has_bias else 'no'} lora_B.bias of {site.path}",
                        "lora_bias",
                    )
                )
            if settings.is_truncating != ("diagonal" in module.keys):
                problems.append(
                    Problem(
                        "config_mismatch",
                        f"kasa_config is {'set' if settings.is_truncating else 'not set'} and the "
                        f"checkpoint holds {'no' if settings.is_truncating else 'a'} lora_diag of "
                        f"{site.path}",
                        "kasa_config",
                    )
                )
            if settings.is_weight_decomposed != has_magnitude:
                problems.append(
                    Problem(
                        "config_mismatch",
                        f"use_dora is {settings.is_weight_decomposed} and the checkpoint holds "
                        f"{'a' if has_magnitude else 'no'} lora_magnitude_vector of {site.path}",
                        "use_dora",
                    )
                )


# --------------------------------------------------------------------------- the config
def _read_init(reader: ConfigReader) -> str:
    """How training began, where that took components out of the base; refused where they cannot
    be had again.
    """
    init = reader.config.get("init_lora_weights", True)
    if init is None or isinstance(init, bool):
        return ""
    lowered = init.lower() if isinstance(init, str) else ""
    if lowered in _RECOMPUTED_INITS:
        return lowered
    if lowered.startswith(_BASE_CHANGING_INITS):
        reader.refuse(
            "init_lora_weights",
            f"init_lora_weights = {shown(init)} took components out of the base when training "
            "began that cannot be computed again, so the file is no addition to this base; save it "
            "with path_initial_model_for_weight_conversion to convert it",
        )
    elif lowered not in _PLAIN_INITS:
        reader.invalid("init_lora_weights", init, "true, false or an initialisation of PEFT's")
    return ""


def _read_parameters(reader: ConfigReader, base: BaseSpec) -> dict[str, int]:
    """Where a checkpoint holds the tensors of each expert parameter that target_parameters names.

    PEFT wraps a module once for each of its parameters, in their order, so that the last one's
    tensors are the module's and the others' lie one `base_layer` deeper each.
    huggingface/peft:src/peft/tuners/tuners_utils.py (_inject_parameters).
    """
    given = reader.config.get("target_parameters") or []
    if not isinstance(given, list) or any(not isinstance(n, str) or not n for n in given):
        reader.invalid("target_parameters", given, "null or a list of names of parameters")
        return {}
    names, used = frozenset(given), set[str]()
    wrapped: dict[str, list[int]] = {}  # by module, in the base's order
    modules = []
    for site_id, site in enumerate(base.sites):
        is_experts = site.kind == "experts"
        meant = names.intersection(endings(site.path if is_experts else f"{site.path}.weight"))
        used |= meant
        if meant and is_experts:
            wrapped.setdefault(site.path.rpartition(".")[0], []).append(site_id)
        elif meant:
            modules.append(site.path)
    if modules:
        reader.refuse(
            "target_parameters",
            f"target_parameters names the weight of {shown(modules[0])}: only the weights of "
            "routed experts are served as parameters; name the module in target_modules",
        )
    reader.notes += [
        f"target_parameters names {shown(name)}, which is no expert weight of this base that "
        "adapters can change; nothing is adapted there"
        for name in sorted(names - used)
    ]
    return {
        path + ".base_layer" * depth: site_id
        for path, site_ids in wrapped.items()
        for depth, site_id in enumerate(reversed(site_ids))
    }


def _refuse_beside_parameters(reader: ConfigReader, init: str) -> None:
    """PEFT makes no such adapters: what it adds to a parameter is a product of A and B alone."""
    given = [key for key in _NOT_WITH_PARAMETERS if reader.config.get(key)]
    for key in [*given, "init_lora_weights"] if init else given:
        reader.refuse(
            key, f"{key} = {shown(reader.config[key])} is not served beside target_parameters"
        )


def _refuse_ungated(reader: ConfigReader, init: str) -> None:
    """In PEFT only A and B wait for the invocation; what replaces parameters acts on every token,
    which is not served. huggingface/peft:src/peft/tuners/lora/variants.py (ALoraLinearVariant).
    """
    given = [
        key for key in ("modules_to_save", "trainable_token_indices") if reader.config.get(key)
    ]
    given += ["bias"] if reader.config.get("bias", "none") != "none" else []
    for key in [*given, "init_lora_weights"] if init else given:
        reader.refuse(
            key,
            f"{key} = {shown(reader.config[key])} acts before the invocation too, and is not "
            "served beside alora_invocation_tokens",
        )


def _read_truncating(reader: ConfigReader) -> bool:
    given = reader.config.get("kasa_config")
    if given is not None and not isinstance(given, dict):
        reader.invalid("kasa_config", given, "null or an object")
    elif given is not None:
        ConfigReader(given, reader.problems, reader.notes).judge(
            read=(), training={"beta", "gamma"}
        )
    return given is not None


def _read_blocks(reader: ConfigReader) -> _Blocks | None:
    given = reader.config.get("use_bdlora")
    if not given:
        return None
    if not isinstance(given, dict):
        reader.invalid("use_bdlora", given, "null or an object with nblocks")
        return None
    inner = ConfigReader(given, reader.problems, reader.notes)
    inner.judge(
        read={"target_modules_bd_a", "target_modules_bd_b", "nblocks"}, training={"match_strict"}
    )
    return _Blocks(
        inner.words("target_modules_bd_a"), inner.words("target_modules_bd_b"),
        inner.whole("nblocks", 1, least=1),
    )  # fmt: skip


# --------------------------------------------------------------------------- the numbers
def _by_expert(b: torch.Tensor, num_experts: int) -> torch.Tensor:
    """B [out, experts * r] with its columns expert after expert; stored is component after
    component, and of each the experts: huggingface/peft:src/peft/tuners/lora/layer.py
    (ParamWrapper.get_delta_weight). A is stored expert after expert.
    """
    return b.view(len(b), -1, num_experts).transpose(1, 2).reshape(b.shape)


def _block_diagonal(stored: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """The matrix of a factor whose diagonal blocks are stored one below the other; see
    huggingface/peft:src/peft/tuners/lora/variants.py (BlockDiagonalLinear).
    """
    import torch

    if num_blocks == 1:
        return stored
    matrix: torch.Tensor = torch.block_diag(*stored.chunk(num_blocks))  # type: ignore[no-untyped-call]
    return matrix


def _weight_decomposed(
    a: torch.Tensor, b: torch.Tensor, magnitude: torch.Tensor, site: SiteSpec, base: SiteBase
) -> Delta:
    """DoRA (arXiv 2402.09353, equation 5): c = m / |W + s B A| by output, y = c (W + s B A) x + b.

    The base's bias is not scaled: what out_scale adds to it is taken off again.
    """
    import torch

    weight = base.weight()
    if site.kind == "embedding":
        weight = weight.t()
    norm = torch.linalg.norm(weight + b @ a, dim=1)
    if not bool((norm > 0).all()):
        raise MisfitError(f"a row of W + B A is zero at {site.path}, so DoRA cannot normalise it")
    scale = magnitude / norm
    bias = base.bias()
    return low_rank(
        a, scale[:, None] * b, out_scale=scale - 1.0,
        bias=None if bias is None else -(scale - 1.0) * bias,
    )  # fmt: skip


def _beside_intact_base(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    settings: LoraSettings,
    site: SiteSpec,
    base: SiteBase,
) -> Delta:
    """PiSSA and OLoRA train on W - s B0 A0; on W itself that is B A - B0 A0, of twice the rank.

    s B0 A0 is W's best approximation of rank r (PiSSA), or the first r columns of Q times the first
    r rows of R of W = Q R (OLoRA); neither depends on the signs that a solver chooses.
    huggingface/peft:src/peft/tuners/lora/layer.py (pissa_init, olora_init).
    """
    import torch

    weight, rank = base.weight(), settings.site_rank(site)
    if settings.init == "pissa":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        b0, a0 = left[:, :rank] * values[:rank], right[:rank]
    else:
        q, r = torch.linalg.qr(weight)
        b0, a0 = settings.scale(site) * q[:, :rank], r[:rank]
    return low_rank(torch.cat([a, a0]), torch.cat([b, -b0], 1), bias=bias)


def _without_tail(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, base: SiteBase
) -> Delta:
    """KaSA adds to W without its r least singular components, so on W itself these go, in another
    r components. huggingface/peft:src/peft/tuners/lora/variants.py (KasaLinearVariant).
    """
    import torch

    rank = a.shape[0]
    left, values, right = torch.linalg.svd(base.weight(), full_matrices=False)
    tail = left[:, -rank:] * values[-rank:]
    return low_rank(torch.cat([a, right[-rank:]]), torch.cat([b, -tail], 1), bias=bias)
