"""What other code wrote, made into what a family reads. Offline only, for `polyadapt convert`.

Each conversion is tensors and a config in, tensors and a config out. Knows no file and no command.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from polyadapt.adapters.families.arrow import PEFT_TYPE as ARROW
from polyadapt.adapters.families.dylora import SCALE
from polyadapt.adapters.peft_modules import without_prefixes
from polyadapt.errors import StartupError
from polyadapt_store.strict_json import shown

if TYPE_CHECKING:
    import torch

_PEFT_PREFIX = "base_model.model."
_LISTED = 5  # names in a message
_FACTORS = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}  # -> rank's dim


@dataclass(frozen=True, slots=True)
class Stored:
    """An adapter as somebody wrote it: its tensors by name, and its config if there is one."""

    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Given:
    """What the command was told beside the source. None: nothing."""

    rank: int | None = None
    min_rank: int = 1
    alpha: float | None = None
    initial: Stored | None = None
    base: Mapping[str, torch.Tensor] | None = None  # the base's own tensors by name
    deltas_only: bool = False
    experts: tuple[Stored, ...] = ()  # beside the source
    general: tuple[Stored, ...] = ()
    top_k: int | None = None
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class Converted:
    """The new directory's content, and what people should know of it."""

    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, Any]
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Conversion:
    """One way in: its word for --from, what it reads, and the function."""

    name: str
    summary: str
    convert: Callable[[Stored, Given], Converted]  # raises StartupError


def _from_pickle(source: Stored, given: Given) -> Converted:
    """PEFT's own names and config: only the file's form changes."""
    return Converted(source.tensors, _config_of(source))


def _from_loralib(source: Stored, given: Given) -> Converted:
    """A loralib state_dict, `<module>.lora_A [r, in]` and `.lora_B [out, r]`, as nested ranks.

    huawei-noah/Efficient-NLP:DyLoRA/loralib/layers.py. The rank is in the file, alpha is not.
    """
    modules = _modules_of(source, ("lora_A", "lora_B"))
    if given.alpha is None:
        raise StartupError("the file does not hold alpha, on which the scale depends; give --alpha")
    ranks = {path: len(tensors["lora_A"]) for path, tensors in modules.items()}
    for path, tensors in modules.items():
        if tensors["lora_B"].shape[1:] != tensors["lora_A"].shape[:1]:
            raise StartupError(
                f"{path} has lora_A {list(tensors['lora_A'].shape)} and lora_B "
                f"{list(tensors['lora_B'].shape)}, expected [r, in] and [out, r]: merged "
                "projections of loralib are not read"
            )
    rank = given.rank or max(ranks.values())
    odd = sorted(path for path, found in ranks.items() if found != rank)
    if odd:
        raise StartupError(
            f"{odd[0]} has rank {ranks[odd[0]]}, expected {rank} everywhere"
            f"{'' if given.rank is None else ' by --rank'}"
        )
    notes = _leave_out(source, modules, ("lora_A", "lora_B"), given, may_replace_norms=False)[1]
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _plain(given.alpha),
        "target_modules": sorted(modules),
        "nested": True,
        "rank_min": given.min_rank,
        "rank_max": rank,
        "scale": SCALE,
    }
    tensors = {
        f"{_PEFT_PREFIX}{path}.{name}.weight": tensor
        for path, factors in modules.items()
        for name, tensor in factors.items()
    }
    return Converted(tensors, config, notes)


def _from_gated(source: Stored, given: Given) -> Converted:
    """A whole model of SoRA's trainer: its low-rank parts, and the norms that it trained.

    TsinghuaC3I/SoRA:src/lora.py. Whether a norm was trained shows beside the base only.
    """
    names = ("lora.lora_A", "lora.lora_B", "lora.gate")
    modules = _modules_of(source, names)
    if given.alpha is None:
        raise StartupError("the file does not hold alpha, on which the scale depends; give --alpha")
    ranks = {len(tensors["lora.lora_A"]) for tensors in modules.values()}
    rank = given.rank or max(ranks)
    if ranks != {rank}:
        raise StartupError(
            f"the file holds ranks {sorted(ranks)}, expected {rank} everywhere: the rank that "
            "training began with"
        )
    norms, notes = _leave_out(source, modules, names, given, may_replace_norms=True)
    config = {
        "peft_type": "SORA",
        "r": rank,
        "lora_alpha": _plain(given.alpha),
        "target_modules": sorted(modules),
    }
    tensors = {
        f"{path}.{name}": tensor
        for path, parts in modules.items()
        for name, tensor in parts.items()
    }
    return Converted(tensors | norms, config, notes)


