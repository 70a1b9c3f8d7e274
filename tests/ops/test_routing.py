"""Components that rows weigh by themselves: every form equals the row-by-row specification."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polyadapt.ops import cells as layout
from polyadapt.ops import native
from polyadapt.ops.cells import BIAS, OUT_SCALE, ROUTER_BIAS, Router, Routing
from polyadapt.ops.gated_matmul import Site, gated_embedding_, gated_matmul_
from polyadapt.ops.plan import PlanBuffers, RowUse, build_plan
from polyadapt.ops.reference import reference_embedding, reference_matmul
from polyadapt.ops.routing import weigh

NUM_IN, NUM_OUT = 37, 41
# rank, routing, parts: one slot each; slot 0 is routed by nobody.
CASES: list[tuple[int, Routing | None, int]] = [
    (9, None, BIAS),
    (12, Routing(Router.SOFTMAX, 4), 0),
    (12, Routing(Router.SOFTMAX, 4, top_k=2, renormalise=True), BIAS | OUT_SCALE),
    (6, Routing(Router.SOFTMAX, 3, top_k=1), OUT_SCALE),
    (64, Routing(Router.SIGMOID, 64, top_k=8), ROUTER_BIAS),
    (12, Routing(Router.SIGMOID, 6, top_k=5), BIAS | OUT_SCALE | ROUTER_BIAS),
    (8, Routing(Router.SIGMOID, 8, top_k=3), 0),
    (15, Routing(Router.MAGNITUDE, 5, top_k=2, value=0.75), 0),
    (10, Routing(Router.TABLE, 5, has_router=False, value=3), BIAS),
    (7, Routing(Router.HINGE, 1, has_router=False), ROUTER_BIAS),
    (6, Routing(Router.HINGE, 1, value=1.25), BIAS | OUT_SCALE | ROUTER_BIAS),
    (5, Routing(Router.HINGE, 1, value=-0.5), 0),
    (4, Routing(Router.EXPERTS, 2, top_k=1), 0),
]
UNWEIGHED = (None, Router.EXPERTS, Router.HINGE)  # nothing of what their rows do is noted


@pytest.fixture(params=["native", "torch"])
def form(request, monkeypatch) -> str:
    if request.param == "native":
        assert native.is_available(), native.unavailable_reason()
    else:
        monkeypatch.setattr(native, "is_available", lambda: False)
    return str(request.param)


def make_cells(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Arena, with NaN between the cells, and int64 [slots, 1, 4]."""
    generator = torch.Generator().manual_seed(1)
    cells, blocks, offset = [], [], 0
    for rank, routing, parts in CASES:
        code = 0 if routing is None else routing.code
        size = layout.num_elements(NUM_IN, NUM_OUT, rank, parts, code)
        blocks += [torch.full((3,), float("nan")), torch.randn(size, generator=generator) / 4]
        cells.append([[offset + 3, rank, parts, code]])
        offset += size + 3
    return torch.cat(blocks).to(dtype), torch.tensor(cells)


def make_uses(lengths: list[int], *, is_gated: bool = False) -> tuple[list[RowUse], int]:
    """Runs of these lengths, slot after slot, with a base row between two."""
    rng = np.random.default_rng(2)
    uses, start = [], 0
    for slot, length in enumerate(lengths):
        table = rng.normal(size=(length, 8)).astype(np.float32)
        table[::2, 4] = 0.0
        gate = np.array([1.0, 0.0, 2.0, 0.5], np.float32) if is_gated and slot % 2 else None
        use = RowUse(start, start + length, (slot,), (0.5 + slot,), (gate,), (table,))
        uses.append(use)
        start += length + 1
    return uses, start


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("length", [1, 2, 5, 40])
def test_a_linear_equals_the_specification(form, length, is_gated):
    arena, cells = make_cells(torch.float32)
    uses, num_rows = make_uses([length] * len(CASES), is_gated=is_gated)
    plan = build_plan(uses, num_rows)
    buffers = PlanBuffers(num_rows, torch.device("cpu"))
    buffers.load(plan)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(num_rows, NUM_IN, generator=generator)
    y = torch.randn(num_rows, NUM_OUT, generator=generator)
    expected = reference_matmul(y, x, arena, cells, plan, 0)
    found = y.clone()
    gated_matmul_(found, x, Site(0, arena, cells, buffers))
    assert largest_difference(found, expected) < 2e-6
    untouched = uses[-1]  # EXPERTS are not the gated product's
    assert torch.equal(found[untouched.start :], y[untouched.start :])


