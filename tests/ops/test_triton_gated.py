"""The Triton kernels against the row-by-row specification, and what they promise about bits and
about captured launches.

They are interpreted on the host, which proves indexing and nothing about races, bfloat16 products
or speed; with TRITON_INTERPRET=0 the same tests run on a CUDA device.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from polyadapt.ops import cells as layout
from polyadapt.ops import device_plan, triton_op
from polyadapt.ops.device import open_device
from polyadapt.ops.device_plan import CHUNK, GATE_WIDTH, DevicePlan, rank_bucket
from polyadapt.ops.gated_matmul import Site, gated_embedding_, gated_matmul_
from polyadapt.ops.plan import BatchPlan, PlanBuffers, RowUse, build_plan
from polyadapt.ops.reference import reference_matmul
from polyadapt.ops.slot_table import SlotTable

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is made for Linux alone"
)

# Of the largest |y|: sums in another order; h and y rounded once each, x not at all.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = (torch.float32, torch.bfloat16)
BIAS, OUT_SCALE = layout.BIAS, layout.OUT_SCALE
TAILS = (BIAS, OUT_SCALE, 0, BIAS | OUT_SCALE)  # of slot 0, 1, ...
ON = open_device("cuda" if os.environ.get("TRITON_INTERPRET") == "0" else "cpu")


@dataclass
class Rig:
    """Adapters scattered over an arena with NaN between them, and buffers that take plans to where
    the kernels read them.
    """

    arena: torch.Tensor  # on the host; the kernels read a copy of it
    cells: torch.Tensor  # int64 [slots, sites, 4], the host's
    slots: SlotTable
    plan: PlanBuffers

    def site(self, site_id: int) -> Site:
        arena = self.arena.to(ON.torch_device)
        return Site(site_id, arena, self.cells, self.plan, self.slots.cells)

    def add(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        site: int = 0,
        parts: list[tuple[int, int, int]] | None = None,
    ) -> None:
        """Run the product on the device; y and x lie on the host."""
        there = y.to(ON.torch_device)
        gated_matmul_(there, x.to(ON.torch_device), self.site(site), parts)
        y.copy_(there)


def rig(
    ranks: list[list[int]],
    num_in: int,
    widths: list[int],
    dtype: torch.dtype = torch.float32,
    *,
    num_rows: int = 96,
    tails: tuple[int, ...] = TAILS,
    transposed: bool = False,
    lead: int = 13,
    gap: int = 5,
) -> Rig:
    """ranks: by slot and site, -1 where there is no cell; `lead` elements before the first one and
    `gap` behind each.
    """
    generator = torch.Generator().manual_seed(len(ranks) * 31 + num_in)
    cells = torch.full((len(ranks), len(widths), layout.COLUMNS), -1)
    blocks, offset = [torch.full((lead,), torch.nan)], lead
    for slot in np.random.default_rng(3).permutation(len(ranks)).tolist():
        for site, (rank, width) in enumerate(zip(ranks[slot], widths, strict=True)):
            if rank < 0:
                continue
            bits = tails[(slot + site) % len(tails)]
            cells[slot, site] = torch.tensor([offset, rank, bits, 0])
            a = torch.randn(rank, num_in, generator=generator) / num_in**0.5
            b = torch.randn(rank, width, generator=generator) / max(rank, 1) ** 0.5
            num_tails = bool(bits & BIAS) + bool(bits & OUT_SCALE)
            tail = torch.randn(num_tails * width, generator=generator)
            behind = torch.full((gap,), torch.nan)
            for block in (a.t() if transposed else a, b, tail, behind):
                blocks.append(block.reshape(-1))
                offset += block.numel()
    slots = SlotTable(cells, ON)
    for slot in range(len(ranks)):
        slots.update(slot)
    arena = torch.cat(blocks).to(dtype)
    plan = PlanBuffers(num_rows, ON.torch_device, cells, None, DevicePlan(num_rows, ON, slots))
    return Rig(arena, cells, slots, plan)


def uses_of(*segments: tuple[int, int], first: int = 1, gap: int = 1) -> tuple[list[RowUse], int]:
    """(slot, rows) of each run, `gap` rows of the base between them."""
    uses, start = [], first
    for slot, length in segments:
        uses.append(RowUse(start, start + length, (slot,), (1.0 + slot / 4,)))
        start += length + gap
    return uses, start


def data(num_rows: int, num_in: int, num_out: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, num_in, generator=generator).to(dtype)
    return x, torch.randn(num_rows, num_out, generator=generator).to(dtype)


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    allowed = TOLERANCE[dtype] * float(expected.abs().max())
    assert float((found.float() - expected).abs().max()) <= allowed


def check(
    made: Rig, plan: BatchPlan, num_in: int, num_out: int, dtype: torch.dtype, site: int = 0
) -> None:
    x, y = data(plan.num_rows, num_in, num_out, dtype)
    expected = reference_matmul(y, x, made.arena, made.cells, plan, site)
    before = y.clone()
    made.plan.load(plan)
    made.add(y, x, site)
    assert_close(y, expected, torch.bfloat16 if made.arena.dtype is torch.bfloat16 else dtype)
    served = {int(row) for lane in plan.lanes for row in lane.rows}
    outside = sorted(set(range(plan.num_rows)) - served)
    assert torch.equal(y[outside], before[outside]), "a base row was touched"


# --------------------------------------------------------------------------- what they compute
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_unpadded_ranks_in_one_launch_equal_the_specification(dtype):
    ranks = [0, 1, 3, 16, 17, 64, 130]
    made = rig([[rank] for rank in ranks], 150, [140], dtype)
    uses, num_rows = uses_of((6, 1), (0, 2), (5, 17), (1, 1), (4, 3), (2, CHUNK), (3, 1), (6, 2))
    check(made, build_plan(uses, num_rows), 150, 140, dtype)


@pytest.mark.parametrize(("num_in", "num_out"), [(1, 1), (13, 7), (128, 128), (257, 129)])
def test_odd_sizes_equal_the_specification(num_in, num_out):
    made = rig([[2], [5], [33]], num_in, [num_out])
    uses, num_rows = uses_of((0, 1), (1, 2), (2, 3))
    check(made, build_plan(uses, num_rows), num_in, num_out, torch.float32)


def test_a_rank_of_600_equals_the_specification():
    made = rig([[600], [1]], 40, [50])
    uses, num_rows = uses_of((0, 2), (1, 1))
    check(made, build_plan(uses, num_rows), 40, 50, torch.float32)


@pytest.mark.parametrize("arena_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_and_weights_may_be_of_two_dtypes(dtype, arena_dtype):
    made = rig([[4], [0], [-1]], 20, [24], arena_dtype)
    uses, num_rows = uses_of((0, 2), (1, 1), (2, 3))
    check(made, build_plan(uses, num_rows), 20, 24, dtype)


@pytest.mark.parametrize("num_in", [1100, 2200])  # two parts of unequal length, and four
def test_a_long_sum_that_is_cut_equals_the_specification(num_in):
    assert triton_op.num_splits(num_in) == num_in // 512
    made = rig([[3], [20]], num_in, [20])
    uses, num_rows = uses_of((0, 1), (1, 2))
    check(made, build_plan(uses, num_rows), num_in, 20, torch.float32)


def test_segments_of_any_length_are_cut_into_chunks():
    made = rig([[3], [2]], 24, [20])
    lengths = (CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3)
    uses, num_rows = uses_of(*((i % 2, length) for i, length in enumerate(lengths)))
    plan = build_plan(uses, num_rows)
    check(made, plan, 24, 20, torch.float32)
    (lane,) = made.plan.lanes
    assert lane.work is not None
    # 15 + 17 rows of one slot and 16 + 35 of the other.
    assert lane.work.num_chunks == 2 + 4


def test_lanes_scales_and_gates_of_any_width_add_up():
    made = rig([[4], [20], [3], [40]], 32, [40])
    rng = np.random.default_rng(1)
    short, long = (rng.normal(size=width).astype(np.float32) for width in (3, 33))
    short[1] = long[:20] = 0.0
    uses = [
        RowUse(0, 1, (0, 1), (1.0, 0.5), (short, None)),
        RowUse(1, 4, (2,), (-1.5,)),
        RowUse(4, 24, (3, 1), (1.0, 2.0), (long, short)),
        RowUse(24, 25, (1,), (0.0,)),
        RowUse(25, 27, (1,), (1.0,)),  # ungated, beside a gate that is wider than its rank
    ]
    check(made, build_plan(uses, 28), 32, 40, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sites_that_share_their_input_take_one_launch_of_each_kernel(dtype, monkeypatch):
    widths, num_in = [8, 140, 24], 20
    made = rig([[3, 5, 0], [16, -1, 35], [0, 4, 9]], num_in, widths, dtype)
    uses, num_rows = uses_of((0, 1), (1, 17), (2, 3))
    plan = build_plan(uses, num_rows)
    x, y = data(num_rows, num_in, sum(widths) + 3, dtype)
    expected, parts, column = y.float(), [], 3  # not from the first column on
    for site, width in enumerate(widths):
        columns = slice(column, column + width)
        own = reference_matmul(y[:, columns], x, made.arena, made.cells, plan, site)
        expected[:, columns] = own
        parts.append((site, column, width))
        column += width
    made.plan.load(plan)
    grids = launches(monkeypatch)
    made.add(y, x, 0, parts)
    assert_close(y, expected, dtype)
    assert grids == [("shrink", (4, 3 * 2, 1)), ("expand", (4, 2, 3))]


def test_more_sites_than_a_launch_takes_are_served_by_several():
    widths, num_in = [5, 6, 7, 8, 9, 10], 12
    made = rig([[2, 1, 0, 3, 4, 2]], num_in, widths)
    plan = build_plan([RowUse(0, 2, (0,), (0.5,))], 3)
    made.plan.load(plan)
    x, y = data(3, num_in, sum(widths), torch.float32)
    expected, parts, column = y.clone(), [], 0
    for site, width in enumerate(widths):
        columns = slice(column, column + width)
        own = reference_matmul(y[:, columns], x, made.arena, made.cells, plan, site)
        expected[:, columns] = own
        parts.append((site, column, width))
        column += width
    made.add(y, x, 0, parts)
    assert_close(y, expected, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embeddings_gather_their_columns(dtype):
    vocab, width = 50, 24
    made = rig([[3], [0], [35], [8]], vocab, [width], dtype, transposed=True)
    uses, num_rows = uses_of((0, 1), (1, 4), (2, 18), (3, 2))
    gate = np.array([0, 1, 2], np.float32)
    uses.append(RowUse(0, 1, (2,), (0.5,), (gate,)))
    plan = build_plan(uses, num_rows)
    ids = torch.randint(0, vocab, (num_rows,), generator=torch.Generator().manual_seed(2))
    y = torch.randn(num_rows, width).to(dtype)
    straight = made.arena.clone()  # the specification reads A row-major
    for offset, rank, *_ in made.cells[:, 0].tolist():
        block = made.arena[offset : offset + vocab * rank].view(vocab, rank)
        straight[offset : offset + vocab * rank] = block.t().reshape(-1)
    one_hot = torch.nn.functional.one_hot(ids, vocab).float()
    expected = reference_matmul(y, one_hot, straight, made.cells, plan, 0)
    made.plan.load(plan)
    there = y.to(ON.torch_device)
    gated_embedding_(there, ids.to(ON.torch_device), vocab, made.site(0))
    y = there.cpu()
    assert_close(y, expected, dtype)


def test_x_and_y_may_be_slices_of_wider_tensors():
    made = rig([[4]], 20, [30])
    made.plan.load(build_plan([RowUse(0, 3, (0,), (1.0,))], 3))
    x, y = (one.to(ON.torch_device) for one in data(3, 20, 30, torch.float32))
    wide_x, wide_y = (torch.randn(3, width, device=ON.torch_device) for width in (50, 70))
    wide_x[:, 10:30], wide_y[:, 40:70] = x, y
    around = wide_y[:, :40].clone()
    gated_matmul_(y, x, made.site(0))
    gated_matmul_(wide_y[:, 40:70], wide_x[:, 10:30], made.site(0))
    assert torch.equal(wide_y[:, 40:70], y)
    assert torch.equal(wide_y[:, :40], around)


# --------------------------------------------------------------------------- NaN
def test_a_closed_gate_keeps_a_nan_component_out_and_only_of_its_own_rows():
    made = rig([[4]], 8, [8], tails=(0,))
    offset = int(made.cells[0, 0, 0])
    made.arena[offset + 3 * 8 : offset + 4 * 8] = torch.nan  # the last rank-one component
    shut, ajar = np.array([1, 0.5, 1, 0], np.float32), np.ones(4, np.float32)
    uses = [RowUse(0, 2, (0,), (1.0,), (shut,)), RowUse(2, 3, (0,), (1.0,), (ajar,))]
    made.plan.load(build_plan(uses, 3))
    x, y = data(3, 8, 8, torch.float32)
    made.add(y, x)
    assert y.isnan().any(1).tolist() == [False, False, True]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, of 0 * inf
def test_nan_of_one_row_or_adapter_stays_there():
    made = rig([[4], [4], [0]], 8, [8], tails=(0, 0, OUT_SCALE))
    made.arena[int(made.cells[1, 0, 0])] = torch.nan
    uses, num_rows = uses_of((0, 3), (1, 2), (0, 2), (2, 2))
    made.plan.load(build_plan(uses, num_rows))
    x, y = data(num_rows, 8, 8, torch.float32)
    x[2] = torch.nan
    y[0] = torch.nan  # of the base alone
    y[1, 3] = torch.inf  # only added to, and not scaled
    made.add(y, x)
    assert y.isnan().any(1).nonzero().flatten().tolist() == [0, 2, 5, 6]
    assert y[1, 3] == torch.inf


# --------------------------------------------------------------------------- bits
def bits_case() -> tuple[Rig, torch.Tensor, torch.Tensor]:
    made = rig([[3], [40], [130], [64]], 1100, [140], torch.bfloat16, num_rows=80)
    x, y = data(48, 1100, 140, torch.bfloat16)
    return made, x, y


def run(made: Rig, uses: list[RowUse], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    made.plan.load(build_plan(uses, len(x)))
    y = y.clone()
    made.add(y, x)
    return y


def test_a_rows_bits_do_not_depend_on_its_neighbours():
    made, x, y = bits_case()
    gate = np.linspace(0, 1, 40, dtype=np.float32)
    slot_of = [(1, 0, 2, 3)[row % 4] if row % 7 else 1 for row in range(24)]

    def uses(rows: list[int]) -> list[RowUse]:
        gates = {row: (gate,) if slot_of[row] == 1 else () for row in rows}
        return [
            RowUse(at, at + 1, (slot_of[row],), (0.5,), gates[row]) for at, row in enumerate(rows)
        ]

    rows = list(range(24))
    together = run(made, uses(rows), x[:24], y[:24])
    permuted = np.random.default_rng(2).permutation(24).tolist()
    again = run(made, uses(permuted), x[permuted], y[permuted])
    assert torch.equal(again, together[permuted])
    for row in (0, 3, 9):  # of ranks 40, 64 and 3: alone, no larger rank is in the plan
        alone = run(made, uses([row]), x[row : row + 1], y[row : row + 1])
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("transposed", [False, True])
def test_where_a_cell_lies_changes_no_bit(transposed):
    """Cells that lie evenly are read several elements at a time."""
    uses = [RowUse(0, 2, (0,), (0.5,)), RowUse(2, 5, (1,), (1.0,)), RowUse(5, 6, (2,), (1.0,))]
    x, y = data(6, 136, 152, torch.float32)
    ids, found = torch.arange(6) * 20, []
    for lead, gap in ((16, 8), (13, 5), (16, 1)):
        made = rig([[3], [40], [0]], 136, [152], lead=lead, gap=gap, transposed=transposed)
        made.plan.load(build_plan(uses, 6))
        there = y.clone().to(ON.torch_device)
        if transposed:
            gated_embedding_(there, ids.to(ON.torch_device), 136, made.site(0))
        else:
            gated_matmul_(there, x.to(ON.torch_device), made.site(0))
            plan = build_plan(uses, 6)
            expected = reference_matmul(y, x, made.arena, made.cells, plan, 0)
            assert_close(there.cpu(), expected, torch.float32)
        found.append(there)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


# --------------------------------------------------------------------------- captured launches
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """The grids of all launches from now on."""
    from polyadapt.ops import triton_gated

    found: list[tuple[str, tuple[int, ...]]] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(triton_gated, name)

        def __getitem__(self, grid: tuple[int, ...]):
            found.append((self.name, grid))
            return self.kernel[grid]

    recorders = {name: Recorder(name) for name in ("shrink", "expand")}
    for name, recorder in recorders.items():
        monkeypatch.setattr(triton_gated, name, recorder)
    return found


class Replay:
    """Calls of the registered op as a graph keeps them: arguments by address, plan or no plan."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[object, ...]] = []
        op = torch.ops.polyadapt.gated_matmul_

        def keep(*args: object) -> None:
            self.calls.append(args)

        monkeypatch.setattr(triton_op, "gated_matmul_", self._checked(keep, op))

    @staticmethod
    def _checked(keep, op):
        def call(y, x, arena, cells, work, parts):
            flat = [n for part in parts for n in part]
            keep(
                op, y, x, arena, cells, work.plan, work.gate, flat, work.lane, work.first_chunk,
                work.num_chunks, work.max_rank,
            )  # fmt: skip

        return call

    def replay(self) -> None:
        for op, *args in self.calls:
            op(*args)


