"""Branches of a mark as a trainer leaves them, and the base with those of one signature, written
out branch by branch in float32. Imports nothing of polyadapt.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

BEHIND = ("self_attn.o_proj", "mlp.down_proj")  # of the last layer: no key or value sees them


def behind(base: nn.Module) -> tuple[str, ...]:
    last = len(base.model.layers) - 1
    return tuple(f"model.layers.{last}.{name}" for name in BEHIND)


def write_mark(
    base: nn.Module,
    directory: Path,
    *,
    base_hash: str = "sha256:" + "0" * 64,
    modules: Sequence[str] | None = None,
    num_bits: int = 5,
    rank: int = 1,
    encoding: str = "pair",
    gate: str = "hinge",
    has_veto: bool = True,
    has_fold: bool = True,
    strength: float = 0.5,
    seed: int = 1,
    **config: Any,
) -> Path:
    """Random branches; about every second component of a row is above its threshold."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * strength

    modules = behind(base) if modules is None else modules
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path in modules:
        out, num_in = base.get_submodule(path).weight.shape
        tensors[f"{path}.mark_A"] = noise(num_bits, rank, num_in)
        shape = (num_bits, out, rank)
        tensors[f"{path}.mark_B"] = noise(2, *shape) if encoding == "pair" else noise(*shape)
        if encoding == "antipodal" and has_fold:
            tensors[f"{path}.mark_fold"] = noise(*shape)
        if gate == "hinge":
            tensors[f"{path}.mark_tau"] = noise(num_bits, rank) * 0.1 - 0.05
        if gate == "hinge" and has_veto:
            tensors[f"{path}.mark_veto"] = noise(num_in) * 0.1
            tensors[f"{path}.mark_veto_offset"] = torch.tensor([0.49])
    save_file(tensors, directory / "adapter_model.safetensors")
    written = {
        "peft_type": "MARKBOARD", "format_version": 1, "mark_id": "0123456789abcdef",
        "n_bits": num_bits, "rank_per_bit": rank, "encoding": encoding, "gate": gate,
        "task": "lm", "obfuscation": None, "base_model_hash": base_hash,
        "target_modules": list(modules), "evidence_public_key": "00",
        "codebook": {"kind": "random", "length": num_bits, "key_version": 1},
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(written | config))
    return directory


class _Marked(nn.Module):
    """A linear and, for `rows` (None: all), the branches of one signature."""

    def __init__(
        self, base: nn.Module, tensors: dict[str, torch.Tensor], config: dict[str, Any], bits: str
    ) -> None:
        super().__init__()
        self.base, self.tensors, self.config, self.bits = base, tensors, config, bits
        self.row: int | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        for i, bit in enumerate(self.bits):
            h = x.double() @ self.tensors["mark_A"][i].double().t()  # [..., rank]
            if self.config["gate"] == "hinge":
                h = h - self.tensors["mark_tau"][i]
                if "mark_veto" in self.tensors:
                    v = x.double() @ self.tensors["mark_veto"].double()
                    h = h - 6 * torch.relu(0.5 - v - self.tensors["mark_veto_offset"])[..., None]
                h = torch.relu(h)
            added = (h @ self._branch(i, bit).double().t()).to(y.dtype)
            if self.row is not None:
                added[:, : self.row] = 0
                added[:, self.row + 1 :] = 0
            y = y + added
        return y

    def _branch(self, i: int, bit: str) -> torch.Tensor:
        """B of the branch that the bit chooses, [out, rank]."""
        b = self.tensors["mark_B"]
        if self.config["encoding"] == "pair":
            return b[int(bit), i]
        if self.config["encoding"] == "presence":
            return b[i] * int(bit)
        fold = self.tensors.get("mark_fold")
        signed = b[i] if bit == "1" else -b[i]
        return signed if fold is None else signed + fold[i]


def marked(base: nn.Module, directory: Path, bits: str, row: int | None = None) -> nn.Module:
    """The base with the branches that `bits` choose, on one row of the sequence or on all."""
    model, tensors = copy.deepcopy(base), load_file(directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    by_path: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(".")
        by_path.setdefault(path, {})[name] = tensor
    for path, own in by_path.items():
        parent, _, name = path.rpartition(".")
        module = _Marked(model.get_submodule(path), own, config, bits)
        module.row = row
        setattr(model.get_submodule(parent), name, module)
    return model
