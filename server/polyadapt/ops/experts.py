"""Routed experts: the base product of each (row, expert) pair, and the adapters' part of it.

A row of the batch stands once for every expert that the base's router chose for it. The pairs are
sorted by expert, so that each expert's weights are read once. Knows slots and sites, never names
or families.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from polyadapt.ops import cells as cells_layout
from polyadapt.ops.gated_matmul import Site
from polyadapt.ops.plan import LoadedLane


@dataclass(frozen=True, slots=True)
class Pairs:
    """The (row, expert) pairs of one call, by expert and within an expert by row.

    rows and experts int64 [pairs]; order int64 [pairs]: where each pair stood in [rows, top k].
    runs: (expert, first pair, one past its last) of the experts that have any. A pair whose expert
    is not one of the module's comes last and is in no run.
    """

    rows: torch.Tensor
    experts: torch.Tensor
    order: torch.Tensor
    runs: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """Pairs of one adapter and one expert.

    index int64 [n] into the pairs; gate [n, width] float32 of their rows, or None for ones.
    """

    slot: int
    scale: float
    expert: int
    index: torch.Tensor
    gate: torch.Tensor | None


def sort_pairs(top_k_index: torch.Tensor, num_experts: int) -> Pairs:
    """Pair every row with its experts; top_k_index int64 [rows, top k]."""
    flat = top_k_index.reshape(-1)
    order = flat.argsort(stable=True)
    experts = flat[order]
    stops = experts.bincount(minlength=num_experts)[:num_experts].cumsum(0).tolist()
    starts = [0, *stops[:-1]]
    runs = [(e, start, stop) for e, (start, stop) in enumerate(zip(starts, stops, strict=True))]
    kept = tuple(run for run in runs if run[1] < run[2])
    return Pairs(order // top_k_index.shape[1], experts, order, kept)


def experts_product(x: torch.Tensor, weights: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Semantics: y[p] = weights[experts[p]] x[p] for every pair p, and 0 for one in no run.

    x [pairs, in], weights [experts, out, in] -> y [pairs, out], all of one dtype.
    """
    y = x.new_zeros(x.shape[0], weights.shape[1])
    for expert, start, stop in pairs.runs:
        y[start:stop] = F.linear(x[start:stop], weights[expert])
    return y


def list_groups(pairs: Pairs, sites: Sequence[Site], num_rows: int) -> list[ExpertGroup]:
    """The pairs whose row has an adapter with a cell at one of the sites, which share their plan
    and their experts; num_rows rows were routed. Empty: the base alone.
    """
    plan = sites[0].plan
    groups: list[ExpertGroup] = []
    for lane in plan.lanes if pairs.runs else ():
        is_adapted = _has_cells(lane, sites)
        if is_adapted.any():
            groups += _groups_of(lane, is_adapted, pairs, plan.device_rows, num_rows)
    return groups


def experts_matmul_(
    y: torch.Tensor, x: torch.Tensor, groups: Sequence[ExpertGroup], site: Site, num_experts: int
) -> None:
    """Add the adapters' part to the pairs' y in place.

    Semantics, for every group (slot, scale, expert e), pair p of it, with (offset, rank, ...) =
    cells[slot, site] and r = rank / num_experts:
        h[i] = scale * dot(A[e r + i], x[p]);  h[i] = where(g[e r + i] != 0, g[e r + i] * h[i], 0)
        y[p] += sum_i h[i] * B[e r + i]
    g is the gate of the pair's row, 1 beyond its width. y [pairs, out], x [pairs, in], float32 or
    bfloat16; pairs in no group, or whose slot has no cell here, stay as they are.
    """
    num_in, num_out = x.shape[1], y.shape[1]
    for group in groups:
        offset, rank, *_ = site.cells[group.slot, site.id].tolist()
        if offset < 0 or rank == 0:
            continue
        r = rank // num_experts
        component = group.expert * r
        a_start = offset + component * num_in
        b_start = offset + rank * num_in + component * num_out
        a = site.arena[a_start : a_start + r * num_in].view(r, num_in)
        b = site.arena[b_start : b_start + r * num_out].view(r, num_out)
        h = x[group.index].to(site.arena.dtype) @ a.t()  # [group pairs, r]
        if group.scale != 1.0:
            h = h * group.scale
        if group.gate is not None:
            h = _gated(h, group.gate[:, component : component + r])
        y[group.index] += (h @ b).to(y.dtype)


def _has_cells(lane: LoadedLane, sites: Sequence[Site]) -> torch.Tensor:
    """Bool [segments]: whether the segment's adapter has a cell at one of the sites."""
    offsets = torch.stack(
        [site.cells[lane.slots.long(), site.id, cells_layout.OFFSET] for site in sites], 1
    )
    return (offsets >= 0).any(1)


def _groups_of(
    lane: LoadedLane, is_adapted: torch.Tensor, pairs: Pairs, rows: torch.Tensor, num_rows: int
) -> list[ExpertGroup]:
    device = rows.device
    bounds = lane.bounds.long()  # on the host, as slots and scales
    segments = torch.where(
        is_adapted.to(device), torch.arange(lane.num_segments, device=device), -1
    )
    segment_of = torch.full((num_rows,), -1, device=device)  # by row
    members = rows[int(bounds[0]) : int(bounds[-1])].long()
    segment_of[members] = segments.repeat_interleave(bounds.diff().to(device))
    of_pair = segment_of[pairs.rows[: pairs.runs[-1][2]]]
    index = (of_pair >= 0).nonzero().flatten()
    index = index[of_pair[index].argsort(stable=True)]  # by segment, and there still by expert
    if not len(index):
        return []
    segment_ids, experts = of_pair[index], pairs.experts[index]
    is_first = torch.ones_like(index, dtype=torch.bool)
    is_first[1:] = (segment_ids[1:] != segment_ids[:-1]) | (experts[1:] != experts[:-1])
    firsts = is_first.nonzero().flatten()
    stops = [*firsts[1:].tolist(), len(index)]
    of_group = segment_ids[firsts].cpu()
    slots, scales = lane.slots[of_group], lane.scales[of_group]
    groups = []
    for slot, scale, expert, start, stop in zip(
        slots.tolist(), scales.tolist(), experts[firsts].tolist(), firsts.tolist(), stops,
        strict=True,
    ):  # fmt: skip
        group = index[start:stop]
        gate = None if lane.gate is None else lane.gate[pairs.rows[group]]
        groups.append(ExpertGroup(slot, scale, expert, group, gate))
    return groups


def _gated(h: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """gate [n, at most r]: whoever is wider than the gate is ungated there."""
    weight = torch.ones_like(h)
    weight[:, : gate.shape[1]] = gate.to(h.dtype)
    # A mask must be `where`: 0 * NaN would poison the row.
    return torch.where(weight != 0, h * weight, torch.zeros_like(h))