def test_a_launch_that_was_captured_for_the_worst_case_serves_any_plan_that_fits(monkeypatch):
    made = rig([[3], [16], [5]], 20, [24], num_rows=12)
    x, y = (torch.zeros(12, width, device=ON.torch_device) for width in (20, 24))
    graph = Replay(monkeypatch)
    made.plan.load(build_plan([RowUse(3, 4, (1,), (1.0,))], 12))
    with made.plan.widened(12):
        gated_matmul_(y, x, made.site(0))
    assert len(graph.calls) == 1
    gate = np.array([0, 2, 1], np.float32)
    plans = [
        build_plan([RowUse(i, i + 1, (i % 3,), (1.0,)) for i in range(12)], 12),
        build_plan([RowUse(1, 7, (1,), (0.5,))], 12),
        build_plan([RowUse(0, 2, (0,), (1.0,), (gate,)), RowUse(2, 3, (1,), (1.0,))], 12),
        build_plan([RowUse(0, 2, (0,), (1.0,))], 12),  # ungated again
    ]
    for number, plan in enumerate(plans):
        made.plan.load(plan)
        assert made.plan.capture_form == 16
        new_x, new_y = data(12, 20, 24, torch.float32)
        new_x *= number + 1
        x.copy_(new_x)
        y.copy_(new_y)
        graph.replay()
        expected = reference_matmul(new_y, new_x, made.arena, made.cells, plan, 0)
        assert_close(y.cpu(), expected, torch.float32)


