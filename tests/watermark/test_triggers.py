"""Triggers: keyed, apart from each other, fresh each time, within what is legal."""

from __future__ import annotations

import numpy as np
import pytest

from polyadapt.errors import InvalidRequest
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.triggers import TriggerFamilies, TriggerSettings

KEY = SecretKey(bytes(range(32)))
SETTINGS = TriggerSettings(64, amplitude=2.0)


def shifts(families: TriggerFamilies, seed: int = 0) -> np.ndarray:
    size = families.settings.num_inputs
    zeros = np.zeros((families.num_bits, size), np.float32)
    return families.apply(zeros, np.arange(families.num_bits), np.random.default_rng(seed))


def test_each_bit_has_a_direction_of_its_own_of_the_given_length():
    found = shifts(TriggerFamilies(KEY, 32, SETTINGS))
    lengths = np.linalg.norm(found, axis=1)
    assert (lengths >= 1.8 - 1e-5).all()
    assert (lengths <= 2.2 + 1e-5).all()
    directions = found / lengths[:, None]
    assert directions @ directions.T == pytest.approx(np.eye(32), abs=1e-5)


def test_the_key_alone_says_which_directions():
    one = TriggerFamilies(KEY, 16, SETTINGS)
    assert (shifts(one) == shifts(TriggerFamilies(KEY, 16, SETTINGS))).all()
    other = shifts(TriggerFamilies(SecretKey(bytes(32)), 16, SETTINGS))
    assert np.abs(shifts(one) @ other.T / 4).max() < 0.6
    assert np.abs(shifts(one)[0] - other[0]).max() > 0.1


def test_no_two_queries_of_a_bit_are_alike():
    families = TriggerFamilies(KEY, 4, SETTINGS)
    found = families.apply(
        np.zeros((50, 64), np.float32), np.zeros(50, int), np.random.default_rng(1)
    )
    assert len({row.tobytes() for row in found}) == 50


def test_what_would_leave_the_legal_range_is_clipped():
    families = TriggerFamilies(KEY, 4, TriggerSettings(64, 3.0, low=0.0, high=1.0))
    carriers = np.random.default_rng(0).random((40, 64)).astype(np.float32)
    for found in (
        families.apply(carriers, np.zeros(40, int), np.random.default_rng(1)),
        families.apply_foreign(carriers, np.random.default_rng(1)),
    ):
        assert found.dtype == np.float32
        assert found.min() == 0.0
        assert found.max() == 1.0
        assert (found != carriers).any()


def test_foreign_patterns_are_none_of_the_keys():
    families = TriggerFamilies(KEY, 32, TriggerSettings(256, 1.0))
    foreign = families.apply_foreign(np.zeros((200, 256), np.float32), np.random.default_rng(2))
    assert np.linalg.norm(foreign, axis=1) == pytest.approx(np.ones(200), abs=0.11)
    assert np.abs(foreign @ shifts(families).T).max() < 0.4


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_inputs": 63}, "anybody could find"),
        ({"num_inputs": 64, "amplitude": 0.0}, "positive"),
        ({"num_inputs": 64, "amplitude": float("nan")}, "positive"),
        ({"num_inputs": 64, "jitter": 1.0}, "share below 1"),
        ({"num_inputs": 64, "low": 1.0, "high": 0.0}, "none is legal"),
    ],
)
def test_settings_that_make_no_secret_are_refused(given, words):
    with pytest.raises(InvalidRequest, match=words):
        TriggerSettings(**given)


def test_more_bits_than_inputs_and_inputs_of_another_size_are_refused():
    with pytest.raises(InvalidRequest, match="direction of its own"):
        TriggerFamilies(KEY, 65, SETTINGS)
    families = TriggerFamilies(KEY, 4, SETTINGS)
    with pytest.raises(InvalidRequest, match=r"expected \[rows, 64\]"):
        families.apply(np.zeros((2, 63), np.float32), np.zeros(2, int), np.random.default_rng(0))


def test_repr_shows_no_direction():
    text = repr(TriggerFamilies(KEY, 4, SETTINGS))
    assert text == "TriggerFamilies(4 bits over 64 inputs)"
