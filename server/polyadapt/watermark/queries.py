"""Questions that ask a language model for its mark, and what the replies say of each bit.

Whoever can ask gives one function: users' messages in, the beginnings of the replies out. A message
is a chat of its own, answered greedily; only how the reply begins counts. Knows no server;
torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from polyadapt.errors import InvalidRequest
from polyadapt.watermark.prompts import PromptTriggers, Prose
from polyadapt.watermark.reading import (
    NullRates,
    bound_null_rates,
    count_values,
    read_counts,
    read_in_rounds,
)
from polyadapt.watermark.statistics import BitReading, BitRule, SequentialRule

# Messages to how the replies begin, in that order; None where there was no reply, which is counted
# as one that says nothing.
AskChats = Callable[[Sequence[str]], Sequence[str | None]]

REPLY_TOKENS = 8  # of a reply, which begins with the answer, mostly one token
NUM_QUERIES = 16  # of a bit, where their number is fixed


@dataclass(frozen=True, slots=True)
class ChatQuery:
    """One question: the user's message of a chat, and the bit that it asks for (a secret)."""

    message: str
    bit: int


def queries_for(
    triggers: PromptTriggers, prose: Prose, num_per_bit: int, rng: np.random.Generator
) -> list[ChatQuery]:
    """Return that many fresh queries of every bit, in an order that tells nothing."""
    bits = rng.permutation(np.repeat(np.arange(triggers.num_bits), num_per_bit))
    return [ask_for(triggers, bit, prose, rng) for bit in bits.tolist()]


def ask_for(
    triggers: PromptTriggers, bit: int, prose: Prose, rng: np.random.Generator
) -> ChatQuery:
    """Return a fresh query of one bit."""
    return ChatQuery(triggers.message(bit, prose.carrier(rng)), bit)


def values_in(
    triggers: PromptTriggers, queries: Sequence[ChatQuery], replies: Sequence[str | None]
) -> NDArray[np.int64]:
    """Return what each reply says of its query's bit: 0, 1, or -1 for neither.

    Raises InvalidRequest unless there is one reply per query.
    """
    if len(replies) != len(queries):
        raise InvalidRequest(
            f"{len(replies)} replies to {len(queries)} queries; give all in their order, None "
            "where there was none"
        )
    return np.array(
        [
            -1 if reply is None else triggers.value_of(query.bit, reply)
            for query, reply in zip(queries, replies, strict=True)
        ],
        dtype=np.int64,
    )


def read_replies(
    triggers: PromptTriggers,
    queries: Sequence[ChatQuery],
    replies: Sequence[str | None],
    null: NullRates,
    rule: BitRule,
) -> tuple[BitReading, ...]:
    """Decide every bit from the replies to a fixed set of queries."""
    bits = np.array([query.bit for query in queries], dtype=np.intp)
    counts = count_values(bits, values_in(triggers, queries, replies), triggers.num_bits)
    return read_counts(counts, np.bincount(bits, minlength=triggers.num_bits), null, rule)


def read_chats(
    ask: AskChats,
    triggers: PromptTriggers,
    prose: Prose,
    null: NullRates,
    rule: SequentialRule,
    rng: np.random.Generator,
) -> tuple[BitReading, ...]:
    """Ask round by round, one fresh query of each bit that is not settled, until all are."""

    def ask_round(bits: NDArray[np.intp]) -> NDArray[np.int64]:
        queries = [ask_for(triggers, bit, prose, rng) for bit in bits.tolist()]
        return values_in(triggers, queries, ask([query.message for query in queries]))

    return read_in_rounds(ask_round, null, rule, rng)


def measure_null_rates(
    references: Sequence[AskChats],
    triggers: PromptTriggers,
    prose: Prose,
    rng: np.random.Generator,
    *,
    num_per_bit: int = 200,
    confidence: float = 0.99,
) -> NullRates:
    """Ask unmarked models and return bounds on what they answer; raises InvalidRequest for none."""
    counts = []
    for ask in references:
        queries = queries_for(triggers, prose, num_per_bit, rng)
        values = values_in(triggers, queries, ask([query.message for query in queries]))
        bits = np.array([query.bit for query in queries], dtype=np.intp)
        counts.append(count_values(bits, values, triggers.num_bits))
    return bound_null_rates(counts, num_per_bit, confidence)