def test_chunks_behind_the_count_are_not_looked_at(monkeypatch):
    made = rig([[3], [16]], 20, [24], num_rows=12)
    plan = build_plan([RowUse(0, 2, (0,), (1.0,)), RowUse(4, 5, (1,), (1.0,))], 12)
    x, y = data(12, 20, 24, torch.float32)
    expected = reference_matmul(y, x, made.arena, made.cells, plan, 0)
    x, y = x.to(ON.torch_device), y.to(ON.torch_device)
    graph = Replay(monkeypatch)
    made.plan.load(plan)
    with made.plan.widened(12):
        gated_matmul_(y, x, made.site(0))
    work = made.plan.lanes[0].work
    assert work is not None
    assert work.num_chunks == 2
    behind = work.first_chunk + 2 * device_plan.COLUMNS + len(made.plan.device_rows)
    work.plan[behind:] = 1 << 30  # what earlier plans left: rows and slots anywhere
    graph.replay()
    assert_close(y.cpu(), expected, torch.float32)


def test_which_plans_a_captured_launch_may_serve():
    made = rig([[3], [300]], 8, [8], num_rows=8)
    wide, narrow = np.ones(GATE_WIDTH + 1, np.float32), np.ones(GATE_WIDTH, np.float32)

    def form_of(*uses: RowUse) -> Hashable | None:
        made.plan.load(build_plan(list(uses), 8))
        return made.plan.capture_form

    assert form_of() == ()
    assert form_of(RowUse(0, 2, (0,), (1.0,))) == 16
    assert form_of(RowUse(0, 8, (1,), (1.0,), (narrow,))) == 1024
    assert form_of(RowUse(0, 8, (1,), (1.0,), (wide,))) is None
    assert form_of(RowUse(0, 1, (0, 1), (1.0, 1.0))) is None
    made.cells[0, 0, layout.ROUTING] = layout.Routing(layout.Router.SOFTMAX, 3).code
    made.slots.update(0)
    assert form_of(RowUse(0, 2, (0,), (1.0,))) is None
    assert form_of(RowUse(0, 2, (1,), (1.0,))) == 1024
    made.cells[0] = -1
    made.slots.update(0)
    assert form_of(RowUse(0, 2, (0,), (1.0,))) == 16


