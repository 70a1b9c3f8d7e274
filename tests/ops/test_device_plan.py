"""A plan on its way to a device: one copy, fixed addresses, and nothing of it read back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyadapt.ops import cells as layout
from polyadapt.ops.device import Done, Host
from polyadapt.ops.device_plan import CHUNK, COLUMNS, FIRST_CHUNK, GATE_WIDTH, DevicePlan
from polyadapt.ops.gated_matmul import Site, gated_embedding_, gated_matmul_
from polyadapt.ops.overrides import add_dense_
from polyadapt.ops.pinned_buffers import PinnedBuffers
from polyadapt.ops.plan import PlanBuffers, RowUse, build_plan
from polyadapt.ops.slot_table import SlotTable

CPU = torch.device("cpu")


class Pending:
    """The mark of work that is done once somebody waits for it."""

    def __init__(self, log: list[str], number: int) -> None:
        self.log, self.number = log, number

    def wait(self) -> None:
        self.log.append(f"wait {self.number}")


class Late(Host):
    """A device on which nothing is done until it is waited for."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.num_marks = 0

    def mark(self) -> Done:
        self.num_marks += 1
        self.log.append(f"mark {self.num_marks}")
        return Pending(self.log, self.num_marks)  # type: ignore[return-value]


class Unreadable(Host):
    """A device whose tensors hold nothing that could be read."""

    @property
    def torch_device(self) -> torch.device:
        return torch.device("meta")


def slot_table(ranks: list[int], device: Host | None = None) -> tuple[torch.Tensor, SlotTable]:
    cells = torch.tensor(
        [[[-1, 0, 0, 0], [slot * 100, rank, 0, 0]] for slot, rank in enumerate(ranks)]
    )
    table = SlotTable(cells, device or Host())
    for slot in range(len(ranks)):
        table.update(slot)
    return cells, table


# --------------------------------------------------------------------------- staging
def test_a_staging_buffer_is_written_again_once_its_copy_is_done_and_not_before():
    device = Late()
    staging = PinnedBuffers(device)
    for number in range(3):
        with staging.turn(8) as buffer:
            device.log.append(f"write {number}")
            assert len(buffer) >= 8
    assert device.log == [
        "write 0", "mark 1", "write 1", "mark 2", "wait 1", "write 2", "mark 3",
    ]  # fmt: skip


def test_staging_buffers_take_turns_and_grow():
    staging = PinnedBuffers(Host())
    addresses = []
    for nbytes in (8, 8, 8, 8, 64):
        with staging.turn(nbytes) as buffer:
            addresses.append(buffer.data_ptr())
            assert len(buffer) >= nbytes
    assert addresses[0] == addresses[2] != addresses[1] == addresses[3]


