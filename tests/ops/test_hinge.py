"""Components behind a threshold, against the formula written out for one row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polyadapt.ops import native
from polyadapt.ops.cells import ROUTER_BIAS, Router, Routing, num_elements
from polyadapt.ops.gated_matmul import Site, gated_embedding_, gated_matmul_
from polyadapt.ops.plan import PlanBuffers, RowUse, build_plan

NUM_IN, NUM_OUT, RANK = 19, 23, 6
SIGNS = np.array([[1, -1, 1], [-1, -1, 1], [1, 1, -1], [0, 1, -1]], np.float32)


@pytest.fixture(params=["native", "torch"])
def form(request, monkeypatch) -> str:
    if request.param == "native":
        assert native.is_available(), native.unavailable_reason()
    else:
        monkeypatch.setattr(native, "is_available", lambda: False)
    return str(request.param)


class Cell:
    """One hinged cell, its parts at hand."""

    def __init__(self, *, has_veto: bool = True, value: float = 0.75, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.a = torch.randn(RANK, NUM_IN, generator=generator)
        self.b = torch.randn(RANK, NUM_OUT, generator=generator)
        self.tau = torch.randn(RANK, generator=generator)
        self.v = torch.randn(1, NUM_IN, generator=generator) if has_veto else torch.empty(0, NUM_IN)
        self.value = value
        self.code = Routing(Router.HINGE, 1, has_router=has_veto, value=value).code

    @property
    def arena(self) -> torch.Tensor:
        return torch.cat([part.flatten() for part in (self.a, self.v, self.b, self.tau)])

    @property
    def cells(self) -> torch.Tensor:
        assert len(self.arena) == num_elements(NUM_IN, NUM_OUT, RANK, ROUTER_BIAS, self.code)
        return torch.tensor([[[0, RANK, ROUTER_BIAS, self.code]]])

    def expected(self, x: torch.Tensor, gate: torch.Tensor, scale: float) -> torch.Tensor:
        """What one row gets: x [in], gate [rank]."""
        h = self.a.double() @ x.double() - self.tau.double()
        if len(self.v):
            h = h - torch.relu(self.value - self.v[0].double() @ x.double())
        return (scale * gate.double() * torch.relu(h)) @ self.b.double()

    def found(
        self, x: torch.Tensor, gates: list[np.ndarray | None], scale: float = 1.0
    ) -> torch.Tensor:
        """Of rows that are one segment, each with its own gate."""
        buffers = PlanBuffers(len(x), torch.device("cpu"))
        uses = [RowUse(t, t + 1, (0,), (scale,), (gate,)) for t, gate in enumerate(gates)]
        buffers.load(build_plan(uses, len(x)))
        (lane,) = buffers.lanes
        assert lane.num_segments == 1, "rows that differ in their gates alone share a segment"
        y = torch.zeros(len(x), NUM_OUT)
        gated_matmul_(y, x, Site(0, self.arena, self.cells, buffers))
        return y


@pytest.mark.parametrize("value", [0.75, -2.0, 40.0])
@pytest.mark.parametrize("has_veto", [True, False])
def test_rows_of_one_segment_get_the_formula_with_their_own_signs(form, has_veto, value):
    cell = Cell(has_veto=has_veto, value=value)
    x = torch.randn(40, NUM_IN, generator=torch.Generator().manual_seed(1))
    gates = [SIGNS[t % len(SIGNS)] for t in range(len(x))]
    found = cell.found(x, list(gates), scale=0.5)
    rest = torch.ones(RANK - SIGNS.shape[1])
    for t, gate in enumerate(gates):
        expected = cell.expected(x[t], torch.cat([torch.from_numpy(gate), rest]), 0.5)
        torch.testing.assert_close(found[t].double(), expected, rtol=1e-4, atol=1e-4)
    assert found.any() or (has_veto and value == 40.0)


def test_a_row_that_trips_nothing_is_changed_by_exactly_nothing(form):
    cell = Cell(has_veto=False)
    cell.tau += 100
    y = cell.found(torch.ones(3, NUM_IN), [SIGNS[0]] * 3)
    assert not y.any()


def test_a_sign_acts_behind_the_threshold_and_a_negative_scale_too(form):
    cell = Cell(has_veto=False)
    x = torch.randn(4, NUM_IN)
    ones, minus = np.ones(RANK, np.float32), -np.ones(RANK, np.float32)
    plain = cell.found(x, [ones] * 4)
    assert plain.any()
    assert torch.equal(cell.found(x, [minus] * 4), -plain)
    assert torch.equal(cell.found(x, [ones] * 4, scale=-1.0), -plain)


def test_what_is_not_a_number_stays_in_its_row_and_a_shut_gate_keeps_it_out(form):
    cell = Cell()
    cell.tau[:] = -5  # a shut component would be open without its gate
    x = torch.randn(3, NUM_IN)
    x[1, 4] = torch.nan
    ones, shut = np.ones(RANK, np.float32), np.zeros(RANK, np.float32)
    y = cell.found(x, [ones, ones, ones])
    assert y[1].isnan().all()
    assert not y[[0, 2]].isnan().any()
    assert not cell.found(x, [shut] * 3).any()


def test_an_infinite_veto_silences(form):
    cell = Cell()
    x = torch.randn(2, NUM_IN)
    cell.v[:] = 0
    cell.v[0, 0] = -1
    cell.a[:, 0] = 0
    cell.tau[:] = -100
    assert cell.found(x, [None] * 2).any()
    x[:, 0] = 3e38
    assert not cell.found(x, [None] * 2).any()


def test_many_rows_have_the_bits_of_each_alone(form):
    if form == "torch":
        pytest.skip("products of many rows have other bits than those of one; exact mode is native")
    cell = Cell()
    x = torch.randn(50, NUM_IN)
    gates = [SIGNS[t % len(SIGNS)] for t in range(len(x))]
    together = cell.found(x, list(gates))
    for t, gate in enumerate(gates):
        assert torch.equal(cell.found(x[t : t + 1], [gate])[0], together[t])


def test_the_torch_form_does_not_round_what_is_compared_with_a_threshold(monkeypatch):
    monkeypatch.setattr(native, "is_available", lambda: False)
    # 1 + 2^-12 is above a threshold of 1; in bfloat16 they are equal.
    code = Routing(Router.HINGE, 1, has_router=False).code
    arena = torch.tensor([1.0, 1.0, 1.0, 1.0]).bfloat16()
    cells = torch.tensor([[[0, 1, ROUTER_BIAS, code]]])
    buffers = PlanBuffers(1, torch.device("cpu"))
    buffers.load(build_plan([RowUse(0, 1, (0,), (1.0,))], 1))
    y = torch.zeros(1, 1)
    gated_matmul_(y, torch.tensor([[1.0, 2.0**-12]]), Site(0, arena, cells, buffers))
    assert y.item() == 2.0**-12


@pytest.mark.parametrize("scores", [0, 2])
def test_another_number_of_scores_is_refused(scores):
    cells = torch.tensor([[[0, 4, 0, Routing(Router.HINGE, scores, has_router=False).code]]])
    buffers = PlanBuffers(1, torch.device("cpu"))
    buffers.load(build_plan([RowUse(0, 1, (0,), (1.0,))], 1))
    y = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="the cell of segment 0"):
        gated_matmul_(y, torch.ones(1, 2), Site(0, torch.ones(100), cells, buffers))


def test_an_embedding_has_nothing_to_compare():
    cells = torch.tensor([[[0, 2, 0, Routing(Router.HINGE, 1, has_router=False).code]]])
    buffers = PlanBuffers(1, torch.device("cpu"))
    buffers.load(build_plan([RowUse(0, 1, (0,), (1.0,))], 1))
    with pytest.raises(ValueError, match="the cell of segment 0"):
        gated_embedding_(
            torch.zeros(1, 2), torch.zeros(1).long(), 3,
            Site(0, torch.ones(100), cells, buffers),
        )  # fmt: skip
