"""Adapters whose experts are chosen by the row: their files, and naive models that read them.

The models compute token by token and expert by expert, on Python's own floats where a choice is
made, from the formulas of the papers and of the code that writes such files. `slip` makes one of
the usual mistakes, so that a test shows that it would be seen. Imports nothing of polyadapt.

SMoRA: arXiv 2501.15103, StyxXuan/smora. LoRAMoE: arXiv 2312.09979, MoLA: arXiv 2402.08562, both
TUDB-Labs/MoE-PEFT. Arrow: arXiv 2405.11157, GenKnowSub: aclanthology.org/2025.acl-short.54, PEFT.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests.oracle import peft_oracle
from torch import nn
from transformers.pytorch_utils import Conv1D

ATTENTION = ("q_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

Part = Callable[[torch.Tensor], torch.Tensor]  # x [in] -> what is added to y [out]


# --------------------------------------------------------------------------- the files
def write_smora(
    base: nn.Module,
    directory: Path,
    *,
    seed: int = 1,
    rank: int = 6,
    kept: int = 2,
    partition: int = 1,
    bias: float = 0.2,
    names: Sequence[str] = (*ATTENTION, "down_proj"),
) -> Path:
    noise, tensors = _noise(seed), {}
    for path, (num_in, num_out) in _sizes(base, names).items():
        key = f"base_model.model.{path}"
        tensors[f"{key}.lora_A.weight"] = noise(rank, num_in) * 0.3
        tensors[f"{key}.lora_B.weight"] = noise(num_out, rank) * 0.1
        # Small, so that no two scores are one in float32.
        tensors[f"{key}.lora_router.weight"] = noise(rank // partition, num_in) * 0.15
        tensors[f"{key}.lora_biases"] = noise(rank) * bias
    config = {
        "peft_type": "SRMOLE", "r": rank, "lora_alpha": 16, "activate_r": kept, "bias": "none",
        "rank_partition": partition, "epsilon_greedy": False, "dense_compute": False,
        "target_modules": list(names), "task_type": "CAUSAL_LM", "lora_dropout": 0.05,
    }  # fmt: skip
    return _save(directory, tensors, config)


def write_loramoe(
    base: nn.Module,
    directory: Path,
    *,
    seed: int = 1,
    rank: int = 3,
    num_experts: int = 4,
    routed: Sequence[str] = MLP,
    plain: Sequence[str] = ATTENTION,
    **options: Any,
) -> Path:
    noise, tensors = _noise(seed), {}
    for path, (num_in, num_out) in _sizes(base, plain).items():
        key = f"loramoe.{_below_stack(path)}"
        tensors[f"{key}.lora_A.weight"] = noise(rank, num_in) * 0.2
        tensors[f"{key}.lora_B.weight"] = noise(num_out, rank) * 0.2
    for path, sizes in _sizes(base, routed).items():
        tensors |= _experts(f"loramoe.{_below_stack(path)}", *sizes, rank, num_experts, noise)
    config = {
        "peft_type": "LORAMOE", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.05,
        "target_modules": [*plain, *routed], "bias": "none", "num_experts": num_experts,
        "routing_strategy": "loramoe", "task_type": "CAUSAL_LM",
    }  # fmt: skip
    return _save(directory, tensors, config | options)


def write_mola(
    base: nn.Module,
    directory: Path,
    *,
    seed: int = 1,
    rank: int | list[int] = 3,
    num_experts: int | list[int] = 4,
    top_k: int | list[int] = 2,
    names: Sequence[str] = ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj"),
    **options: Any,
) -> Path:
    noise, tensors = _noise(seed), {}
    for path, sizes in _sizes(base, names).items():
        layer = _layer(path)
        key = f"mola.{_below_stack(path)}"
        tensors |= _experts(key, *sizes, _at(rank, layer), _at(num_experts, layer), noise)
    config = {
        "peft_type": "MOLA", "r": rank, "lora_alpha": 6, "lora_dropout": 0.05, "bias": "none",
        "target_modules": list(names), "num_experts": num_experts, "top_k": top_k,
        "routing_strategy": "mola", "task_type": "CAUSAL_LM",
    }  # fmt: skip
    return _save(directory, tensors, config | options)


def write_arrow(
    base: nn.Module,
    directory: Path,
    *,
    seed: int = 1,
    rank: int = 3,
    num_experts: int = 4,
    num_general: int = 0,
    top_k: int = 2,
    temperature: float = 1.0,
    names: Sequence[str] = (*ATTENTION, "up_proj"),
) -> Path:
    noise, tensors = _noise(seed), {}
    members: dict[str, list[dict[str, Any]]] = {}
    for group, count in (("experts", num_experts), ("general", num_general)):
        members[group] = [
            {
                "peft_type": "LORA", "r": rank, "lora_alpha": 4 + 3 * number, "bias": "none",
                "use_rslora": number % 2 == 1, "target_modules": list(names),
            }
            for number in range(count)
        ]  # fmt: skip
        for number in range(count):
            for path, (num_in, num_out) in _sizes(base, names).items():
                key = f"{group}.{number}.base_model.model.{path}"
                tensors[f"{key}.lora_A.weight"] = noise(rank, num_in) * 0.2
                tensors[f"{key}.lora_B.weight"] = noise(num_out, rank) * 0.2
    settings = {
        "top_k": top_k, "router_temperature": temperature, "use_gks": num_general > 0,
        "rng_seed": None,
    }  # fmt: skip
    config = {"peft_type": "POLYADAPT_ARROW", "arrow_config": settings, **members}
    return _save(directory, tensors, config)


def _experts(
    key: str, num_in: int, num_out: int, rank: int, num: int, noise: Callable[..., torch.Tensor]
) -> dict[str, torch.Tensor]:
    tensors = {f"{key}.moe_gate.weight": noise(num, num_in) * 0.3}
    for e in range(num):
        tensors[f"{key}.experts.{e}.lora_A.weight"] = noise(rank, num_in) * 0.2
        tensors[f"{key}.experts.{e}.lora_B.weight"] = noise(num_out, rank) * 0.2
    return tensors


# --------------------------------------------------------------------------- the models
def routed(base: nn.Module, directory: Path, *, slip: str = "", scale: float = 1.0) -> nn.Module:
    """Return a copy of the model, which may have other adapters, with the one in the directory."""
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    make = {
        "SRMOLE": _smora_parts, "LORAMOE": _moe_parts, "MOLA": _moe_parts,
        "POLYADAPT_ARROW": _arrow_parts,
    }[config["peft_type"]]  # fmt: skip
    model = copy.deepcopy(base)
    linears = [path for path, module in model.named_modules() if _is_linear(module)]
    paths = [path.removesuffix(".base") for path in linears]
    for path, part in make(config, tensors, paths, slip).items():
        parent, _, name = path.rpartition(".")
        module = model.get_submodule(path)
        setattr(model.get_submodule(parent), name, _Added(module, part, scale))
    return model


def logits(
    model_dir: Path, directory: Path, ids: Sequence[int], *, slip: str = "", scale: float = 1.0
) -> torch.Tensor:
    """Return the logits [len(ids), vocabulary] fp32 of one sequence."""
    model = routed(peft_oracle.load_base(model_dir), directory, slip=slip, scale=scale)
    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


class _Added(nn.Module):
    def __init__(self, base: nn.Module, part: Part, scale: float) -> None:
        super().__init__()
        self.base, self.part, self.scale = base, part, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        added = [self.part(token) for token in x.reshape(-1, x.shape[-1])]
        return y + self.scale * torch.stack(added).reshape(y.shape)


def _smora_parts(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], paths: list[str], slip: str
) -> dict[str, Part]:
    alpha, kept, partition = (config[k] for k in ("lora_alpha", "activate_r", "rank_partition"))

    def part_of(key: str) -> Part:
        a, b = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
        router, biases = tensors[f"{key}.lora_router.weight"], tensors[f"{key}.lora_biases"]

        def part(x: torch.Tensor) -> torch.Tensor:
            scores = [1 / (1 + math.exp(-float(row @ x))) for row in router]
            values = {i: scores[i // partition] + float(biases[i]) for i in range(len(a))}
            if slip == "softmax":
                shares = _softmax([float(row @ x) for row in router])
                values = {i: shares[i // partition] + float(biases[i]) for i in range(len(a))}
            best = sorted(values, key=lambda i: (-values[i], i))[:kept]
            if slip == "last of equal ones":
                best = sorted(values, key=lambda i: (-values[i], -i))[:kept]
            if slip == "bias in the choice alone":
                values = {i: scores[i // partition] for i in values}
            if slip == "all components":
                best = list(values)
            total = 1.0 if slip == "not divided" else sum(values[i] for i in best)
            scale = alpha / len(a) if slip == "alpha / r" else alpha
            return sum(
                (scale * values[i] / total * (a[i] @ x) * b[:, i] for i in best), b[:, 0] * 0
            )

        return part

    keys = {path: f"base_model.model.{path}" for path in paths}
    return {p: part_of(k) for p, k in keys.items() if f"{k}.lora_A.weight" in tensors}


def _moe_parts(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], paths: list[str], slip: str
) -> dict[str, Part]:
    prefix = config["peft_type"].lower()

    def part_of(path: str, key: str) -> Part | None:
        rank = _at(config["r"], _layer(path))
        scale = config["lora_alpha"] / rank
        if config.get("use_rslora"):
            scale = config["lora_alpha"] / math.sqrt(rank)
        gate = tensors.get(f"{key}.moe_gate.weight")
        if gate is None:
            if f"{key}.lora_A.weight" not in tensors:
                return None
            a, b = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
            return lambda x: scale * (b @ (a @ x))
        experts = [
            [tensors[f"{key}.experts.{e}.lora_{factor}.weight"] for factor in "AB"]
            for e in range(len(gate))
        ]
        if slip == "experts reversed":
            experts.reverse()
        top_k = _at(config["top_k"], _layer(path)) if prefix == "mola" else len(gate)

        def part(x: torch.Tensor) -> torch.Tensor:
            shares = _softmax([float(row @ x) for row in gate])
            best = sorted(range(len(gate)), key=lambda e: (-shares[e], e))[:top_k]
            if slip == "one expert":
                best = best[:1]
            total = sum(shares[e] for e in best) if prefix == "mola" else 1.0
            if slip == "not divided":
                total = 1.0
            if slip == "equal shares":
                shares, total = [1.0] * len(gate), float(len(best))
            outputs = [
                shares[e] / total * scale * (experts[e][1] @ (experts[e][0] @ x)) for e in best
            ]
            return torch.stack(outputs).sum(0)

        return part

    made = {path: part_of(path, f"{prefix}.{_below_stack(path)}") for path in paths}
    return {path: part for path, part in made.items() if part is not None}


def _arrow_parts(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], paths: list[str], slip: str
) -> dict[str, Part]:
    settings = config["arrow_config"]
    top_k, temperature = settings["top_k"], settings["router_temperature"]

    def factors(group: str, path: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        names = [f"{group}.{n}.base_model.model.{path}" for n in range(len(config[group]))]
        return [
            (tensors[f"{name}.lora_A.weight"].double(), tensors[f"{name}.lora_B.weight"].double())
            for name in names
        ]

    def part_of(path: str) -> Part:
        experts, general = factors("experts", path), factors("general", path)
        if general and slip != "nothing taken off":
            mean_a = sum(a for a, _ in general) / len(general)
            mean_b = sum(b for _, b in general) / len(general)
            experts = [(a - mean_a, b - mean_b) for a, b in experts]
        directions, outputs = [], []
        for own, (a, b) in zip(config["experts"], experts, strict=True):
            rank = own["r"]
            scale = own["lora_alpha"] / (math.sqrt(rank) if own["use_rslora"] else rank)
            delta = b @ a
            directions.append(torch.linalg.svd(delta).Vh[0])
            outputs.append(scale * delta)
        if slip == "direction of A":
            directions = [torch.linalg.svd(a).Vh[0] for a, _ in experts]

        def part(x: torch.Tensor) -> torch.Tensor:
            x = x.double()
            scores = [abs(float(p @ x)) for p in directions]
            if slip == "signed":
                scores = [float(p @ x) for p in directions]
            if slip == "direction of the input":
                scores = [score / float(x.norm()) for score in scores]
            best = sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:top_k]
            t = 1.0 if slip == "temperature" else temperature
            weights = _softmax([scores[e] / t for e in best])
            if slip == "softmax over all":
                shares = _softmax([score / t for score in scores])
                weights = [shares[e] for e in best]
            terms = [w * (outputs[e] @ x) for e, w in zip(best, weights, strict=True)]
            return torch.stack(terms).sum(0).float()

        return part

    adapted = [p for p in paths if f"experts.0.base_model.model.{p}.lora_A.weight" in tensors]
    return {path: part_of(path) for path in adapted}


# --------------------------------------------------------------------------- what they share
def _softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _sizes(base: nn.Module, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Path -> inputs and outputs of the linears that are called one of `names`."""
    found = {}
    for path, module in base.named_modules():
        if _is_linear(module) and path.rpartition(".")[2] in names:
            shape = tuple(module.weight.shape)
            found[path] = shape if isinstance(module, Conv1D) else shape[::-1]
    return found


def _below_stack(path: str) -> str:
    """`model.layers.3.mlp.up_proj` or `transformer.h.3...` as `layers.3...`."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return path if number is None else ".".join(["layers", *parts[number:]])


def _layer(path: str) -> int:
    return int(next((part for part in path.split(".") if part.isdecimal()), 0))


def _at(value: int | list[int], layer: int) -> int:
    return value[layer] if isinstance(value, list) else value


def _noise(seed: int) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def _save(directory: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory
