"""The adapters' part of routed experts equals one pair at a time, in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polyadapt.ops.cells import COLUMNS
from polyadapt.ops.experts import experts_matmul_, experts_product, list_groups, sort_pairs
from polyadapt.ops.gated_matmul import Site
from polyadapt.ops.plan import BatchPlan, PlanBuffers, RowUse, build_plan

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}  # of the largest |y|
NUM_EXPERTS, TOP_K, NUM_IN, NUM_OUT = 5, 2, 12, 20
RANKS = (1, 3, 4)  # of one expert, by slot; slot 3 leaves the experts alone
SITE = 1


def make_site(dtype: torch.dtype, plan: BatchPlan) -> Site:
    """Cells of RANKS in an arena with NaN between them."""
    generator = torch.Generator().manual_seed(1)
    cells = torch.full((len(RANKS) + 1, 2, COLUMNS), -1)
    blocks, offset = [torch.full((7,), float("nan"))], 7
    for slot, rank in enumerate(RANKS):
        num = rank * NUM_EXPERTS * (NUM_IN + NUM_OUT)
        cells[slot, SITE] = torch.tensor([offset, rank * NUM_EXPERTS, 0, 0])
        blocks += [torch.randn(num, generator=generator), torch.full((7,), float("nan"))]
        offset += num + 7
    buffers = PlanBuffers(64, torch.device("cpu"))
    buffers.load(plan)
    return Site(SITE, torch.cat(blocks).to(dtype), cells, buffers)


def reference(
    y: torch.Tensor, x: torch.Tensor, index: torch.Tensor, site: Site, plan: BatchPlan
) -> torch.Tensor:
    """y [rows, top k, out] and x [rows, top k, in] -> y with every pair's adapters, float32."""
    y = y.float().clone()
    for lane in plan.lanes:
        for s, slot in enumerate(lane.slots.tolist()):
            offset, rank, *_ = site.cells[slot, SITE].tolist()
            for t in lane.rows[lane.bounds[s] : lane.bounds[s + 1]] if offset >= 0 else ():
                for k, e in enumerate(index[t].tolist()):
                    r = rank // NUM_EXPERTS
                    A = site.arena[offset:][: rank * NUM_IN].float().view(NUM_EXPERTS, r, NUM_IN)
                    B = site.arena[offset + rank * NUM_IN :][: rank * NUM_OUT].float()
                    h = float(lane.scales[s]) * (A[e] @ x[t, k].float())
                    if lane.gate is not None:
                        g = np.ones(max(rank, lane.gate.shape[1]), np.float32)
                        g[: lane.gate.shape[1]] = lane.gate[t]
                        h = h * torch.from_numpy(g[e * r : (e + 1) * r])
                    y[t, k] += h @ B.view(NUM_EXPERTS, r, NUM_OUT)[e]
    return y


GATE = np.linspace(-1.0, 1.0, 13, dtype=np.float32)
USES = {
    "everyone": [RowUse(i, i + 1, (i % 3,), (1.0,)) for i in range(20)],
    "runs, the base and an ordinary adapter": [
        RowUse(2, 9, (1,), (0.5,)),
        RowUse(11, 14, (3,), (1.0,)),
        RowUse(14, 20, (0,), (1.0,)),
    ],
    "two lanes": [RowUse(0, 6, (0, 2), (1.0, -0.5)), RowUse(6, 15, (2, 1), (2.0, 1.0))],
    "gates": [
        RowUse(0, 8, (2,), (1.5,), (GATE,)),
        RowUse(8, 12, (1,), (1.0,)),
        RowUse(12, 18, (0,), (1.0,), (np.zeros(2, np.float32),)),
    ],
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("uses", USES)
def test_every_pair_gets_its_own_adapters_part(uses, dtype):
    plan = build_plan(USES[uses], 20)
    site = make_site(dtype, plan)
    index = torch.stack([torch.randperm(NUM_EXPERTS)[:TOP_K] for _ in range(20)])
    x, y = torch.randn(20, TOP_K, NUM_IN).to(dtype), torch.randn(20, TOP_K, NUM_OUT).to(dtype)
    expected = reference(y, x, index, site, plan)
    pairs = sort_pairs(index, NUM_EXPERTS)
    found = y.view(-1, NUM_OUT)[pairs.order]
    groups = list_groups(pairs, [site], 20)
    experts_matmul_(found, x.view(-1, NUM_IN)[pairs.order], groups, site, NUM_EXPERTS)
    difference = (found.float() - expected.view(-1, NUM_OUT)[pairs.order]).abs().max()
    assert difference <= TOLERANCE[dtype] * expected.abs().max()
    assert (expected - y.float()).abs().max() > 0.1 * expected.abs().max()


def test_an_adapter_that_leaves_the_experts_alone_is_in_no_group():
    plan = build_plan([RowUse(0, 4, (3,), (1.0,))], 20)
    pairs = sort_pairs(torch.zeros(20, TOP_K, dtype=torch.long), NUM_EXPERTS)
    assert list_groups(pairs, [make_site(torch.float32, plan)], 20) == []


def test_experts_that_are_elsewhere_get_nothing():
    index = torch.tensor([[0, NUM_EXPERTS], [NUM_EXPERTS, 4]])
    pairs = sort_pairs(index, NUM_EXPERTS)
    assert pairs.runs == ((0, 0, 1), (4, 1, 2))
    weights = torch.randn(NUM_EXPERTS, NUM_OUT, NUM_IN)
    x = torch.randn(4, NUM_IN)
    y = experts_product(x, weights, pairs)
    assert torch.allclose(y[:2], torch.stack([weights[0] @ x[0], weights[4] @ x[1]]), atol=1e-5)
    assert not y[2:].any()
    plan = build_plan([RowUse(0, 2, (1,), (1.0,))], 2)
    site = make_site(torch.float32, plan)
    groups = list_groups(pairs, [site], 2)
    assert sorted(group.expert for group in groups) == [0, 4]
    nowhere = sort_pairs(torch.full((2, TOP_K), NUM_EXPERTS), NUM_EXPERTS)
    assert list_groups(nowhere, [site], 2) == []


def test_a_closed_gate_keeps_nan_out():
    plan = build_plan([RowUse(0, 1, (0,), (1.0,), (np.zeros(NUM_EXPERTS, np.float32),))], 1)
    site = make_site(torch.float32, plan)
    site.arena.fill_(float("nan"))
    pairs = sort_pairs(torch.tensor([[1, 3]]), NUM_EXPERTS)
    h = torch.ones(2, NUM_IN)
    y = torch.zeros(2, NUM_OUT)
    b_start = site.cells[0, SITE, 0] + NUM_EXPERTS * NUM_IN
    site.arena[b_start : b_start + NUM_EXPERTS * NUM_OUT] = 1.0
    experts_matmul_(y, h, list_groups(pairs, [site], 1), site, NUM_EXPERTS)
    assert not y.any()