def test_long_segments_equal_the_specification(form):
    arena, cells = make_cells(torch.float32)
    uses, num_rows = make_uses([300, 270, 260, 1, 300, 256, 300, 300, 280, 260, 300, 1, 1])
    plan = build_plan(uses, num_rows)
    assert any(lane.num_short < lane.num_segments for lane in plan.lanes)
    buffers = PlanBuffers(num_rows, torch.device("cpu"))
    buffers.load(plan)
    x, y = torch.randn(num_rows, NUM_IN), torch.randn(num_rows, NUM_OUT)
    expected = reference_matmul(y, x, arena, cells, plan, 0)
    gated_matmul_(y, x, Site(0, arena, cells, buffers))
    assert largest_difference(y, expected) < 2e-6


def test_work_that_is_cut_for_threads_gives_the_same_bits():
    arena = torch.randn(64 * (2 * 1100 + 900) + 7)
    cells = torch.tensor([[[5, 64, 0, Routing(Router.SIGMOID, 64, top_k=8).code]]])
    plan = build_plan([RowUse(0, 90, (0,), (1.0,))], 90)
    buffers = PlanBuffers(90, torch.device("cpu"))
    buffers.load(plan)
    x, y = torch.randn(90, 1100) / 33, torch.zeros(90, 900)
    threads = torch.get_num_threads()
    found = []
    try:
        for num in (1, 2, 3):
            torch.set_num_threads(num)
            found.append(y.clone())
            gated_matmul_(found[-1], x, Site(0, arena, cells, buffers))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert largest_difference(found[0], reference_matmul(y, x, arena, cells, plan, 0)) < 2e-6


def test_a_row_has_its_bits_whoever_is_beside_it():
    arena, cells = make_cells(torch.float32)
    uses, num_rows = make_uses([7] * len(CASES))
    buffers = PlanBuffers(num_rows, torch.device("cpu"))
    buffers.load(build_plan(uses, num_rows))
    x, y = torch.randn(num_rows, NUM_IN), torch.randn(num_rows, NUM_OUT)
    together = y.clone()
    gated_matmul_(together, x, Site(0, arena, cells, buffers))
    for use in uses:
        for row in range(use.start, use.stop):
            (table,) = use.tables
            alone = RowUse(0, 1, use.slots, use.scales, (), (table[row - use.start][None],))
            buffers.load(build_plan([alone], 1))
            own = y[row : row + 1].clone()
            gated_matmul_(own, x[row : row + 1], Site(0, arena, cells, buffers))
            assert torch.equal(own[0], together[row])


def test_an_embedding_takes_the_table(form):
    num_tokens, width, rank = 11, 6, 8
    arena = torch.randn(3 + rank * (num_tokens + width))
    routing = Routing(Router.TABLE, 4, has_router=False, value=2)
    cells = torch.tensor([[[3, rank, 0, routing.code]]])
    table = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    plan = build_plan([RowUse(1, 6, (0,), (0.5,), (), (table,))], 7)
    buffers = PlanBuffers(7, torch.device("cpu"))
    buffers.load(plan)
    ids, weight = torch.randint(num_tokens, (7,)), torch.randn(num_tokens, width)
    found = weight[ids]
    gated_embedding_(found, ids, num_tokens, Site(0, arena, cells, buffers))
    expected = reference_embedding(ids, weight, arena, cells, plan, 0)
    assert largest_difference(found, expected) < 2e-6


