"""Keeps a server at what its registry says, whoever wrote it, and tells the others where it is.

Looks once a second how often the registry was written. Names are resolved by reading, so a new one
is served at once; what is kept in memory follows here. Lives on one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from polyadapt.errors import Unavailable

logger = logging.getLogger(__name__)

POLL_S = 1.0
_BEAT_POLLS = 3  # polls from one heartbeat to the next
_SWEEP_POLLS = 300  # and from one sweep of what nobody names any more


class Board(Protocol):
    """What this needs of polyadapt_store's ReplicaBoard."""

    @property
    def id(self) -> str: ...

    def beat(self, tiers: Mapping[str, str]) -> None: ...

    def leave(self) -> None: ...


class Store(Protocol):
    """What this needs of polyadapt_store.AdapterStore."""

    @property
    def replicas(self) -> Board: ...

    def refresh(self) -> int: ...

    def sweep(self) -> Sequence[str]: ...


class Follower:
    """See the module. run() until it is cancelled, then leave()."""

    def __init__(
        self,
        store: Store,
        follow: Sequence[Callable[[], Awaitable[object]]],
        tiers: Callable[[], Mapping[str, str]],
        *,
        poll_s: float = POLL_S,
    ) -> None:
        """follow: called in turn after others, or this server, have written. tiers: digest ->
        where this server has it.
        """
        self._store = store
        self._follow = follow
        self._tiers = tiers
        self._poll_s = poll_s
        self._num_polls = 0
        self._followed: int | None = None  # writes
        self._sweep: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Follow for ever. A registry that cannot be had is asked again at the next poll."""
        logger.info("this server is %s among those of its registry", self._store.replicas.id)
        while True:
            try:
                await self.poll()
            except Unavailable:
                pass  # the store has logged it
            except Exception:
                # A fault of ours, too, must not leave this server behind for ever.
                logger.exception("what others wrote was not followed; trying again")
            await asyncio.sleep(self._poll_s)

    async def poll(self) -> None:
        """Follow what was written since the last poll, and beat when it is time. Raises
        Unavailable.
        """
        written = await asyncio.to_thread(self._store.refresh)
        if written != self._followed:
            for follow in self._follow:
                await follow()
            self._followed = written
        if self._num_polls % _BEAT_POLLS == 0:
            await asyncio.to_thread(self._store.replicas.beat, dict(self._tiers()))
        if self._num_polls % _SWEEP_POLLS == 0 and self._sweep is None:
            self._sweep = asyncio.create_task(self._sweep_once())
        self._num_polls += 1

    async def leave(self) -> None:
        """Take this server off the board; it ends."""
        if self._sweep is not None:
            await self._sweep
        with contextlib.suppress(Unavailable):
            await asyncio.to_thread(self._store.replicas.leave)

    async def _sweep_once(self) -> None:
        try:
            swept = await asyncio.to_thread(self._store.sweep)
        except Unavailable:
            return  # the next sweep does it
        finally:
            self._sweep = None
        if swept:
            logger.info("swept the bytes of %d adapters that nobody names", len(swept))
