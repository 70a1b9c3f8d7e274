"""What replaces the base equals the specification: each part, alone and together, in both forms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from polyadapt.ops import cells as layout
from polyadapt.ops import native, overrides
from polyadapt.ops.cells import BIAS, DENSE, OUT_SCALE, SWAP, TRANSFORM, WEIGHT
from polyadapt.ops.gated_matmul import Site, gated_embedding_, gated_matmul_
from polyadapt.ops.linear import DenseWeight, PackedWeight, Weight
from polyadapt.ops.native import overrides as kernels
from polyadapt.ops.plan import PlanBuffers, RowUse, build_plan
from polyadapt.ops.reference import reference_embedding, reference_linear, reference_norm

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}  # of the largest |y|
needs_native = pytest.mark.skipif(not native.is_available(), reason="no C compiler")
ALL = BIAS | OUT_SCALE | TRANSFORM | SWAP | DENSE
# By slot; the last is no override.
LINEAR_PARTS = (TRANSFORM, SWAP, DENSE, TRANSFORM | SWAP | BIAS, ALL, OUT_SCALE)


@dataclass
class Bank:
    """Cells of every (slot, site), scattered in one arena with garbage between them."""

    arena: torch.Tensor
    cells: torch.Tensor  # int64 [slots, sites, 4]
    has_overrides: np.ndarray

    def site(self, plan: PlanBuffers, site_id: int = 0) -> Site:
        return Site(site_id, self.arena, self.cells, plan)

    def buffers(self, num_rows: int) -> PlanBuffers:
        return PlanBuffers(num_rows, CPU, self.cells, self.has_overrides)


def make_bank(
    parts: list[list[int]], sizes: list[tuple[int, int]], dtype: torch.dtype, *, rank=0, group=4
) -> Bank:
    """parts [slots][sites]; sizes (in, out) by site."""
    generator = torch.Generator().manual_seed(3)
    cells = torch.full((len(parts), len(sizes), layout.COLUMNS), -1)
    blocks, offset = [], 0
    for slot, by_site in enumerate(parts):
        for site, bits in enumerate(by_site):
            if not bits:
                continue
            bits |= group << layout.GROUP_SHIFT if bits & (TRANSFORM | SWAP) else 0
            size = layout.num_elements(*sizes[site], rank, bits)
            blocks += [torch.full((7,), float("nan")), torch.randn(size, generator=generator) / 2]
            cells[slot, site] = torch.tensor([offset + 7, rank, bits, 0])
            offset += 7 + size
    bits = cells[:, :, layout.PARTS].clamp(min=0) & layout.OVERRIDES
    return Bank(torch.cat(blocks).to(dtype), cells, bits.bool().any(1).numpy())


def uses_of(lengths: list[int], num_slots: int) -> tuple[list[RowUse], int]:
    """Runs of base rows and of each slot in turn; slot 0's rows are in two places."""
    uses, start = [], 1
    for i, length in enumerate([*lengths, lengths[0]]):
        slot = i % len(lengths) % num_slots
        scale = 1.0 if slot % 2 else 0.5
        uses.append(RowUse(start, start + length, (slot,), (scale,)))
        start += length + i % 2
    return uses, start + 1


