"""The specification of everything that a cell can say: one row at a time, in float32.

Slow on purpose. Every strategy and kernel is tested against these functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from polyadapt.ops.cells import (
    BIAS,
    DENSE,
    OUT_SCALE,
    SWAP,
    TRANSFORM,
    WEIGHT,
    group_of,
    list_parts,
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
        h = cell.scale * (cell.a.view(-1, num_in) @ x[t].float())  # [rank]
        h = torch.where(cell.gate != 0, cell.gate * h, 0.0)
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
        out[t] += torch.where(cell.gate != 0, cell.gate * h, 0.0) @ cell.b
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
            offset, rank, parts = cells[int(lane.slots[s]), site].tolist()
            if offset < 0:
                continue
            sizes = [(0, rank * num_in), (-1, rank * num_out), *list_parts(num_in, num_out, parts)]
            blocks, at = {}, offset
            for name, size in sizes:
                blocks[name] = arena[at : at + size].float()
                at += size
            a, b = blocks.pop(0), blocks.pop(-1).view(rank, num_out)
            for t in lane.rows[lane.bounds[s] : lane.bounds[s + 1]].tolist():
                gate = torch.ones(rank)
                if lane.gate is not None:
                    gate[: lane.gate.shape[1]] = torch.from_numpy(lane.gate[t, :rank])
                yield _Cell(t, float(lane.scales[s]), gate, a, b, blocks, group_of(parts))