def test_bfloat16_weights_are_summed_in_float32():
    arena, cells = make_cells(torch.bfloat16)
    uses, num_rows = make_uses([3] * len(CASES))
    plan = build_plan(uses, num_rows)
    buffers = PlanBuffers(num_rows, torch.device("cpu"))
    buffers.load(plan)
    x, y = torch.randn(num_rows, NUM_IN), torch.randn(num_rows, NUM_OUT)
    expected = reference_matmul(y, x, arena, cells, plan, 0)
    gated_matmul_(y, x, Site(0, arena, cells, buffers))
    assert largest_difference(y, expected) < 2e-6


def test_of_equal_scores_the_first_are_chosen(form):
    # Six rows of equal components, three scores of two components each, without a bias.
    rank, routing = 6, Routing(Router.SIGMOID, 3, top_k=3)
    router = torch.zeros(3, NUM_IN)
    b = torch.eye(rank, NUM_OUT)
    arena = torch.cat([torch.ones(rank * NUM_IN), router.flatten(), b.flatten()])
    cells = torch.tensor([[[0, rank, 0, routing.code]]])
    buffers = PlanBuffers(1, torch.device("cpu"))
    buffers.load(build_plan([RowUse(0, 1, (0,), (1.0,))], 1))
    y = torch.zeros(1, NUM_OUT)
    gated_matmul_(y, torch.ones(1, NUM_IN), Site(0, arena, cells, buffers))
    assert y[0, :rank].tolist() == pytest.approx([NUM_IN / 3] * 3 + [0.0] * 3)


def test_a_component_that_weighs_nothing_passes_no_infinity(form):
    rank, routing = 2, Routing(Router.TABLE, 2, has_router=False)
    arena = torch.cat([torch.tensor([[torch.inf], [1.0]]).flatten(), torch.ones(rank * 2)])
    cells = torch.tensor([[[0, rank, 0, routing.code]]])
    plan = build_plan([RowUse(0, 1, (0,), (1.0,), (), (np.array([[0.0, 2.0]], np.float32),))], 1)
    buffers = PlanBuffers(1, torch.device("cpu"))
    buffers.load(plan)
    y = torch.zeros(1, 2)
    gated_matmul_(y, torch.ones(1, 1), Site(0, arena, cells, buffers))
    assert y.tolist() == [[2.0, 2.0]]


def test_a_sum_that_is_not_positive_divides_nothing_by_zero(form):
    rank, routing = 2, Routing(Router.SIGMOID, 2, top_k=1)
    blocks = [torch.ones(rank), torch.zeros(2), torch.ones(rank), torch.full((2,), -0.5)]
    cells = torch.tensor([[[0, rank, ROUTER_BIAS, routing.code]]])
    buffers = PlanBuffers(1, torch.device("cpu"))
    buffers.load(build_plan([RowUse(0, 1, (0,), (1.0,))], 1))
    y = torch.zeros(1, 1)
    gated_matmul_(y, torch.ones(1, 1), Site(0, torch.cat(blocks), cells, buffers))
    assert y.tolist() == [[0.0]]


def test_a_negative_sum_divides_as_a_sum(form):
    rank, routing = 2, Routing(Router.SIGMOID, 2, top_k=2)
    blocks = [torch.ones(rank), torch.zeros(2), torch.ones(rank), torch.tensor([-1.0, -1.5])]
    cells = torch.tensor([[[0, rank, ROUTER_BIAS, routing.code]]])
    buffers = PlanBuffers(1, torch.device("cpu"))
    buffers.load(build_plan([RowUse(0, 1, (0,), (1.0,))], 1))
    y = torch.zeros(1, 1)
    gated_matmul_(y, torch.ones(1, 1), Site(0, torch.cat(blocks), cells, buffers))
    assert y.item() == pytest.approx(1.0)  # weights 1/3 and 2/3


