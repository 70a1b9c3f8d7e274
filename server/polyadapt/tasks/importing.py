"""Fetches adapters from sources while nobody waits; what came of each is kept where every server of
the registry can tell it. Lives on one event loop. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from polyadapt.errors import InternalError, PolyadaptError, QueueFull, Unavailable
from polyadapt.tasks.directory import AdapterDirectory, NewProfile
from polyadapt_store.imports import RENEW_S, Import, ImportBook
from polyadapt_store.sources import Source, Sources
from polyadapt_store.staging import StagedUpload

logger = logging.getLogger(__name__)

_MAX_WAITING = 100
_NUM_FETCHES = 4  # at once; the next ones wait
_CLOSE_TIMEOUT_S = 5.0


class Store(Protocol):
    """What this needs of polyadapt_store.AdapterStore."""

    def stage(self) -> StagedUpload: ...


class Importer:
    """See the module. Owns the threads that fetch: a slow source keeps nobody else waiting."""

    def __init__(
        self,
        directory: AdapterDirectory,
        store: Store,
        sources: Sources,
        book: ImportBook,
        uploads: asyncio.Semaphore,
        *,
        renew_s: float = RENEW_S,
    ) -> None:
        """sources: are closed with this. uploads: how many are stored at once, those of callers
        included; what was fetched waits for it.
        """
        self._directory = directory
        self._store = store
        self._sources = sources
        self._book = book
        self._uploads = uploads
        self._renew_s = renew_s
        self._turns = asyncio.Semaphore(_NUM_FETCHES)
        self._threads = ThreadPoolExecutor(_NUM_FETCHES, thread_name_prefix="fetch")
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by the import's id
        self._renewing: asyncio.Task[None] | None = None

    async def begin(
        self,
        tenant: str,
        name: str,
        uri: str,
        *,
        description: str = "",
        tags: Sequence[str] = (),
        new_profile: NewProfile | None = None,
    ) -> Import:
        """Begin to fetch; return what get() will tell more of. Raises InvalidRequest, Forbidden for
        a source that is not allowed, and QueueFull.
        """
        source = self._sources.check(uri)
        if len(self._tasks) >= _MAX_WAITING:
            raise QueueFull(f"{_MAX_WAITING} sources are being fetched", retry_after_s=30)
        job = await asyncio.to_thread(self._book.begin, tenant, name, source.uri)

        async def publish(staged: StagedUpload) -> int:
            record, _ = await self._directory.upload_from(
                tenant,
                name,
                lambda mine: mine.take_over(staged),
                description=description,
                tags=tags,
                new_profile=new_profile,
            )
            return record.version

        async def run() -> None:
            try:
                # Until it is published, so that no more than that many lie on the disk.
                async with self._turns:
                    with await self._fetch(source) as staged:
                        async with self._uploads:
                            version = await publish(staged)
                await asyncio.to_thread(self._book.finish, job.id, version)
            except PolyadaptError as error:
                logger.warning("%s: %s was not imported: %s", job.id, source.uri, error.message)
                await self._fail(job, error)
            except asyncio.CancelledError:
                self._book.fail(job.id, Unavailable("the server ended; ask again").envelope())
                raise
            except Exception:
                logger.exception("%s: %s", job.id, source.uri)
                await self._fail(job, InternalError(f"a fault of this server, see {job.id}"))

        task = asyncio.create_task(run())
        self._tasks[job.id] = task
        task.add_done_callback(lambda task: self._tasks.pop(job.id))
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._renew())
        return job

    async def get(self, tenant: str, import_id: str) -> Import:
        """Return what came of one; raises NotFound."""
        return await asyncio.to_thread(self._book.get, tenant, import_id)

    async def close(self) -> None:
        """End fetches at their next bytes, and let what is being published be so; what takes longer
        than a moment is left. A thread that still waits for its source only removes what it wrote.
        """
        self._sources.close()
        if self._renewing is not None:
            self._renewing.cancel()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks.values(), timeout=_CLOSE_TIMEOUT_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        self._threads.shutdown(wait=False)

    async def _fetch(self, source: Source) -> StagedUpload:
        """Return the source's files, which the caller is to discard."""
        fetching = self._threads.submit(self._stage, source)
        try:
            return await asyncio.wrap_future(fetching)
        except asyncio.CancelledError:
            fetching.add_done_callback(_discard)
            raise

    def _stage(self, source: Source) -> StagedUpload:
        staged = self._store.stage()
        try:
            self._sources.fetch(source, staged)
        except BaseException:
            staged.discard()
            raise
        return staged

    async def _renew(self) -> None:
        """Tell other servers, as long as there is something to tell, that this one still lives."""
        while self._tasks:
            with contextlib.suppress(Unavailable):  # the store has logged it
                await asyncio.to_thread(self._book.renew, list(self._tasks))
            await asyncio.sleep(self._renew_s)
        self._renewing = None

    async def _fail(self, job: Import, error: PolyadaptError) -> None:
        try:
            await asyncio.to_thread(self._book.fail, job.id, error.envelope())
        except Unavailable:
            logger.error("%s: what came of it could not be kept", job.id)


def _discard(fetching: Future[StagedUpload]) -> None:
    if not fetching.cancelled() and fetching.exception() is None:
        fetching.result().discard()
