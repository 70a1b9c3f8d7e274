"""From rows and their adapters to lanes and segments, and into the fixed buffers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyadapt.ops import cells as layout
from polyadapt.ops.plan import GEMM_MIN_ROWS, MAX_LANES, BatchPlan, PlanBuffers, RowUse, build_plan


def uses_of(lengths: list[int], slots: list[tuple[int, ...]]) -> tuple[list[RowUse], int]:
    """Neighbouring runs; an empty slot tuple is a base run, which the plan never hears of."""
    uses, start = [], 0
    for length, chosen in zip(lengths, slots, strict=True):
        if chosen:
            uses.append(RowUse(start, start + length, chosen, (1.0,) * len(chosen)))
        start += length
    return uses, start


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_row_is_served_by_exactly_its_adapters(data):
    num = data.draw(st.integers(0, 12))
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=num, max_size=num))
    slots = data.draw(
        st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=num, max_size=num)
    )
    uses, total = uses_of(lengths, slots)
    plan = build_plan(uses, total)
    served: dict[int, list[int]] = {}
    for lane in plan.lanes:
        assert lane.bounds[0] == 0
        assert lane.bounds[-1] == len(lane.rows)
        assert len(set(lane.rows.tolist())) == len(lane.rows), "a lane serves a row once"
        sizes = np.diff(lane.bounds)
        assert (sizes > 0).all()
        assert (sizes[: lane.num_short] < GEMM_MIN_ROWS).all()
        assert (sizes[lane.num_short :] >= GEMM_MIN_ROWS).all()
        assert len(set(lane.slots.tolist())) == lane.num_segments, "one segment per adapter"
        for s in range(lane.num_segments):
            for row in lane.rows[lane.bounds[s] : lane.bounds[s + 1]]:
                served.setdefault(int(row), []).append(int(lane.slots[s]))
    start = 0
    for length, chosen in zip(lengths, slots, strict=True):
        for row in range(start, start + length):
            assert sorted(served.get(row, [])) == sorted(chosen)
        start += length


def test_base_rows_and_scale_zero_are_in_no_segment():
    assert build_plan([], 5).lanes == ()
    assert build_plan([RowUse(0, 5, (1,), (0.0,))], 5).lanes == ()


def test_one_adapter_at_two_scales_is_two_segments():
    plan = build_plan([RowUse(0, 1, (3,), (1.0,)), RowUse(1, 2, (3,), (0.5,))], 2)
    assert plan.lanes[0].scales.tolist() == [0.5, 1.0]


def test_too_many_lanes_are_refused():
    slots = tuple(range(MAX_LANES + 1))
    with pytest.raises(ValueError, match="at most"):
        build_plan([RowUse(0, 1, slots, (1.0,) * len(slots))], 1)


def test_buffers_keep_their_addresses_and_forget_the_previous_step():
    buffers = PlanBuffers(64, torch.device("cpu"))
    tensors = (buffers.rows, buffers.bounds, buffers.slots, buffers.scales)
    addresses = [tensor.data_ptr() for tensor in tensors]
    first, total = uses_of([3, 20, 1], [(1, 2), (2,), (4,)])
    buffers.load(build_plan(first, total))
    assert len(buffers.lanes) == 2
    second, total = uses_of([2], [(5,)])
    buffers.load(build_plan(second, total))
    (lane,) = buffers.lanes
    assert (lane.num_short, lane.num_segments, lane.gate) == (1, 1, None)
    assert lane.bounds.tolist() == [0, 2]
    assert buffers.rows[:2].tolist() == [0, 1]
    buffers.clear()
    assert buffers.lanes == ()
    assert [tensor.data_ptr() for tensor in tensors] == addresses


def test_the_fullest_plan_fits_the_buffers_and_a_longer_one_is_refused():
    buffers = PlanBuffers(8, torch.device("cpu"))
    slots = tuple(range(MAX_LANES))
    uses = [
        RowUse(r, r + 1, tuple(r * 10 + s for s in slots), (1.0,) * MAX_LANES) for r in range(8)
    ]
    buffers.load(build_plan(uses, 8))
    assert len(buffers.lanes) == MAX_LANES
    with pytest.raises(ValueError, match="the buffers hold 8"):
        buffers.load(BatchPlan(9))


def slow_lane(uses: list[RowUse], lane_id: int) -> tuple[list[int], list[int], list[int], list]:
    """Rows, bounds, slots and scales of a lane, segment by segment in plain Python."""
    segments: dict[tuple[int, float], list[int]] = {}
    for use in uses:
        if len(use.slots) > lane_id and use.scales[lane_id] != 0.0:
            rows = segments.setdefault((use.slots[lane_id], use.scales[lane_id]), [])
            rows += range(use.start, use.stop)
    order = sorted(segments, key=lambda key: (len(segments[key]) >= GEMM_MIN_ROWS, key))
    bounds = [0]
    for key in order:
        bounds.append(bounds[-1] + len(segments[key]))
    rows = [row for key in order for row in segments[key]]
    return rows, bounds, [slot for slot, _ in order], [scale for _, scale in order]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_plan_equals_one_that_is_built_row_by_row(data):
    scales = st.sampled_from([1.0, 0.5, 0.0, -2.0])
    long = GEMM_MIN_ROWS
    length_of = st.sampled_from([1, 1, 1, 2, long // 2, long - 1, long, long + 24])
    lengths = data.draw(st.lists(length_of, max_size=20))
    uses, start = [], 0
    for length in lengths:
        chosen = data.draw(st.lists(st.tuples(st.integers(0, 4), scales), max_size=MAX_LANES))
        slots, factors = tuple(slot for slot, _ in chosen), tuple(scale for _, scale in chosen)
        uses.append(RowUse(start, start + length, slots, factors))
        start += length
    plan = build_plan(uses, start)
    expected = [slow_lane(uses, lane_id) for lane_id in range(MAX_LANES)]
    expected = [lane for lane in expected if lane[0]]
    assert len(plan.lanes) == len(expected)
    for lane, (rows, bounds, slots, factors) in zip(plan.lanes, expected, strict=True):
        assert lane.rows.tolist() == rows
        assert lane.bounds.tolist() == bounds
        assert lane.slots.tolist() == slots
        assert lane.scales.tolist() == factors
        sizes = np.diff(bounds)
        assert lane.num_short == (sizes < GEMM_MIN_ROWS).sum()
        kinds = (lane.rows.dtype, lane.bounds.dtype, lane.slots.dtype, lane.scales.dtype)
        assert kinds == (np.int32, np.int32, np.int32, np.float32)


def test_a_plan_that_is_loaded_again_is_there_again_and_another_one_replaces_it():
    buffers = PlanBuffers(16, torch.device("cpu"))
    plan = build_plan([RowUse(0, 2, (3,), (0.5,)), RowUse(2, 3, (1,), (1.0,))], 3)
    other = build_plan([RowUse(0, 3, (7,), (1.0,))], 3)

    def content() -> list[list[float]]:
        tensors = (buffers.rows[:3], buffers.bounds[:3], buffers.slots[:2])
        return [tensor.tolist() for tensor in (*tensors, buffers.scales[:2])]

    buffers.load(plan)
    first = content()
    buffers.clear()
    assert not buffers.lanes
    buffers.load(plan)
    assert content() == first
    assert len(buffers.lanes) == 1
    buffers.load(other)
    assert buffers.slots[0] == 7
    buffers.load(plan)
    assert content() == first


def test_which_sites_a_plan_adapts_is_known_before_they_are_reached():
    cells = torch.full((3, 4, layout.COLUMNS), -1)
    cells[0, 1, layout.OFFSET] = 0
    cells[2, 3, layout.OFFSET] = 5
    buffers = PlanBuffers(8, torch.device("cpu"), cells)
    assert not buffers.adapts([1, 3])
    buffers.load(build_plan([RowUse(0, 2, (0,), (1.0,))], 2))
    assert buffers.adapts([0, 1])
    assert not buffers.adapts([0, 2, 3])
    buffers.load(build_plan([RowUse(0, 2, (1, 2), (1.0, 1.0))], 2))
    assert buffers.adapts([3])
    assert not buffers.adapts([1])
    buffers.clear()
    assert not buffers.adapts([3])
