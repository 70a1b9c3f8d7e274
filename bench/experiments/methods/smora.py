"""SMoRA: every rank-one component is an expert, and a router picks k of r at each linear.

arXiv 2501.15103, StyxXuan/smora:packages/peft/src/peft/tuners/srmole/layer.py (rank_partition 1):
    l = sigmoid(W_r x) + beta;  I = the k largest of l;  g_i = l_i / sum of l_j over I
    y = W x + alpha * sum over I of g_i B[:, i] (A[i] x)
beta is not trained by the loss: after each step it goes up for components that were used less than
the mean, and down for the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from bench.experiments.methods import attach, lora
from torch import nn


class SmoraLinear(nn.Module):
    """One linear with its own router over its r components."""

    router: nn.Parameter
    bias: torch.Tensor

    def __init__(
        self, inner: nn.Module, rank: int, num_active: int, alpha: float, draws: torch.Generator
    ) -> None:
        super().__init__()
        width = attach.in_features(inner)
        self.inner = inner
        self.A = attach.new_a(rank, width, draws)
        self.B = nn.Parameter(torch.zeros(int(inner.out_features), rank))
        self.router = attach.new_a(rank, width, draws)
        self.register_buffer("bias", torch.zeros(rank))  # beta
        self.rank, self.num_active, self.alpha = rank, num_active, alpha
        self.picked: torch.Tensor | None = None  # of the last forward: bool [..., rank]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        scores = torch.sigmoid(F.linear(x, self.router)) + self.bias
        # A stable sort: of equal scores the lowest index is picked.
        order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[
            ..., : self.num_active
        ]
        picked = torch.zeros_like(scores).scatter(-1, order, 1.0)
        kept = scores * picked
        gate = kept / kept.sum(-1, keepdim=True)
        self.picked = picked.detach().bool()
        return self.inner(x) + self.alpha * F.linear(gate * F.linear(x, self.A), self.B)

    def balance(self, step_size: float) -> None:
        """Move beta against the load of the last forward."""
        assert self.picked is not None, "a forward comes first"
        load = self.picked.float().flatten(0, -2).mean(0)
        self.bias += step_size * torch.sign(load.mean() - load)


def add_smora(
    model: nn.Module,
    targets: Iterable[str],
    rank: int,
    num_active: int,
    alpha: float,
    draws: torch.Generator,
) -> dict[str, SmoraLinear]:
    """Put it into the model's modules of these names; return path -> module."""
    return attach.replace(
        model, set(targets), lambda inner: SmoraLinear(inner, rank, num_active, alpha, draws)
    )


def write(directory: Path, modules: Mapping[str, SmoraLinear]) -> Path:
    """Write it as the authors' fork of PEFT does."""
    first = next(iter(modules.values()))
    config = lora.config(
        first.rank,
        first.alpha,
        modules,
        peft_type="SRMOLE",
        activate_r=first.num_active,
        rank_partition=1,
    )
    tensors = {}
    for path, module in modules.items():
        stem = f"base_model.model.{path}"
        tensors[f"{stem}.lora_A.weight"] = module.A
        tensors[f"{stem}.lora_B.weight"] = module.B
        tensors[f"{stem}.lora_router.weight"] = module.router
        tensors[f"{stem}.lora_biases"] = module.bias
    return attach.write(directory, config, tensors)
