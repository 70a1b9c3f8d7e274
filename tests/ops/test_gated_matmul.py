"""Every strategy of the gated segmented product equals the row-by-row specification."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from polyadapt.ops import native
from polyadapt.ops.cells import BIAS, COLUMNS, OUT_SCALE, num_elements
from polyadapt.ops.gated_matmul import Site, gated_embedding_, gated_matmul_
from polyadapt.ops.plan import PlanBuffers, RowUse, build_plan
from polyadapt.ops.reference import reference_matmul

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}  # of the largest |y|
SITE = 1
PARTS = (BIAS, OUT_SCALE, 0, BIAS | OUT_SCALE)  # of slot 0, 1, ...


@dataclass
class Bank:
    """Adapters of the given ranks scattered in one arena, with garbage between them."""

    arena: torch.Tensor
    cells: torch.Tensor  # [slots, 2, 4]


def make_bank(
    ranks: list[int], num_in: int, num_out: int, dtype: torch.dtype, *, transposed: bool = False
) -> Bank:
    generator = torch.Generator().manual_seed(7)
    parts = [torch.full((13,), float("nan"), dtype=dtype)]
    cells = torch.full((len(ranks), 2, COLUMNS), -1)
    offset = 13
    for slot in np.random.default_rng(3).permutation(len(ranks)):
        rank = ranks[slot]
        bits = PARTS[slot % len(PARTS)]
        a = torch.randn(rank, num_in, generator=generator) / num_in**0.5
        b = torch.randn(rank, num_out, generator=generator) / max(rank, 1) ** 0.5
        blocks = [a.t() if transposed else a, b]
        for bit in (BIAS, OUT_SCALE):
            if bits & bit:
                blocks.append(torch.randn(num_out, generator=generator))
        cells[slot, SITE] = torch.tensor([offset, rank, bits, 0])
        blocks.append(torch.full((5,), float("nan")))
        for block in blocks:
            parts.append(block.reshape(-1).to(dtype))
            offset += block.numel()
    return Bank(torch.cat(parts), cells)


def popularity(kind: str, num_runs: int, num_slots: int) -> list[int | None]:
    rng = np.random.default_rng(5)
    if kind == "identical":
        return [2] * num_runs
    if kind == "distinct":
        return [i % num_slots for i in range(num_runs)]
    if kind == "uniform":
        return rng.integers(0, num_slots, num_runs).tolist()
    if kind == "zipf":
        return [min(int(z) - 1, num_slots - 1) for z in rng.zipf(1.7, num_runs)]
    assert kind == "with_base"
    return [None if i % 2 else i % num_slots for i in range(num_runs)]


def runs(kind: str, lengths: list[int], num_slots: int) -> tuple[list[RowUse], int]:
    uses, start = [], 0
    for length, slot in zip(lengths, popularity(kind, len(lengths), num_slots), strict=True):
        if slot is not None:
            uses.append(RowUse(start, start + length, (slot,), (1.0,)))
        start += length
    return uses, start


def check(
    bank: Bank, uses: list[RowUse], num_rows: int, num_in: int, num_out: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(num_rows, num_in, generator=generator).to(dtype)
    y = torch.randn(num_rows, num_out, generator=generator).to(dtype)
    plan = build_plan(uses, num_rows)
    expected = reference_matmul(y, x, bank.arena, bank.cells, plan, SITE)
    buffers = PlanBuffers(num_rows, torch.device("cpu"))
    buffers.load(plan)
    untouched = y.clone()
    gated_matmul_(y, x, Site(SITE, bank.arena, bank.cells, buffers))
    tolerance = max(TOLERANCE[dtype], TOLERANCE[bank.arena.dtype])
    allowed = tolerance * float(expected.abs().max())
    assert float((y.float() - expected).abs().max()) <= allowed
    in_plan = {row for use in uses if any(use.scales) for row in range(use.start, use.stop)}
    outside = sorted(set(range(num_rows)) - in_plan)
    assert torch.equal(y[outside], untouched[outside]), "a base row was touched"


@pytest.fixture(params=["torch", "native"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "is_available", lambda: False)
    elif not native.is_available():
        pytest.fail(f"the native kernel must build where tests run: {native.unavailable_reason()}")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["identical", "distinct", "uniform", "zipf", "with_base"])
@pytest.mark.parametrize("lengths", [[1] * 19, [1, 1, 40, 3, 17, 1], [70, 70], [300, 2]])
def test_every_popularity_equals_the_specification(form, kind, lengths, dtype):
    ranks = [1, 3, 8, 16, 64, 5]
    bank = make_bank(ranks, 48, 80, dtype)
    uses, num_rows = runs(kind, lengths, len(ranks))
    check(bank, uses, num_rows, 48, 80, dtype)


@pytest.mark.parametrize("rank", [1, 2, 7, 33, 600])
@pytest.mark.parametrize(("num_in", "num_out"), [(1, 1), (13, 7), (64, 64), (100, 257)])
def test_odd_ranks_and_sizes_equal_the_specification(form, rank, num_in, num_out):
    bank = make_bank([rank] * 4, num_in, num_out, torch.float32)
    uses, num_rows = runs("uniform", [1, 2, 20, 1, 5], 4)
    check(bank, uses, num_rows, num_in, num_out, torch.float32)


def test_adapters_that_leave_a_site_alone_or_only_replace_its_bias(form):
    bank = make_bank([4, 0, 4, 0], 16, 24, torch.float32)
    bank.cells[1, SITE, 0] = -1
    uses, num_rows = runs("distinct", [1, 2, 3, 20], 4)
    check(bank, uses, num_rows, 16, 24, torch.float32)


@pytest.mark.parametrize("arena_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_out", [1, 67, 2050])  # a kernel's block is 2048 columns
def test_a_scale_of_the_output_acts_by_itself_and_beside_the_rest(
    form, num_out, dtype, arena_dtype
):
    bank = make_bank([0, 0, 0, 0, 3, 3, 3, 3], 16, num_out, arena_dtype)
    uses, num_rows = runs("distinct", [1, 2, 3, 1, 1, 40, 1, 5], 8)
    check(bank, uses, num_rows, 16, num_out, dtype)


def test_a_scale_of_the_output_is_not_the_requests_scale_and_acts_on_what_lanes_before_it_added(
    form,
):
    bank = make_bank([2, 0, 2, 2], 8, 24, torch.float32)
    uses = [RowUse(0, 3, (1, 2), (0.5, 2.0)), RowUse(3, 4, (2, 3), (1.0, 0.5))]
    check(bank, uses, 4, 8, 24, torch.float32)
    offset = int(bank.cells[1, SITE, 0])
    y = torch.ones(1, 24)
    buffers = PlanBuffers(1, torch.device("cpu"))
    buffers.load(build_plan([RowUse(0, 1, (1,), (0.5,))], 1))
    gated_matmul_(y, torch.ones(1, 8), Site(SITE, bank.arena, bank.cells, buffers))
    torch.testing.assert_close(y[0], 1 + bank.arena[offset : offset + 24])


def test_lanes_scales_and_gates_add_up(form):
    bank = make_bank([4, 8, 3, 6], 32, 40, torch.float32)
    prefix = np.array([1, 1, 0, 0, 0, 0, 0, 0], np.float32)
    uses = [
        RowUse(0, 1, (0, 1), (1.0, 0.5), (None, prefix)),
        RowUse(1, 4, (2,), (-1.5,)),
        RowUse(4, 30, (1, 3), (1.0, 2.0)),
        RowUse(30, 31, (1,), (0.0,)),
    ]
    check(bank, uses, 33, 32, 40, torch.float32)


def test_gates_of_two_widths_and_an_ungated_wider_neighbour(form):
    bank = make_bank([4, 8, 16, 12], 16, 24, torch.float32)
    short, long = np.array([1, 0, 2, 1], np.float32), np.array([1, 0] * 8, np.float32)
    uses = [
        RowUse(0, 2, (0, 2), (1.0, 1.0), (short, long)),
        RowUse(2, 22, (3,), (1.0,)),  # ungated, and wider than its lane's gate
    ]
    check(bank, uses, 22, 16, 24, torch.float32)


def test_a_closed_gate_keeps_a_nan_component_out(form):
    bank = make_bank([4], 8, 8, torch.float32)
    offset = int(bank.cells[0, SITE, 0])
    bank.arena[offset + 3 * 8 : offset + 4 * 8] = float("nan")  # the last rank-one component
    gate = np.array([1, 0.5, 1, 0], np.float32)
    plan = build_plan([RowUse(0, 2, (0,), (1.0,), (gate,))], 2)
    buffers = PlanBuffers(2, torch.device("cpu"))
    buffers.load(plan)
    y = torch.zeros(2, 8)
    gated_matmul_(y, torch.randn(2, 8), Site(SITE, bank.arena, bank.cells, buffers))
    assert bool(torch.isfinite(y).all())


def test_a_nan_adapter_poisons_its_own_rows_only(form):
    bank = make_bank([4, 4, 4], 8, 8, torch.float32)
    offset = int(bank.cells[1, SITE, 0])
    bank.arena[offset : offset + 4] = float("nan")
    uses, num_rows = runs("distinct", [1, 1, 1, 20, 20, 20], 3)
    buffers = PlanBuffers(num_rows, torch.device("cpu"))
    buffers.load(build_plan(uses, num_rows))
    y = torch.zeros(num_rows, 8)
    gated_matmul_(y, torch.randn(num_rows, 8), Site(SITE, bank.arena, bank.cells, buffers))
    is_bad = torch.isnan(y).any(1)
    poisoned = [row for use in uses if use.slots == (1,) for row in range(use.start, use.stop)]
    assert is_bad.nonzero().flatten().tolist() == poisoned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_gather_their_columns(form, dtype):
    vocab, width = 50, 24
    bank = make_bank([3, 0, 1, 8], vocab, width, dtype, transposed=True)
    uses, num_rows = runs("distinct", [1, 4, 20, 2, 1], 4)
    plan = build_plan(uses, num_rows)
    ids = torch.randint(0, vocab, (num_rows,), generator=torch.Generator().manual_seed(2))
    y = torch.randn(num_rows, width).to(dtype)
    # The specification reads A row-major: give it the transposed blocks.
    straight = bank.arena.clone()
    for offset, rank, *_ in bank.cells[:, SITE].tolist():
        block = bank.arena[offset : offset + vocab * rank].view(vocab, rank)
        straight[offset : offset + vocab * rank] = block.t().reshape(-1)
    one_hot = torch.nn.functional.one_hot(ids, vocab).float()
    expected = reference_matmul(y, one_hot, straight, bank.cells, plan, SITE)
    buffers = PlanBuffers(num_rows, torch.device("cpu"))
    buffers.load(plan)
    gated_embedding_(y, ids, vocab, Site(SITE, bank.arena, bank.cells, buffers))
    allowed = TOLERANCE[dtype] * float(expected.abs().max())
    assert float((y.float() - expected).abs().max()) <= allowed


def test_without_a_plan_nothing_is_read(form):
    buffers = PlanBuffers(4, torch.device("cpu"))
    y = torch.randn(4, 3)
    before = y.clone()
    nowhere = torch.full((1,), float("nan"))
    gated_matmul_(y, torch.randn(4, 2), Site(0, nowhere, torch.full((1, 1, COLUMNS), -1), buffers))
    assert torch.equal(y, before)


@pytest.mark.parametrize("lengths", [[1, 1, 3], [300, 1, 2]])
def test_sites_that_share_their_input_in_one_call_equal_a_call_each(form, lengths):
    generator = torch.Generator().manual_seed(2)
    widths, ranks, num_in = (40, 8, 24), ((3, 5, 0), (16, 1, 2), (0, 4, 9)), 20
    cells = torch.full((3, 4, COLUMNS), -1)
    blocks, offset = [], 0
    for slot in range(3):
        for site, (width, rank) in enumerate(zip(widths, ranks[slot], strict=True)):
            bits = PARTS[(slot + site) % len(PARTS)]
            if rank or bits:
                cells[slot, site] = torch.tensor([offset, rank, bits, 0])
                size = num_elements(num_in, width, rank, bits)
                blocks.append(torch.randn(size, generator=generator))
                offset += size
    arena = torch.cat(blocks)
    uses, num_rows = runs("distinct", lengths, 3)
    buffers = PlanBuffers(num_rows, torch.device("cpu"))
    buffers.load(build_plan(uses, num_rows))
    x = torch.randn(num_rows, num_in, generator=generator)
    together = torch.randn(num_rows, sum(widths), generator=generator)
    alone = together.clone()
    parts, column, plan = [], 0, build_plan(uses, num_rows)
    expected = together.clone()
    for site, width in enumerate(widths):
        columns = slice(column, column + width)
        expected[:, columns] = reference_matmul(expected[:, columns], x, arena, cells, plan, site)
        parts.append([site, column, width])
        gated_matmul_(alone[:, column : column + width], x, Site(site, arena, cells, buffers))
        column += width
    gated_matmul_(together, x, Site(0, arena, cells, buffers), parts)
    assert torch.equal(together, alone)
    allowed = TOLERANCE[torch.float32] * float(expected.abs().max())
    assert float((together - expected).abs().max()) <= allowed


def test_a_part_outside_y_or_cells_is_refused():
    bank = make_bank([2], 8, 8, torch.float32)
    buffers = PlanBuffers(1, torch.device("cpu"))
    buffers.load(build_plan([RowUse(0, 1, (0,), (1.0,))], 1))
    site = Site(SITE, bank.arena, bank.cells, buffers)
    y, x = torch.zeros(1, 8), torch.ones(1, 8)
    for part in ([5, 0, 8], [SITE, 1, 8], [SITE, -1, 8], [-1, 0, 8]):
        with pytest.raises(ValueError, match=r"parts\[1\]"):
            gated_matmul_(y, x, site, [(SITE, 0, 8), part])
        assert not y.any()
