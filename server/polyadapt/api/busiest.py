"""Counts by name for names without number: the busiest have their own, the rest share one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

OTHER = "other"
_PERIOD_S = 60.0
_NUM_WATCHED = 16  # times as many names are watched as have counts of their own


class Busiest:
    """Counts that only grow, for at most `limit` names and OTHER.

    Once a minute a name that asks more than twice as often as one with counts of its own takes
    its place: the counts of that one end, and it goes on in OTHER. Each name's rate is a sum in
    which a minute weighs half of the next.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._own: dict[str, list[int]] = {}
        self._other = [0, 0]
        self._rates: dict[str, float] = {}
        self._next_review = clock() + _PERIOD_S

    def add(self, name: str, num_tokens: int) -> None:
        """Count a request of the name and its tokens."""
        if self._clock() >= self._next_review:
            self._review()
        if name in self._rates or len(self._rates) < _NUM_WATCHED * self._limit:
            self._rates[name] = self._rates.get(name, 0.0) + 1.0
        if name not in self._own and len(self._own) < self._limit and name != OTHER:
            self._own[name] = [0, 0]
        counts = self._own.get(name, self._other)
        counts[0] += 1
        counts[1] += num_tokens

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        """Yield name, requests and tokens."""
        for name, (num_requests, num_tokens) in self._own.items():
            yield name, num_requests, num_tokens
        if any(self._other):
            yield OTHER, self._other[0], self._other[1]

    def _review(self) -> None:
        self._next_review = self._clock() + _PERIOD_S
        by_rate = sorted(self._rates, key=self._rates.__getitem__, reverse=True)
        rising = [name for name in by_rate[: self._limit] if name not in self._own]
        fading = sorted(self._own, key=lambda name: self._rates.get(name, 0.0))
        for new, old in zip(rising, fading, strict=False):
            if self._rates[new] <= 2 * self._rates.get(old, 0.0):
                break
            if new != OTHER:
                del self._own[old]
                self._own[new] = [0, 0]
        self._rates = {name: rate / 2 for name, rate in self._rates.items() if rate >= 0.5}
