"""The Deltas of one MLP's experts, computed row by row and expert by expert; see
adapters/adapter.py: Delta and ops/cells.py: Router.EXPERTS. Shares no code with the engine.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from polyadapt.adapters.adapter import Delta
from polyadapt.ops.cells import Router
from polyadapt.types import BaseSpec, MlpSpec


def put_mixture(
    model: nn.Module, base: BaseSpec, mlp: MlpSpec, deltas: Mapping[int, Delta]
) -> None:
    """Replace the MLP of `model`, in place, if its first site has experts."""
    if deltas[mlp.inputs[0]].routing.router is not Router.EXPERTS:
        return
    parent, _, name = mlp.path.rpartition(".")
    paths = [base.sites[site_id].path.rpartition(".")[2] for site_id in (*mlp.inputs, mlp.down)]
    own = [deltas[site_id] for site_id in (*mlp.inputs, mlp.down)]
    module = model.get_submodule(mlp.path)
    mixture = _Mixture(module, paths, own, mlp.is_gated)
    setattr(model.get_submodule(parent), name, mixture)


class _Mixture(nn.Module):
    def __init__(
        self, base: nn.Module, names: list[str], deltas: list[Delta], is_gated: bool
    ) -> None:
        super().__init__()
        self.base, self.names, self.deltas, self.is_gated = base, names, deltas, is_gated
        others = [child for name, child in base.named_children() if name not in names]
        (self.act,) = [child for child in others if not isinstance(child, nn.Dropout)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = [self._row(row) for row in x.reshape(-1, x.shape[-1])]
        return torch.stack(rows).view(x.shape)

    def _row(self, x: torch.Tensor) -> torch.Tensor:
        first, last = self.deltas[0].routing, self.deltas[-1].routing
        assert first.num_scores == last.num_scores
        shares = (self.deltas[0].router @ x).softmax(0)
        order = shares.argsort(descending=True, stable=True).tolist()
        kept = order[: first.top_k or len(order)]
        if first.value:
            sums = [float(sum(shares[e] for e in order[:n])) for n in range(len(order))]
            kept = [e for e, before in zip(order, sums, strict=True) if before <= first.value]
        total = sum(shares[e] for e in kept) if first.renormalise else 1.0
        parts = [shares[e] / total * last.value * self._expert(x, e) for e in kept]
        return torch.stack(parts).sum(0)

    def _expert(self, x: torch.Tensor, e: int) -> torch.Tensor:
        u = torch.cat([self._linear(n, x, e) for n in range(len(self.names) - 1)])
        inner = self.act(u)
        if self.is_gated:
            gate, up = u.chunk(2)
            inner = self.act(gate) * up
        return self._linear(len(self.names) - 1, inner, e)

    def _linear(self, number: int, x: torch.Tensor, e: int) -> torch.Tensor:
        delta = self.deltas[number]
        r = len(delta.a) // delta.routing.num_scores
        components = slice(e * r, (e + 1) * r)
        y: torch.Tensor = self.base.get_submodule(self.names[number])(x)
        return y + delta.b[:, components] @ (delta.a[components] @ x)
