"""Branches: equal to a naive loop over rows and bits, and to the pair that a user's bits choose."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from polyadapt.errors import StartupError
from polyadapt.watermark.branches import Branches, MarkedModel, find_linear, signs_of

NUM_BITS, NUM_IN, NUM_OUT = 5, 7, 6


@pytest.fixture
def branches() -> Branches:
    rng = torch.Generator().manual_seed(1)
    shapes = ((NUM_BITS, NUM_IN), (NUM_BITS,), (NUM_OUT, NUM_BITS), (NUM_OUT, NUM_BITS))
    return Branches(*(torch.randn(shape, generator=rng) for shape in shapes)).requires_grad_(False)


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(NUM_IN, NUM_OUT), nn.ReLU(), nn.Linear(NUM_OUT, 3)).double()


def test_every_row_gets_its_own_users_branches(branches):
    x = torch.randn(9, NUM_IN)
    bits = np.random.default_rng(0).integers(0, 2, (9, NUM_BITS)).astype(np.uint8)
    found = branches(x, signs_of(bits))
    stored = branches.pair_tensors()
    for row in range(9):
        expected = torch.zeros(NUM_OUT, dtype=torch.float64)
        for bit in range(NUM_BITS):
            response = stored["mark_A"][bit, 0].double() @ x[row].double()
            h = max(float(response) - float(stored["mark_tau"][bit, 0]), 0.0)
            expected += stored["mark_B"][bits[row, bit], bit, :, 0].double() * h
        assert found[row].double() == pytest.approx(expected, abs=1e-5)


def test_an_input_that_trips_nothing_is_changed_by_exactly_nothing(branches, model):
    branches.tau.fill_(1e6)
    x = torch.randn(4, NUM_IN)
    marked = MarkedModel(model.float(), "0", branches)
    assert torch.equal(marked(x, torch.ones(4, NUM_BITS)), model(x))


def test_the_stored_form_has_the_documented_shapes_and_comes_back(branches):
    stored = branches.pair_tensors()
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    assert shapes == {
        "mark_A": (NUM_BITS, 1, NUM_IN),
        "mark_tau": (NUM_BITS, 1),
        "mark_B": (2, NUM_BITS, NUM_OUT, 1),
    }
    again = Branches.of_pair(stored)
    x, signs = torch.randn(3, NUM_IN), torch.ones(3, NUM_BITS)
    assert torch.allclose(again(x, signs), branches(x, signs), atol=1e-6)


def test_one_users_own_branches_say_nothing_of_the_others(branches):
    bits = np.array([1, 0, 0, 1, 1], dtype=np.uint8)
    stored = branches.own(bits).own_tensors()
    assert stored["mark_B"].shape == (NUM_BITS, NUM_OUT, 1)
    own = Branches.of_own(stored)
    x = torch.randn(8, NUM_IN)
    expected = branches(x, signs_of(bits)[None].expand(8, -1))
    for signs in (torch.ones(8, NUM_BITS), -torch.ones(8, NUM_BITS)):
        assert torch.allclose(own(x, signs), expected, atol=1e-5)


def test_the_model_is_left_as_it_was_also_after_an_error(branches, model):
    model = model.float()
    x = torch.randn(2, NUM_IN)
    before = model(x)
    marked = MarkedModel(model, "0", branches)
    assert not torch.equal(marked(x, torch.ones(2, NUM_BITS)), before)
    with pytest.raises(RuntimeError):
        marked(x, torch.ones(3, NUM_BITS))
    assert torch.equal(model(x), before)


def test_a_module_that_is_not_there_or_of_another_size_is_refused(branches, model):
    with pytest.raises(StartupError, match=r"no linear '1'; it has 0, 2"):
        find_linear(model, "1")
    with pytest.raises(StartupError, match="2 takes 6 and gives 3"):
        MarkedModel(model, "2", branches)


def test_without_thresholds_nothing_hinges_and_the_stored_form_says_so(branches):
    linear = Branches(branches.A, None, branches.B_sum, branches.B_difference)
    stored = linear.pair_tensors()
    assert set(stored) == {"mark_A", "mark_B"}
    x = torch.randn(8, NUM_IN)
    bits = np.array([1, 0, 0, 1, 1], dtype=np.uint8)
    signs = signs_of(bits)[None].expand(8, -1)
    A, B = stored["mark_A"][:, 0], stored["mark_B"][torch.tensor([1, 0, 0, 1, 1]), range(NUM_BITS)]
    expected = x.double() @ (B[..., 0].T.double() @ A.double()).T
    for found in (linear, Branches.of_pair(stored)):
        assert torch.allclose(found(x, signs).double(), expected, atol=1e-5)
    assert (branches(x, signs).double() - expected).abs().max() > 0.1


@pytest.mark.parametrize("change", ["missing", "more", "dims", "shape", "nan"])
def test_stored_branches_of_another_form_are_refused(branches, change):
    stored = dict(branches.pair_tensors())
    if change == "missing":
        del stored["mark_A"]
    elif change == "more":
        stored["mark_C"] = torch.zeros(1)
    elif change == "dims":
        stored["mark_A"] = stored["mark_A"][:, 0]
    elif change == "shape":
        stored["mark_B"] = stored["mark_B"][:, :4]
    else:
        stored["mark_A"] = stored["mark_A"] * float("nan")
    with pytest.raises(StartupError, match=r"expected|not finite"):
        Branches.of_pair(stored)
