"""Exact tails, decisions per bit, and error control over many tests. Knows no models and no keys.

Every p-value here is an upper bound that holds at any sample size; nothing relies on a normal
approximation, which is far too bold in the tails that tracing among many users needs. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyadapt.errors import InvalidRequest

Bit = int | None  # 0, 1, or None: erased
# Of the grid that scores are rounded up to: at most this many standard deviations are given away.
_GRID_LOSS = 0.1
_LOWEST, _HIGHEST = -8.0, 12.0  # of the grid, in standard deviations


# ------------------------------------------------------------------------------- binomial
def binomial_tails(num_trials: int, rate: float) -> NDArray[np.float64]:
    """Return P[Bin(num_trials, rate) >= k] for k = 0 ... num_trials + 1, to 1e-9 of each value."""
    if num_trials < 0 or not 0.0 <= rate <= 1.0:
        raise ValueError(f"no binomial of {num_trials} trials at rate {rate}")
    tails = np.zeros(num_trials + 2)
    if rate in (0.0, 1.0):
        tails[: 1 if rate == 0.0 else num_trials + 1] = 1.0
        return tails
    k = np.arange(num_trials + 1)
    log_factorial = np.array([math.lgamma(i + 1) for i in range(num_trials + 1)])
    log_mass = log_factorial[-1] - log_factorial - log_factorial[::-1]
    log_mass += k * math.log(rate) + (num_trials - k) * math.log1p(-rate)
    # From the far end on, so that small terms are added before large ones.
    tails[:-1] = np.minimum(np.cumsum(np.exp(log_mass)[::-1])[::-1], 1.0)
    tails[0] = 1.0
    return tails


def binomial_tail(num_hits: int, num_trials: int, rate: float) -> float:
    """Return P[Bin(num_trials, rate) >= num_hits]."""
    if num_hits > num_trials:
        return 0.0
    return float(binomial_tails(num_trials, rate)[max(num_hits, 0)])


def gamma_tails(shape: int, totals: NDArray[Any]) -> NDArray[np.float64]:
    """Return P[sum of `shape` exponential variables of mean 1 >= t] for every t, to 1e-9 of each.

    Which is the chance of fewer than `shape` events of a Poisson process by the time t.
    """
    found = np.ones(len(totals))
    if shape == 0:
        return found
    k = np.arange(shape)
    log_factorial = np.array([math.lgamma(i + 1) for i in range(shape)])
    for i, total in enumerate(np.asarray(totals, np.float64)):
        if total > 0.0:
            found[i] = min(1.0, np.exp(k * math.log(total) - total - log_factorial).sum())
    return found


def rate_upper_bound(num_hits: int, num_trials: int, confidence: float) -> float:
    """Return the rate that the true one is not above, with this confidence.

    Clopper and Pearson (1934): the p at which P[Bin(num_trials, p) <= num_hits] = 1 - confidence.
    """
    if not 0 <= num_hits <= num_trials or num_trials == 0 or not 0.5 <= confidence < 1.0:
        raise ValueError(f"{num_hits} hits of {num_trials} at confidence {confidence}")
    if num_hits == num_trials:
        return 1.0
    low, high = num_hits / num_trials, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        # P[X <= hits] is the upper tail of the misses.
        if binomial_tail(num_trials - num_hits, num_trials, 1.0 - middle) > 1.0 - confidence:
            low = middle
        else:
            high = middle
    return high


# ------------------------------------------------------------------------------- many tests
def holm(p_values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Return family-wise p-values by Holm's step-down method (1979), in the order given.

    Valid however the tests depend on each other, and never larger than Bonferroni's.
    """
    given = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(given, kind="stable")
    factors = np.arange(len(given), 0, -1)
    adjusted = np.empty_like(given)
    adjusted[order] = np.minimum(np.maximum.accumulate(given[order] * factors), 1.0)
    return adjusted


# ------------------------------------------------------------------------------- one bit
@dataclass(frozen=True, slots=True)
class BitReading:
    """What the answers to one bit's triggers say. `p_value`: of an unmarked model giving as many
    answers of either value; it holds for a sequential reading as well.
    """

    value: Bit
    num_hits: tuple[int, int]  # answers that are value 0's target, value 1's
    num_queries: int
    p_value: float