def test_ranks_are_captured_in_a_few_sizes():
    ranks = (0, 1, 16, 17, 64, 65, 256, 600, 1025)
    assert [rank_bucket(rank) for rank in ranks] == [16, 16, 16, 64, 64, 256, 256, 1024, 2048]


# --------------------------------------------------------------------------- who serves what
def test_cells_that_weigh_their_components_are_left_to_the_torch_form_which_serves_them(
    monkeypatch,
):
    num_in, width = 12, 10
    made = rig([[4], [4], [3]], num_in, [width], tails=(0,))
    rank = int(made.cells[0, 0, layout.RANK])
    routing = layout.Routing(layout.Router.SOFTMAX, 2, top_k=1)
    size = layout.num_elements(num_in, width, rank, 0, routing.code)
    start = len(made.arena)
    generator = torch.Generator().manual_seed(1)
    made.arena = torch.cat([made.arena, torch.randn(size, generator=generator)])
    made.cells[0, 0] = torch.tensor([start, rank, 0, routing.code])
    made.slots.update(0)
    uses, num_rows = uses_of((0, 3), (1, 2), (0, 1), (2, 1))
    plan = build_plan(uses, num_rows)
    noted: list[tuple[int, int]] = []
    made.plan.observer = lambda site_id, slot, weights: noted.append((slot, len(weights)))
    check(made, plan, num_in, width, torch.float32)
    assert noted == [(0, 4)]
    # Another site of the same adapter may have nothing of the kind.
    assert made.slots.is_routed.tolist() == [True, False, False]


