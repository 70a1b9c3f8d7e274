"""Which of the reading threads works, and how much of a processor it takes while requests are
computed. Torch-free.

One works at a time, in the order in which reads were asked for. A read that takes long lets those
go first that do not, between two of its parts: whoever reads says so by `breathe`.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator

# Of one core, while the engine computes: a read then takes at most 1 / share as long as alone.
_SHARE = 0.25
_SLICE_S = 0.002  # work between two pauses
LONG_S = 0.25  # work of a read from which on it lets shorter ones go first


class CalledOffError(Exception):
    """The read was called off before it had its first turn."""


class Turn:
    """One read's place among the others."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.worked_s = 0.0
        self.has_begun = False
        self.is_called_off = False

    @property
    def rank(self) -> tuple[bool, int]:
        """Whose turn it is, the smallest first."""
        return self.worked_s >= LONG_S, self.order


class Pace:
    """Shared by the reading threads; `is_shared` is set by the engine's."""

    def __init__(
        self,
        work_clock: Callable[[], float] = time.thread_time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """work_clock: seconds that the calling thread has worked."""
        self.is_shared = False
        self._clock = work_clock
        self._sleep = sleep
        self._orders = itertools.count()
        self._changed = threading.Condition()
        self._waiting: list[Turn] = []
        self._current: Turn | None = None
        # Of the thread whose turn it is:
        self._since = 0.0  # its clock when it began, or paused last
        self._owed_s = 0.0  # work of turns before, since the last pause: short reads pause as well

    def queue(self) -> Turn:
        """A place behind all others."""
        with self._changed:
            turn = Turn(next(self._orders))
            self._waiting.append(turn)
            return turn

    def call_off(self, turn: Turn) -> bool:
        """Give the place up, unless the read has begun; whether it had not."""
        with self._changed:
            if turn.has_begun or turn.is_called_off:
                return False
            turn.is_called_off = True
            self._waiting.remove(turn)
            self._changed.notify_all()
            return True

    @contextlib.contextmanager
    def reading(self, turn: Turn) -> Iterator[None]:
        """Wait for the turn, on the thread that reads, and give it back at the end; raises
        CalledOffError instead of working.
        """
        self._take(turn)
        try:
            yield
        finally:
            self._give_back()

    def breathe(self) -> None:
        """Pause for as long as the work since the last pause has to be paid for, and let others go
        first that are shorter. Outside of `reading` nothing.
        """
        turn = self._current
        if turn is None:
            return
        worked = self._clock() - self._since
        if self._owed_s + worked < _SLICE_S:
            return
        if self.is_shared:
            self._sleep((self._owed_s + worked) * (1 / _SHARE - 1))
        turn.worked_s += worked
        self._owed_s, self._since = 0.0, self._clock()
        with self._changed:
            is_first = all(turn.rank < other.rank for other in self._waiting)
            if is_first:
                return
            self._waiting.append(turn)
        self._give_back()
        self._take(turn)

    def _take(self, turn: Turn) -> None:
        with self._changed:
            self._changed.wait_for(lambda: turn.is_called_off or self._is_next(turn))
            if turn.is_called_off:
                raise CalledOffError
            self._waiting.remove(turn)
            self._current, turn.has_begun = turn, True
            self._since = self._clock()

    def _is_next(self, turn: Turn) -> bool:
        return self._current is None and min(self._waiting, key=lambda other: other.rank) is turn

    def _give_back(self) -> None:
        with self._changed:
            assert self._current is not None
            worked = self._clock() - self._since
            self._owed_s += worked
            self._current.worked_s += worked
            self._current = None
            self._changed.notify_all()
