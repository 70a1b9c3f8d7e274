"""An engine whose adapters' files are brought to this machine before it is asked for them.

For stores whose bytes lie elsewhere: files stay here while a request needs them, and the engine,
which reads them from the disk, knows nothing of it. Lives on one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from polyadapt.engine.client import EngineClient
from polyadapt.errors import AdapterCold, AdapterDeleted, PolyadaptError
from polyadapt.types import (
    AdapterId,
    AppliedAdapter,
    EngineInfo,
    EngineStats,
    Event,
    Failed,
    Request,
    Residency,
    WhenCold,
)

logger = logging.getLogger(__name__)

_DELETED = "the adapter was deleted while the request ran"


class Bytes(Protocol):
    """What this needs of polyadapt_store.AdapterStore."""

    def try_hold(self, digest: str) -> bool: ...

    def hold(self, digest: str) -> None: ...

    def release(self, digest: str) -> None: ...


@dataclass(slots=True, eq=False)
class _Unknown:
    """A request that has these digests without the engine's knowing: while files are fetched, and
    then those that it is not served with.
    """

    digests: frozenset[str]
    deleted: asyncio.Future[None]  # done when one of them is deleted with mode=now


class StockedEngine:
    """An EngineClient; see the module."""

    def __init__(self, engine: EngineClient, store: Bytes) -> None:
        self._engine = engine
        self._store = store
        self._fetches: dict[str, asyncio.Task[None]] = {}  # each holds the digest when it ends
        self._unknown: set[_Unknown] = set()
        self._pinned: set[str] = set()  # held as long: a new engine process reads them again

    @property
    def info(self) -> EngineInfo | None:
        """See EngineClient."""
        return self._engine.info

    @property
    def is_ready(self) -> bool:
        """See EngineClient."""
        return self._engine.is_ready

    @property
    def is_alive(self) -> bool:
        """See EngineClient."""
        return self._engine.is_alive

    @property
    def num_restarts(self) -> int:
        """See EngineClient."""
        return self._engine.num_restarts

    async def start(self) -> EngineInfo:
        """See EngineClient."""
        return await self._engine.start()

    async def stop(self) -> None:
        """See EngineClient."""
        for fetch in self._fetches.values():
            fetch.cancel()
        await self._engine.stop()

    async def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        """See EngineClient. What is not here is cold: `when_cold` holds for the fetch too."""
        async with contextlib.AsyncExitStack() as stack:
            unknown = stack.enter_context(self._listed(request))
            try:
                asked = await self._stock_request(stack, request, unknown.deleted)
            except PolyadaptError as error:
                yield Failed(request.id, error.code, error.message)
                return
            unknown.digests = _digests_held(request) - _digests_held(asked)
            events = self._engine.submit(asked)
            async with contextlib.aclosing(events):
                async for event in events:
                    if unknown.deleted.done():
                        yield Failed(request.id, AdapterDeleted.code, _DELETED)
                        return
                    yield event

    async def prepare_adapter(self, adapter: AdapterId) -> Residency:
        """See EngineClient."""
        async with self._stocked(adapter.digest):
            return await self._engine.prepare_adapter(adapter)

    async def load_adapter(self, adapter: AdapterId, *, is_pinned: bool) -> Residency:
        """See EngineClient."""
        async with self._stocked(adapter.digest):
            residency = await self._engine.load_adapter(adapter, is_pinned=is_pinned)
            if not is_pinned:
                self._unpin(adapter.digest)
            elif adapter.digest not in self._pinned and self._store.try_hold(adapter.digest):
                self._pinned.add(adapter.digest)
            return residency

    async def unload_adapter(self, digest: str) -> None:
        """See EngineClient."""
        await self._engine.unload_adapter(digest)
        self._unpin(digest)

    async def cancel_adapter(self, digest: str) -> int:
        """See EngineClient."""
        found = [unknown for unknown in self._unknown if digest in unknown.digests]
        for unknown in found:
            if not unknown.deleted.done():
                unknown.deleted.set_result(None)
        return len(found) + await self._engine.cancel_adapter(digest)

    def stats(self) -> EngineStats:
        """See EngineClient."""
        return self._engine.stats()

    def residencies(self) -> Mapping[str, Residency]:
        """See EngineClient."""
        return self._engine.residencies()

    def _unpin(self, digest: str) -> None:
        if digest in self._pinned:
            self._pinned.remove(digest)
            self._store.release(digest)

    @contextlib.contextmanager
    def _listed(self, request: Request) -> Iterator[_Unknown]:
        unknown = _Unknown(_digests_held(request), asyncio.get_running_loop().create_future())
        self._unknown.add(unknown)
        try:
            yield unknown
        finally:
            self._unknown.remove(unknown)

    @contextlib.asynccontextmanager
    async def _stocked(self, digest: str) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            await self._stock(
                stack, (digest,), WhenCold(), asyncio.get_running_loop().create_future()
            )
            yield

    async def _stock_request(
        self, stack: contextlib.AsyncExitStack, request: Request, deleted: asyncio.Future[None]
    ) -> Request:
        """Return what the engine is to be asked for, its files held until `stack` ends. Raises
        AdapterCold, AdapterDeleted, and why a fetch failed.
        """
        began, when_cold = time.monotonic(), request.when_cold
        missing = await self._stock(stack, _digests(request.adapters), when_cold, deleted)
        if missing and when_cold.instead is None:
            names = [a.adapter.name for a in request.adapters if a.adapter.digest in missing]
            raise AdapterCold(
                f"not on the device within cold_timeout_ms {when_cold.wait_ms:g}: "
                f"{', '.join(names)}; they are being fetched, try again"
            )
        if missing:
            assert when_cold.instead is not None
            await self._stock(stack, _digests(when_cold.instead), WhenCold(), deleted)
            return replace(request, adapters=when_cold.instead, when_cold=WhenCold())
        if when_cold.wait_ms is None:
            return request
        instead = _digests(when_cold.instead or ())
        if await self._stock(stack, instead, WhenCold(0), deleted):
            # Its own are here and sooner on the device than what is only being fetched.
            return replace(request, when_cold=WhenCold())
        waited_ms = (time.monotonic() - began) * 1000
        left = replace(when_cold, wait_ms=max(0.0, when_cold.wait_ms - waited_ms))
        return replace(request, when_cold=left)

    async def _stock(
        self,
        stack: contextlib.AsyncExitStack,
        digests: Iterable[str],
        when_cold: WhenCold,
        deleted: asyncio.Future[None],
    ) -> frozenset[str]:
        """Hold the files until `stack` ends; return those that did not come in time, which are
        fetched all the same. Raises AdapterDeleted once `deleted` is done, and why a fetch failed.
        """
        until = None if when_cold.wait_ms is None else time.monotonic() + when_cold.wait_ms / 1000
        missing = set(digests)
        while True:
            if deleted.done():
                raise AdapterDeleted(_DELETED)
            for digest in sorted(missing):
                if self._store.try_hold(digest):
                    stack.callback(self._store.release, digest)
                    missing.remove(digest)
            left = None if until is None else until - time.monotonic()
            if not missing:
                return frozenset()
            fetches = {self._fetch(digest) for digest in missing}
            if left is not None and left <= 0:
                return frozenset(missing)
            done, _ = await asyncio.wait(
                {*fetches, deleted}, timeout=left, return_when=asyncio.FIRST_COMPLETED
            )
            for fetch in done & fetches:
                fetch.result()  # raises why it failed

    def _fetch(self, digest: str) -> asyncio.Task[None]:
        """Return the one fetch of a digest that is under way."""
        fetch = self._fetches.get(digest)
        if fetch is None:
            fetch = asyncio.create_task(self._bring(digest))
            self._fetches[digest] = fetch
            fetch.add_done_callback(_note_failure)
        return fetch

    async def _bring(self, digest: str) -> None:
        try:
            await asyncio.to_thread(self._store.hold, digest)
            # Whoever waits for it takes a hold of its own at once; nobody may be there any more.
            self._store.release(digest)
        finally:
            del self._fetches[digest]


def _note_failure(fetch: asyncio.Task[None]) -> None:
    """Also where nobody waits for the fetch any more."""
    if not fetch.cancelled() and (error := fetch.exception()) is not None:
        logger.warning("an adapter was not fetched: %s", error)


def _digests(adapters: Iterable[AppliedAdapter]) -> frozenset[str]:
    return frozenset(applied.adapter.digest for applied in adapters)


def _digests_held(request: Request) -> frozenset[str]:
    """Every adapter whose use the caller counts until the request ends."""
    return _digests((*request.adapters, *(request.when_cold.instead or ())))
