"""Put modules in the place of a model's linears, and write tensors as an adapter's directory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import nn

M = TypeVar("M", bound=nn.Module)


def replace(
    model: nn.Module, targets: Collection[str], make: Callable[[nn.Module], M]
) -> dict[str, M]:
    """Put make(module) in the place of every module whose path ends in one of `targets`.

    Returns path -> what was made, in the model's own order. What stands there already may be an
    adapter's module, which `make` then wraps.
    """
    paths = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in targets]
    made = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        made[path] = make(getattr(owner, name))
        setattr(owner, name, made[path])
    return made


def in_features(module: nn.Module) -> int:
    """Of a linear, or of an adapter's module around one."""
    return int(module.in_features)


def new_a(rank: int, width: int, draws: torch.Generator) -> nn.Parameter:
    """A [rank, width], uniform within 1 / sqrt(width), which is LoRA's start; B starts as zeros."""
    return nn.Parameter((torch.rand(rank, width, generator=draws) * 2 - 1) / math.sqrt(width))


def num_parameters(module: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def write(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write adapter_config.json and adapter_model.safetensors; return the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    stored = {key: tensor.detach().float().contiguous().clone() for key, tensor in tensors.items()}
    save_file(stored, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory
