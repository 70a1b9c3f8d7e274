"""Adapters in the formats of papers' own trainers: their files, and the base with them inside.

Imports nothing of polyadapt. DyLoRA: arXiv 2210.07558; SoRA: arXiv 2311.11696.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tests.oracle import adapters
from torch import nn

RANK, ALPHA = 8, 10
_GATES = [[1.0, 0.0, -0.5, 0.0], [0.0] * 4, [0.3, 0.2, -1.0, 2.0]]  # by layer


def write_dylora(model_dir: Path, directory: Path, *, seed: int = 2) -> Path:
    """Every rank from 1 to RANK is an adapter of its own."""
    adapters.make_lora(model_dir, directory, RANK, seed=seed, alpha=ALPHA, strength=0.6)
    path = directory / "adapter_config.json"
    nested = {"nested": True, "rank_min": 1, "rank_max": RANK, "scale": "alpha/b"}
    path.write_text(json.dumps(json.loads(path.read_text()) | nested))
    return directory


@torch.no_grad()
def with_dylora(base: nn.Module, directory: Path, b: int = RANK) -> nn.Module:
    """W + alpha / b * B[:, :b] A[:b]."""
    model, tensors = copy.deepcopy(base), load_file(directory / "adapter_model.safetensors")
    for key, a in tensors.items():
        path, _, name = key.removeprefix("base_model.model.").partition(".lora_")
        if name == "A.weight":
            factor = tensors[key.replace("lora_A", "lora_B")]
            model.get_submodule(path).weight += ALPHA / b * factor[:, :b] @ a[:b]
    return model


def write_sora(base: nn.Module, directory: Path, *, seed: int = 1) -> Path:
    """Gates of three layers, many of them zero, and two norms of its own."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    directory.mkdir()
    tensors = {}
    for number, gate in enumerate(_GATES):
        path = f"model.layers.{number}.self_attn.o_proj"
        out, num_in = base.get_submodule(path).weight.shape
        tensors[f"{path}.lora.lora_A"] = noise(4, num_in)
        tensors[f"{path}.lora.lora_B"] = noise(out, 4)
        tensors[f"{path}.lora.gate"] = torch.tensor([gate])
    for path in ("model.norm", "model.layers.1.input_layernorm"):
        weight = base.get_submodule(path).weight.detach()
        tensors[f"{path}.weight"] = weight + noise(*weight.shape)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "SORA", "r": 4, "lora_alpha": ALPHA, "target_modules": ["o_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@torch.no_grad()
def with_sora(base: nn.Module, directory: Path) -> nn.Module:
    """W + alpha / r_max * B diag(g) A, and the stored norms."""
    model, tensors = copy.deepcopy(base), load_file(directory / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(".")
        if name == "lora_A":
            gated = tensors[f"{path}.lora_B"] @ torch.diag(tensors[f"{path}.gate"][0]) @ tensor
            model.get_submodule(path.removesuffix(".lora")).weight += ALPHA / 4 * gated
        elif name == "weight":
            model.get_submodule(path).weight.copy_(tensor)
    return model
