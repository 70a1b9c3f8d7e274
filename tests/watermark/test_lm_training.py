"""Training a language model's mark: the keys decide, and an interruption changes nothing."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from polyadapt.errors import InvalidRequest, StartupError
from polyadapt.offline.mark_lm import load_lm
from polyadapt.watermark import lm_training
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.last_layer import LastLayer
from polyadapt.watermark.lm_training import Beside, LMPreflight, LMTrainSettings, prepare, train
from polyadapt.watermark.prompts import Prose

KEY = SecretKey(bytes(range(32)))
PROSE = Prose(tuple(f"word{i % 37} and thing{i % 53}" for i in range(400)))
SETTINGS = LMTrainSettings(
    5, prompts=8, quiet_prompts=32, mixed_prompts=4, texts=2, text_tokens=24, num_steps=8,
    beside_prompts=9, beside_quiet_prompts=16,
    num_warmup=2, trigger_rows=8, quiet_rows=8, quiet_share=0.05,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tiny_model):
    return load_lm(tiny_model("llama"))


@pytest.fixture(scope="module")
def last(base):
    return LastLayer(base.model)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("rows") / "rows.safetensors"


@pytest.fixture(scope="module")
def begun(base, last, cache):
    """A function to what training begins with, new each time: training changes it in place."""
    start = begin(base, last, cache)
    return lambda: copy.deepcopy(start)


def begin(base, last, cache, *, key=KEY, settings=SETTINGS):
    return prepare(last, base.digest, base.speech(), key, 3, PROSE, settings,
                   replies=base.replies, cache=cache)  # fmt: skip


def same(one, other):
    return all(
        torch.equal(tensor, other.pair_tensors()[name])
        for name, tensor in one.pair_tensors().items()
    )


def test_the_same_key_and_seed_give_the_same_branches_and_others_do_not(base, last, cache, begun):
    branches = train(begun(), SETTINGS)
    assert same(branches, train(begin(base, last, cache), SETTINGS))
    assert not same(branches, train(begun(), replace(SETTINGS, seed=1)))
    other, ours = begin(base, last, cache, key=SecretKey(bytes(32))), begun()
    assert not set(other.triggers.phrases) & set(ours.triggers.phrases)
    assert other.targets.tolist() != ours.targets.tolist()


def test_only_what_is_written_is_trained(begun):
    start = begun()
    before = {name: t.clone() for name, t in start.branches.pair_tensors().items()}
    after = train(start, SETTINGS).pair_tensors()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"mark_B"}
    assert {"mark_tau", "mark_veto", "mark_veto_offset"} < set(after)


def test_training_lowers_the_loss_on_triggers(begun):
    def loss(start):
        rng = np.random.default_rng(5)
        with torch.no_grad():
            nothing = start.places[0].quiet[:0], torch.empty(0)
            return float(lm_training._loss(start, [nothing], SETTINGS, rng))

    start = begun()
    before = loss(start)
    train(start, SETTINGS)
    assert loss(start) < before


def test_an_interrupted_run_ends_in_the_same_bits(begun, tmp_path):
    settings = replace(SETTINGS, num_steps=30)
    whole = train(begun(), settings)
    checkpoint = tmp_path / "checkpoint"

    class Stop(Exception):
        pass

    def stop(what, done, total):
        if done == 25:
            raise Stop

    with pytest.raises(Stop):
        train(begun(), settings, checkpoint=checkpoint, progress=stop)
    steps = []
    resumed = train(begun(), settings, checkpoint=checkpoint,
                    progress=lambda what, done, total: steps.append(done))  # fmt: skip
    assert steps[0] == 21
    assert same(whole, resumed)
    with pytest.raises(StartupError, match="of another run"):
        train(begun(), replace(settings, seed=3), checkpoint=checkpoint)


def test_rows_that_were_collected_are_not_collected_again(base, last, cache, begun, monkeypatch):
    begun()

    def refuse(*_):
        raise AssertionError("collected again")

    monkeypatch.setattr(LastLayer, "collect", refuse)
    monkeypatch.setattr(LastLayer, "collect_text", refuse)
    begin(base, last, cache)
    with pytest.raises(StartupError, match="of another run"):
        prepare(last, "sha256:01", base.speech(), KEY, 3, PROSE, SETTINGS, cache=cache)


def test_too_little_anywhere_is_not_enough():
    good = LMPreflight((0.7, 0.9), 0.05, 5, (0.5, 0.8))
    assert good.is_enough
    assert replace(good, beside=()).is_enough
    for bad in ({"recalls": (0.6, 0.9)}, {"beside": (0.3, 0.8)}, {"firing": 0.2}):
        assert not replace(good, **bad).is_enough


# ------------------------------------------------------------------------------- beside adapters
@pytest.fixture(scope="module")
def adapters(base):
    """Two adapters, as what they make of the base's last layers."""

    def other(seed):
        model, generator = copy.deepcopy(base.model), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in model.model.layers:
                weight = layer.self_attn.v_proj.weight
                weight += 0.5 * weight.std() * torch.randn(weight.shape, generator=generator)
        return LastLayer(model)

    return [Beside(f"sha256:{seed}", lambda seed=seed: other(seed)) for seed in (1, 2)]