@dataclass(frozen=True, slots=True)
class BitRule:
    """When a fixed number of answers decides a bit; else it is erased.

    `alpha` is the chance that an unmarked model has this bit decided, `margin` by how many answers
    the winner must lead: a model that gives both targets by turns carries no value.
    """

    alpha: float = 1e-4
    margin: int = 4

    def __post_init__(self) -> None:
        _check_error("alpha", self.alpha)
        if self.margin < 1:
            raise InvalidRequest(f"margin is {self.margin}, expected at least 1", param="margin")

    def read(
        self, num_hits: tuple[int, int], num_queries: int, null_rates: tuple[float, float]
    ) -> BitReading:
        """Decide. `null_rates`: how often unmarked models give value 0's and 1's target, measured
        and not assumed.
        """
        tails = [
            binomial_tail(hits, num_queries, rate)
            for hits, rate in zip(num_hits, null_rates, strict=True)
        ]
        p_value = min(1.0, 2 * min(tails))  # either value would have been decided
        winner = int(num_hits[1] > num_hits[0])
        is_clear = num_hits[winner] - num_hits[1 - winner] >= self.margin
        is_decided = is_clear and 2 * tails[winner] <= self.alpha
        return BitReading(winner if is_decided else None, num_hits, num_queries, p_value)


@dataclass(frozen=True, slots=True)
class SequentialRule:
    """When to stop asking: Wald's sequential probability ratio test (1945), one for each value.

    Marked copies give the right target at `hit_rate` or more. The bounds are those of Ville's
    inequality (1 / error) and so hold exactly: an unmarked model has the bit decided with a chance
    of at most `alpha`, a copy at `hit_rate` has it given up before `max_queries` with `beta`.
    """

    alpha: float = 1e-4
    beta: float = 1e-3
    hit_rate: float = 0.6
    margin: int = 4
    max_queries: int = 64

    def __post_init__(self) -> None:
        _check_error("alpha", self.alpha)
        _check_error("beta", self.beta)
        if not 0.0 < self.hit_rate < 1.0 or self.max_queries < 1 or self.margin < 1:
            raise InvalidRequest(
                f"hit_rate {self.hit_rate}, max_queries {self.max_queries} and margin "
                f"{self.margin}; expected a rate between 0 and 1, and at least 1 of the others"
            )


class SequentialBit:
    """One bit being read, answer by answer."""

    def __init__(self, rule: SequentialRule, null_rates: tuple[float, float]) -> None:
        self._rule = rule
        # Where unmarked models hit as often as marked ones, an answer says nothing: both steps 0.
        self._steps = [
            (math.log(rule.hit_rate / max(rate, 1e-12)), math.log((1 - rule.hit_rate) / (1 - rate)))
            if rate < rule.hit_rate
            else (0.0, 0.0)
            for rate in null_rates
        ]
        self._ratios = [0.0, 0.0]  # log likelihood ratio: marked with this value over unmarked
        self._best = 0.0  # the largest that either reached: what its p-value comes from
        self._num_hits = [0, 0]
        self._num_queries = 0

    def add(self, answer: Bit) -> None:
        """Count one answer: the value whose target it was, or None."""
        self._num_queries += 1
        for value, (hit, miss) in enumerate(self._steps):
            is_hit = answer == value
            self._num_hits[value] += is_hit
            self._ratios[value] += hit if is_hit else miss
        self._best = max(self._best, *self._ratios)

    @property
    def is_settled(self) -> bool:
        """Whether more answers are not wanted."""
        given_up = max(self._ratios) <= math.log(self._rule.beta) or not any(
            hit for hit, _ in self._steps
        )
        is_spent = self._num_queries >= self._rule.max_queries
        return self._winner() is not None or given_up or is_spent

    def reading(self) -> BitReading:
        """Return what is known so far."""
        p_value = min(1.0, 2 * math.exp(-self._best))
        hits = (self._num_hits[0], self._num_hits[1])
        return BitReading(self._winner(), hits, self._num_queries, p_value)

    def _winner(self) -> Bit:
        winner = int(self._ratios[1] > self._ratios[0])
        lead = self._num_hits[winner] - self._num_hits[1 - winner]
        is_sure = self._ratios[winner] >= math.log(2 / self._rule.alpha)  # two values are tested
        return winner if is_sure and lead >= self._rule.margin else None


