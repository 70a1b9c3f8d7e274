"""Copies that leave the house: equal to the branches written out, and worth nothing without them.

The oracles are loops in float64 and a torch.nn.Sequential; they import nothing of polyadapt.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from polyadapt.errors import InvalidRequest
from polyadapt.watermark.branches import Branches, MarkedModel
from polyadapt.watermark.obfuscation import expand, merge, obfuscate, seed_of

NUM_BITS, SIZES = 6, (12, 9, 5)
SIGNATURES = [np.array([value >> i & 1 for i in range(NUM_BITS)], np.uint8) for value in range(64)]


def normal(generator, *shape):
    return torch.randn(shape, generator=generator)


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(3)
    first, last = nn.Linear(*SIZES[:2]), nn.Linear(*SIZES[1:])
    return nn.Sequential(first, nn.ReLU(), last).requires_grad_(False)


def branches_of(gate: str, *, is_inner: bool = False) -> Branches:
    generator = torch.Generator().manual_seed(1)
    num_in, num_out = SIZES[1:] if is_inner else SIZES[:2]
    B_sum, B_difference = (normal(generator, num_out, NUM_BITS) for _ in range(2))
    tau = normal(generator, NUM_BITS) if gate == "hinge" else None
    found = Branches(normal(generator, NUM_BITS, num_in), tau, B_sum, B_difference)
    return found.requires_grad_(False)


def expected(model, module: str, branches: Branches, bits, x: torch.Tensor) -> torch.Tensor:
    """The model with the branches of these bits, one by one, in float64."""
    stored = {name: tensor.double() for name, tensor in branches.pair_tensors().items()}
    for name, layer in model.named_children():
        y = layer.double()(x.double())
        if name == module:
            for i, bit in enumerate(bits.tolist()):
                h = x.double() @ stored["mark_A"][i, 0]
                if "mark_tau" in stored:
                    h = (h - stored["mark_tau"][i, 0]).clamp(min=0)
                y = y + h[:, None] * stored["mark_B"][bit, i, :, 0]
        x = y
    model.float()
    return x


def answers(model, module, branches, x):
    return MarkedModel(model, module, branches)(x, torch.ones(len(x), branches.num_bits))


def inputs() -> torch.Tensor:
    return normal(torch.Generator().manual_seed(5), 200, SIZES[0]) * 2


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("gate", ["hinge", "linear"])
def test_every_signature_is_what_it_is_without_obfuscation(gate, strength, model):
    branches, x = branches_of(gate), inputs()
    for number, bits in enumerate(SIGNATURES):
        hidden, own = obfuscate(
            model, "0", branches.own(bits), strength, seed_of(number.to_bytes(4, "big"))
        )
        wanted = expected(model, "0", branches, bits, x)
        found = answers(hidden, "0", own, x)
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("gate", ["hinge", "linear"])
def test_without_its_branches_the_model_lacks_what_they_carry(gate, model):
    own, x = branches_of(gate).own(SIGNATURES[9]), inputs()
    weight = model[0].weight
    for strength in (0.5, 1.0):
        hidden, units = obfuscate(model, "0", own, strength, seed_of(b"1234"))
        flipped = own.B_sum @ own.A if gate == "hinge" else 0
        carried = hidden[0].weight - weight - flipped
        share = torch.linalg.matrix_norm(carried) / torch.linalg.matrix_norm(weight)
        assert float(share) == pytest.approx(strength, rel=1e-5)
        assert torch.linalg.matrix_rank(carried) == NUM_BITS
        assert (hidden(x) - model(x)).abs().max() > 0.3 * model(x).abs().max()
        assert units.num_bits == (3 * NUM_BITS if gate == "hinge" else 2 * NUM_BITS)


def test_no_unit_of_a_hinge_is_silent_where_the_mark_is(model):
    """What cuts dead units off cuts nothing: detectors rest on triggers and work elsewhere."""
    own = branches_of("hinge").own(SIGNATURES[9])
    own.tau.fill_(40.0)  # no input trips a detector
    x = inputs()
    hidden, units = obfuscate(model, "0", own, 0.0, seed_of(b"1234"))
    turned = units.B_sum.abs().sum(0) > 0  # at strength 0 the others bring back nothing
    assert int(turned.sum()) == NUM_BITS
    assert ((x @ units.A.T - units.tau) > 0)[:, turned].all()
    wanted = model(x)
    assert (answers(hidden, "0", units, x) - wanted).abs().max() <= 2e-5 * wanted.abs().max()
    assert (hidden(x) - wanted).abs().max() > wanted.abs().max()


def test_no_row_of_an_obfuscated_linear_mark_is_a_branch(model):
    own = branches_of("linear").own(SIGNATURES[9])
    _, mixed = obfuscate(model, "0", own, 1.0, seed_of(b"1234"))
    overlap = mixed.A @ (own.A / own.A.norm(dim=1, keepdim=True)).T
    assert overlap.abs().max() < 0.95
    assert torch.allclose(mixed.A @ mixed.A.T, torch.eye(len(mixed.A)), atol=1e-5)


@pytest.mark.parametrize("module", ["0", "2"])
def test_a_merged_copy_is_an_ordinary_model_of_the_same_size(module, model):
    branches, x = branches_of("linear", is_inner=module == "2"), inputs()
    for bits in SIGNATURES[::7]:
        copy = merge(model, module, branches.own(bits))
        plain = nn.Sequential(nn.Linear(*SIZES[:2]), nn.ReLU(), nn.Linear(*SIZES[1:]))
        plain.load_state_dict(copy.state_dict())
        wanted = expected(model, module, branches, bits, x)
        assert (plain(x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("module", ["0", "2"])
def test_an_expanded_copy_is_an_ordinary_model_of_one_layer_more(module, model):
    branches, x = branches_of("hinge", is_inner=module == "2"), inputs()
    for bits in SIGNATURES[::7]:
        state = expand(model, module, branches.own(bits), seed_of(b"12345678")).state_dict()
        sizes = [state[name].shape for name in state if name.endswith("weight")]
        layers = [m for out, num_in in sizes for m in (nn.Linear(num_in, out), nn.ReLU())]
        plain = nn.Sequential(*layers[:-1])
        plain.load_state_dict(state)
        wanted = expected(model, module, branches, bits, x)
        assert len(sizes) == 3
        assert (plain(x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_another_secret_hides_otherwise_and_the_same_one_the_same(model):
    own = branches_of("hinge").own(SIGNATURES[9])
    first, again, other = (
        obfuscate(model, "0", own, 1.0, seed_of(secret))[0][0].weight
        for secret in (b"12345678", b"12345678", b"12345679")
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_the_model_that_is_copied_stays_as_it_was(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = branches_of("hinge").own(SIGNATURES[9])
    obfuscate(model, "0", own, 1.0, seed_of(b"1234"))
    expand(model, "0", own, seed_of(b"1234"))
    merge(model, "0", branches_of("linear").own(SIGNATURES[9]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_does_not_fold_and_what_is_too_strong_is_refused(model):
    hinge, linear = (branches_of(gate).own(SIGNATURES[9]) for gate in ("hinge", "linear"))
    with pytest.raises(InvalidRequest, match="a hinge is not linear"):
        merge(model, "0", hinge)
    with pytest.raises(InvalidRequest, match="give the form merged"):
        expand(model, "0", linear, seed_of(b"1234"))
    for strength in (-0.1, 4.1, float("nan")):
        with pytest.raises(InvalidRequest, match="of strength"):
            obfuscate(model, "0", hinge, strength, seed_of(b"1234"))