@pytest.mark.parametrize("top_k", [1, 2, 7, 100, 511])
def test_many_of_many_equal_the_specification_with_ties(form, top_k):
    num_in, rank = 8, 512
    generator = torch.Generator().manual_seed(top_k)
    # Few different scores, so that many tie; zeros of both signs among them.
    router = torch.randint(-2, 3, (rank, num_in), generator=generator).float() * 0.25
    routing = Routing(Router.SIGMOID, rank, top_k=top_k)
    a = torch.randn(rank, num_in, generator=generator)
    b = torch.randn(rank, 4, generator=generator)
    arena = torch.cat([a.flatten(), router.flatten(), b.flatten()])
    cells = torch.tensor([[[0, rank, 0, routing.code]]])
    plan = build_plan([RowUse(0, 3, (0,), (1.0,))], 3)
    buffers = PlanBuffers(3, torch.device("cpu"))
    buffers.load(plan)
    x = torch.tensor([[1.0] * 8, [-1.0] * 8, [0.0] * 8])
    y = torch.zeros(3, 4)
    expected = reference_matmul(y, x, arena, cells, plan, 0)
    gated_matmul_(y, x, Site(0, arena, cells, buffers))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_the_torch_form_does_not_round_scores(monkeypatch):
    monkeypatch.setattr(native, "is_available", lambda: False)
    rank, routing = 2, Routing(Router.SOFTMAX, 2, top_k=1)
    # Two scores that bfloat16 cannot tell apart: 1 + 2^-9 of x's second input decides.
    blocks = [torch.ones(2, 2), torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.eye(2)]
    arena = torch.cat([block.flatten() for block in blocks]).bfloat16()
    cells = torch.tensor([[[0, rank, 0, routing.code]]])
    buffers = PlanBuffers(1, torch.device("cpu"))
    buffers.load(build_plan([RowUse(0, 1, (0,), (1.0,))], 1))
    y = torch.zeros(1, 2)
    x = torch.tensor([[1.0, 2.0**-12]])
    gated_matmul_(y, x, Site(0, arena, cells, buffers))
    assert y[0, 0] == 0.0
    assert y[0, 1] > 0.0


def test_a_table_that_is_too_narrow_is_refused_whatever_an_earlier_step_brought():
    arena, cells = make_cells(torch.float32)
    slot = next(i for i, (_, of, _) in enumerate(CASES) if of and of.router is Router.TABLE)
    buffers = PlanBuffers(1, torch.device("cpu"))
    site = Site(0, arena, cells, buffers)
    wide, narrow = np.ones((1, 8), np.float32), np.ones((1, 7), np.float32)
    y = torch.zeros(1, NUM_OUT)
    buffers.load(build_plan([RowUse(0, 1, (slot,), (1.0,), (), (wide,))], 1))
    gated_matmul_(y, torch.ones(1, NUM_IN), site)
    buffers.load(build_plan([RowUse(0, 1, (slot,), (1.0,), (), (narrow,))], 1))
    with pytest.raises(ValueError, match="segment 0 needs a table"):
        gated_matmul_(y, torch.ones(1, NUM_IN), site)


def test_a_cell_that_reads_a_table_is_refused_without_one():
    arena, cells = make_cells(torch.float32)
    slot = next(i for i, (_, of, _) in enumerate(CASES) if of and of.router is Router.TABLE)
    buffers = PlanBuffers(1, torch.device("cpu"))
    buffers.load(build_plan([RowUse(0, 1, (slot,), (1.0,))], 1))
    y = torch.zeros(1, NUM_OUT)
    with pytest.raises(ValueError, match="segment 0 needs a table"):
        gated_matmul_(y, torch.ones(1, NUM_IN), Site(0, arena, cells, buffers))
    assert not y.any()


@pytest.mark.parametrize("code", [Routing(Router.SOFTMAX, 5).code, Routing(Router.SOFTMAX, 0).code])
def test_a_routing_that_does_not_divide_the_rank_is_refused(code):
    buffers = PlanBuffers(1, torch.device("cpu"))
    buffers.load(build_plan([RowUse(0, 1, (0,), (1.0,))], 1))
    cells = torch.tensor([[[0, 4, 0, code]]])
    y = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="the cell of segment 0"):
        gated_matmul_(y, torch.ones(1, 2), Site(0, torch.ones(100), cells, buffers))


