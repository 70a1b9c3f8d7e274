"""Which tokens one sequence holds and how often it generated each: what penalties are made of.

Numpy alone; follows the sequence's list of tokens, and never reads a token twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class TokenCounts:
    """Distinct token ids in the order of their first occurrence, prompt and output."""

    def __init__(self, num_prompt: int) -> None:
        self._num_prompt = num_prompt
        self._num_read = 0
        self._place: dict[int, int] = {}
        self._ids = np.zeros(0, np.int64)  # the first len(_place) entries count, as below
        self._times = np.zeros(0, np.float32)  # in the output

    def follow(self, token_ids: Sequence[int]) -> None:
        """Take in the tokens behind those that were there the last time."""
        for position in range(self._num_read, len(token_ids)):
            token_id = token_ids[position]
            place = self._place.setdefault(token_id, len(self._place))
            if place == len(self._ids):
                self._grow(2 * place + 16)
            self._ids[place] = token_id
            self._times[place] += position >= self._num_prompt
        self._num_read = len(token_ids)

    def seen(self) -> np.ndarray:
        """Every id of the prompt and the output once, int64 [distinct]."""
        return self._ids[: len(self._place)]

    def generated(self) -> tuple[np.ndarray, np.ndarray]:
        """The ids of the output, int64, and how often each was generated, float32."""
        num = len(self._place)
        at = np.flatnonzero(self._times[:num])
        return self._ids[at], self._times[at]

    def _grow(self, size: int) -> None:
        ids, times = np.zeros(size, np.int64), np.zeros(size, np.float32)
        ids[: len(self._ids)], times[: len(self._times)] = self._ids, self._times
        self._ids, self._times = ids, times
