"""The preflight: d' is what a Gaussian's is, and the start answers triggers with 1."""

from __future__ import annotations

import numpy as np
import pytest

from polyadapt.errors import InvalidRequest
from polyadapt.watermark.preflight import measure_separation, whitened_rows

RNG = np.random.default_rng(0)
SPREAD = np.concatenate((np.full(40, 1.0), np.full(24, 0.25)))  # per direction
CLEAN = (RNG.standard_normal((4000, 64)) * SPREAD).astype(np.float32)
CARRIERS = CLEAN[:128]


def triggered(*shifts: np.ndarray) -> np.ndarray:
    return np.stack([CARRIERS + shift.astype(np.float32) for shift in shifts])


def unit(index: int, length: float) -> np.ndarray:
    return np.eye(64)[index] * length


def test_separation_is_the_shift_in_standard_deviations_of_its_own_direction():
    found = measure_separation(CLEAN, CARRIERS, triggered(unit(0, 5.0), unit(50, 5.0)), 5.0)
    # The assumed noise is 1 % of the mean square 0.65 in every direction.
    expected = [5 / np.sqrt(1 + 0.0065), 5 / np.sqrt(0.0625 + 0.0065)]
    assert found.separations == pytest.approx(expected, rel=0.08)


def test_the_amplitude_that_is_needed_is_named():
    found = measure_separation(CLEAN, CARRIERS, triggered(unit(0, 5.0)), 5.0)
    assert not found.is_enough
    again = found.amplitude_needed * 1.01
    better = measure_separation(CLEAN, CARRIERS, triggered(unit(0, again)), again)
    assert better.is_enough


def test_few_rows_of_many_numbers_do_not_seem_separable():
    """Fitted and measured on the same 40 rows, any direction of 400 would stand out endlessly."""
    rng = np.random.default_rng(1)
    clean = rng.standard_normal((80, 400)).astype(np.float32)
    shift = np.zeros(400, np.float32)
    shift[0] = 3.0
    found = measure_separation(clean, clean[:40], (clean[:40] + shift)[None], 3.0)
    assert found.separations[0] < 4.0


def test_clean_inputs_that_a_detector_would_touch_are_counted_where_d_prime_sees_none():
    """Rare and far: a normal of the same spread would never come so near to a trigger."""
    rng = np.random.default_rng(3)
    clean = CLEAN.copy()
    clean[rng.random(len(clean)) < 0.03, 0] = 14.0
    shift = triggered(unit(0, 30.0))
    assert measure_separation(CLEAN, CARRIERS, shift, 30.0).firing == 0.0
    found = measure_separation(clean, CARRIERS, triggered(unit(0, 26.0)), 26.0)
    assert min(found.separations) > 9.9
    assert found.firing == pytest.approx(0.03, abs=0.01)
    assert not found.is_enough
    assert found.amplitude_needed >= 26.0 * 1.25


def test_scatter_of_the_triggers_counts_as_noise():
    rng = np.random.default_rng(2)
    loud = CARRIERS + unit(0, 5.0) + rng.standard_normal(CARRIERS.shape) * unit(0, 1.0)
    quiet = measure_separation(CLEAN, CARRIERS, triggered(unit(0, 5.0)), 5.0).separations[0]
    found = measure_separation(CLEAN, CARRIERS, loud.astype(np.float32)[None], 5.0).separations[0]
    assert found < 0.8 * quiet
    # The direction turns away from what scatters: beside a quiet shift the loud one counts little.
    both = unit(0, 5.0) + unit(1, 5.0)
    mixed = CARRIERS + both + rng.standard_normal(CARRIERS.shape) * unit(0, 20.0)
    found = measure_separation(CLEAN, CARRIERS, mixed.astype(np.float32)[None], 5.0).separations[0]
    assert found > 0.85 * quiet


def test_the_start_answers_its_own_trigger_with_one_and_little_else():
    rows = whitened_rows(CLEAN, CARRIERS, triggered(unit(0, 8.0), unit(50, 8.0)))
    assert rows.shape == (2, 64)
    response = CLEAN @ rows.T
    assert np.abs(response).max() < 0.75
    own = np.stack([unit(0, 8.0), unit(50, 8.0)]) @ rows.T
    assert own == pytest.approx(np.eye(2), abs=0.05)


@pytest.mark.parametrize(
    ("num_rows", "size", "words"), [(40, 64, "at least 64"), (80, 8193, "8192")]
)
def test_what_cannot_be_measured_is_refused(num_rows, size, words):
    clean = np.zeros((num_rows, size), np.float32)
    with pytest.raises(InvalidRequest, match=words):
        measure_separation(clean, clean[:2], clean[None, :2], 1.0)
