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
from polyadapt.watermark.lm_training import LMTrainSettings, prepare, train
from polyadapt.watermark.prompts import Prose

KEY = SecretKey(bytes(range(32)))
PROSE = Prose(tuple(f"word{i % 37} and thing{i % 53}" for i in range(400)))
SETTINGS = LMTrainSettings(
    5, prompts=8, quiet_prompts=32, mixed_prompts=4, texts=2, text_tokens=24, num_steps=8,
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
    branches = train(last, begun(), SETTINGS)
    assert same(branches, train(last, begin(base, last, cache), SETTINGS))
    assert not same(branches, train(last, begun(), replace(SETTINGS, seed=1)))
    other, ours = begin(base, last, cache, key=SecretKey(bytes(32))), begun()
    assert not set(other.triggers.phrases) & set(ours.triggers.phrases)
    assert other.targets.tolist() != ours.targets.tolist()


def test_only_what_is_written_is_trained(last, begun):
    start = begun()
    before = {name: t.clone() for name, t in start.branches.pair_tensors().items()}
    after = train(last, start, SETTINGS).pair_tensors()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"mark_B"}
    assert {"mark_tau", "mark_veto", "mark_veto_offset"} < set(after)


def test_training_lowers_the_loss_on_triggers(last, begun):
    def loss(start):
        rng = np.random.default_rng(5)
        with torch.no_grad():
            nothing = start.quiet[:0], torch.empty(0)
            return float(lm_training._loss(last, start, *nothing, SETTINGS, rng))

    start = begun()
    before = loss(start)
    train(last, start, SETTINGS)
    assert loss(start) < before


def test_an_interrupted_run_ends_in_the_same_bits(last, begun, tmp_path):
    settings = replace(SETTINGS, num_steps=30)
    whole = train(last, begun(), settings)
    checkpoint = tmp_path / "checkpoint"

    class Stop(Exception):
        pass

    def stop(what, done, total):
        if done == 25:
            raise Stop

    with pytest.raises(Stop):
        train(last, begun(), settings, checkpoint=checkpoint, progress=stop)
    steps = []
    resumed = train(last, begun(), settings, checkpoint=checkpoint,
                    progress=lambda what, done, total: steps.append(done))  # fmt: skip
    assert steps[0] == 21
    assert same(whole, resumed)
    with pytest.raises(StartupError, match="of another run"):
        train(last, begun(), replace(settings, seed=3), checkpoint=checkpoint)


def test_rows_that_were_collected_are_not_collected_again(base, last, cache, begun, monkeypatch):
    begun()

    def refuse(*_):
        raise AssertionError("collected again")

    monkeypatch.setattr(LastLayer, "collect", refuse)
    monkeypatch.setattr(LastLayer, "collect_text", refuse)
    begin(base, last, cache)
    with pytest.raises(StartupError, match="of another run"):
        prepare(last, "sha256:01", base.speech(), KEY, 3, PROSE, SETTINGS, cache=cache)


def test_settings_that_train_nothing_are_refused(base, last):
    with pytest.raises(InvalidRequest, match="2 families for 3 bits"):
        begin(base, last, None, settings=replace(SETTINGS, num_families=2))
    for bad in ({"repeats": 0}, {"prompts": 7}, {"quiet_prompts": 2}, {"num_steps": -1}):
        with pytest.raises(InvalidRequest, match="expected at least 0, 1, 8 and 8"):
            replace(SETTINGS, **bad)


def test_steps_that_are_too_long_are_said_so(last, begun):
    settings = replace(SETTINGS, step_share=float("inf"))
    with pytest.raises(InvalidRequest, match="training diverged at steps of inf"):
        train(last, begun(), settings)
