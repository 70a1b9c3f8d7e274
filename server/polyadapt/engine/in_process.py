"""An engine in a thread of this process: the EngineClient of tests, notebooks and single-process
tools.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Mapping

from polyadapt.engine.engine import NewEngine
from polyadapt.engine.loop import EngineLoop
from polyadapt.engine.output import Command, StepOutput
from polyadapt.engine.streams import Streams
from polyadapt.errors import EngineUnavailable
from polyadapt.types import AdapterId, EngineInfo, EngineStats, Event, Request, Residency


class InProcessEngine:
    """The twin of EngineProcess without a process border: the same loop, the same streams."""

    def __init__(self, new_engine: NewEngine) -> None:
        self._new_engine = new_engine
        self._streams = Streams(self._send)
        self._loop: EngineLoop | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self.num_restarts = 0

    @property
    def info(self) -> EngineInfo | None:
        """What the engine is, once started."""
        return self._loop.engine.info if self._loop else None

    @property
    def is_ready(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def is_alive(self) -> bool:
        """Whether the thread has not died of an error."""
        return self._failure is None

    async def start(self) -> EngineInfo:
        """Build the engine and start its thread; raises StartupError."""
        events = asyncio.get_running_loop()

        def emit(output: StepOutput) -> None:
            events.call_soon_threadsafe(self._streams.absorb, output)

        def run(loop: EngineLoop) -> None:
            try:
                loop.run()
            except BaseException as error:
                self._failure = error
                events.call_soon_threadsafe(
                    self._streams.fail_all, EngineUnavailable("the engine has failed")
                )
                raise

        self._loop = await asyncio.to_thread(EngineLoop, self._new_engine, emit)
        info = self._loop.engine.info
        self._streams.capacity = info.max_num_seqs + info.max_waiting
        self._thread = threading.Thread(target=run, args=(self._loop,), name="engine", daemon=True)
        self._thread.start()
        return info

    async def stop(self) -> None:
        """End every request with an error and join the thread."""
        self._streams.fail_all(EngineUnavailable("the server is shutting down"))
        if self._loop is not None and self._thread is not None:
            self._loop.stop()
            await asyncio.to_thread(self._thread.join)

    def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        """See EngineClient."""
        return self._streams.submit(request)

    async def prepare_adapter(self, adapter: AdapterId) -> Residency:
        """See EngineClient."""
        return await self._streams.prepare(adapter.digest)

    async def load_adapter(self, adapter: AdapterId, *, is_pinned: bool) -> Residency:
        """See EngineClient."""
        return await self._streams.load(adapter.digest, is_pinned=is_pinned)

    async def unload_adapter(self, digest: str) -> None:
        """See EngineClient."""
        await self._streams.unload(digest)

    async def cancel_adapter(self, digest: str) -> int:
        """See EngineClient."""
        return await self._streams.cancel_adapter(digest)

    def stats(self) -> EngineStats:
        """See EngineClient."""
        return self._streams.stats

    def residencies(self) -> Mapping[str, Residency]:
        """See EngineClient."""
        return self._streams.residencies

    def _send(self, command: Command) -> None:
        if self._loop is None or not self.is_ready:
            raise EngineUnavailable("the engine is not running")
        self._loop.put(command)
