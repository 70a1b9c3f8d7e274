"""An adapter's own experts in place of a whole MLP, for its own rows: the torch form, and the
choice between it and the native kernel. The specification is ops/reference.py.

The base's products are made once a row, for everyone; a row is expanded to its chosen experts
behind gate and up, and combined before down. Knows slots and sites, never names or families.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from polyadapt.ops import native
from polyadapt.ops.cells import Router, Routing, num_router_rows
from polyadapt.ops.gated_matmul import Site
from polyadapt.ops.native import mixture as kernels
from polyadapt.ops.plan import Mixture, Mixtures
from polyadapt.ops.routing import choose


@dataclass(frozen=True, slots=True)
class MixedMlp:
    """All that an MLP hands to the op.

    Its inputs make u of x: gate and then up, or up alone. parts int64 [n, 3] holds (site id, first
    column of u, columns) of each; `site` is the first of them, where the routers stand.
    """

    site: Site
    parts: torch.Tensor
    down: int  # site id
    num_in: int  # columns of x
    width: int  # of `inner`
    is_gated: bool
    activation: Callable[[torch.Tensor], torch.Tensor]
    native: int | None  # the kernel's code for it; None: the kernel has none
    bias: torch.Tensor | None  # of down, float32 [out]

    def activate(self, u: torch.Tensor) -> torch.Tensor:
        """act(gate) * up, or act(up): [..., inner]."""
        if not self.is_gated:
            return self.activation(u)
        gate, up = u.chunk(2, -1)
        return self.activation(gate) * up


def mix_(inner: torch.Tensor, u: torch.Tensor, x: torch.Tensor, mlp: MixedMlp) -> torch.Tensor:
    """Put the experts' sum into `inner` for the rows that have experts here, in place.

    Semantics, for every row t of the plan's mixtures whose slot has a cell at `mlp.site`: A[e] and
    B[e] are the e-th of the experts' parts of a site's cell, w the weights that the router makes of
    x[t] (ops/cells.py: Router.EXPERTS), times the value of down's cell;
        v[e] = u[t] + B[e] A[e] x[t] of every input, each in its columns;  a[e] = w[e] * act(v[e])
        inner[t] = sum_e a[e], over the e with w[e] != 0
        h = A[e] a[e] of down, expert after expert, and behind them the sum of the weights
    Returns h float32 [rows of the mixtures, widest rank + 1] for add_mixed_; without a cell h is
    zeros and one. inner [rows, inner], u [rows, columns] and x [rows, in] are all float32 or all
    bfloat16; sums are float32. Rows in no mixture stay as they are.
    """
    mixtures = _mixtures(mlp)
    h = torch.zeros(mixtures.num_rows, mixtures.width + 1, device=x.device)
    first = _num_native(mlp, mixtures)
    if first:
        assert mlp.native is not None
        kernels.mix_(
            inner, u, x, h, mlp.site.arena, mlp.site.cells, mlp.site.plan.rows,
            mixtures.table[:first], mlp.parts, mlp.down, mlp.site.plan.usage,
            is_gated=mlp.is_gated, activation=mlp.native,
        )  # fmt: skip
    for mixture in mixtures.segments[first:]:
        _mix_segment(inner, u, x, h[mixture.first : mixture.first + mixture.num_rows], mlp, mixture)
    return h


def add_mixed_(y: torch.Tensor, h: torch.Tensor, mlp: MixedMlp) -> None:
    """Add to down's outputs y [rows, out] of the combined rows what the experts do there, in place.

    Semantics, for every row t of the mixtures: y[t] += sum_i h[i] * B[i] + (sum of weights - 1) *
    bias, as every expert adds the base's bias by its weight.
    """
    mixtures = _mixtures(mlp)
    first = _num_native(mlp, mixtures)
    if first:
        kernels.add_mixed_(
            y, h, mlp.site.arena, mlp.site.cells, mlp.site.plan.rows, mixtures.table[:first],
            mlp.parts, mlp.down, mlp.bias, num_in=mlp.num_in, width=mlp.width,
            is_gated=mlp.is_gated,
        )  # fmt: skip
    for mixture in mixtures.segments[first:]:
        own = h[mixture.first : mixture.first + mixture.num_rows]
        cell = _cell(mlp.site, mixture.slot, mlp.down, mlp.width, y.shape[1])
        if cell is not None:
            y[mixture.index] += (own[:, : len(cell.b)].to(cell.b.dtype) @ cell.b).to(y.dtype)
        if mlp.bias is not None:
            y[mixture.index] += ((own[:, -1:] - 1.0) * mlp.bias).to(y.dtype)


# --------------------------------------------------------------------------- the torch form
@dataclass(frozen=True, slots=True)
class _Cell:
    """Views of one cell: a [rank, in], router [scores, in], maybe none, and b [rank, out]."""

    routing: Routing
    a: torch.Tensor
    router: torch.Tensor
    b: torch.Tensor

    def expert(self, e: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of expert e: [r, in] and [r, out]."""
        r = len(self.a) // self.routing.num_scores
        return self.a[e * r : (e + 1) * r], self.b[e * r : (e + 1) * r]


