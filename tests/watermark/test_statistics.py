"""Tails that are exact, and decisions that err as rarely as they say."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest

from polyadapt.errors import InvalidRequest
from polyadapt.watermark.codebook import Codebook, Design
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.statistics import (
    BitRule,
    InnocentScores,
    SequentialBit,
    SequentialRule,
    binomial_tail,
    binomial_tails,
    holm,
    rate_upper_bound,
    scores_of,
)


def exact_tail(k: int, n: int, p: Fraction) -> Fraction:
    return sum((math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1)), Fraction(0))


@pytest.mark.parametrize("rate", [Fraction(1, 2), Fraction(1, 50), Fraction(9, 10), Fraction(1, 3)])
@pytest.mark.parametrize("num_trials", [1, 16, 128])
def test_binomial_tails_equal_rational_arithmetic(num_trials, rate):
    found = binomial_tails(num_trials, float(rate))
    assert found.shape == (num_trials + 2,)
    for k in range(num_trials + 2):
        assert found[k] == pytest.approx(float(exact_tail(k, num_trials, rate)), rel=1e-9)


# The table of false accusations: bits, matches, one user.
@pytest.mark.parametrize(
    ("bits", "matches", "expected"),
    [(16, 16, 1.5e-5), (32, 32, 2.3e-10), (32, 30, 1.2e-7), (64, 56, 2.8e-10), (128, 96, 6.4e-9)],
)
def test_the_chance_of_a_stranger_matching_is_the_tables(bits, matches, expected):
    assert binomial_tail(matches, bits, 0.5) == pytest.approx(expected, rel=0.05)


def test_tails_at_the_ends():
    assert binomial_tails(3, 0.0).tolist() == [1, 0, 0, 0, 0]
    assert binomial_tails(3, 1.0).tolist() == [1, 1, 1, 1, 0]
    assert binomial_tail(-1, 3, 0.5) == 1.0
    assert binomial_tail(4, 3, 0.5) == 0.0
    assert binomial_tails(0, 0.3).tolist() == [1, 0]
    for bad in ((-1, 0.5), (3, 1.5), (3, math.nan)):
        with pytest.raises(ValueError, match="no binomial"):
            binomial_tails(*bad)


@pytest.mark.parametrize(("hits", "trials"), [(0, 50), (3, 50), (49, 50), (10, 200)])
def test_the_upper_bound_of_a_rate_is_where_so_few_hits_become_improbable(hits, trials):
    bound = rate_upper_bound(hits, trials, 0.99)
    at_bound = 1 - exact_tail(hits + 1, trials, Fraction(bound))
    assert float(at_bound) == pytest.approx(0.01, rel=1e-6)
    assert bound > hits / trials
    assert rate_upper_bound(trials, trials, 0.99) == 1.0


def test_holm_is_the_step_down_procedure():
    p_values = [0.01, 0.04, 0.03, 0.005]
    assert holm(p_values).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    bonferroni = np.minimum(np.array(p_values) * len(p_values), 1.0)
    assert (holm(p_values) <= bonferroni).all()
    assert holm([0.9, 0.8]).max() == 1.0


# ------------------------------------------------------------------------------- one bit
RULE = BitRule(alpha=1e-3, margin=4)


@pytest.mark.parametrize(
    ("hits", "expected"),
    [((16, 0), 0), ((0, 16), 1), ((1, 12), 1), ((8, 8), None), ((0, 0), None), ((9, 6), None)],
)
def test_a_bit_is_decided_only_by_a_clear_and_improbable_lead(hits, expected):
    assert RULE.read(hits, 16, (0.1, 0.1)).value == expected


def test_what_unmarked_models_answer_anyway_decides_nothing():
    assert RULE.read((0, 16), 16, (0.1, 0.9)).value is None
    assert RULE.read((0, 16), 16, (0.1, 1.0)).p_value == 1.0
    assert RULE.read((0, 16), 16, (0.9, 0.1)).value == 1


def test_a_bits_p_value_counts_both_values():
    reading = RULE.read((0, 12), 16, (0.1, 0.1))
    assert reading.p_value == pytest.approx(2 * float(exact_tail(12, 16, Fraction(1, 10))))


def test_an_unmarked_model_has_a_bit_decided_no_more_often_than_alpha():
    rule = BitRule(alpha=0.02, margin=1)
    rng = np.random.default_rng(3)
    rates = (0.15, 0.3)
    answers = rng.choice(3, size=(8000, 24), p=[0.15, 0.3, 0.55])
    decided = sum(
        rule.read((int((row == 0).sum()), int((row == 1).sum())), 24, rates).value is not None
        for row in answers
    )
    assert decided <= 8000 * binomial_bound(0.02, 8000)
    assert decided > 20  # the rule is not idle


@pytest.mark.parametrize("bad", [{"alpha": 0.0}, {"alpha": 0.7}, {"margin": 0}])
def test_a_rule_that_says_nothing_is_refused(bad):
    with pytest.raises(InvalidRequest):
        BitRule(**bad)


# ------------------------------------------------------------------------------- sequential
def read(rule, rates, answers):
    bit = SequentialBit(rule, rates)
    for answer in answers:
        if bit.is_settled:
            break
        bit.add(None if answer == 2 else int(answer))
    return bit.reading()


def test_a_sequential_reading_keeps_its_errors_and_stops_early():
    rule = SequentialRule(alpha=0.02, beta=0.02, hit_rate=0.6, margin=1, max_queries=200)
    rng = np.random.default_rng(4)
    rates = (0.1, 0.2)
    null = [read(rule, rates, rng.choice(3, 200, p=[0.1, 0.2, 0.7])) for _ in range(4000)]
    wrong = sum(reading.value is not None for reading in null)
    assert 4 < wrong <= 4000 * binomial_bound(0.02, 4000)
    marked = [read(rule, rates, rng.choice(3, 200, p=[0.05, 0.6, 0.35])) for _ in range(2000)]
    assert sum(reading.value != 1 for reading in marked) <= 2000 * binomial_bound(0.04, 2000)
    assert np.mean([reading.num_queries for reading in marked]) < 20
    assert np.mean([reading.num_queries for reading in null]) < 25


def test_its_p_value_holds_whenever_it_is_looked_at():
    rule = SequentialRule(alpha=1e-6, beta=1e-6, hit_rate=0.6, margin=1, max_queries=40)
    rng = np.random.default_rng(5)
    p_values = np.array(
        [read(rule, (0.2, 0.2), rng.choice(3, 40, p=[0.2, 0.2, 0.6])).p_value for _ in range(3000)]
    )
    for alpha in (0.2, 0.05, 0.01):
        assert (p_values <= alpha).mean() <= binomial_bound(alpha, 3000)


def test_a_useless_bit_is_given_up_at_once():
    bit = SequentialBit(SequentialRule(hit_rate=0.6), (0.7, 0.9))
    assert bit.is_settled
    assert bit.reading().value is None
    assert bit.reading().p_value == 1.0


def test_two_targets_by_turns_carry_no_value():
    rule = SequentialRule(alpha=1e-3, hit_rate=0.5, margin=4, max_queries=60)
    assert read(rule, (0.01, 0.01), [0, 1] * 30).value is None


# ------------------------------------------------------------------------------- codes
BIASES = np.array([0.5, 0.21132, 0.78868, 0.1, 0.9, 0.5, 0.3, 0.05])
BITS = [1, 0, 1, 1, None, 0, 1, 0]


def exact_scores(bits) -> dict[float, float]:
    """Every row's score with its chance, by the published formula written out."""
    found: dict[float, float] = {}
    for row in itertools.product((0, 1), repeat=len(BIASES)):
        chance, score = 1.0, 0.0
        for x, y, p in zip(row, bits, BIASES, strict=True):
            chance *= p if x else 1 - p
            if y == 1:
                score += math.sqrt((1 - p) / p) if x else -math.sqrt(p / (1 - p))
            elif y == 0:
                score += -math.sqrt((1 - p) / p) if x else math.sqrt(p / (1 - p))
        found[score] = found.get(score, 0.0) + chance
    return found


