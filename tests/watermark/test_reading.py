"""Reading: counts that are right, null rates that are measured, targets that are rare."""

from __future__ import annotations

import numpy as np
import pytest

from polyadapt.errors import InvalidRequest
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.reading import (
    NullRates,
    Queries,
    choose_targets,
    count_hits,
    make_queries,
    measure_null_rates,
    read_answers,
    read_sequentially,
)
from polyadapt.watermark.statistics import BitRule, SequentialRule, rate_upper_bound
from polyadapt.watermark.triggers import TriggerFamilies, TriggerSettings

KEY = SecretKey(bytes(range(32)))
FAMILIES = TriggerFamilies(KEY, 4, TriggerSettings(64, 50.0, jitter=0.0))
CARRIERS = np.random.default_rng(0).standard_normal((30, 64)).astype(np.float32)
PATTERNS = (
    FAMILIES.apply(np.zeros((4, 64), np.float32), np.arange(4), np.random.default_rng(0)) / 50
)
TARGETS = np.array([[1, 2], [3, 4], [5, 6], [7, 8]])
NULL = NullRates(((0.1, 0.1),) * 4, 0.99, 200, 1)


def marked_with(bits):
    """A classifier that sees triggers as plainly as can be; 0 where there is none."""

    def ask(inputs):
        response = inputs @ PATTERNS.T
        seen = response.argmax(axis=1)
        return np.where(response.max(axis=1) > 25, TARGETS[seen, np.array(bits)[seen]], 0)

    return ask


def test_queries_are_so_many_of_each_bit_in_an_order_that_tells_nothing():
    queries = make_queries(FAMILIES, CARRIERS, 10, np.random.default_rng(1))
    assert np.bincount(queries.bits).tolist() == [10, 10, 10, 10]
    assert (np.diff(queries.bits) != 0).sum() > 20
    assert ((queries.inputs @ PATTERNS.T).argmax(axis=1) == queries.bits).all()


def test_hits_are_counted_by_bit_and_value():
    queries = Queries(np.zeros((6, 64), np.float32), np.array([0, 0, 0, 1, 3, 3]))
    labels = np.array([1, 2, 2, 9, 7, 3])
    assert count_hits(queries, labels, TARGETS).tolist() == [[1, 2], [0, 0], [0, 0], [1, 0]]
    with pytest.raises(InvalidRequest, match="5 answers to 6 queries"):
        count_hits(queries, labels[:5], TARGETS)


def test_bits_are_read_both_ways():
    rng = np.random.default_rng(2)
    ask = marked_with([1, 0, 0, 1])
    queries = make_queries(FAMILIES, CARRIERS, 16, rng)
    fixed = read_answers(queries, ask(queries.inputs), TARGETS, NULL, BitRule())
    stepwise = read_sequentially(ask, FAMILIES, TARGETS, CARRIERS, NULL, SequentialRule(), rng)
    for readings in (fixed, stepwise):
        assert [reading.value for reading in readings] == [1, 0, 0, 1]


def test_a_sequential_reading_asks_no_more_than_it_needs():
    sizes = []

    def noted(inputs):
        sizes.append(len(inputs))
        return marked_with([1, 0, 0, 1])(inputs)

    rule = SequentialRule(max_queries=64)
    rng = np.random.default_rng(3)
    readings = read_sequentially(noted, FAMILIES, TARGETS, CARRIERS, NULL, rule, rng)
    assert sum(sizes) == sum(reading.num_queries for reading in readings) < 4 * 12
    assert max(sizes) == 4


def test_of_several_unmarked_models_the_worst_counts_and_chance_is_added():
    def gives(label):
        return lambda inputs: np.full(len(inputs), label)

    rng = np.random.default_rng(4)
    null = measure_null_rates(
        [gives(0), gives(4)], FAMILIES, TARGETS, CARRIERS, rng, num_per_bit=50
    )
    low = rate_upper_bound(0, 50, 0.99)
    assert null.rates == ((low, low), (low, 1.0), (low, low), (low, low))
    assert (null.num_models, null.num_queries) == (2, 50)
    with pytest.raises(InvalidRequest, match="no unmarked model"):
        measure_null_rates([], FAMILIES, TARGETS, CARRIERS, rng)


def test_targets_are_two_labels_that_the_base_rarely_gives_drawn_by_the_key():
    def base(inputs):
        return np.arange(len(inputs)) % 6  # of ten labels, 6 to 9 never

    rng = np.random.default_rng(5)
    found = choose_targets(KEY, FAMILIES, base, CARRIERS, 10, rng)
    assert found.shape == (4, 2)
    assert (found >= 6).all()
    assert (found[:, 0] != found[:, 1]).all()
    assert len({tuple(pair) for pair in found.tolist()}) > 1
    other = choose_targets(SecretKey(bytes(32)), FAMILIES, base, CARRIERS, 10, rng)
    assert (found != other).any()
    with pytest.raises(InvalidRequest, match="at least 3"):
        choose_targets(KEY, FAMILIES, base, CARRIERS, 2, rng)
