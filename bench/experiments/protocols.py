"""LoRID's agreement and self-consistency over samples that are there already. Knows no model.

The authors too generate everything first and then play (Xinhe-Li/LoRID:src/evaluation); stopping
early while sampling has the same distribution and spends what is counted here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answer:
    """What one sample came to, None: nothing, and the tokens that were generated for it."""

    value: str | None
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Agreed:
    """One question under the protocol."""

    common: tuple[str, ...]  # () if the sets never met; else the deep answer first
    num_iterations: int
    num_tokens: int
    fallback: str | None  # the majority of all answers, of equals a deep one

    @property
    def one(self) -> str | None:
        """What a server would answer, that has to give one answer."""
        return self.common[0] if self.common else None


def play(intuitive: Sequence[Answer], deep: Sequence[Answer], max_iterations: int) -> Agreed:
    """Draw an answer of each until the sets of all answers so far meet; a sample's place is its
    iteration.
    """
    left: set[str] = set()
    right: set[str] = set()
    intuitive_first: list[str | None] = []
    num_tokens = 0
    for number, (a, b) in enumerate(zip(intuitive, deep, strict=False), 1):
        num_tokens += a.num_tokens + b.num_tokens
        intuitive_first += [a.value, b.value]
        left |= set() if a.value is None else {a.value}
        right |= set() if b.value is None else {b.value}
        if left & right or number == max_iterations:
            deep_value = b.value
            common = sorted(left & right, key=lambda value: (value != deep_value, value))
            return Agreed(tuple(common), number, num_tokens, majority(intuitive_first, right))
    raise ValueError(f"{len(intuitive)} samples are fewer than {max_iterations} iterations")


def majority(values: Sequence[str | None], preferred: Collection[str] = frozenset()) -> str | None:
    """The most frequent, of equals a preferred one and the one that was first; None: no answer."""
    counts = Counter(value for value in values if value is not None)
    order = list(counts)
    return max(
        counts,
        key=lambda value: (counts[value], value in preferred, -order.index(value)),
        default=None,
    )


def within(answers: Sequence[Answer], num_tokens: float) -> list[Answer]:
    """The first answers that fit into so many tokens, one at least."""
    spent, found = 0, []
    for answer in answers:
        spent += answer.num_tokens
        if found and spent > num_tokens:
            break
        found.append(answer)
    return found