def test_scores_are_the_symmetric_formula():
    rows = np.array(list(itertools.product((0, 1), repeat=len(BIASES))), dtype=np.uint8)
    expected = exact_scores(BITS)
    assert sorted(set(scores_of(rows, BIASES, BITS).round(9))) == pytest.approx(
        sorted({round(score, 9) for score in expected})
    )


def test_an_innocents_tail_is_bounded_closely_from_above():
    expected = exact_scores(BITS)
    innocent = InnocentScores(BIASES, BITS)
    assert innocent.num_positions == 7
    grid = np.array(sorted(expected))
    tails = np.array([sum(c for s, c in expected.items() if s >= at - 1e-12) for at in grid])
    found = innocent.p_values(grid)
    assert (found >= tails - 1e-12).all()
    shifted = np.array(
        [sum(c for s, c in expected.items() if s >= at - 0.11 * math.sqrt(7)) for at in grid]
    )
    assert (found <= shifted + 1e-12).all()


def test_for_even_biases_an_innocents_tail_is_the_binomial_itself():
    biases, bits = np.full(96, 0.5), [1, 0] * 48
    scores = np.array([2.0 * matches - 96 for matches in range(97)])
    assert InnocentScores(biases, bits).p_values(scores) == pytest.approx(
        binomial_tails(96, 0.5)[:97], rel=1e-9
    )


