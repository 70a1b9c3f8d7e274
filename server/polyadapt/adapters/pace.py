"""How much of a processor a background read may take while requests are computed. Torch-free."""

from __future__ import annotations

import time
from collections.abc import Callable

# Of one core, while the engine computes: a read then takes at most 1 / share as long as alone.
_SHARE = 0.25
_SLICE_S = 0.002  # work between two pauses


class Pace:
    """`breathe` is called by the reading thread, often; `is_shared` is set by the engine's."""

    def __init__(
        self,
        work_clock: Callable[[], float] = time.thread_time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.is_shared = False
        self._clock = work_clock
        self._sleep = sleep
        self._since: float | None = None

    def begin(self) -> None:
        """Start to count, on the one thread that works: its clock is its own.

        Later calls change nothing, so that many short reads together pause like a long one.
        """
        if self._since is None:
            self._since = self._clock()

    def breathe(self) -> None:
        """Pause for as long as the work since the last pause has to be paid for."""
        if self._since is None:
            return
        worked = self._clock() - self._since
        if worked >= _SLICE_S:
            if self.is_shared:
                self._sleep(worked * (1 / _SHARE - 1))
            self._since = self._clock()