def _mix_segment(
    inner: torch.Tensor,
    u: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    mlp: MixedMlp,
    mixture: Mixture,
) -> None:
    """One adapter's rows; h [segment rows, widest rank + 1]."""
    site, slot = mlp.site, mixture.slot
    h[:, -1] = 1.0
    parts = mlp.parts.tolist()
    cells = [_cell(site, slot, site_id, x.shape[1], width) for site_id, _, width in parts]
    first, down = cells[0], _cell(site, slot, mlp.down, inner.shape[1], 0)
    if first is None or down is None:
        return
    xs, us = x[mixture.index], u[mixture.index]
    scores = xs.float() @ first.router.float().t()
    weights = choose(scores, first.routing) * down.routing.value  # [segment rows, experts]
    site.plan.note(site.id, slot, weights, first.routing.num_scores)
    total = inner.new_zeros(len(xs), inner.shape[1], dtype=torch.float32)
    for e in range(first.routing.num_scores):
        chosen = weights[:, e].nonzero().flatten()
        if not len(chosen):
            continue
        xe, v = xs[chosen].to(site.arena.dtype), us[chosen].float()
        for cell, (_, column, width) in zip(cells, parts, strict=True):
            if cell is not None:
                a, b = cell.expert(e)
                v[:, column : column + width] += (xe @ a.t() @ b).float()
        own = mlp.activate(v) * weights[chosen, e, None]
        total[chosen] += own
        a, _ = down.expert(e)
        h[chosen, e * len(a) : (e + 1) * len(a)] = (own.to(a.dtype) @ a.t()).float()
    inner[mixture.index] = total.to(inner.dtype)
    h[:, -1] = weights.sum(1)


def _cell(site: Site, slot: int, site_id: int, num_in: int, num_out: int) -> _Cell | None:
    """The slot's cell of experts at a site, or None; with num_out 0 its b is not to be read."""
    offset, rank, _, code = site.cells[slot, site_id].tolist()
    routing = Routing.of(code)
    if offset < 0 or routing.router is not Router.EXPERTS:
        return None
    num_rows = rank + num_router_rows(code)
    at = offset + num_rows * num_in
    rows = site.arena[offset:at].view(num_rows, num_in)
    b = site.arena[at : at + rank * num_out].view(rank, num_out)
    return _Cell(routing, rows[:rank], rows[rank:], b)


def _mixtures(mlp: MixedMlp) -> Mixtures:
    mixtures = mlp.site.plan.mixtures
    assert mixtures is not None, "whoever asks looked"
    return mixtures


def _num_native(mlp: MixedMlp, mixtures: Mixtures) -> int:
    is_native = mlp.native is not None and native.serves(mlp.site.arena)
    return mixtures.num_short if is_native and mlp.site.plan.observer is None else 0
