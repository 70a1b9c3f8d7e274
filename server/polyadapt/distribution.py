"""How often a quantity fell between fixed bounds: what a Prometheus histogram is made of.

One thread adds to it. Half a microsecond a value, so that a step or a token can afford it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

# Seconds that an adapter's way to the device takes, stage by stage: from a copy of a small one to a
# read from a slow disk.
LOAD_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
                1.0, 2.5, 5.0, 10.0)  # fmt: skip


class Distribution:
    """Counts values between bounds, each of which belongs to the values at and below it."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        """Ascending bounds; values above the last one are counted as well."""
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0  # sum of the values

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value so many times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def snapshot(self) -> tuple[float, ...]:
        """Return the counts between the bounds, from the lowest on, and behind them the sum."""
        return (*self.counts, self.total)
