"""Rows of numbers by token position: what one sequence's first pass made for its second.

Numpy alone.
"""

from __future__ import annotations

import numpy as np


class TokenTable:
    """float32 rows [width] of neighbouring positions; the oldest leave when nobody needs them."""

    def __init__(self) -> None:
        self._first = 0
        self._rows = np.zeros((0, 0), np.float32)

    @property
    def stop(self) -> int:
        """The position behind the last row."""
        return self._first + len(self._rows)

    def put(self, first: int, rows: np.ndarray) -> None:
        """Take rows [n, width] of the positions from `first` on; those that were there go, and all
        others where the new ones do not continue them.
        """
        if self._first < first <= self.stop:
            kept = self._rows[: first - self._first]
            self._rows = np.concatenate([kept, rows])
        else:
            self._first, self._rows = first, np.ascontiguousarray(rows, np.float32)

    def at(self, start: int, stop: int, last: int) -> np.ndarray:
        """Return rows [stop - start, width]; those of position `last` stand for all behind it."""
        positions = np.minimum(np.arange(start, stop), last)
        assert self._first <= positions[0] <= positions[-1] < self.stop, "a row is missing"
        found: np.ndarray = self._rows[positions - self._first]
        return found

    def forget_before(self, position: int) -> None:
        """Drop the rows of earlier positions, but for the last row of all."""
        num_gone = min(position - self._first, len(self._rows) - 1)
        if num_gone > 0:
            self._first, self._rows = self._first + num_gone, self._rows[num_gone:]