# ------------------------------------------------------------------------------- codes
def scores_of(
    rows: NDArray[np.uint8], biases: NDArray[np.float64], bits: Sequence[Bit]
) -> NDArray[np.float64]:
    """Return each row's score against what was read: [users].

    Semantics: S_j = sum over the positions that were read of sqrt((1 - q) / q) where the row agrees
    and -sqrt(q / (1 - q)) where not; q = the chance that an innocent row agrees, p where a 1 was
    read and 1 - p where a 0. An innocent's score has mean 0 and variance 1 per position.
    Skoric, Katzenbeisser and Celik, "Symmetric Tardos Fingerprinting Codes" (2008).
    """
    kept, _, hit, miss = _contributions(biases, bits)
    read = np.array([bits[i] for i in kept], dtype=np.uint8)
    scores: NDArray[np.float64] = np.where(rows[:, kept] == read, hit, miss).sum(axis=1)
    return scores


class InnocentScores:
    """How the score of somebody who had no part in it is distributed, given what was read.

    The row of an innocent is independent of the reading, so its score is a sum of independent
    two-valued terms. Its distribution is built term by term on a grid; every term is rounded up to
    it, so each tail is at least the true one (by at most _GRID_LOSS standard deviations of score;
    for biases of 1/2 the terms are whole and nothing is lost).
    """

    def __init__(self, biases: NDArray[np.float64], bits: Sequence[Bit]) -> None:
        kept, chances, hit, miss = _contributions(biases, bits)
        self.num_positions = len(kept)
        deviation = math.sqrt(max(self.num_positions, 1))
        self._step = 2.0 ** min(0, math.floor(math.log2(_GRID_LOSS / deviation)))
        lowest = math.floor(_LOWEST * deviation / self._step)
        highest = math.ceil(_HIGHEST * deviation / self._step)
        ups = np.ceil(hit / self._step).astype(int)
        downs = np.ceil(miss / self._step).astype(int)
        first, mass = 0, np.ones(1)  # of the cells from `first` on
        for chance, up, down in zip(chances, ups, downs, strict=True):
            moved = np.zeros(len(mass) + up - down)
            moved[: len(mass)] = (1 - chance) * mass
            moved[up - down :] += chance * mass
            first, mass = _within(first + int(down), moved, lowest, highest)
        self._first = first
        # The last cell holds all that is above it, the first what is below, which is rounded up.
        self._tails = np.minimum(np.cumsum(mass[::-1])[::-1], 1.0)

    def p_values(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return, for each score, a bound on the chance that an innocent scores as much."""
        cells = np.floor(scores / self._step).astype(np.int64) - self._first
        found = self._tails[np.clip(cells, 0, len(self._tails) - 1)]
        return np.where(cells <= 0, 1.0, found)

    def threshold(self, alpha: float) -> float:
        """Return the smallest score that an innocent can have whose p-value is at most `alpha`;
        infinite if none is.
        """
        enough = np.flatnonzero(self._tails <= alpha)
        if not len(enough):
            return math.inf
        # Between two possible scores the tail is that of the upper one.
        cell = int(np.flatnonzero(self._tails >= self._tails[enough[0]])[-1])
        return (self._first + cell) * self._step


def _contributions(
    biases: NDArray[np.float64], bits: Sequence[Bit]
) -> tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return of the positions that were read: index, chance that an innocent agrees, score if so,
    score if not.
    """
    if len(bits) != len(biases):
        raise InvalidRequest(
            f"{len(bits)} bits were read and the code has {len(biases)}; they are of another mark",
            param="bits",
        )
    if any(bit not in (0, 1, None) for bit in bits):
        raise InvalidRequest("a bit is neither 0, 1 nor null (erased)", param="bits")
    kept = np.array([i for i, bit in enumerate(bits) if bit is not None], dtype=np.intp)
    ones = np.array([bits[i] == 1 for i in kept], dtype=bool)
    chances = np.where(ones, biases[kept], 1 - biases[kept])
    return kept, chances, np.sqrt((1 - chances) / chances), -np.sqrt(chances / (1 - chances))


def _within(
    first: int, mass: NDArray[np.float64], lowest: int, highest: int
) -> tuple[int, NDArray[np.float64]]:
    """Return the cells between the two; what lies outside is added to the outermost."""
    if first + len(mass) - 1 > highest:
        cut = max(highest - first, 0)
        mass = np.append(mass[:cut], mass[cut:].sum())
    if first < lowest:
        cut = min(lowest - first, len(mass) - 1)
        mass = np.concatenate(([mass[: cut + 1].sum()], mass[cut + 1 :]))
        first = lowest
    return first, mass


def _check_error(name: str, value: float) -> None:
    if not 0.0 < value < 0.5:
        raise InvalidRequest(f"{name} is {value}, expected between 0 and 0.5", param=name)
