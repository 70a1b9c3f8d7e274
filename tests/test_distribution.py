"""Bounds belong to the values at and below them, as in Prometheus."""

from __future__ import annotations

import random

import pytest

from polyadapt.distribution import Distribution


def test_a_value_counts_below_the_first_bound_that_it_does_not_exceed():
    taken = Distribution((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        taken.observe(value)
    assert taken.snapshot() == (2, 2, 1, 7.5)


def test_a_value_may_count_several_times():
    taken = Distribution((1.0,))
    taken.observe(0.25, 4)
    assert taken.snapshot() == (4, 0, 1.0)


def test_it_agrees_with_counting_by_hand():
    bounds = (0.1, 0.2, 0.4, 0.8)
    values = [random.random() for _ in range(500)]
    taken = Distribution(bounds)
    for value in values:
        taken.observe(value)
    *counts, total = taken.snapshot()
    sofar = 0
    for bound, count in zip(bounds, counts, strict=False):
        sofar += count
        assert sofar == sum(value <= bound for value in values)
    assert sum(counts) == 500
    assert total == pytest.approx(sum(values))
