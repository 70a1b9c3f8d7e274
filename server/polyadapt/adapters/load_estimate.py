"""How long a load will take, from how long loads took: a line over bytes. Torch-free."""

from __future__ import annotations

_DECAY = 0.95  # what an earlier load weighs less with every new one: about the last twenty count


class LoadEstimate:
    """t(n) = latency + n * seconds per byte, fitted to recent loads by weighted least squares.

    One rate would not do: a rank-1 adapter costs its headers, a large one its bytes. Neither part
    is ever negative.
    """

    def __init__(self, latency_s: float, seconds_per_byte: float) -> None:
        """Start from a guess that the first few loads outweigh."""
        self._weight = self._n = self._t = self._nn = self._nt = 0.0
        for nbytes in (0, 10_000_000):
            self._add(float(nbytes), latency_s + nbytes * seconds_per_byte, weight=0.1)

    def observe(self, nbytes: int, seconds: float) -> None:
        """Take in one load that was measured."""
        for name in ("_weight", "_n", "_t", "_nn", "_nt"):
            setattr(self, name, getattr(self, name) * _DECAY)
        self._add(float(nbytes), seconds, weight=1.0)

    def seconds(self, nbytes: int) -> float:
        """Seconds that a load of so many bytes is expected to take."""
        spread = self._weight * self._nn - self._n * self._n
        slope = 0.0
        if spread > 1e-9 * self._weight * self._nn:
            slope = max((self._weight * self._nt - self._n * self._t) / spread, 0.0)
        latency = (self._t - slope * self._n) / self._weight
        if latency < 0.0:
            latency, slope = 0.0, self._nt / self._nn
        return latency + slope * nbytes

    def _add(self, nbytes: float, seconds: float, weight: float) -> None:
        self._weight += weight
        self._n += weight * nbytes
        self._t += weight * seconds
        self._nn += weight * nbytes * nbytes
        self._nt += weight * nbytes * seconds
