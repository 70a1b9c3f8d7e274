"""Counts that follow a growing text are those of the whole text."""

from __future__ import annotations

import random
from collections import Counter

from polyadapt.engine.token_counts import TokenCounts


def test_counts_follow_a_growing_text():
    rng = random.Random(0)
    text = [rng.randrange(40) for _ in range(30)]
    counts = TokenCounts(num_prompt=30)
    for _ in range(60):
        counts.follow(text)
        assert sorted(counts.seen().tolist()) == sorted(set(text))
        ids, times = counts.generated()
        assert dict(zip(ids.tolist(), times.tolist(), strict=True)) == Counter(text[30:])
        text += [rng.randrange(40) for _ in range(rng.randrange(4))]


def test_a_token_is_read_once():
    class OnceRead(list[int]):
        def __getitem__(self, position):
            value, self[position] = super().__getitem__(position), None
            assert value is not None, f"{position} was read twice"
            return value

    text = OnceRead([5, 6, 5])
    counts = TokenCounts(num_prompt=2)
    counts.follow(text)
    text.append(6)
    counts.follow(text)
    ids, times = counts.generated()
    assert (ids.tolist(), times.tolist()) == ([5, 6], [1, 1])
