"""Fetches adapters from sources while nobody waits; what came of each is kept where every server of
the registry can tell it. Lives on one event loop. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from polyadapt.errors import InternalError, PolyadaptError, QueueFull, Unavailable
from polyadapt.tasks.directory import AdapterDirectory, NewProfile
from polyadapt_store.imports import Import, ImportBook
from polyadapt_store.sources import Sources

logger = logging.getLogger(__name__)

_MAX_WAITING = 100


class Importer:
    """See the module."""

    def __init__(
        self,
        directory: AdapterDirectory,
        sources: Sources,
        book: ImportBook,
        uploads: asyncio.Semaphore,
    ) -> None:
        """uploads: how many are stored at once, those of callers included."""
        self._directory = directory
        self._sources = sources
        self._book = book
        self._uploads = uploads
        self._tasks: set[asyncio.Task[None]] = set()

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

        async def run() -> None:
            try:
                async with self._uploads:
                    record, _ = await self._directory.upload_from(
                        tenant,
                        name,
                        lambda staged: self._sources.fetch(source, staged),
                        description=description,
                        tags=tags,
                        new_profile=new_profile,
                    )
                await asyncio.to_thread(self._book.finish, job.id, record.version)
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
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    async def get(self, tenant: str, import_id: str) -> Import:
        """Return what came of one; raises NotFound."""
        return await asyncio.to_thread(self._book.get, tenant, import_id)

    async def close(self) -> None:
        """End what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _fail(self, job: Import, error: PolyadaptError) -> None:
        try:
            await asyncio.to_thread(self._book.fail, job.id, error.envelope())
        except Unavailable:
            logger.error("%s: what came of it could not be kept", job.id)
