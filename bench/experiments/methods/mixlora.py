"""MixLoRA: experts of low rank in every MLP, picked per token by one router a layer.

arXiv 2404.15159, TUDB-Labs/MoE-PEFT:moe_peft/adapters/mixlora/model.py, strategy `mixlora`:
    p = softmax(G x);  T = the k largest;  w = p / sum of p over T
    a_e = act(W1 x + s B1_e A1_e x) * (W3 x + s B3_e A3_e x);  f_e = W2 a_e + s B2_e A2_e a_e
    MLP(x) = sum over T of w_e f_e
with the attention's linears as plain LoRA. Every expert is computed for every token here, as it is
written; there is no dropout. The auxiliary loss is E * sum of (share of tokens) * (mean p).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from bench.experiments.methods import attach, lora
from torch import nn

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Experts(nn.Module):
    """B_e A_e of one projection for all experts: A [experts, r, in], B [experts, out, r]."""

    def __init__(self, linear: nn.Linear, num: int, rank: int, draws: torch.Generator) -> None:
        super().__init__()
        a = [attach.new_a(rank, linear.in_features, draws) for _ in range(num)]
        self.A = nn.Parameter(torch.stack([part.detach() for part in a]))
        self.B = nn.Parameter(torch.zeros(num, linear.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in], or [..., experts, in] with an input for each -> [..., experts, out]."""
        inputs = "...ei" if x.dim() > 3 else "...i"
        return torch.einsum(
            "...er,eor->...eo", torch.einsum(f"{inputs},eri->...er", x, self.A), self.B
        )


class MixMlp(nn.Module):
    """A Llama's MLP whose projections are adapted by the experts that the router picks."""

    def __init__(
        self, mlp: nn.Module, num_experts: int, top_k: int, rank: int, scale: float,
        draws: torch.Generator,
    ) -> None:  # fmt: skip
        super().__init__()
        self.mlp = mlp
        linears = [mlp.get_submodule(name) for name in _PROJECTIONS]
        self.gate, self.up, self.down = (
            Experts(linear, num_experts, rank, draws)
            for linear in linears
            if isinstance(linear, nn.Linear)
        )
        width = attach.in_features(linears[0])
        self.router = nn.Parameter(torch.randn(num_experts, width, generator=draws) * 0.02)
        self.num_experts, self.top_k, self.rank, self.scale = num_experts, top_k, rank, scale
        self.balance_loss = torch.zeros(())  # of the last forward
        self.picked: torch.Tensor | None = None  # of the last forward: bool [..., experts]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, length, width] -> the same shape."""
        mlp = self.mlp
        chances = torch.softmax(F.linear(x, self.router).float(), -1)
        top = chances.topk(self.top_k, -1)
        weights = torch.zeros_like(chances).scatter(
            -1, top.indices, top.values / top.values.sum(-1, keepdim=True)
        )
        self.picked = weights > 0
        load = self.picked.float().flatten(0, -2).mean(0) / self.top_k
        self.balance_loss = self.num_experts * (load * chances.flatten(0, -2).mean(0)).sum()
        gate = mlp.gate_proj(x)[..., None, :] + self.scale * self.gate(x)
        up = mlp.up_proj(x)[..., None, :] + self.scale * self.up(x)
        inner = F.silu(gate) * up  # [rows, length, experts, inner]
        out = mlp.down_proj(inner) + self.scale * self.down(inner)
        return (weights[..., None] * out).sum(-2)


def add_mixlora(
    model: nn.Module,
    *,
    num_experts: int,
    top_k: int,
    expert_rank: int,
    attention_rank: int,
    scale: float,
    draws: torch.Generator,
) -> tuple[dict[str, MixMlp], dict[str, lora.LowRank]]:
    """Put it into a Llama; returns the MLPs and the attention's LoRA, each by path."""
    attention = lora.add_lora(
        model,
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        attention_rank,
        scale * attention_rank,
        draws,
    )
    mlps = attach.replace(
        model, {"mlp"}, lambda mlp: MixMlp(mlp, num_experts, top_k, expert_rank, scale, draws)
    )
    return mlps, attention


def write(
    directory: Path, mlps: Mapping[str, MixMlp], attention: Mapping[str, lora.LowRank]
) -> Path:
    """Write it as MoE-PEFT does, in safetensors; ranks other than the config's in expert_lora."""
    first, plain = next(iter(mlps.values())), next(iter(attention.values()))
    paths = [*attention, *(f"{path}.{name}" for path in mlps for name in _PROJECTIONS)]
    config = lora.config(
        plain.rank,
        plain.alpha,
        paths,
        peft_type="MIXLORA",
        use_dora=False,
        use_rslora=False,
        routing_strategy="mixlora",
        num_experts=first.num_experts,
        top_k=first.top_k,
        expert_lora={
            "r": first.rank,
            "lora_alpha": first.scale * first.rank,
            "lora_dropout": 0.0,
        },
    )
    tensors = {}
    for path, module in attention.items():
        stem = "mixlora." + path.removeprefix("model.")
        tensors[f"{stem}.lora_A.weight"] = module.A
        tensors[f"{stem}.lora_B.weight"] = module.B
    for path, mlp in mlps.items():
        stem = "mixlora." + path.removeprefix("model.")
        tensors[f"{stem}.moe_gate.weight"] = mlp.router
        for name, experts in zip(_PROJECTIONS, (mlp.gate, mlp.up, mlp.down), strict=True):
            for e in range(mlp.num_experts):
                tensors[f"{stem}.{name}.experts.{e}.lora_A.weight"] = experts.A[e]
                tensors[f"{stem}.{name}.experts.{e}.lora_B.weight"] = experts.B[e]
    return attach.write(directory, config, tensors)
