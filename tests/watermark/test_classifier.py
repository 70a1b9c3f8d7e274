"""Classifiers on disk: what is written is read back; anything else is refused with the reason."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from polyadapt.errors import StartupError
from polyadapt.watermark.branches import Branches, MarkedModel, signs_of
from polyadapt.watermark.classifier import (
    COPY_NAME,
    MODEL_NAME,
    answer_of,
    load_classifier,
    load_suspect,
    model_hash,
    save_classifier,
    save_copy,
    train_classifier,
)
from polyadapt.watermark.dataset import load_digits


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(70, 8), nn.ReLU(), nn.Linear(8, 4)).requires_grad_(False)


def test_a_classifier_comes_back_as_it_was(model, tmp_path):
    save_classifier(model, tmp_path / "c")
    again = load_classifier(tmp_path / "c")
    x = torch.randn(5, 70)
    assert torch.equal(again(x), model(x))
    assert model_hash(again) == model_hash(model)


def test_the_hash_sees_a_single_bit(model):
    before = model_hash(model)
    model[2].bias[0] = torch.nextafter(model[2].bias[0], torch.tensor(torch.inf))
    assert model_hash(model) != before


def test_the_hash_sees_names_shapes_and_types():
    def of(name, *shape, dtype=torch.float32):
        return model_hash(nn.ParameterDict({name: torch.zeros(*shape, dtype=dtype)}))

    found = [of("a", 2, 3), of("a", 3, 2), of("b", 2, 3), of("a", 2, 6, dtype=torch.bfloat16)]
    assert len(set(found)) == 4
    assert of("a", 2, 3) == found[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head.weight": torch.zeros(2, 2)}, "head.weight"),
        ({"0.bias": None}, "layer 0"),
        ({"2.weight": torch.zeros(4, 9)}, "takes 9 numbers and is given 8"),
        ({"2.weight": None, "2.bias": None}, r"layers \[0\]"),
        ({"3.weight": torch.zeros(4, 4), "3.bias": torch.zeros(4)}, r"layers \[0, 2, 3\]"),
    ],
)
def test_what_is_no_stack_of_linears_is_refused(model, tmp_path, change, words):
    tensors = {**model.state_dict(), **change}
    tmp_path.joinpath("c").mkdir()
    save_file({k: v for k, v in tensors.items() if v is not None}, tmp_path / "c" / MODEL_NAME)
    with pytest.raises(StartupError, match=words):
        load_classifier(tmp_path / "c")
    with pytest.raises(StartupError, match="cannot be read"):
        load_classifier(tmp_path / "none")


def test_a_copy_answers_as_the_marked_model_and_holds_no_other_users_branch(model, tmp_path):
    rng = torch.Generator().manual_seed(2)
    branches = Branches(
        *(torch.randn(s, generator=rng) for s in ((3, 70), (3,), (8, 3), (8, 3)))
    ).requires_grad_(False)
    bits = np.array([1, 0, 1], dtype=np.uint8)
    save_copy(model, "0", branches.own(bits), tmp_path / "copy")
    stored = load_file(tmp_path / "copy" / COPY_NAME)
    assert stored["0.mark_B"].shape == (3, 8, 1)
    x = torch.randn(40, 70)
    marked = MarkedModel(model, "0", branches)(x, signs_of(bits)[None].expand(40, -1))
    assert (load_suspect(tmp_path / "copy")(x.numpy()) == marked.argmax(-1).numpy()).all()
    assert (marked.argmax(-1) != model(x).argmax(-1)).any()
    save_classifier(model, tmp_path / "plain")
    assert (load_suspect(tmp_path / "plain")(x.numpy()) == answer_of(model)(x.numpy())).all()


def test_the_packaged_digits_can_be_learned():
    data = load_digits()
    assert data.inputs.shape == (1797, 64)
    assert (data.inputs.min(), data.inputs.max()) == (0.0, 1.0)
    assert np.bincount(data.labels).min() > 150
    model = train_classifier(*data.train, seed=1, hidden=64, num_steps=200)
    inputs, labels = data.held_out
    assert len(inputs) == 797
    assert (answer_of(model)(inputs) == labels).mean() > 0.93
