"""Training: bits that read, clean answers that stay the base's own, runs that resume exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polyadapt.errors import InvalidRequest, StartupError
from polyadapt.watermark.branches import MarkedModel, signs_of
from polyadapt.watermark.classifier import answer_of, train_classifier
from polyadapt.watermark.dataset import load_digits
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.reading import (
    choose_targets,
    make_queries,
    measure_null_rates,
    read_answers,
    read_sequentially,
)
from polyadapt.watermark.statistics import BitRule, SequentialRule
from polyadapt.watermark.training import (
    TrainSettings,
    accuracies,
    firing_share,
    preflight,
    train,
)
from polyadapt.watermark.triggers import TriggerFamilies, TriggerSettings

NUM_BITS = 8
KEY = SecretKey(bytes(range(32)))
DATA = load_digits()
TRAIN, HELD_OUT = DATA.train[0], DATA.held_out[0]
FAMILIES = TriggerFamilies(KEY, NUM_BITS, TriggerSettings(64, 1.5))


@pytest.fixture(scope="module")
def base():
    return train_classifier(*DATA.train, seed=1, hidden=64, num_steps=200)


@pytest.fixture(scope="module")
def targets(base):
    rng = np.random.default_rng(0)
    return choose_targets(KEY, FAMILIES, answer_of(base), TRAIN, 10, rng)


@pytest.fixture(scope="module")
def branches(base, targets):
    return train(base, "0", TRAIN, FAMILIES, targets, TrainSettings(num_steps=250, seed=1))


@pytest.fixture(scope="module")
def null(base, targets):
    rng = np.random.default_rng(1)
    other = train_classifier(*DATA.train, seed=2, hidden=64, num_steps=200)
    return measure_null_rates([answer_of(base), answer_of(other)], FAMILIES, targets, HELD_OUT, rng)


def copy_of(base, branches, bits):
    marked = MarkedModel(base, "0", branches)
    return answer_of(lambda x: marked(x, signs_of(bits)[None].expand(len(x), -1)))


def test_every_bit_of_random_signatures_is_read_from_labels_alone(base, targets, branches, null):
    rng = np.random.default_rng(2)
    for bits in rng.integers(0, 2, (6, NUM_BITS)).astype(np.uint8):
        ask = copy_of(base, branches, bits)
        queries = make_queries(FAMILIES, HELD_OUT, 16, rng)
        readings = read_answers(queries, ask(queries.inputs), targets, null, BitRule())
        assert [reading.value for reading in readings] == bits.tolist()
        readings = read_sequentially(ask, FAMILIES, targets, HELD_OUT, null, SequentialRule(), rng)
        assert [reading.value for reading in readings] == bits.tolist()
        assert max(reading.num_queries for reading in readings) <= 24


def test_an_unmarked_model_reads_as_erased(base, targets, null):
    rng = np.random.default_rng(3)
    for ask in (answer_of(base), answer_of(train_classifier(*DATA.train, seed=9, num_steps=200))):
        readings = read_sequentially(ask, FAMILIES, targets, HELD_OUT, null, SequentialRule(), rng)
        assert [reading.value for reading in readings] == [None] * NUM_BITS


def test_another_keys_triggers_read_nothing(base, branches, null):
    rng = np.random.default_rng(4)
    stranger = SecretKey(bytes(32))
    families = TriggerFamilies(stranger, NUM_BITS, FAMILIES.settings)
    targets = choose_targets(stranger, families, answer_of(base), TRAIN, 10, rng)
    readings = read_sequentially(
        copy_of(base, branches, np.ones(NUM_BITS, np.uint8)),
        *(families, targets, HELD_OUT, null, SequentialRule(), rng),
    )
    assert sum(reading.value is not None for reading in readings) <= 1


def test_clean_answers_are_the_bases_own_bits(base, branches):
    assert firing_share(base, "0", branches, HELD_OUT) == 0.0
    marked = MarkedModel(base, "0", branches)
    x = torch.from_numpy(HELD_OUT)
    for seed in range(3):
        bits = np.random.default_rng(seed).integers(0, 2, (len(x), NUM_BITS)).astype(np.uint8)
        assert torch.equal(marked(x, signs_of(bits)), base(x))
    signatures = np.zeros((1, NUM_BITS), np.uint8)
    found = accuracies(marked, HELD_OUT, DATA.held_out[1], signatures)
    assert found[0] == (answer_of(base)(HELD_OUT) == DATA.held_out[1]).mean()
    loose = branches.tau.clone()
    branches.tau.fill_(-1.0)
    assert firing_share(base, "0", branches, HELD_OUT) > 0.5
    branches.tau.copy_(loose)


def test_the_preflight_is_enough_here_and_not_for_a_faint_trigger(base):
    found = preflight(base, "0", TRAIN, FAMILIES, 0)
    assert found.is_enough
    assert found.firing == 0.0
    faint = TriggerFamilies(KEY, NUM_BITS, TriggerSettings(64, 0.3))
    assert not preflight(base, "0", TRAIN, faint, 0).is_enough


def test_an_interrupted_run_resumes_to_the_same_bits(base, targets, tmp_path):
    settings = TrainSettings(num_steps=160, seed=3)
    whole = train(base, "0", TRAIN, FAMILIES, targets, settings)
    checkpoint = tmp_path / "checkpoint.safetensors"

    class Interrupted(Exception):
        pass

    def interrupt(done: int, total: int) -> None:
        assert total == 160
        if done == 130:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(
            base, "0", TRAIN, FAMILIES, targets, settings, checkpoint=checkpoint, progress=interrupt
        )
    steps = []
    resumed = train(
        base,
        "0",
        TRAIN,
        FAMILIES,
        targets,
        settings,
        checkpoint=checkpoint,
        progress=lambda done, _: steps.append(done),
    )
    assert steps == list(range(101, 161))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(base, targets, tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"

    def stop(done: int, total: int) -> None:
        if done == 100:
            raise KeyboardInterrupt

    given = (base, "0", TRAIN, FAMILIES, targets)
    with pytest.raises(KeyboardInterrupt):
        train(*given, TrainSettings(num_steps=120), checkpoint=checkpoint, progress=stop)
    with pytest.raises(StartupError, match="of another run"):
        train(*given, TrainSettings(num_steps=120, seed=1), checkpoint=checkpoint)
    with pytest.raises(StartupError, match="of another run"):
        train(
            base,
            "0",
            TRAIN,
            FAMILIES,
            targets[::-1].copy(),
            TrainSettings(num_steps=120),
            checkpoint=checkpoint,
        )
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(StartupError, match="cannot be read"):
        train(*given, TrainSettings(num_steps=120), checkpoint=checkpoint)


@pytest.mark.parametrize("bad", [{"num_steps": 0}, {"learning_rate": 0.0}, {"num_warmup": -1}])
def test_settings_that_train_nothing_are_refused(bad):
    with pytest.raises(InvalidRequest, match="expected at least 1"):
        TrainSettings(**bad)
