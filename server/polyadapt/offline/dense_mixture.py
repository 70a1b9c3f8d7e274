"""One MLP as the weighted sum of an adapter's experts, each of them whole: plain torch, every
expert for every row. What a served answer is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers.activations import ACT2FN

from polyadapt.adapters.adapter import Delta


class DenseMixture(nn.Module):
    """sum_e w_e MLP_e(x), see ops/cells.py: Router.EXPERTS."""

    def __init__(
        self, linears: Sequence[nn.Module], deltas: Sequence[Delta], *, is_gated: bool, act: str
    ) -> None:
        """linears and their deltas: the MLP's inputs and then down; act: transformers' name."""
        super().__init__()
        self.linears = nn.ModuleList(linears)
        self.deltas = tuple(deltas)
        self.is_gated = is_gated
        self.act = ACT2FN[act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden] -> the same shape."""
        weights = self._weights(x)  # [..., experts]
        y = torch.zeros_like(x)
        for e in range(weights.shape[-1]):
            *inputs, down = range(len(self.linears))
            u = torch.cat([self._linear(n, x, e) for n in inputs], -1)
            if self.is_gated:
                gate, up = u.chunk(2, -1)
                inner = self.act(gate) * up
            else:
                inner = self.act(u)
            y = y + weights[..., e, None] * self._linear(down, inner, e)
        return y

    def _linear(self, number: int, x: torch.Tensor, e: int) -> torch.Tensor:
        delta = self.deltas[number]
        assert delta.routing is not None
        r = len(delta.a) // delta.routing.num_scores
        own = slice(e * r, (e + 1) * r)
        y: torch.Tensor = self.linears[number](x)
        return y + x @ delta.a[own].t() @ delta.b[:, own].t()

    def _weights(self, x: torch.Tensor) -> torch.Tensor:
        first, last = self.deltas[0], self.deltas[-1].routing
        assert first.routing is not None
        assert first.router is not None
        assert last is not None
        shares = (x @ first.router.t()).softmax(-1)
        ordered, order = shares.sort(dim=-1, descending=True, stable=True)
        if first.routing.value:
            before = nn.functional.pad(ordered.cumsum(-1)[..., :-1], (1, 0))
            kept = before <= first.routing.value
        else:
            places = torch.arange(shares.shape[-1]).expand_as(ordered)
            kept = places < (first.routing.top_k or shares.shape[-1])
        chosen = torch.zeros_like(shares).scatter(-1, order, ordered.where(kept, 0.0))
        if first.routing.renormalise:
            chosen = chosen / chosen.sum(-1, keepdim=True)
        return chosen * last.value
