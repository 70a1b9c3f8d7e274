"""LoRA and, as LoRA whose first b components are trained to stand alone, DyLoRA.

LoRA, arXiv 2106.09685: y = W x + alpha / r B A x. DyLoRA, arXiv 2210.07558: a rank b is drawn for
each step, and y = W x + alpha / b B[:, :b] A[:b] x; "frozen" trains only the b-th components then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench.experiments.methods import attach
from torch import nn


class LowRank(nn.Module):
    """A linear, or another adapter's module, plus scale * B[:, :b] A[:b] x."""

    def __init__(self, inner: nn.Module, rank: int, alpha: float, draws: torch.Generator) -> None:
        super().__init__()
        self.inner = inner
        self.in_features = attach.in_features(inner)
        self.out_features = int(inner.out_features)
        self.A = attach.new_a(rank, self.in_features, draws)
        self.B = nn.Parameter(torch.zeros(self.out_features, rank))
        self.rank = rank
        self.alpha = alpha
        self.num_used = rank  # b
        self.scale = alpha / rank
        self.is_only_last_trained = False
        self.is_on = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        y = self.inner(x)
        if not self.is_on:
            return y
        A, B = self.A[: self.num_used], self.B[:, : self.num_used]
        if self.is_only_last_trained:
            A = torch.cat([A[:-1].detach(), A[-1:]])
            B = torch.cat([B[:, :-1].detach(), B[:, -1:]], 1)
        return y + self.scale * F.linear(F.linear(x, A), B)


def add_lora(
    model: nn.Module, targets: Iterable[str], rank: int, alpha: float, draws: torch.Generator
) -> dict[str, LowRank]:
    """Put LoRA into the model's modules of these names; return path -> module."""
    return attach.replace(model, set(targets), lambda inner: LowRank(inner, rank, alpha, draws))


def use_rank(modules: Mapping[str, LowRank], rank: int, scale: float) -> None:
    """Let the first `rank` components act with this scale."""
    for module in modules.values():
        module.num_used, module.scale = rank, scale


def config(rank: int, alpha: float, paths: Iterable[str], **more: Any) -> dict[str, Any]:
    """PEFT's adapter_config.json of a LoRA on these modules, with other keys over it."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({path.rpartition(".")[2] for path in paths}),
        **more,
    }


def tensors(modules: Mapping[str, LowRank]) -> dict[str, torch.Tensor]:
    """By PEFT's keys."""
    found = {}
    for path, module in modules.items():
        found[f"base_model.model.{path}.lora_A.weight"] = module.A
        found[f"base_model.model.{path}.lora_B.weight"] = module.B
    return found


def write(directory: Path, modules: Mapping[str, LowRank], **more: Any) -> Path:
    """Write it as PEFT writes a LoRA; `more` overrides its config's keys."""
    first = next(iter(modules.values()))
    own = config(first.rank, first.alpha, modules, **more)
    return attach.write(directory, own, tensors(modules))


def write_nested(directory: Path, modules: Mapping[str, LowRank]) -> Path:
    """Write it as an adapter whose requests choose a rank."""
    rank = next(iter(modules.values())).rank
    nested = {"nested": True, "rank_min": 1, "rank_max": rank, "scale": "alpha/b"}
    return write(directory, modules, **nested)
