"""The line through recent loads."""

from __future__ import annotations

import pytest

from polyadapt.adapters.load_estimate import LoadEstimate


def test_it_starts_from_the_guess():
    estimate = LoadEstimate(0.005, 1e-8)
    assert estimate.seconds(0) == pytest.approx(0.005)
    assert estimate.seconds(1_000_000) == pytest.approx(0.015)


def test_it_tells_headers_from_bytes():
    estimate = LoadEstimate(1.0, 1.0)
    for number in range(400):
        nbytes = (1_000, 20_000_000)[number % 2]
        estimate.observe(nbytes, 0.02 + nbytes * 5e-9)
    assert estimate.seconds(0) == pytest.approx(0.02, rel=0.01)
    assert estimate.seconds(10_000_000) == pytest.approx(0.07, rel=0.01)


def test_it_follows_a_machine_that_has_become_slower():
    estimate = LoadEstimate(0.0, 1e-9)
    for seconds in [0.01] * 100 + [0.1] * 100:
        estimate.observe(10_000_000, seconds)
    assert estimate.seconds(10_000_000) == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("loads", [[(0, 0.1), (1000, 0.0)], [(1000, 0.0), (2000, 1.0)]])
def test_neither_part_is_ever_negative(loads: list[tuple[int, float]]):
    estimate = LoadEstimate(0.0, 0.0)
    for nbytes, seconds in loads * 50:
        estimate.observe(nbytes, seconds)
    assert estimate.seconds(0) >= 0.0
    assert estimate.seconds(10_000) >= estimate.seconds(0)