@pytest.mark.parametrize("routing", [of for _, of, _ in CASES if of is not None])
def test_a_routing_comes_back_from_its_code(routing):
    assert 0 < routing.code < 1 << 63
    assert Routing.of(routing.code) == routing
    expected = routing.num_scores if routing.has_router else 0
    assert layout.num_router_rows(routing.code) == expected


def test_the_largest_fields_fit():
    routing = Routing(Router.TABLE, 4095, 4095, True, False, value=(1 << 31) - 1)
    assert Routing.of(routing.code) == routing


@pytest.mark.parametrize("kind", [Router.SOFTMAX, Router.SIGMOID, Router.MAGNITUDE])
def test_the_kept_weights_sum_to_one_where_they_are_said_to(kind):
    scores = torch.randn(50, 8)
    routing = Routing(kind, 8, top_k=3, renormalise=True, value=0.5)
    weights = weigh(scores, routing, 8)
    assert ((weights != 0).sum(1) == 3).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(50))


@pytest.mark.parametrize("length", [3, 300])
def test_what_the_rows_chose_is_noted(form, length):
    arena, cells = make_cells(torch.float32)
    uses, num_rows = make_uses([length] * len(CASES))
    buffers = PlanBuffers(num_rows, torch.device("cpu"))
    buffers.usage = torch.zeros(len(CASES), layout.USAGE_COLUMNS)
    buffers.load(build_plan(uses, num_rows))
    x = torch.randn(num_rows, NUM_IN)
    gated_matmul_(torch.zeros(num_rows, NUM_OUT), x, Site(0, arena, cells, buffers))
    for slot, (rank, routing, parts) in enumerate(CASES):
        found = buffers.usage[slot]
        if routing is None or routing.router in UNWEIGHED:
            assert not found.any()
            continue
        assert found[0] == length
        rows = x[uses[slot].start : uses[slot].stop]
        at = int(cells[slot, 0, 0]) + rank * NUM_IN
        if routing.router is Router.TABLE:
            first = int(routing.value)
            scores = torch.from_numpy(uses[slot].tables[0][:, first : first + routing.num_scores])
        else:
            router = arena[at : at + routing.num_scores * NUM_IN].view(-1, NUM_IN)
            scores = rows @ router.t()
        bias = None
        if parts & ROUTER_BIAS:
            tails = layout.list_parts(NUM_IN, NUM_OUT, rank, parts)
            size = layout.num_elements(NUM_IN, NUM_OUT, rank, parts, routing.code)
            end = int(cells[slot, 0, 0]) + size
            assert tails[-1] == (ROUTER_BIAS, rank)
            bias = arena[end - rank : end]
        weights = weigh(scores, routing, rank, bias)
        shares = weights.view(length, routing.num_scores, -1).mean(2).sum(0)
        torch.testing.assert_close(
            found[1 : 1 + routing.num_scores], shares, rtol=1e-4, atol=1e-4 * length
        )


def test_more_experts_than_buckets_are_noted_with_their_neighbours(form):
    rank = 128
    arena = torch.cat([torch.ones(rank), torch.ones(rank)])
    cells = torch.tensor([[[0, rank, 0, Routing(Router.TABLE, rank, has_router=False).code]]])
    table = np.arange(rank, dtype=np.float32)[None]
    buffers = PlanBuffers(1, torch.device("cpu"))
    buffers.usage = torch.zeros(1, layout.USAGE_COLUMNS)
    buffers.load(build_plan([RowUse(0, 1, (0,), (1.0,), (), (table,))], 1))
    gated_matmul_(torch.zeros(1, 1), torch.ones(1, 1), Site(0, arena, cells, buffers))
    expected = [1.0, *(float(4 * b + 1) for b in range(64))]
    assert buffers.usage[0].tolist() == expected