def test_the_kernels_read_the_cells_on_the_device_once_they_are_told_that_they_changed():
    made = rig([[3]], 8, [8], tails=(BIAS,))
    plan = build_plan([RowUse(0, 2, (0,), (1.0,))], 2)
    x, y = data(2, 8, 8, torch.float32)
    made.plan.load(plan)
    kept = made.cells.clone()
    made.cells[0, 0, layout.OFFSET] = -1
    first = y.clone()
    made.add(first, x)
    expected = reference_matmul(y, x, made.arena, kept, plan, 0)
    assert_close(first, expected, torch.float32)
    made.slots.update(0)
    made.add(y, x)
    assert torch.equal(y, data(2, 8, 8, torch.float32)[1])


def test_two_plans_in_a_row_do_not_mix_and_a_cleared_one_runs_nothing(monkeypatch):
    made = rig([[3], [5]], 8, [8])
    x, y = data(6, 8, 8, torch.float32)
    grids = launches(monkeypatch)
    for uses in ([RowUse(0, 6, (0,), (1.0,))], [RowUse(2, 3, (1,), (2.0,))]):
        plan = build_plan(uses, 6)
        expected = reference_matmul(y, x, made.arena, made.cells, plan, 0)
        made.plan.load(plan)
        made.add(y, x)
        assert_close(y, expected, torch.float32)
    made.plan.clear()
    del grids[:]
    made.add(y, x)
    assert grids == []


