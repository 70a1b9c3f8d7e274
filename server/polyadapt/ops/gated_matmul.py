"""The one operation: y += B (gate * A x) per row, each row with its own adapter's A and B.

Its torch form, and the choice between that, the native kernel and the Triton kernels. The
specification is ops/reference.py. Knows slots and sites, never names or families.

`cells` int64 [num_slots, num_sites, 4] holds (offset, rank, parts, routing) of each (slot, site),
whose layout in the flat arena ops/cells.py gives. Every constant scale is folded in at load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from polyadapt.ops import native, triton_op
from polyadapt.ops.cells import (
    BIAS,
    OUT_SCALE,
    ROUTER_BIAS,
    Router,
    Routing,
    list_parts,
    num_router_rows,
)
from polyadapt.ops.plan import LoadedLane, PlanBuffers, index_of
from polyadapt.ops.routing import hinge, weigh
from polyadapt.ops.triton_op import Part


@dataclass(frozen=True, slots=True)
class Site:
    """All that a wrapped module hands to the op: its id, the arena, the cell table, the plan's
    buffers. device_cells: the cell table where the arena lies, for kernels that read it there.
    """

    id: int
    arena: torch.Tensor  # [num_elements] float32 or bfloat16
    cells: torch.Tensor  # int64 [num_slots, num_sites, 4], on the host
    plan: PlanBuffers
    device_cells: torch.Tensor | None = None


def gated_matmul_(
    y: torch.Tensor, x: torch.Tensor, site: Site, parts: Sequence[Part] | None = None
) -> None:
    """Add the adapters' part to y in place.

    Semantics, for every lane, segment s, row t of the segment, with (offset, rank, parts, routing)
    = cells[slots[s], site]:
        h[i] = scales[s] * dot(A[i], x[t]);  h[i] = where(gate[t, i] != 0, gate[t, i] * h[i], 0)
        h[i] = where(w[i] != 0, w[i] * h[i], 0)
    with the hinge of ops/cells.py in place of the dot product where the routing is one,
        y[t] += out_scale * y[t] + sum_i h[i] * B[i] + scales[s] * bias
    where bias and out_scale are those of the cell, or 0, and w, ones without a routing, weighs the
    components as ops/cells.py: Router says. A cell whose router is EXPERTS is left alone.
    y [rows, out], x [rows, in], float32 or bfloat16; sums are float32. Rows in no segment stay as
    they are. Several sites that share x are served at once: parts holds (site id, first column of
    y, columns) of each; absent means all of y for `site`.
    """
    if parts is None:
        parts = [(site.id, 0, y.shape[1])]
    plan = site.plan
    is_native = native.serves(x) and plan.observer is None
    for lane in plan.lanes:
        if lane.work is not None:
            triton_op.gated_matmul_(y, x, site.arena, _device_cells(site), lane.work, parts)
            if lane.work.is_routed:
                _segments_matmul_(y, x, site, lane, parts, is_routed=True)
            continue
        first = lane.num_short if is_native else 0
        if first:
            native.gated_matmul_(
                y, x, site.arena, site.cells, plan.rows, lane.bounds, lane.slots, lane.scales,
                first, lane.gate, lane.table, torch.tensor(parts), plan.usage,
            )  # fmt: skip
        if first < lane.num_segments:
            _segments_matmul_(y, x, site, lane, parts, first)


def gated_embedding_(y: torch.Tensor, ids: torch.Tensor, num_in: int, site: Site) -> None:
    """Add the adapters' part of an embedding in place: as gated_matmul_ with h[i] = A[ids[t], i].

    y [rows, width], ids int64 [rows] below num_in, the size of the vocabulary.
    """
    plan = site.plan
    for lane in plan.lanes:
        if lane.work is not None:
            triton_op.gated_embedding_(
                y, ids, num_in, site.arena, _device_cells(site), lane.work, site.id
            )
            if lane.work.is_routed:
                _segments_embedding_(y, ids, num_in, site, lane, is_routed=True)
        elif native.serves(y) and plan.observer is None:
            # A gather of single rows: long segments are no GEMM here.
            native.gated_embedding_(
                y, ids, num_in, site.arena, site.cells, plan.rows, lane.bounds, lane.slots,
                lane.scales, lane.num_segments, lane.gate, lane.table, site.id, plan.usage,
            )  # fmt: skip
        else:
            _segments_embedding_(y, ids, num_in, site, lane)


def _device_cells(site: Site) -> torch.Tensor:
    return site.cells if site.device_cells is None else site.device_cells


# Told of a segment's slot, the weights [rows, rank] of its components, and how many experts they
# make.
Note = Callable[[int, torch.Tensor, int], None]


def strategy(*, has_triton: bool = False) -> str:
    """Name the form that serves segments on this machine, with its reason; has_triton: whether the
    Triton kernels were asked for.
    """
    if has_triton:
        return "Triton kernels" + (", interpreted" if triton_op.is_interpreted() else "")
    if native.is_available():
        return "native C kernels"
    return f"torch GEMMs per segment ({native.unavailable_reason()})"


# --------------------------------------------------------------------------- the torch form
def _segments_matmul_(
    y: torch.Tensor,
    x: torch.Tensor,
    site: Site,
    lane: LoadedLane,
    parts: Sequence[Part],
    first: int = 0,
    *,
    is_routed: bool = False,
) -> None:
    """Two GEMMs per segment of one lane from the first-th on, part by part; as gated_matmul_.
    is_routed: only of cells with a routing.
    """
    arena, num_in = site.arena, x.shape[-1]
    for site_id, column, num_out in parts:
        columns, note = y[:, column : column + num_out], partial(site.plan.note, site_id)
        for segment in _segments(site, lane, site_id, first, is_routed):
            rank = segment.rank
            a_rows = rank + num_router_rows(segment.code)
            a_end = segment.offset + a_rows * num_in
            b_end = a_end + rank * num_out
            tails = _tails(arena, b_end, num_in, num_out, segment)
            _scale_output_(columns, tails, segment)
            if rank and segment.is_hinged:
                # Which side of a threshold a rounded product is on would be another choice.
                stored = arena[segment.offset : a_end].view(a_rows, num_in).float()
                products = x[segment.index].float() @ stored.t()
                thresholds, value = tails.get(ROUTER_BIAS), Routing.of(segment.code).value
                h = hinge(products[:, :rank], products[:, rank:], value, thresholds)
                h = _apply(h, segment, lane.gate).to(arena.dtype)
                columns[segment.index] += (h @ arena[a_end:b_end].view(rank, num_out)).to(y.dtype)
            elif rank:
                xs = x[segment.index].to(arena.dtype)  # [segment rows, in]
                stored = arena[segment.offset : a_end].view(a_rows, num_in)
                if a_rows > rank and arena.dtype is torch.float32:  # A and router in one product
                    h, scores = (xs @ stored.t()).split_with_sizes([rank, a_rows - rank], 1)
                else:  # a choice that was rounded would be another one
                    h = xs @ stored[:rank].t()
                    scores = x[segment.index].float() @ stored[rank:].float().t()
                h = _apply(h, segment, lane.gate)
                h = _route(h, scores, segment, lane.table, tails, note)
                delta = h @ arena[a_end:b_end].view(rank, num_out)
                columns[segment.index] += delta.to(y.dtype)
            _add_bias_(columns, tails, segment)


def _segments_embedding_(
    y: torch.Tensor,
    ids: torch.Tensor,
    num_in: int,
    site: Site,
    lane: LoadedLane,
    *,
    is_routed: bool = False,
) -> None:
    """One gather and one GEMM per segment of one lane; A is stored token-major [num_in, rank]."""
    arena, num_out, note = site.arena, y.shape[-1], partial(site.plan.note, site.id)
    for segment in _segments(site, lane, site.id, 0, is_routed):
        rank = segment.rank
        a_end = segment.offset + num_in * rank
        b_end = a_end + rank * num_out
        tails = _tails(arena, b_end, num_in, num_out, segment)
        _scale_output_(y, tails, segment)
        if rank:
            a = arena[segment.offset : a_end].view(num_in, rank)
            h = _apply(a[ids[segment.index]], segment, lane.gate)  # [segment rows, rank]
            h = _route(h, h[:, :0], segment, lane.table, tails, note)
            delta = h @ arena[a_end:b_end].view(rank, num_out)
            y[segment.index] += delta.to(y.dtype)
        _add_bias_(y, tails, segment)


@dataclass(frozen=True, slots=True)
class _Segment:
    slot: int
    offset: int
    rank: int
    parts: int
    code: int  # of the routing
    scale: float
    index: slice | torch.Tensor  # a slice where the rows are neighbours, which spares two copies

    @property
    def is_hinged(self) -> bool:
        return bool(self.code) and Routing.of(self.code).router is Router.HINGE


def _segments(
    site: Site, lane: LoadedLane, site_id: int, first: int, is_routed: bool
) -> Iterator[_Segment]:
    """The lane's segments from the first-th on that have a cell at the site; is_routed: only where
    that has a routing. Reads the host's tensors alone.
    """
    rows, device_rows = site.plan.rows, site.plan.device_rows
    limits = lane.bounds[first:].tolist()
    slots = lane.slots[first:]
    found = site.cells[slots.long(), site_id].tolist()
    for slot, (offset, rank, parts, code), scale, start, stop in zip(
        slots.tolist(), found, lane.scales[first:].tolist(), limits[:-1], limits[1:], strict=True
    ):
        if offset < 0 or start == stop or (code and Routing.of(code).router is Router.EXPERTS):
            continue
        if is_routed and not code:
            continue
        index = index_of(rows[start:stop], device_rows[start:stop])
        yield _Segment(slot, offset, rank, parts, code, scale, index)


def _tails(
    arena: torch.Tensor, b_end: int, num_in: int, num_out: int, segment: _Segment
) -> dict[int, torch.Tensor]:
    """What follows B, by bit."""
    found, at = {}, b_end
    for bit, size in list_parts(num_in, num_out, segment.rank, segment.parts):
        found[bit] = arena[at : at + size]
        at += size
    return found


def _scale_output_(y: torch.Tensor, tails: dict[int, torch.Tensor], segment: _Segment) -> None:
    if OUT_SCALE in tails:
        y[segment.index] += (y[segment.index] * tails[OUT_SCALE]).to(y.dtype)


def _add_bias_(y: torch.Tensor, tails: dict[int, torch.Tensor], segment: _Segment) -> None:
    if BIAS in tails:
        y[segment.index] += (segment.scale * tails[BIAS]).to(y.dtype)


def _route(
    h: torch.Tensor,
    scores: torch.Tensor,
    segment: _Segment,
    table: torch.Tensor | None,
    tails: dict[int, torch.Tensor],
    note: Note | None,
) -> torch.Tensor:
    if not segment.code:
        return h
    routing = Routing.of(segment.code)
    if routing.router is Router.TABLE:
        assert table is not None, "whoever needs a table brings it with the plan"
        first = int(routing.value)
        scores = table[segment.index, first : first + routing.num_scores]
    weight = weigh(scores, routing, segment.rank, tails.get(ROUTER_BIAS))
    if note is not None:
        note(segment.slot, weight, routing.num_scores)
    weight = weight.to(h.dtype)
    # A mask must be `where`: 0 * NaN would poison the row.
    return torch.where(weight != 0, h * weight, torch.zeros_like(h))


def _apply(h: torch.Tensor, segment: _Segment, gate: torch.Tensor | None) -> torch.Tensor:
    if segment.scale != 1.0:
        h = h * segment.scale
    if gate is None:
        return h
    width = min(gate.shape[1], h.shape[1])  # whoever is wider than the gate is ungated there
    weight = torch.ones_like(h)
    weight[:, :width] = gate[segment.index, :width].to(h.dtype)
    return torch.where(weight != 0, h * weight, torch.zeros_like(h))