def _from_changed_base(source: Stored, given: Given) -> Converted:
    """An adapter whose training began by taking s B0 A0 out of the base, as one of twice the rank.

    On the intact base it is s (B A - B0 A0) = s [B, -B0] [A; A0], with the initial adapter's B0 and
    A0. Twice the rank with the same scale needs twice alpha, or sqrt(2) of it where the scale is
    alpha / sqrt(r). huggingface/peft:src/peft/tuners/lora/model.py (subtract_mutated_init).
    """
    import torch

    config = _config_of(source)
    init = config.get("init_lora_weights", True)
    if not isinstance(init, str) or init.lower() in ("gaussian", "orthogonal", "eva", "mica"):
        raise StartupError(
            f"init_lora_weights is {shown(init)}, which left the base as it was: the adapter can "
            "be uploaded as it is"
        )
    if init.lower() == "loftq":
        raise StartupError("loftq trains on a quantised base, whose error no initial adapter holds")
    if config.get("use_dora"):
        raise StartupError(
            "use_dora scales rows of the changed base: that is no sum of two adapters"
        )
    if given.initial is None:
        raise StartupError(
            f"init_lora_weights is {shown(init)}: give --initial the directory that "
            "save_pretrained wrote before training began"
        )
    began = _config_of(given.initial)
    for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        if (config.get(key) or None) != (began.get(key) or None):
            raise StartupError(
                f"{key} is {shown(config.get(key))} and {shown(began.get(key))} in --initial: that "
                "is not where this adapter began"
            )
    if not any(part in _FACTORS for key in source.tensors for part in key.split(".")):
        raise StartupError("the source holds no lora_A and lora_B")
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in source.tensors.items():
        parts = [part for part in key.split(".") if part in _FACTORS]
        if not parts:
            tensors[key] = tensor
            continue
        start = given.initial.tensors.get(key)
        if start is None or start.shape != tensor.shape:
            raise StartupError(f"--initial holds no {shown(key)} of shape {list(tensor.shape)}")
        is_b = _FACTORS[parts[0]] == 1
        if tensor.dim() == 1:  # a bias of B: what it was is in no weight of the base
            tensors[key] = tensor - start.to(tensor.dtype)
            continue
        start = start.to(tensor.dtype)
        tensors[key] = torch.cat([tensor, -start if is_b else start], _FACTORS[parts[0]])
    factor = math.sqrt(2) if config.get("use_rslora") else 2
    alphas: Mapping[str, float] = config.get("alpha_pattern") or {}
    ranks: Mapping[str, int] = config.get("rank_pattern") or {}
    changed = {
        "r": 2 * config.get("r", 8),
        "lora_alpha": _plain(factor * config.get("lora_alpha", 8)),
        "rank_pattern": {name: 2 * rank for name, rank in ranks.items()},
        "alpha_pattern": {name: _plain(factor * alpha) for name, alpha in alphas.items()},
        "init_lora_weights": True,
        **{f"{name}_config": None for name in ("eva", "corda", "lora_ga", "loftq")},
    }
    return Converted(tensors, {**config, **changed})


def _from_several(source: Stored, given: Given) -> Converted:
    """Plain LoRAs of PEFT's as one adapter that routes between them, see families/arrow.py."""
    experts = (source, *given.experts)
    top_k = min(3, len(experts)) if given.top_k is None else given.top_k  # 3 is PEFT's default
    tensors: dict[str, torch.Tensor] = {}
    configs: dict[str, list[Mapping[str, Any]]] = {"experts": [], "general": []}
    for group, members in (("experts", experts), ("general", given.general)):
        for number, member in enumerate(members):
            configs[group].append(_config_of(member))
            for key, tensor in member.tensors.items():
                tensors[f"{group}.{number}.{without_prefixes(key)}"] = tensor
    config = {
        "peft_type": ARROW,
        "base_model_name_or_path": _config_of(source).get("base_model_name_or_path"),
        "arrow_config": {
            "top_k": top_k,
            "router_temperature": given.temperature,
            "use_gks": bool(given.general),
        },
        **configs,
    }
    notes = (f"a row takes {top_k} of {len(experts)} experts",)
    return Converted(tensors, config, notes if given.top_k is None else ())


def _from_layered(source: Stored, given: Given) -> Converted:
    """MoLA as its authors save it: `<module>.lora_A_<expert>` and `<module>.router.router`, under a
    config of PEFT's whose r is a list by layer. GCYZSL/MoLA:src/mola_{lora,peft_model}_hacked.py.
    """
    config = _config_of(source)
    if given.top_k is None:
        raise StartupError(
            "the files do not hold top_k, the number of experts that a row takes; give --top-k"
        )
    tensors: dict[str, torch.Tensor] = {}
    num_experts: dict[int, int] = {}  # by layer
    for key, tensor in source.tensors.items():
        path, _, ending = without_prefixes(key).partition(".layers.")[2].partition(".lora_")
        factor, _, expert = ending.removesuffix(".weight").partition("_")
        router = path.removesuffix(".router.router.weight")
        layer = path.partition(".")[0]
        if layer.isdecimal() and factor in ("A", "B") and expert.isdecimal():
            name = f"mola.layers.{path}.experts.{int(expert)}.lora_{factor}.weight"
            num_experts[int(layer)] = max(num_experts.get(int(layer), 0), int(expert) + 1)
        elif layer.isdecimal() and router != path:
            name = f"mola.layers.{router}.moe_gate.weight"
        else:
            raise StartupError(
                f"{shown(key)} is none of <module>.lora_A_<expert>.weight, "
                "<module>.lora_B_<expert>.weight and <module>.router.router.weight below a number "
                "of a layer"
            )
        tensors[name] = tensor
    if sorted(num_experts) != list(range(len(num_experts))):
        raise StartupError(f"the layers {sorted(num_experts)} have experts, expected all of them")
    kept = ("base_model_name_or_path", "bias", "lora_alpha", "r", "target_modules", "task_type")
    changed = {
        "peft_type": "MOLA",
        "num_experts": [count for _, count in sorted(num_experts.items())],
        "top_k": given.top_k,
    }
    return Converted(tensors, {key: config[key] for key in kept if key in config} | changed)


