"""What other code wrote, made into what a family reads. Offline only, for `polyadapt convert`.

Each conversion is tensors and a config in, tensors and a config out. Knows no file and no command.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from polyadapt.adapters.families.arrow import PEFT_TYPE as ARROW
from polyadapt.adapters.families.b_lora import HALVES, SQUARED
from polyadapt.adapters.families.conversion import (
    PEFT_PREFIX,
    Conversion,
    Converted,
    Given,
    Stored,
    config_of,
    leave_out,
    modules_of,
    plain,
    some,
)
from polyadapt.adapters.families.dylora import SCALE
from polyadapt.adapters.families.extraction import from_merged
from polyadapt.adapters.families.forgetting import from_tasks
from polyadapt.adapters.families.markboard import adapter_config
from polyadapt.adapters.peft_modules import without_prefixes
from polyadapt.errors import StartupError
from polyadapt_store.strict_json import shown

if TYPE_CHECKING:
    import torch

_FACTORS = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}  # -> rank's dim
_BLOCKS = {
    "content": "up_blocks.0.attentions.0",
    "style": "up_blocks.0.attentions.1",
}


def _from_pickle(source: Stored, given: Given) -> Converted:
    """PEFT's own names and config: only the file's form changes."""
    return Converted(source.tensors, config_of(source))


def _from_loralib(source: Stored, given: Given) -> Converted:
    """A loralib state_dict, `<module>.lora_A [r, in]` and `.lora_B [out, r]`, as nested ranks.

    huawei-noah/Efficient-NLP:DyLoRA/loralib/layers.py. The rank is in the file, alpha is not.
    """
    modules = modules_of(source, ("lora_A", "lora_B"))
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
    notes = leave_out(source, modules, ("lora_A", "lora_B"), given, may_replace_norms=False)[1]
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": plain(given.alpha),
        "target_modules": sorted(modules),
        "nested": True,
        "rank_min": given.min_rank,
        "rank_max": rank,
        "scale": SCALE,
    }
    tensors = {
        f"{PEFT_PREFIX}{path}.{name}.weight": tensor
        for path, factors in modules.items()
        for name, tensor in factors.items()
    }
    return Converted(tensors, config, notes)


def _from_gated(source: Stored, given: Given) -> Converted:
    """A whole model of SoRA's trainer: its low-rank parts, and the norms that it trained.

    TsinghuaC3I/SoRA:src/lora.py. Whether a norm was trained shows beside the base only.
    """
    names = ("lora.lora_A", "lora.lora_B", "lora.gate")
    modules = modules_of(source, names)
    if given.alpha is None:
        raise StartupError("the file does not hold alpha, on which the scale depends; give --alpha")
    ranks = {len(tensors["lora.lora_A"]) for tensors in modules.values()}
    rank = given.rank or max(ranks)
    if ranks != {rank}:
        raise StartupError(
            f"the file holds ranks {sorted(ranks)}, expected {rank} everywhere: the rank that "
            "training began with"
        )
    norms, notes = leave_out(source, modules, names, given, may_replace_norms=True)
    config = {
        "peft_type": "SORA",
        "r": rank,
        "lora_alpha": plain(given.alpha),
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

    config = config_of(source)
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
    began = config_of(given.initial)
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
        "lora_alpha": plain(factor * config.get("lora_alpha", 8)),
        "rank_pattern": {name: 2 * rank for name, rank in ranks.items()},
        "alpha_pattern": {name: plain(factor * alpha) for name, alpha in alphas.items()},
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
            configs[group].append(config_of(member))
            for key, tensor in member.tensors.items():
                tensors[f"{group}.{number}.{without_prefixes(key)}"] = tensor
    config = {
        "peft_type": ARROW,
        "base_model_name_or_path": config_of(source).get("base_model_name_or_path"),
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
    config = config_of(source)
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


def _from_vectors(source: Stored, given: Given) -> Converted:
    """A model with DV-LoRA: `<module>.lora_A`, `lora_B`, `lora_U` and `lora_V`.

    BeileiCui/EndoDAC:models/backbones/mylora/layers.py. Weights are never merged there, and alpha
    is set to the rank. The convolutions and depth heads beside it have no place in an adapter.
    """
    names = ("lora_A", "lora_B", "lora_U", "lora_V")
    modules = modules_of(source, names)
    ranks = {len(tensors["lora_A"]) for tensors in modules.values()}
    rank = given.rank or max(ranks)
    if ranks != {rank}:
        raise StartupError(f"the file holds ranks {sorted(ranks)}, expected {rank} everywhere")
    notes = leave_out(source, modules, names, given, may_replace_norms=False)[1]
    if given.alpha is None:
        notes += (f"alpha is taken to be the rank, {rank}, as EndoDAC sets it; --alpha says it",)
    config = {
        "peft_type": "DV_LORA",
        "r": rank,
        "lora_alpha": plain(rank if given.alpha is None else given.alpha),
        "target_modules": sorted(modules),
    }
    tensors = {
        f"{path}.{name}": tensor
        for path, parts in modules.items()
        for name, tensor in parts.items()
    }
    return Converted(tensors, config, notes)


def _from_halves(source: Stored, given: Given) -> Converted:
    """A file of B-LoRA, which holds a content half and a style half, or the halves that are asked
    for.

    yardenfren1996/B-LoRA:blora_utils.py (BLOCKS): the two attentions of the first upward block of
    SDXL's network. Its command line scales both matrices, hence `blora_squared`.
    """
    names = ("lora.down.weight", "lora.up.weight")
    found = modules_of(source, names)
    rest = {k: t for k, t in source.tensors.items() if not k.endswith(names)}
    if rest and not given.deltas_only:
        raise StartupError(
            f"the source holds {len(rest)} tensors of other kinds ({some(rest)}); give "
            "--deltas-only to leave them out"
        )
    modules = {path.removeprefix("unet."): tensors for path, tensors in found.items()}
    asked = given.halves or dict.fromkeys(HALVES)
    unknown = sorted(asked.keys() - set(HALVES))
    if unknown:
        raise StartupError(f"--half is {unknown[0]!r}, expected {' or '.join(HALVES)}")
    blocks = {half: path or _BLOCKS[half] for half, path in asked.items()}
    kept = {
        path: tensors
        for path, tensors in modules.items()
        if any(path.startswith(f"{block}.") for block in blocks.values())
    }
    for half, block in blocks.items():
        if not any(path.startswith(f"{block}.") for path in kept):
            raise StartupError(
                f"no module of the source lies in {block}, the {half} block; give --half "
                f"{half}=PATH if this model's is another"
            )
    left = sorted(modules.keys() - kept.keys())
    if left and not given.halves:
        raise StartupError(
            f"{len(left)} modules lie in neither half ({some(left)}); name the halves that are "
            "meant, --half content --half style, to leave them out"
        )
    notes = [f"{len(left)} modules outside of the half were left out"] if left else []
    notes.append(
        f"scale_mode is {SQUARED}: a request's scale acts squared, as the original's alphas do"
    )
    config = {
        "peft_type": "B_LORA",
        "halves": {half: [block] for half, block in blocks.items()},
        "scale_mode": SQUARED,
        "target_modules": sorted(kept),
    }
    tensors = {
        f"{path}.{name}": tensor for path, parts in kept.items() for name, tensor in parts.items()
    }
    return Converted(tensors, config, tuple(notes))


def _from_mark(source: Stored, given: Given) -> Converted:
    """The directory of a mark, without what it keeps sealed: branches and what the config says."""
    if source.config is None:
        raise StartupError(
            "there is no config.json beside branches.safetensors; give the directory that "
            "`polyadapt mark` wrote"
        )
    if source.config.get("base_model_hash") is None:
        raise StartupError("the mark is not trained; run `polyadapt mark train` first")
    return Converted(source.tensors, adapter_config(source.config))


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
        Conversion(
            "gs_lora", "the models of GS-LoRA's trainer, one per task", from_tasks, is_series=True
        ),
        Conversion(
            "dv_lora",
            "EndoDAC's depth model",
            _from_vectors,
            ignored=frozenset({"height", "width", "use_stereo"}),
        ),
        Conversion("b_lora", "a file of B-LoRA, or one half of it", _from_halves),
        Conversion("explora", "a whole model that LoRA was merged into", from_merged),
        Conversion("markboard", "the directory of a mark", _from_mark, config_name="config.json"),
    )
}