@pytest.mark.parametrize("name", ["random", "nuida4", "tardos6"])
def test_a_threshold_keeps_its_error(name):
    book = Codebook(SecretKey(bytes(32)), Design.parse(name), 128)
    bits = book.row("the leak").tolist()
    innocent = InnocentScores(book.biases, bits)
    rows = (np.random.default_rng(6).random((20_000, 128)) < book.biases).astype(np.uint8)
    scores = scores_of(rows, book.biases, bits)
    for alpha in (0.05, 0.005):
        threshold = innocent.threshold(alpha)
        share = (scores >= threshold).mean()
        assert share <= binomial_bound(alpha, 20_000)
        assert share > alpha / 4  # a bound, and no idle one
        assert (innocent.p_values(scores[scores >= threshold]) <= alpha).all()


def test_the_normal_threshold_accuses_too_often_where_biases_are_skewed():
    """Why it is not used: the textbook's Phi^-1(1 - alpha) sqrt(m) takes a score for symmetric."""
    biases, bits = np.full(64, 0.01), [1] * 64
    rows = (np.random.default_rng(7).random((40_000, 64)) < biases).astype(np.uint8)
    scores = scores_of(rows, biases, bits)
    assert (scores >= NormalDist().inv_cdf(1 - 1e-4) * math.sqrt(64)).mean() > 1e-3
    assert (scores >= InnocentScores(biases, bits).threshold(1e-4)).mean() < 3e-4


def test_nothing_read_means_nothing_known():
    innocent = InnocentScores(np.array([0.5, 0.5]), [None, None])
    assert innocent.num_positions == 0
    assert innocent.p_values(np.array([0.0])).tolist() == [1.0]


@pytest.mark.parametrize("bits", [[1, 0], [1, 0, 2], [1, 0, "1"]])
def test_bits_of_another_mark_are_refused(bits):
    with pytest.raises(InvalidRequest, match="bit"):
        scores_of(np.zeros((1, 3), np.uint8), np.full(3, 0.5), bits)


def binomial_bound(rate: float, trials: int) -> float:
    """The share that a true rate of `rate` exceeds in one of 1,000 tests."""
    return rate + 3.3 * math.sqrt(rate * (1 - rate) / trials)
