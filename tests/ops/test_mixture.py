"""An adapter's own experts for a whole MLP: every form equals the row-by-row specification."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from polyadapt.ops import cells as layout
from polyadapt.ops import native
from polyadapt.ops.cells import Router, Routing
from polyadapt.ops.gated_matmul import Site, gated_matmul_
from polyadapt.ops.linear import PackedWeight
from polyadapt.ops.mixture import MixedMlp, add_mixed_, mix_
from polyadapt.ops.native import mixture as kernels
from polyadapt.ops.plan import BatchPlan, PlanBuffers, RowUse, build_plan
from polyadapt.ops.reference import reference_mixture

CPU = torch.device("cpu")
# Of the largest |y|; in bfloat16 the inner rows are rounded on their way.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-2}
DTYPES = (torch.float32, torch.bfloat16)
HIDDEN, INNER = 37, 43
ROUTER, UP, DOWN = 0, 1, 2
# By slot: experts, the routing's own fields, factor of the weights, ranks of one expert at gate, up
# and down. Slot 0 has ordinary components and slot 1 none at all.
CASES = [
    (4, {"top_k": 2, "renormalise": True}, 1.0, (3, 3, 3)),
    (8, {"top_k": 3, "renormalise": True}, 1.0, (2, 5, 1)),
    (3, {"top_k": 3}, 1.0, (1, 4, 0)),
    (1, {"top_k": 1, "renormalise": True}, 1.0, (16, 16, 16)),
    (6, {"value": 0.6}, 1.25, (3, 0, 7)),
    (5, {"value": 0.99}, 0.5, (2, 2, 2)),
]


def silu_of(u: torch.Tensor, is_gated: bool) -> torch.Tensor:
    if not is_gated:
        return F.silu(u)
    gate, up = u.chunk(2, -1)
    return F.silu(gate) * up


def gelu_of(u: torch.Tensor, is_gated: bool) -> torch.Tensor:
    def gelu(v: torch.Tensor) -> torch.Tensor:
        return F.gelu(v, approximate="tanh")

    if not is_gated:
        return gelu(u)
    gate, up = u.chunk(2, -1)
    return gelu(gate) * up


@dataclass
class Bench:
    """One MLP and adapters for it; sites 0, gate, 1, up, and 2, down; or 0 for both or up alone."""

    form: str  # gated, fused or plain
    dtype: torch.dtype = torch.float32
    arena_dtype: torch.dtype = torch.float32
    has_bias: bool = False
    activation: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(5)

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        self.is_gated = self.form != "plain"
        widths = {"gated": [INNER, INNER], "fused": [2 * INNER], "plain": [INNER]}[self.form]
        starts = np.cumsum([0, *widths])[:-1].tolist()
        self.parts = [
            [site, at, w] for site, (at, w) in enumerate(zip(starts, widths, strict=True))
        ]
        self.down = len(widths)
        self.weight = noise(sum(widths), HIDDEN) / HIDDEN**0.5
        self.down_weight = (noise(HIDDEN, INNER) / INNER**0.5).to(self.dtype)
        self.bias = noise(HIDDEN) if self.has_bias else None
        sites = [(HIDDEN, w) for w in widths] + [(INNER, HIDDEN)]
        blocks, offset = [], 0
        self.cells = torch.full((2 + len(CASES), len(sites), layout.COLUMNS), -1)
        self.cells[:, :, layout.ROUTING] = 0
        for slot in [0, *range(2, 2 + len(CASES))]:
            for site, (num_in, num_out) in enumerate(sites):
                rank, code = 4, 0
                if slot:
                    experts, fields, factor, ranks = CASES[slot - 2]
                    rank = experts * (ranks[2] if site == self.down else ranks[site])
                    routing = Routing(Router.EXPERTS, experts, has_router=False, value=factor)
                    if site == 0:
                        routing = Routing(Router.EXPERTS, experts, **fields)
                    code = routing.code
                size = layout.num_elements(num_in, num_out, rank, 0, code)
                blocks += [torch.full((3,), float("nan")), noise(size) * 0.3]
                self.cells[slot, site] = torch.tensor([offset + 3, rank, 0, code])
                offset += size + 3
        self.arena = torch.cat(blocks).to(self.arena_dtype)
        self.has_overrides = np.array([False, False, *[True] * len(CASES)])

    def mlp(self, plan: PlanBuffers) -> MixedMlp:
        act = (F.silu, lambda v: F.gelu(v, approximate="tanh"))[self.activation]
        site = Site(0, self.arena, self.cells, plan)
        return MixedMlp(
            site, torch.tensor(self.parts), self.down, HIDDEN, INNER, self.is_gated, act,
            self.activation, self.bias,
        )  # fmt: skip

    def buffers(self, plan: BatchPlan) -> PlanBuffers:
        buffers = PlanBuffers(max(plan.num_rows, 1), CPU, self.cells, self.has_overrides)
        buffers.load(plan)
        return buffers

    def run(self, x: torch.Tensor, buffers: PlanBuffers) -> torch.Tensor:
        """The MLP as models/ compute it, without other adapters."""
        mlp = self.mlp(buffers)
        u = (x.float() @ self.weight.t()).to(self.dtype)
        inner = mlp.activate(u)
        h = mix_(inner, u, x, mlp) if buffers.mixtures is not None else None
        bias = 0.0 if self.bias is None else self.bias
        y = (inner.float() @ self.down_weight.float().t() + bias).to(self.dtype)
        if h is not None:
            add_mixed_(y, h, mlp)
        return y

    def expected(self, x: torch.Tensor, plan: BatchPlan) -> torch.Tensor:
        u = (x.float() @ self.weight.t()).to(self.dtype)
        activate = (silu_of, gelu_of)[self.activation]
        parts = [tuple(part) for part in self.parts]
        return reference_mixture(
            x, u, lambda v: activate(v, self.is_gated), (self.down_weight, self.bias), self.arena,
            self.cells, plan, parts, self.down,
        )  # fmt: skip


def make_plan(lengths: list[int]) -> BatchPlan:
    """Runs of these lengths, slot after slot, with a base row between two."""
    uses, start = [], 1
    for slot, length in enumerate(lengths):
        uses.append(RowUse(start, start + length, (slot,), (1.0,)))
        start += length + 1
    return build_plan(uses, start)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = float((found.float() - expected).abs().max() / expected.abs().max())
    assert error <= TOLERANCE[found.dtype], f"off by {error:.1e} of the largest value"


@pytest.fixture(params=["native", "torch"])
def form(request, monkeypatch) -> str:
    if request.param == "native":
        assert native.is_available(), native.unavailable_reason()
    else:
        monkeypatch.setattr(native, "is_available", lambda: False)
    return str(request.param)


LENGTHS = [3, 2, 1, 5, 4, 2, 7, 1]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("activation", [0, 1])
@pytest.mark.parametrize("shape", ["gated", "plain"])
def test_it_equals_the_specification(form, shape, activation, has_bias):
    bench = Bench(shape, has_bias=has_bias, activation=activation)
    check(bench, LENGTHS)


def check(bench: Bench, lengths: list[int]) -> None:
    plan = make_plan(lengths)
    x = torch.randn(plan.num_rows, HIDDEN).to(bench.dtype)
    found, expected = bench.run(x, bench.buffers(plan)), bench.expected(x, plan)
    assert_close(found, expected)
    base = bench.run(x, bench.buffers(BatchPlan(plan.num_rows)))
    mixed = [t for use in range(2, 8) for t in rows_of(lengths, use)]
    others = sorted(set(range(plan.num_rows)) - set(mixed))
    assert torch.equal(found[others], base[others]), "a row without experts has other bits"
    assert not torch.isclose(found[mixed], base[mixed]).all(1).any()


def rows_of(lengths: list[int], slot: int) -> range:
    start = 1 + sum(lengths[:slot]) + slot
    return range(start, start + lengths[slot])


def test_one_linear_of_gate_and_up_equals_the_specification(form):
    check(Bench("fused"), LENGTHS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arena_dtype", DTYPES)
def test_every_precision_equals_the_specification(form, dtype, arena_dtype):
    bench = Bench("gated", dtype=dtype, arena_dtype=arena_dtype, has_bias=True)
    plan = make_plan(LENGTHS)
    x = torch.randn(plan.num_rows, HIDDEN).to(dtype)
    found, expected = bench.run(x, bench.buffers(plan)), bench.expected(x, plan)
    limit = 3e-2 if torch.bfloat16 in (dtype, arena_dtype) else TOLERANCE[dtype]
    # Near a tie a choice hangs on rounding: such rows may be few.
    errors = (found.float() - expected).abs().amax(1) / expected.abs().max()
    assert int((errors > limit).sum()) <= (0 if limit < 1e-2 else 2)


def test_long_segments_equal_the_specification(form):
    lengths = [300, 2, 270, 1, 256, 3, 300, 260]
    plan = make_plan(lengths)
    assert any(lane.num_short < lane.num_segments for lane in plan.lanes)
    bench = Bench("gated", has_bias=True)
    buffers = bench.buffers(plan)
    assert buffers.mixtures.num_short == 2
    x = torch.randn(plan.num_rows, HIDDEN)
    assert_close(bench.run(x, buffers), bench.expected(x, plan))


def test_the_gated_product_leaves_experts_alone(form):
    bench = Bench("gated")
    plan = make_plan(LENGTHS)
    buffers = bench.buffers(plan)
    x, y = torch.randn(plan.num_rows, HIDDEN), torch.randn(plan.num_rows, 2 * INNER)
    found = y.clone()
    gated_matmul_(found, x, Site(0, bench.arena, bench.cells, buffers), bench.parts)
    own = list(rows_of(LENGTHS, 0))
    others = sorted(set(range(plan.num_rows)) - set(own))
    assert torch.equal(found[others], y[others])
    assert not torch.isclose(found[own], y[own]).all(1).any()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_has_the_same_bits_alone_and_in_every_batch(threads):
    bench = Bench("gated", has_bias=True)
    lengths = [9, 1, 40, 3, 5, 2, 30, 8]
    plan = make_plan(lengths)
    x = torch.randn(plan.num_rows, HIDDEN)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        mlp_rows = kernel_rows(bench, x, plan)
        for slot in range(2, 8):
            for t in rows_of(lengths, slot):
                uses = [RowUse(0, 1, (slot,), (1.0,))]
                alone = kernel_rows(bench, x[t : t + 1], build_plan(uses, 1))
                assert torch.equal(alone[0], mlp_rows[t]), (slot, t)
    finally:
        torch.set_num_threads(before)


def kernel_rows(bench: Bench, x: torch.Tensor, plan: BatchPlan) -> torch.Tensor:
    """What the kernel makes of rows whose products do not depend on the batch."""
    buffers = bench.buffers(plan)
    mlp = bench.mlp(buffers)
    u = PackedWeight.pack([bench.weight]).product(x, None)
    inner = torch.zeros(len(x), INNER)
    h = mix_(inner, u, x, mlp)
    y = PackedWeight.pack([bench.down_weight]).product(inner, bench.bias)
    add_mixed_(y, h, mlp)
    return torch.cat([inner, y], 1)


def test_rows_far_apart_are_one_segment(form):
    bench = Bench("gated")
    uses = [RowUse(t, t + 1, (2 + t % 3,), (1.0,)) for t in (0, 1, 3, 4, 6, 7, 9)]
    plan = build_plan(uses, 11)
    x = torch.randn(11, HIDDEN)
    assert_close(bench.run(x, bench.buffers(plan)), bench.expected(x, plan))


def test_a_second_lane_may_have_the_experts(form):
    bench = Bench("gated")
    uses = [RowUse(0, 2, (1, 3), (1.0, 1.0)), RowUse(2, 4, (4,), (1.0,))]
    plan = build_plan(uses, 5)
    buffers = bench.buffers(plan)
    assert buffers.mixtures.num_rows == 4
    x = torch.randn(5, HIDDEN)
    assert_close(bench.run(x, buffers), bench.expected(x, plan))


def test_what_is_not_a_number_stays_in_its_row(form):
    bench = Bench("gated")
    plan = make_plan(LENGTHS)
    x = torch.randn(plan.num_rows, HIDDEN)
    clean = bench.run(x, bench.buffers(plan))
    sick = rows_of(LENGTHS, 3)[1]
    x[sick, 5] = float("nan")
    found = bench.run(x, bench.buffers(plan))
    others = [t for t in range(plan.num_rows) if t != sick]
    assert torch.equal(found[others], clean[others]) or form == "torch"
    assert found[others].isfinite().all()
    assert not found[sick].isfinite().any()


def test_a_plan_is_loaded_twice_and_cleared():
    bench = Bench("gated")
    plan = make_plan(LENGTHS)
    buffers = bench.buffers(plan)
    first = buffers.mixtures
    assert first.num_rows == sum(LENGTHS[2:])
    assert [segment.slot for segment in first.segments] == list(range(2, 8))
    buffers.clear()
    assert buffers.mixtures is None
    buffers.load(plan)
    assert buffers.mixtures is first
    buffers.load(build_plan([RowUse(0, 3, (0,), (1.0,))], 4))
    assert buffers.mixtures is None


def test_what_rows_chose_is_noted(form):
    bench = Bench("gated")
    plan = make_plan(LENGTHS)
    buffers = bench.buffers(plan)
    buffers.usage = torch.zeros(len(bench.cells), layout.USAGE_COLUMNS)
    x = torch.randn(plan.num_rows, HIDDEN)
    mlp = bench.mlp(buffers)
    u = x @ bench.weight.t()
    h = mix_(mlp.activate(u), u, x, mlp)
    for segment in buffers.mixtures.segments:
        rows, shares = buffers.usage[segment.slot, 0], buffers.usage[segment.slot, 1:]
        assert rows == LENGTHS[segment.slot]
        total = h[segment.first : segment.first + segment.num_rows, -1].sum()
        assert float(shares.sum()) == pytest.approx(float(total), rel=1e-5)
        assert (shares > 0).sum() <= CASES[segment.slot - 2][0]
    assert not buffers.usage[:2].any()


# --------------------------------------------------------------------------- choices
def test_as_many_as_it_takes_are_kept():
    from polyadapt.ops.routing import choose

    shares = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    for mass, kept in ((0.4, 1), (0.5, 2), (0.74, 2), (0.76, 3), (0.95, 4), (3.0, 4)):
        routing = Routing(Router.EXPERTS, 4, value=mass)
        found = choose(shares.log(), routing)[0]
        order = shares[0].argsort(descending=True)[:kept]
        assert sorted(found.nonzero().flatten().tolist()) == sorted(order.tolist()), mass
        assert torch.allclose(found[order], shares[0][order])


def test_equal_experts_are_chosen_by_their_number(form):
    bench = Bench("gated")
    # All experts of slot 2 have the same router row: the first two are taken.
    offset, rank, _, code = bench.cells[2, 0].tolist()
    start = offset + rank * HIDDEN
    experts = Routing.of(code).num_scores
    bench.arena[start : start + experts * HIDDEN].view(experts, HIDDEN)[:] = 0.25
    plan = build_plan([RowUse(0, 4, (2,), (1.0,))], 4)
    x = torch.randn(4, HIDDEN)
    buffers = bench.buffers(plan)
    buffers.usage = torch.zeros(len(bench.cells), layout.USAGE_COLUMNS)
    found = bench.run(x, buffers)
    assert_close(found, bench.expected(x, plan))
    assert buffers.usage[2, 1:5].tolist() == pytest.approx([2.0, 2.0, 0.0, 0.0])


# --------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("slot", "slot of segment 0"),
        ("bounds", "segment 0 does not lie inside"),
        ("row", "rows\\[0\\] is not a row"),
        ("arena", "experts of segment 0"),
        ("rank", "experts of segment 0"),
        ("router", "experts of segment 0"),
        ("down", "experts of segment 0"),
        ("narrow", "experts of segment 0"),
        ("dtype", "expected float32 or bfloat16"),
        ("columns", "expected as many rows, and 86 columns"),
    ],
)
def test_an_index_outside_its_tensor_is_refused(what, words):
    bench = Bench("gated")
    plan = build_plan([RowUse(0, 2, (2,), (1.0,))], 3)
    buffers = bench.buffers(plan)
    x, u, inner = torch.randn(3, HIDDEN), torch.randn(3, 2 * INNER), torch.randn(3, INNER)
    cells, rows, h = bench.cells.clone(), buffers.rows.clone(), torch.zeros(2, 13)
    table = buffers.mixtures.table.clone()
    if what == "slot":
        table[0, 0] = 99
    elif what == "bounds":
        table[0, 2] = 10**6
    elif what == "row":
        rows[0] = 7
    elif what == "arena":
        cells[2, 1, layout.OFFSET] = len(bench.arena) - 5
    elif what == "rank":
        cells[2, 0, layout.RANK] = 11
    elif what == "router":
        cells[2, 0, layout.ROUTING] = Routing(Router.EXPERTS, 4, has_router=False).code
    elif what == "down":
        cells[2, bench.down, layout.OFFSET] = -1
    elif what == "narrow":
        h = torch.zeros(2, 12)
    elif what == "dtype":
        u = u.bfloat16()
    else:
        u = u[:, 1:]
    before = inner.clone()
    with pytest.raises(ValueError, match=words):
        kernels.mix_(
            inner, u, x, h, bench.arena, cells, rows, table, torch.tensor(bench.parts),
            bench.down, None, is_gated=True, activation=0,
        )  # fmt: skip
    assert torch.equal(inner, before)