@pytest.fixture(params=["torch", "native"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "is_available", lambda: False)
    elif not native.is_available():
        pytest.fail(f"the native kernel must build where tests run: {native.unavailable_reason()}")
    return request.param


def adapted(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    site: Site,
    parts: list[tuple[int, int, int]],
) -> torch.Tensor:
    """The order in which a module computes it."""
    y = weight.product(x, bias)
    overrides.replace_products_(y, x, site, parts, weight, bias)
    gated_matmul_(y, x, site, parts)
    overrides.add_dense_(y, x, site, parts)
    return y


@pytest.mark.parametrize("arena_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("form", "packed"), [("torch", False), ("native", False), ("native", True)], indirect=["form"]
)
@pytest.mark.parametrize(
    ("lengths", "group", "rank"),
    [
        ([1] * 6, 2, 0),
        ([1, 40, 3, 2, 7, 1], 1, 0),
        ([1, 40, 3, 2, 7, 1], 4, 3),
        ([130, 1, 2, 1, 3, 1], 12, 0),
    ],
)
def test_every_part_of_fused_linears_equals_the_specification(
    form, lengths, group, rank, packed, dtype, arena_dtype
):
    # No part but the first begins with a panel, none ends with one.
    widths, num_in, generator = (36, 24, 60), 48, torch.Generator().manual_seed(5)
    sizes = [(num_in, width) for width in widths]
    parts = [[LINEAR_PARTS[(slot + site) % 6] for site in range(3)] for slot in range(6)]
    if group == 1:  # which has no halves to exchange
        parts = [[bits & ~SWAP for bits in by_site] for by_site in parts]
    parts[1][2] = 0
    bank = make_bank(parts, sizes, arena_dtype, rank=rank, group=group)
    uses, num_rows = uses_of(lengths, 6)
    plan, buffers = build_plan(uses, num_rows), bank.buffers(num_rows)
    buffers.load(plan)
    is_long = any(not o.is_short for found in buffers.overrides.values() for o in found)
    assert is_long is (lengths[0] > 100), "a GEMM serves the long segments"
    weights = [torch.randn(width, num_in, generator=generator) / 7 for width in widths]
    weights = [weight.to(dtype) for weight in weights]
    bias = torch.randn(sum(widths), generator=generator)
    x = torch.randn(num_rows, num_in, generator=generator).to(dtype)
    dense = torch.cat(weights)
    weight: Weight = PackedWeight.pack(weights) if packed else DenseWeight(dense)
    columns = [(0, 0, 36), (1, 36, 24), (2, 60, 60)]
    y = adapted(x, weight, bias if packed else bias.to(dtype), bank.site(buffers), columns)
    for site, start, width in columns:
        rows = slice(start, start + width)
        expected = reference_linear(x, dense[rows], bias[rows], bank.arena, bank.cells, plan, site)
        allowed = TOLERANCE[dtype] * float(expected.abs().max())
        if torch.bfloat16 in (dtype, arena_dtype):  # the torch form rounds between its steps
            allowed = 2 * TOLERANCE[torch.bfloat16] * float(expected.abs().max())
        assert float((y[:, rows].float() - expected).abs().max()) <= allowed, site
    in_plan = {row for use in uses for row in range(use.start, use.stop)}
    outside = sorted(set(range(num_rows)) - in_plan)
    assert len(outside) > 2
    if not packed:  # a packed product of other rows has the same bits as well, seen elsewhere
        base = weight.product(x, bias.to(dtype))
        assert torch.equal(y[outside], base[outside]), "a base row was touched"


@pytest.mark.parametrize("part", [TRANSFORM, SWAP, DENSE])
def test_each_part_matters_to_the_specification(part):
    """So that a specification that forgets one is not what the forms are compared with."""
    bank = make_bank([[part]], [(8, 8)], torch.float32)
    plan = build_plan([RowUse(0, 1, (0,), (1.0,))], 1)
    x, weight = torch.randn(1, 8), torch.randn(8, 8)
    found = reference_linear(x, weight, None, bank.arena, bank.cells, plan, 0)
    cell = bank.arena[7:]
    if part == TRANSFORM:
        left, right = cell[:32].view(2, 4, 4)
        expected = torch.block_diag(left, right).t()
        expected = x @ (weight @ expected).t()
    elif part == SWAP:
        y, swap = x @ weight.t(), cell[:16].view(2, 8)
        expected = (1 + swap[0]) * y + swap[1] * y[:, [2, 3, 0, 1, 6, 7, 4, 5]]
    else:
        expected = x @ (weight + cell[:64].view(8, 8)).t()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_rows_of_an_embedding_equal_the_specification(form, dtype):
    vocab, width = 30, 20
    parts = [[DENSE], [DENSE | BIAS | OUT_SCALE], [0]]
    bank = make_bank(parts, [(vocab, width)], dtype, rank=2)
    uses, num_rows = uses_of([1, 20, 3], 3)
    plan, buffers = build_plan(uses, num_rows), bank.buffers(num_rows)
    buffers.load(plan)
    ids = torch.randint(0, vocab, (num_rows,))
    table = torch.randn(vocab, width).to(dtype)
    y = table[ids]
    gated_embedding_(y, ids, vocab, bank.site(buffers))
    overrides.add_dense_rows_(y, ids, vocab, bank.site(buffers))
    expected = reference_embedding(ids, table, bank.arena, bank.cells, plan, 0)
    allowed = TOLERANCE[dtype] * float(expected.abs().max())
    assert float((y.float() - expected).abs().max()) <= allowed


def test_a_norm_is_told_its_segments_and_weights(form):
    bank = make_bank([[WEIGHT | BIAS], [BIAS], [WEIGHT]], [(6, 6)], torch.float32)
    uses, num_rows = uses_of([2, 3, 1], 3)
    plan, buffers = build_plan(uses, num_rows), bank.buffers(num_rows)
    buffers.load(plan)
    normalised, weight, bias = torch.randn(num_rows, 6), torch.randn(6), torch.randn(6)
    y = normalised * weight + bias
    for override, own in overrides.norm_weights(bank.site(buffers), 6):
        y[override.index] = normalised[override.index] * own + bias
    gated_matmul_(y, y, bank.site(buffers))
    expected = reference_norm(normalised, weight, bias, bank.arena, bank.cells, plan, 0)
    torch.testing.assert_close(y, expected)
    assert not torch.equal(expected, normalised * weight + bias)


# --------------------------------------------------------------------------- the plan
def cells_with(parts: list[list[int]]) -> torch.Tensor:
    return torch.tensor([[[7 * bool(bits), 0, bits, 0] for bits in by_site] for by_site in parts])


def test_a_plan_lists_by_site_the_segments_with_overrides_and_no_others():
    has = np.array([False, True, False, True])
    cells = cells_with([[BIAS, 0], [0, SWAP | BIAS], [OUT_SCALE, BIAS], [DENSE, WEIGHT]])
    buffers = PlanBuffers(16, CPU, cells, has)
    uses = [
        RowUse(0, 1, (1,), (1.0,)),
        RowUse(1, 3, (0, 3), (1.0, 0.5)),
        RowUse(3, 6, (1,), (1.0,)),
        RowUse(6, 7, (3,), (0.0,)),  # dropped
        RowUse(8, 10, (3,), (1.0,)),
    ]
    plan = build_plan(uses, 10)
    buffers.load(plan)
    found = {
        site: [(o.slot, o.parts, o.scale, o.rows.tolist(), o.is_short) for o in overrides]
        for site, overrides in buffers.overrides.items()
    }
    assert found == {
        0: [(3, DENSE, 1.0, [8, 9], True), (3, DENSE, 0.5, [1, 2], True)],
        1: [
            (1, SWAP | BIAS, 1.0, [0, 3, 4, 5], True),
            (3, WEIGHT, 1.0, [8, 9], True),
            (3, WEIGHT, 0.5, [1, 2], True),
        ],
    }
    scattered, *neighbours = [o.index for o in buffers.overrides[1]]
    assert isinstance(scattered, torch.Tensor)
    assert scattered.tolist() == [0, 3, 4, 5]
    assert neighbours == [slice(8, 10), slice(1, 3)]
    buffers.clear()
    assert not buffers.overrides
    buffers.load(plan)  # what is still there is not filled in again
    assert buffers.overrides.keys() == {0, 1}
    buffers.load(build_plan(uses[1:2], 10))
    assert [o.slot for o in buffers.overrides[1]] == [3]
    has[:] = False
    buffers.load(build_plan(uses, 10))
    assert not buffers.overrides


def test_an_arena_that_moves_between_steps_is_followed():
    bank = make_bank([[WEIGHT]], [(4, 4)], torch.float32)
    buffers = bank.buffers(1)
    plan = build_plan([RowUse(0, 1, (0,), (1.0,))], 1)
    for offset in (7, 3):
        bank.cells[0, 0, 0] = offset
        buffers.load(plan)
        ((_, weight),) = overrides.norm_weights(bank.site(buffers), 4)
        assert weight.data_ptr() == bank.arena[offset:].data_ptr()


def test_long_segments_are_left_to_gemms():
    cells = cells_with([[DENSE], [DENSE]])
    buffers = PlanBuffers(400, CPU, cells, np.array([True, True]))
    buffers.load(build_plan([RowUse(0, 300, (0,), (1.0,)), RowUse(300, 301, (1,), (1.0,))], 400))
    assert [(o.slot, o.is_short) for o in buffers.overrides[0]] == [(1, True), (0, False)]


# --------------------------------------------------------------------------- the kernels' promises
@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_in", "num_out", "group"), [(100, 67, 20), (12, 2, 2), (600, 514, 600)]
)
def test_a_rows_bits_depend_on_that_row_alone(num_in, num_out, group, dtype):
    x, y = torch.randn(70, num_in).to(dtype), torch.randn(70, num_out).to(dtype)
    dense = torch.randn(num_out, num_in).to(dtype)
    transform = torch.randn(num_in // group, group, group).to(dtype)
    swap = torch.randn(2, num_in).to(dtype)
    rows = torch.randperm(70)[:51].int()

    def run(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        added, swapped = y.clone(), x.clone()
        kernels.add_dense_(added, x, rows, dense, 0.75)
        kernels.swap_(swapped, rows, swap, group)
        return added[rows.long()], swapped[rows.long()], kernels.block_transform(x, rows, transform)

    threads = torch.get_num_threads()
    together = run(rows)
    try:
        torch.set_num_threads(1)
        for found, expected in zip(run(rows), together, strict=True):
            assert torch.equal(found, expected)
    finally:
        torch.set_num_threads(threads)
    for i in range(0, 51, 10):
        for found, expected in zip(run(rows[i : i + 1]), together, strict=True):
            assert torch.equal(found[0], expected[i])


@needs_native
def test_what_does_not_fit_is_refused_before_anything_is_written():
    x, y, rows = torch.ones(3, 8), torch.ones(3, 6), torch.tensor([0, 2], dtype=torch.int32)
    outside = torch.tensor([0, 3], dtype=torch.int32)
    for call, said in (
        (lambda: kernels.block_transform(x, rows, torch.ones(2, 3, 3)), "blocks that cover 8"),
        (lambda: kernels.block_transform(x, outside, torch.ones(2, 4, 4)), r"rows\[1\] is not one"),
        (lambda: kernels.swap_(y, rows, torch.ones(2, 6), 4), "even divisor of 6"),
        (lambda: kernels.swap_(y, rows, torch.ones(2, 6), 3), "even divisor of 6"),
        (lambda: kernels.swap_(y, outside, torch.ones(2, 6), 2), r"rows\[1\] is not one"),
        (lambda: kernels.add_dense_(y, x, rows, torch.ones(6, 7), 1.0), "do not fit a weight"),
        (lambda: kernels.add_dense_(y, x, rows.long(), torch.ones(6, 8), 1.0), "expected float32"),
        (lambda: kernels.add_dense_(y, x, outside, torch.ones(6, 8), 1.0), r"rows\[1\] is not one"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    assert torch.equal(y, torch.ones(3, 6))
