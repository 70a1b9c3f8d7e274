"""Reads a mark out of a classifier by asking it: triggers in, labels out, bits with their p-values.

What unmarked models answer is measured first and never assumed. Knows no weights; torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from polyadapt.errors import InvalidRequest
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.statistics import (
    BitReading,
    BitRule,
    SequentialBit,
    SequentialRule,
    rate_upper_bound,
)
from polyadapt.watermark.triggers import TriggerFamilies

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
Ask = Callable[[Floats], Labels]  # inputs [rows, size] -> labels [rows]

_RARE_LABELS = 4  # of which two are drawn as a bit's targets


@dataclass(frozen=True, slots=True)
class Queries:
    """Triggered inputs [rows, size] in an order that tells nothing, and the bit of each [rows]."""

    inputs: Floats
    bits: NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class NullRates:
    """How often unmarked models give each value's target, at most: [bits, 2] with `confidence`.

    Of several reference models each bit's worst counts: a suspect resembles one, not their mean.
    """

    rates: tuple[tuple[float, float], ...]
    confidence: float
    num_queries: int  # of each bit, to each model
    num_models: int


def make_queries(
    families: TriggerFamilies, carriers: Floats, num_per_bit: int, rng: np.random.Generator
) -> Queries:
    """Return that many fresh queries of every bit on carriers drawn from those given."""
    bits = rng.permutation(np.repeat(np.arange(families.num_bits), num_per_bit))
    drawn = carriers[rng.integers(0, len(carriers), len(bits))]
    return Queries(families.apply(drawn, bits, rng), bits)


def choose_targets(
    key: SecretKey,
    families: TriggerFamilies,
    ask: Ask,
    carriers: Floats,
    num_labels: int,
    rng: np.random.Generator,
    *,
    num_per_bit: int = 64,
) -> Labels:
    """Return two labels per bit, [bits, 2], drawn by the key among those that the base gives least
    often when asked: a label that unmarked models give anyway is no sign of a mark.
    """
    if num_labels < 3:
        raise InvalidRequest(
            f"the classifier has {num_labels} labels, expected at least 3: with fewer, one of a "
            "bit's two targets is what unmarked models answer"
        )
    queries = make_queries(families, carriers, num_per_bit, rng)
    answers = ask(queries.inputs)
    targets = []
    for bit in range(families.num_bits):
        counts = np.bincount(answers[queries.bits == bit], minlength=num_labels)
        drawn = np.frombuffer(key.stream(4 * num_labels, "trigger targets", bit), "<u4")
        rare = np.lexsort((drawn, counts))[: min(_RARE_LABELS, num_labels)]
        targets.append(rare[np.argsort(drawn[rare])][:2])
    return np.array(targets, dtype=np.int64)


def count_hits(queries: Queries, labels: Labels, targets: Labels) -> NDArray[np.int64]:
    """Return how many answers are value 0's and value 1's target: [bits, 2].

    Raises InvalidRequest unless there is one answer per query.
    """
    if labels.shape != queries.bits.shape:
        raise InvalidRequest(
            f"{labels.shape[0] if labels.ndim else 0} answers to {len(queries.bits)} queries; "
            "give the labels of all of them in the order of the file"
        )
    zero, one = targets[queries.bits].T
    values = np.where(labels == one, 1, np.where(labels == zero, 0, -1))
    return count_values(queries.bits, values, len(targets))


def count_values(
    bits: NDArray[np.intp], values: NDArray[np.int64], num_bits: int
) -> NDArray[np.int64]:
    """Return how many answers say 0 and 1 of each bit, [bits, 2]: values [rows] are 0, 1 or -1."""
    counts = np.zeros((num_bits, 2), np.int64)
    said = values >= 0
    np.add.at(counts, (bits[said], values[said]), 1)
    return counts


def measure_null_rates(
    references: Sequence[Ask],
    families: TriggerFamilies,
    targets: Labels,
    carriers: Floats,
    rng: np.random.Generator,
    *,
    num_per_bit: int = 200,
    confidence: float = 0.99,
) -> NullRates:
    """Ask unmarked models and return bounds on what they answer; raises InvalidRequest for none."""
    counts = []
    for ask in references:
        queries = make_queries(families, carriers, num_per_bit, rng)
        counts.append(count_hits(queries, ask(queries.inputs), targets))
    return bound_null_rates(counts, num_per_bit, confidence)


def bound_null_rates(
    counts: Sequence[NDArray[np.int64]], num_per_bit: int, confidence: float
) -> NullRates:
    """Return bounds from the hits [bits, 2] of each unmarked model; raises InvalidRequest for none.

    Of several models each bit's worst counts, and of that the upper end of its interval.
    """
    if not counts:
        raise InvalidRequest("no unmarked model to measure with; give the base and others like it")
    worst = np.maximum.reduce(list(counts))
    bound = [rate_upper_bound(hits, num_per_bit, confidence) for hits in range(num_per_bit + 1)]
    rates = tuple((bound[zero], bound[one]) for zero, one in worst.tolist())
    return NullRates(rates, confidence, num_per_bit, len(counts))


def read_answers(
    queries: Queries, labels: Labels, targets: Labels, null: NullRates, rule: BitRule
) -> tuple[BitReading, ...]:
    """Decide every bit from the answers to a fixed set of queries."""
    counts = count_hits(queries, labels, targets)
    return read_counts(counts, np.bincount(queries.bits, minlength=len(targets)), null, rule)


def read_counts(
    counts: NDArray[np.int64], asked: NDArray[np.int64], null: NullRates, rule: BitRule
) -> tuple[BitReading, ...]:
    """Decide every bit from its hits, [bits, 2], of so many queries [bits]."""
    return tuple(
        rule.read((int(zero), int(one)), int(num), rates)
        for (zero, one), num, rates in zip(counts, asked, null.rates, strict=True)
    )


def read_sequentially(
    ask: Ask,
    families: TriggerFamilies,
    targets: Labels,
    carriers: Floats,
    null: NullRates,
    rule: SequentialRule,
    rng: np.random.Generator,
) -> tuple[BitReading, ...]:
    """Ask round by round, one fresh query of each bit that is not settled, until all are."""

    def ask_round(bits: NDArray[np.intp]) -> NDArray[np.int64]:
        drawn = carriers[rng.integers(0, len(carriers), len(bits))]
        labels = ask(families.apply(drawn, bits, rng))
        zero, one = targets[bits].T
        return np.where(labels == one, 1, np.where(labels == zero, 0, -1))

    return read_in_rounds(ask_round, null, rule, rng)


def read_in_rounds(
    ask_round: Callable[[NDArray[np.intp]], NDArray[np.int64]],
    null: NullRates,
    rule: SequentialRule,
    rng: np.random.Generator,
) -> tuple[BitReading, ...]:
    """Ask for the bits that are not settled, [open], until all are; each round tells of each the
    value whose target was given, or -1.
    """
    states = [SequentialBit(rule, rates) for rates in null.rates]
    while open_bits := [bit for bit, state in enumerate(states) if not state.is_settled]:
        bits = rng.permutation(np.array(open_bits, dtype=np.intp))
        for bit, value in zip(bits.tolist(), ask_round(bits).tolist(), strict=True):
            states[bit].add(None if value < 0 else value)
    return tuple(state.reading() for state in states)