def test_whoever_traces_sees_one_op_that_writes_y():
    class Seen(TorchDispatchMode):
        calls: ClassVar[list[tuple[str, bool]]] = []  # of which op, and whether y was in its hands

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls.append((str(func), any(one is y for one in args)))
            return None if func.namespace == "polyadapt" else func(*args, **(kwargs or {}))

    made = rig([[3]], 8, [8])
    made.plan.load(build_plan([RowUse(0, 2, (0,), (1.0,))], 2))
    x, y = (one.to(ON.torch_device) for one in data(2, 8, 8, torch.float32))
    before = y.clone()
    site = made.site(0)
    with Seen() as seen:
        gated_matmul_(y, x, site)
    assert [name for name, has_y in seen.calls if has_y] == ["polyadapt.gated_matmul_.default"]
    assert torch.equal(y, before), "something else ran"
    schema = torch.ops.polyadapt.gated_matmul_.default._schema
    assert [one.name for one in schema.arguments if one.alias_info is not None] == ["y"]
    assert schema.arguments[0].alias_info.is_write


def test_wrong_tensors_are_refused():
    made = rig([[3]], 8, [8])
    made.plan.load(build_plan([RowUse(0, 2, (0,), (1.0,))], 2))
    x, y = (one.to(ON.torch_device) for one in data(2, 8, 8, torch.float32))
    for bad_y, bad_x in ((y, x[:1]), (y, x.half()), (y.half(), x), (y.t(), x), (y, x.t()[:2])):
        with pytest.raises(ValueError, match="float32 or bfloat16"):
            gated_matmul_(bad_y, bad_x, made.site(0))
    with pytest.raises(ValueError, match="one contiguous int64 per row"):
        gated_embedding_(y, torch.zeros(3, dtype=torch.int64), 4, made.site(0))


