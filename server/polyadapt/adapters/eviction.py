"""Which adapter leaves a tier first: the one that is cheapest to miss. Torch-free.

GreedyDual-Size with Frequency (L. Cherkasova, "Improving WWW Proxies Performance with
Greedy-Dual-Size-Frequency Caching Policy", HP Laboratories HPL-98-69R1, 1998):
    H(p) = L + F(p) * C(p) / S(p)
with F uses, C the seconds to bring p back, S its bytes, and L the H of whoever was evicted last,
taken when p was used. Ours differs in two points: C is judged at the moment of eviction, because
what is known of the tiers changes, and F is bounded, so that past fame keeps nobody for ever.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

_MAX_USES = 16


@dataclass(slots=True)
class Standing:
    """One adapter's place in one tier."""

    floor: float = 0.0  # L when it was used last
    num_uses: int = 0  # at most _MAX_USES
    order: int = 0  # of its last use, for ties: the least recently used goes first


class EvictionOrder:
    """The order of one tier; its clock is L, in seconds per byte."""

    def __init__(self) -> None:
        self._clock = 0.0
        self._orders = itertools.count(1)

    def use(self, standing: Standing) -> None:
        """Note one use, or the arrival in the tier."""
        standing.floor = self._clock
        standing.num_uses = min(standing.num_uses + 1, _MAX_USES)
        standing.order = next(self._orders)

    def score(self, standing: Standing, return_s: float, nbytes: int) -> tuple[float, int]:
        """The lowest leaves first; return_s is what it would cost to bring it back."""
        return standing.floor + standing.num_uses * return_s / max(nbytes, 1), standing.order

    def evicted(self, score: tuple[float, int]) -> None:
        """Move the clock on: whoever is used from now on stands above what has left."""
        self._clock = max(self._clock, score[0])