CONVERSIONS: Mapping[str, Conversion] = {
    conversion.name: conversion
    for conversion in (
        Conversion(
            "pickle", "adapter_model.bin of PEFT or MoE-PEFT, with its config", _from_pickle
        ),
        Conversion("dylora", "a loralib state_dict, whose ranks are nested", _from_loralib),
        Conversion("sora", "a whole model of SoRA's trainer", _from_gated),
        Conversion("pissa", "PiSSA, OLoRA, CorDA, LoRA-GA with --initial", _from_changed_base),
        Conversion("arrow", "a LoRA of PEFT's and others with --expert", _from_several),
        Conversion("mola", "MoLA as its authors save it, with --top-k", _from_layered),
    )
}


# --------------------------------------------------------------------------- what they share
def _config_of(source: Stored) -> Mapping[str, Any]:
    if source.config is None:
        raise StartupError(
            "there is no adapter_config.json beside the weights, which says what they are"
        )
    return source.config


def _modules_of(source: Stored, names: tuple[str, ...]) -> dict[str, dict[str, torch.Tensor]]:
    """Module path -> name -> tensor, all of `names` for each."""
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in source.tensors.items():
        for name in names:
            if key.endswith(f".{name}"):
                modules.setdefault(key.removesuffix(f".{name}"), {})[name] = tensor
    if not modules:
        raise StartupError(
            f"the source holds no tensors named {' and '.join(f'<module>.{n}' for n in names)}"
        )
    for path, tensors in sorted(modules.items()):
        missing = [name for name in names if name not in tensors]
        if missing:
            raise StartupError(f"{path} has no {' and no '.join(missing)}")
    return modules


def _leave_out(
    source: Stored,
    modules: Mapping[str, Any],
    names: tuple[str, ...],
    given: Given,
    *,
    may_replace_norms: bool,
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Judge every other tensor: equal to the base's it is left out, a trained norm is kept if that
    is allowed, and anything else that was trained is an error. Returns the norms and the notes.
    """
    own = {f"{path}.{name}" for path in modules for name in names}
    others = {key: tensor for key, tensor in source.tensors.items() if key not in own}
    if not others:
        return {}, ()
    if given.deltas_only:
        return {}, (f"{len(others)} other tensors were left out unseen, trained or not",)
    if given.base is None:
        raise StartupError(
            f"the source holds {len(others)} tensors beside the adapter's ({_some(others)}); give "
            "--base to tell those that were trained from the base's own, or --deltas-only to leave "
            "all of them out"
        )
    trained = {key for key, tensor in others.items() if not _is_in_base(key, tensor, given.base)}
    norms = {
        path
        for path, _, name in (key.rpartition(".") for key in trained)
        if may_replace_norms and name in ("weight", "bias") and _is_norm(path, others)
    }
    rest = sorted(key for key in trained if key.rpartition(".")[0] not in norms)
    if rest:
        raise StartupError(
            f"{len(rest)} tensors differ from the base's and have no place in the adapter: "
            f"{_some(rest)}; it was trained on another base, or trains more than is served"
        )
    kept = {key: tensor for key, tensor in others.items() if key.rpartition(".")[0] in norms}
    left = len(others) - len(kept)
    return kept, (f"{left} tensors are the base's own and were left out",) if left else ()


def _is_norm(path: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    """A module with one vector of weights, and maybe one of biases."""
    weight = tensors.get(f"{path}.weight")
    return weight is not None and weight.dim() == 1


def _is_in_base(key: str, tensor: torch.Tensor, base: Mapping[str, torch.Tensor]) -> bool:
    """Whether it is the base's own; one that shares another's weight may be stored under both."""
    import torch

    candidates = [base[key]] if key in base else [b for b in base.values() if b.dim() == 2]
    return any(
        tensor.shape == own.shape and torch.equal(tensor.float(), own.float()) for own in candidates
    )


def _some(names: Mapping[str, Any] | list[str]) -> str:
    first = sorted(names)
    more = f" and {len(first) - _LISTED} more" if len(first) > _LISTED else ""
    return ", ".join(shown(name) for name in first[:_LISTED]) + more


def _plain(number: float) -> int | float:
    return int(number) if float(number).is_integer() else float(number)