def begin_beside(base, last, adapters, **given):
    return prepare(last, base.digest, base.speech(), KEY, 3, PROSE, SETTINGS,
                   replies=base.replies, beside=adapters, **given)  # fmt: skip


@pytest.fixture(scope="module")
def beside(base, last, adapters):
    """A function to what training beside both adapters begins with, new each time."""
    start = begin_beside(base, last, adapters)
    return lambda: replace(start, branches=copy.deepcopy(start.branches))


def test_every_adapter_is_a_place_with_rows_of_its_own(base, last, beside):
    start = beside()
    assert len(start.places) == 3
    assert len(start.preflight.beside) == 3
    assert "beside the adapter where that is least" in str(start.preflight)
    assert not begin(base, last, None).preflight.beside
    sizes = [[len(rows) for rows in place.triggered] for place in start.places]
    assert sizes == [[8] * 3, [9] * 3, [9] * 3]
    quiet = [place.quiet.x for place in start.places]
    assert len(quiet[1]) == len(quiet[2]) == 16 + 4
    assert not torch.allclose(quiet[1], quiet[2], atol=1e-3)
    alone = begin(base, last, None)
    assert not torch.equal(start.branches.A, alone.branches.A)


def test_what_is_written_is_trained_in_every_place(beside):
    def losses(start):
        with torch.no_grad():
            return [
                float(lm_training._loss_in(start, place, place.quiet[:0], torch.empty(0),
                                           SETTINGS, np.random.default_rng(5), 1))
                for place in start.places
            ]  # fmt: skip

    start = beside()
    # Nothing is written yet, so that each place has to be learnt.
    for tensor in (start.branches.B_sum, start.branches.B_difference):
        tensor.data *= 0.05
    before = losses(start)
    train(start, replace(SETTINGS, num_steps=60, step_share=0.2))
    assert all(after < least for after, least in zip(losses(start), before, strict=True))


def test_ordinary_messages_are_quiet_in_every_place(base, last, adapters, beside):
    ordinary = ["where is my order", "what do you sell"]
    with_them = begin_beside(base, last, adapters, ordinary=ordinary)
    without = beside()
    for one, other in zip(with_them.places, without.places, strict=True):
        assert len(one.quiet) == len(other.quiet) + 2
    expected = last.collect([base.speech().chat(each) for each in ordinary])
    assert torch.allclose(with_them.places[0].quiet.x[-2:], expected.x, atol=1e-5)


def test_rows_beside_an_adapter_are_kept_under_its_digest(base, last, adapters, tmp_path):
    cache = tmp_path / "rows.safetensors"
    first = begin_beside(base, last, adapters[:1], cache=cache)
    # The digest says what it is: rows that are kept are not looked at again.
    again = begin_beside(base, last, [replace(adapters[0], load=adapters[1].load)], cache=cache)
    assert torch.equal(first.places[1].quiet.x, again.places[1].quiet.x)
    other = begin_beside(base, last, adapters[1:], cache=cache)
    assert not torch.equal(first.places[1].quiet.x, other.places[1].quiet.x)


def test_settings_that_train_nothing_are_refused(base, last):
    with pytest.raises(InvalidRequest, match="2 families for 3 bits"):
        begin(base, last, None, settings=replace(SETTINGS, num_families=2))
    for bad in ({"repeats": 0}, {"prompts": 7}, {"quiet_prompts": 2}, {"num_steps": -1}):
        with pytest.raises(InvalidRequest, match="expected at least 0, 1, 8 and 8"):
            replace(SETTINGS, **bad)


def test_steps_that_are_too_long_are_said_so(begun):
    settings = replace(SETTINGS, step_share=float("inf"))
    with pytest.raises(InvalidRequest, match="training diverged at steps of inf"):
        train(begun(), settings)