# --------------------------------------------------------------------------- the work table
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_chunks_cover_every_row_of_every_segment_once_and_in_order(data):
    scales = st.sampled_from([1.0, 0.5, -2.0, 0.0])
    lengths = st.sampled_from([1, 1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
    uses, start = [], 0
    for length in data.draw(st.lists(lengths, max_size=8)):
        chosen = data.draw(st.lists(st.tuples(st.integers(0, 3), scales), max_size=3))
        slots, factors = tuple(slot for slot, _ in chosen), tuple(scale for _, scale in chosen)
        gates = tuple(
            np.arange(width, dtype=np.float32) if width else None
            for width in data.draw(st.lists(st.integers(0, 3), max_size=len(chosen)))
        )
        uses.append(RowUse(start, start + length, slots, factors, gates))
        start += length
    plan = build_plan(uses, start)
    _, table = slot_table([1, 2, 40, 7])
    made = DevicePlan(500, Host(), table)
    placed = made.load(plan)
    assert len(placed) == len(plan.lanes)
    for lane_id, (lane, there) in enumerate(zip(plan.lanes, placed, strict=True)):
        work = there.work
        assert work is not None
        num_chunks, width = work.plan[2 * lane_id : 2 * lane_id + 2].tolist()
        assert (work.lane, work.num_chunks) == (lane_id, num_chunks)
        assert width == (0 if lane.gate is None else lane.gate.shape[1])
        found = []
        chunks = work.plan[work.first_chunk :][: COLUMNS * num_chunks].view(-1, COLUMNS)
        for first, count, slot, bits in chunks.tolist():
            assert 0 < count <= CHUNK
            scale = float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))
            found += [(row, slot, scale) for row in work.plan[first : first + count].tolist()]
        expected = [
            (row, int(lane.slots[s]), float(lane.scales[s]))
            for s in range(lane.num_segments)
            for row in lane.rows[lane.bounds[s] : lane.bounds[s + 1]].tolist()
        ]
        assert found == expected
        assert num_chunks == sum(-(-size // CHUNK) for size in np.diff(lane.bounds).tolist())
        assert work.max_rank == max([1, 2, 40, 7][slot] for slot in lane.slots.tolist())
        if lane.gate is not None:
            assert there.gate is not None
            assert there.gate.tolist() == lane.gate.tolist()
            assert work.gate[: there.gate.numel()].tolist() == there.gate.flatten().tolist()


def test_what_a_captured_launch_reads_never_moves(monkeypatch):
    _, table = slot_table([3, 3])
    made = DevicePlan(40, Host(), table)
    gates = [np.ones(width, np.float32) for width in (3, GATE_WIDTH)]
    plans = [
        build_plan([RowUse(0, 1, (0,), (1.0,))], 1),
        build_plan([RowUse(i, i + 1, (i % 2,), (1.0,), (gates[i % 2],)) for i in range(40)], 40),
        build_plan([RowUse(0, 40, (1, 0), (1.0, 1.0), (None, gates[0]))], 40),
    ]
    works = [made.load(plan)[0].work for plan in plans]
    assert works[0] is not None
    first = made.widened(works[0], 40)
    assert (first.num_chunks, first.max_rank) == (40, 16)
    assert made.widened(first, 2).num_chunks == 2
    for plan in plans:
        work = made.load(plan)[0].work
        assert work is not None
        assert work.is_fixed
        assert (work.plan.data_ptr(), work.gate.data_ptr()) == (
            first.plan.data_ptr(),
            first.gate.data_ptr(),
        )
        assert (work.lane, work.first_chunk) == (first.lane, first.first_chunk) == (0, FIRST_CHUNK)
    wide = np.ones(GATE_WIDTH + 1, np.float32)
    work = made.load(build_plan([RowUse(0, 40, (0,), (1.0,), (wide,))], 40))[0].work
    assert work is not None
    assert not work.is_fixed


def test_a_plan_goes_to_the_device_by_one_copy_and_its_gates_by_one_each(monkeypatch):
    _, table = slot_table([3, 3])
    device = Late()
    made = DevicePlan(40, device, table)
    sent: list[int] = []
    copy = torch.Tensor.copy_

    def counted(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False):
        assert non_blocking
        sent.append(target.numel())
        return copy(target, source)

    monkeypatch.setattr(torch.Tensor, "copy_", counted)
    made.load(build_plan([RowUse(0, 9, (0, 1), (1.0, 1.0))], 9))
    assert sent == [FIRST_CHUNK + 2 * COLUMNS + 2 * 9]
    gate = np.ones(5, np.float32)
    made.load(build_plan([RowUse(0, 9, (0,), (1.0,), (gate,))], 9))
    assert sent[1:] == [FIRST_CHUNK + COLUMNS + 9, 9 * 5]
    assert device.log == ["mark 1", "mark 2"]


# --------------------------------------------------------------------------- the slots' table
def test_ranks_count_where_a_linear_stands_and_components_are_not_weighed():
    routing = layout.Routing(layout.Router.SOFTMAX, 4).code
    experts = layout.Routing(layout.Router.EXPERTS, 4).code
    cells = torch.tensor(
        [
            [[0, 3, 0, 0], [9, 7, 0, 0], [-1, 90, 0, routing]],
            [[0, 3, 0, 0], [-1, 9, 0, 0], [20, 80, 0, experts]],
            [[-1, 3, 0, 0], [-1, 9, 0, 0], [20, 80, 0, routing]],
        ]
    )
    table = SlotTable(cells, Host(), torch.tensor([True, False, True]))
    assert (table.cells == -1).all()
    for slot in range(3):
        table.update(slot)
    assert table.max_ranks.tolist() == [3, 3, 0]
    assert table.is_routed.tolist() == [False, False, True]
    assert torch.equal(table.cells, cells)


# --------------------------------------------------------------------------- what the host reads
@pytest.mark.parametrize("has_kernels", [True, False])
def test_nothing_that_lies_on_the_device_is_read_on_the_host(has_kernels):
    device = Unreadable()
    num_in, width = 12, 8
    routed = layout.Routing(layout.Router.SOFTMAX, 2, top_k=1)
    weighed = layout.Routing(layout.Router.TABLE, 2, has_router=False, value=0)
    sizes = [(3, layout.BIAS, 0), (4, 0, routed.code), (4, 0, weighed.code), (2, layout.DENSE, 0)]
    cells = torch.tensor(
        [
            [[slot * 1000, rank, bits, code], [slot * 1000, rank, 0, 0 if slot == 1 else code]]
            for slot, (rank, bits, code) in enumerate(sizes)
        ]
    )
    has_overrides = np.array([False, False, False, True])
    slots = SlotTable(cells, device)
    for slot in range(len(sizes)):
        slots.update(slot)
    on_device = DevicePlan(64, device, slots if has_kernels else None)
    buffers = PlanBuffers(64, device.torch_device, cells, has_overrides, on_device)
    buffers.usage = torch.zeros(len(sizes), layout.USAGE_COLUMNS, device=device.torch_device)
    arena = torch.empty(5000, device=device.torch_device)
    site, embedding = (Site(i, arena, cells, buffers, slots.cells) for i in range(2))
    gate, table = np.ones(3, np.float32), np.ones((2, 2), np.float32)
    uses = [RowUse(row, row + 1, (row % 4,), (0.5,), (gate,), ()) for row in range(8)]
    uses.append(RowUse(9, 11, (2, 1), (1.0, 1.0), (None, None), (table, None)))
    buffers.load(build_plan(uses, 12))
    y = torch.empty(12, width, device=device.torch_device)
    x = torch.empty(12, num_in, device=device.torch_device)
    gated_matmul_(y, x, site)
    ids = torch.zeros(12, dtype=torch.int64, device=device.torch_device)
    gated_embedding_(y, ids, num_in, embedding)
    assert list(buffers.overrides) == [0]
    add_dense_(y, x, site, [(0, 0, width)])
    assert buffers.adapts([0])
    index = buffers.overrides[0][0].index
    assert isinstance(index, torch.Tensor)
    assert index.device == device.torch_device, "indexing by the host's rows would wait"
    forms = []
    for slot in range(len(sizes)):
        buffers.load(build_plan([RowUse(0, 2, (slot,), (1.0,))], 2))
        forms.append(buffers.capture_form)
    assert forms == [16 if has_kernels else None, None, None, None]


def test_the_torch_form_serves_a_device_as_it_does_the_host(monkeypatch):
    """What the plan sends, the form reads: rows, gates and tables that it indexes by."""
    from polyadapt.ops import native

    generator = torch.Generator().manual_seed(3)
    weighed = layout.Routing(layout.Router.TABLE, 2, has_router=False, value=0)
    cells = torch.tensor([[[0, 3, 0, 0]], [[100, 4, 0, weighed.code]]])
    arena = torch.randn(300, generator=generator)
    gate = np.array([0, 2], np.float32)
    weights = np.array([[0.5, 0.0]], np.float32)
    uses = [RowUse(row, row + 1, (0,), (0.5,), (gate,)) for row in (0, 2, 5)]
    uses += [RowUse(row, row + 1, (1,), (1.0,), (None,), (weights,)) for row in (1, 3)]
    plan = build_plan(sorted(uses, key=lambda use: use.start), 7)
    x, y = torch.randn(7, 12, generator=generator), torch.randn(7, 8, generator=generator)
    monkeypatch.setattr(native, "is_available", lambda: False)
    found = []
    makers: list[Callable[[], DevicePlan | None]] = [
        lambda: None,
        lambda: DevicePlan(7, Host(), None),
    ]
    for make in makers:
        buffers = PlanBuffers(7, CPU, cells, None, make())
        buffers.load(plan)
        found.append(y.clone())
        gated_matmul_(found[-1], x, Site(0, arena, cells, buffers))
    assert torch.equal(*found)
    assert not torch.equal(found[0], y)
