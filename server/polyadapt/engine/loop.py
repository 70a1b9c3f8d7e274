"""The thread that steps an engine: commands in through a queue, one coalesced output per step."""

from __future__ import annotations

import queue
from collections.abc import Callable

from polyadapt.engine.engine import Engine, NewEngine
from polyadapt.engine.output import Command, StepOutput

_LOAD_WAIT_S = 0.02


class EngineLoop:
    """Runs `run` on one thread; `put`, `wake` and `stop` may be called from any."""

    def __init__(self, new_engine: NewEngine, emit: Callable[[StepOutput], None]) -> None:
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._emit = emit
        self._is_stopping = False
        self.engine: Engine = new_engine(self.wake)

    def put(self, command: Command) -> None:
        """Hand a command to the engine; it takes effect before the next step."""
        self._inbox.put(command)

    def wake(self) -> None:
        """End an idle wait, because a load has finished."""
        self._inbox.put(None)

    def stop(self) -> None:
        """Leave `run` after the current step."""
        self._is_stopping = True
        self.wake()

    def run(self) -> None:
        """Step until stopped; sleeps while there is nothing to compute."""
        engine = self.engine
        engine.check_integrity()
        has_run = False
        while not self._is_stopping:
            if not engine.has_work:
                engine.check_integrity()
                self._drain(wait_s=None)
            else:
                # Requests that wait for a load have nothing to compute: a finished load wakes us,
                # the bound is for their time limits.
                self._drain(wait_s=0.0 if has_run else _LOAD_WAIT_S)
            if not self._is_stopping:
                output = engine.step()
                has_run = output.num_rows > 0
                self._emit(output)
        engine.pool.close()

    def _drain(self, *, wait_s: float | None) -> None:
        """Execute every queued command; wait up to wait_s for the first (None: for as long as it
        takes).
        """
        try:
            if wait_s != 0.0:
                self._take(self._inbox.get(timeout=wait_s))
            while True:
                self._take(self._inbox.get_nowait())
        except queue.Empty:
            return

    def _take(self, command: Command | None) -> None:
        if command is not None:
            self.engine.execute(command)
