"""The specification of everything that a cell can say: one row at a time, in float32.

Slow on purpose. Every strategy and kernel is tested against these functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from polyadapt.ops.cells import (
    BIAS,
    DENSE,
    OUT_SCALE,
    ROUTER_BIAS,
    SWAP,
    TRANSFORM,
    WEIGHT,
    Router,
    Routing,
    group_of,
    list_parts,
    num_router_rows,
)
from polyadapt.ops.plan import BatchPlan


@dataclass(frozen=True, slots=True)
class _Cell:
    """What one lane does to row `row`: A flat, B [rank, out], the parts flat by bit, in float32."""

    row: int
    scale: float
    gate: torch.Tensor  # [rank]
    a: torch.Tensor
    b: torch.Tensor
    parts: dict[int, torch.Tensor]
    group: int
    routing: Routing | None
    router: torch.Tensor  # flat
    table: torch.Tensor  # the lane's, of this row; empty where it has none


def reference_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    arena: torch.Tensor,
    cells: torch.Tensor,
    plan: BatchPlan,
    site: int,
) -> torch.Tensor:
    """Return the adapted linear [rows, out] as float32; x [rows, in], weight [out, in], bias [out].

    Per row: v = W T(x) + b; v is exchanged by the swap; then, lane after lane, out_scale, B A x and
    bias as in reference_matmul; then dense x. At most one lane of a row has a transform or a swap.
    """
    b = 0.0 if bias is None else bias.float()
    y = x.float() @ weight.float().t() + b
    num_in, num_out = x.shape[1], weight.shape[0]
    for cell in _cells(arena, cells, plan, site, num_in, num_out):
        t, g = cell.row, cell.group
        if TRANSFORM in cell.parts:
            blocks, matrices = x[t].float().view(-1, g), cell.parts[TRANSFORM].view(-1, g, g)
            turned = [block @ matrix for block, matrix in zip(blocks, matrices, strict=True)]
            y[t] = weight.float() @ torch.cat(turned) + b
        if SWAP in cell.parts:
            first, second = cell.parts[SWAP].view(2, num_out)
            partner = [o // g * g + (o % g + g // 2) % g for o in range(num_out)]
            y[t] = (1 + first) * y[t] + second * y[t][partner]
    y = reference_matmul(y, x, arena, cells, plan, site)
    for cell in _cells(arena, cells, plan, site, num_in, num_out):
        if DENSE in cell.parts:
            dense = cell.parts[DENSE].view(num_out, num_in)
            y[cell.row] += cell.scale * (dense @ x[cell.row].float())
    return y


def reference_matmul(
    y: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    cells: torch.Tensor,
    plan: BatchPlan,
    site: int,
) -> torch.Tensor:
    """Return y + the gated product's part as float32; see gated_matmul_ for the semantics.

    y [rows, out], x [rows, in] or, for an embedding, the one-hot rows [rows, vocabulary] with a
    cell whose A block is token-major (then pass its transpose in the arena's row-major layout).
    """
    out = y.float().clone()
    num_in = x.shape[1]
    for cell in _cells(arena, cells, plan, site, num_in, y.shape[1]):
        t = cell.row
        h = cell.scale * _components(cell, x[t].float())  # [rank]
        h = torch.where(cell.gate != 0, cell.gate * h, 0.0) * _weights(cell, x[t])
        if OUT_SCALE in cell.parts:
            out[t] += cell.parts[OUT_SCALE] * out[t]
        out[t] += h @ cell.b + cell.scale * cell.parts.get(BIAS, 0.0)
    return out


def reference_embedding(
    ids: torch.Tensor,
    weight: torch.Tensor,
    arena: torch.Tensor,
    cells: torch.Tensor,
    plan: BatchPlan,
    site: int,
) -> torch.Tensor:
    """Return the adapted embedding [rows, width] as float32; ids [rows], weight [vocab, width].

    Per row and lane: out_scale, then B A[id], bias and dense[id] are added; A and dense have a row
    per token.
    """
    out = weight[ids].float()
    num_in, num_out = weight.shape
    for cell in _cells(arena, cells, plan, site, num_in, num_out):
        t, token = cell.row, int(ids[cell.row])
        h = cell.scale * cell.a.view(num_in, -1)[token] if len(cell.gate) else cell.a
        out[t] += cell.parts.get(OUT_SCALE, 0.0) * out[t]
        out[t] += cell.scale * cell.parts.get(BIAS, 0.0)
        out[t] += torch.where(cell.gate != 0, cell.gate * h, 0.0) * _weights(cell, None) @ cell.b
        if DENSE in cell.parts:
            out[t] += cell.scale * cell.parts[DENSE].view(num_in, num_out)[token]
    return out


def reference_norm(
    normalised: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    arena: torch.Tensor,
    cells: torch.Tensor,
    plan: BatchPlan,
    site: int,
) -> torch.Tensor:
    """Return weight * normalised + bias [rows, width] as float32, where a cell's own weight stands
    for the base's and its bias, times the lane's scale, is added to the base's.

    normalised [rows, width]; weight and bias [width]. At most one lane of a row has a weight.
    """
    width = len(weight)
    out = normalised.float() * weight.float()
    found = list(_cells(arena, cells, plan, site, width, width))
    for cell in found:
        if WEIGHT in cell.parts:
            out[cell.row] = normalised[cell.row].float() * cell.parts[WEIGHT]
    out = out if bias is None else out + bias.float()
    for cell in found:
        out[cell.row] += cell.scale * cell.parts.get(BIAS, 0.0)
    return out


def reference_mixture(
    x: torch.Tensor,
    u: torch.Tensor,
    activate: Callable[[torch.Tensor], torch.Tensor],
    down: tuple[torch.Tensor, torch.Tensor | None],
    arena: torch.Tensor,
    cells: torch.Tensor,
    plan: BatchPlan,
    parts: list[tuple[int, int, int]],
    down_site: int,
) -> torch.Tensor:
    """Return down(activate(u)) [rows, out] as float32, and for rows with experts of their own the
    weighted sum of those: every expert runs the whole of down, see ops/cells.py: Router.EXPERTS.

    x [rows, in]; u [rows, columns], what the MLP's inputs make of x; down: weight [out, inner] and
    bias [out]; parts: (site, first column of u, columns) of the inputs, the first with the router.
    """
    weight, bias = down[0].float(), 0.0 if down[1] is None else down[1].float()
    y = activate(u.float()) @ weight.t() + bias
    for lane in plan.lanes:
        for s in range(lane.num_segments):
            slot = cells[int(lane.slots[s])].tolist()
            offset, rank, _, code = slot[parts[0][0]]
            first = Routing.of(code)
            if offset < 0 or first.router is not Router.EXPERTS:
                continue
            factor = Routing.of(slot[down_site][3]).value
            start = offset + rank * x.shape[1]
            router = (
                arena[start : start + first.num_scores * x.shape[1]].float().view(-1, x.shape[1])
            )
            for t in lane.rows[lane.bounds[s] : lane.bounds[s + 1]].tolist():
                shares = (router @ x[t].float()).softmax(0).tolist()
                kept = _largest(shares, first.top_k)
                if first.value > 0:
                    sums = [sum(shares[e] for e in kept[:n]) for n in range(len(kept))]
                    kept = [
                        e for e, before in zip(kept, sums, strict=True) if before <= first.value
                    ]
                total = sum(shares[e] for e in kept) if first.renormalise else 1.0
                y[t] = 0.0
                for e in kept:
                    v = u[t].float().clone()
                    for site, column, width in parts:
                        a, b = _expert(arena, slot[site], e, x.shape[1], width)
                        v[column : column + width] += a @ x[t].float() @ b
                    inner = activate(v)
                    a, b = _expert(arena, slot[down_site], e, weight.shape[1], weight.shape[0])
                    y[t] += shares[e] / total * factor * (weight @ inner + bias + a @ inner @ b)
    return y


def _expert(
    arena: torch.Tensor, fields: list[int], e: int, num_in: int, num_out: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of one expert of a cell, [r, in] and [r, out] in float32."""
    offset, rank, _, code = fields
    r = rank // Routing.of(code).num_scores
    b_start = offset + (rank + num_router_rows(code)) * num_in
    a = arena[offset : offset + rank * num_in].view(rank, num_in)
    b = arena[b_start : b_start + rank * num_out].view(rank, num_out)
    return a[e * r : (e + 1) * r].float(), b[e * r : (e + 1) * r].float()


def _components(cell: _Cell, x: torch.Tensor) -> torch.Tensor:
    """What a row's components are before the scale and the gate, [rank]; x [in]."""
    found = [float(row @ x) for row in cell.a.view(-1, len(x))]
    routing = cell.routing
    if routing is not None and routing.router is Router.HINGE:
        thresholds = cell.parts.get(ROUTER_BIAS, torch.zeros(len(found))).tolist()
        veto = routing.value - float(cell.router @ x) if routing.has_router else 0.0
        veto = 0.0 if veto < 0 else veto  # NaN stays, here as below
        lowered = [one - own - veto for one, own in zip(found, thresholds, strict=True)]
        found = [0.0 if one < 0 else one for one in lowered]
    return torch.tensor(found)


def _weights(cell: _Cell, x: torch.Tensor | None) -> torch.Tensor:
    """What the components weigh, [rank]; see ops/cells.py: Router. x [in], None of an embedding."""
    routing, rank = cell.routing, len(cell.gate)
    if routing is None or rank == 0 or routing.router is Router.HINGE:
        return torch.ones(rank)
    expert_of = [i // (rank // routing.num_scores) for i in range(rank)]
    if routing.router is Router.TABLE:
        return torch.stack([cell.table[int(routing.value) + expert] for expert in expert_of])
    assert x is not None, "an embedding has no input that a router could read"
    scores = [float(row @ x.float()) for row in cell.router.view(routing.num_scores, -1)]
    if routing.router is Router.SIGMOID:
        bias = cell.parts.get(ROUTER_BIAS, torch.zeros(rank)).tolist()
        values = [1 / (1 + math.exp(-scores[e])) + bias[i] for i, e in enumerate(expert_of)]
        kept = _largest(values, routing.top_k)
        total, tiny = sum(values[i] for i in kept), torch.finfo(torch.float32).tiny
        total = tiny if abs(total) < tiny else total
        return torch.tensor([values[i] / total if i in kept else 0.0 for i in range(rank)])
    if routing.router is Router.MAGNITUDE:
        kept = _largest([abs(score) for score in scores], routing.top_k)
        chosen = torch.tensor([abs(scores[e]) / routing.value for e in kept]).softmax(0).tolist()
    else:
        shares = torch.tensor(scores).softmax(0).tolist()
        kept = _largest(shares, routing.top_k)
        total = sum(shares[e] for e in kept) if routing.renormalise else 1.0
        chosen = [shares[e] / total for e in kept]
    weight_of = dict(zip(kept, chosen, strict=True))
    return torch.tensor([weight_of.get(expert, 0.0) for expert in expert_of])


def _largest(values: list[float], top_k: int) -> list[int]:
    """Where the top_k largest are, of equal ones the first; 0: all."""
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    return order[: top_k or len(values)]


def _cells(
    arena: torch.Tensor,
    cells: torch.Tensor,
    plan: BatchPlan,
    site: int,
    num_in: int,
    num_out: int,
) -> Iterator[_Cell]:
    """Lane after lane, the cell of every row that has one."""
    for lane in plan.lanes:
        for s in range(lane.num_segments):
            offset, rank, parts, code = cells[int(lane.slots[s]), site].tolist()
            if offset < 0:
                continue
            routing = Routing.of(code) if code else None
            if routing is not None and routing.router is Router.EXPERTS:
                continue
            sizes = [
                (0, rank * num_in), (-2, num_router_rows(code) * num_in), (-1, rank * num_out),
                *list_parts(num_in, num_out, rank, parts),
            ]  # fmt: skip
            blocks, at = {}, offset
            for name, size in sizes:
                blocks[name] = arena[at : at + size].float()
                at += size
            a, router, b = blocks.pop(0), blocks.pop(-2), blocks.pop(-1).view(rank, num_out)
            for t in lane.rows[lane.bounds[s] : lane.bounds[s + 1]].tolist():
                gate = torch.ones(rank)
                if lane.gate is not None:
                    gate[: lane.gate.shape[1]] = torch.from_numpy(lane.gate[t, :rank])
                table = torch.empty(0) if lane.table is None else torch.from_numpy(lane.table[t])
                yield _Cell(
                    t, float(lane.scales[s]), gate, a, b, blocks, group_of(parts), routing, router,
                    table,
                )  # fmt: skip