def test_where_triton_cannot_run_the_reason_is_told(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_op.unavailable_reason(torch.device("cpu")) is None
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "set TRITON_INTERPRET=1" in str(triton_op.unavailable_reason(torch.device("cpu")))
    assert triton_op.unavailable_reason(torch.device("cuda")) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in str(triton_op.unavailable_reason(torch.device("cuda")))


COMPILE = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from polyadapt.ops import triton_gated, triton_op
from polyadapt.ops.device_plan import CHUNK

pointers = dict(h_ptr="*fp32", x_ptr="*bf16", y_ptr="*bf16", arena_ptr="*bf16", cells_ptr="*i64",
                plan_ptr="*i32", gate_ptr="*fp32", ids_ptr="*i64")
shared = dict(NUM_SPLITS=2, CHUNK=CHUNK, BLOCK_RANK=triton_op._BLOCK_RANK, DOT=tl.bfloat16)
for kernel, own in (
    (triton_gated.shrink, dict(BLOCK_IN=triton_op._BLOCK_IN)),
    (triton_gated.expand, dict(BLOCK_OUT=triton_op._BLOCK_OUT, IS_GATHER=False)),
):
    constants = shared | own
    types = {name: pointers.get(name, "i32") for name in kernel.arg_names}
    types |= dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    even = [name for name in types if name in pointers or name.endswith(("stride", "num_in"))]
    hints = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in even}
    source = triton.compiler.ASTSource(kernel, types, places, hints)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
    assert "mma" in code["ptx"] and len(code["cubin"]) > 1000
    assert ", 0x10, " in code["ptx"], "nothing is read 16 bytes at a time"
"""


def test_the_kernels_compile_for_a_device_that_is_not_there(tmp_path):
    """Down to machine code for compute capability 9.0, by the compiler that Triton brings."""
    environ = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environ = {**os.environ, **environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", COMPILE], check=True, env=environ, timeout=200)
