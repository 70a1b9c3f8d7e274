"""A source that is slow keeps nobody else waiting, and no server from ending."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.polyadapt_store.support import accept
from tests.support.fake_engine import FakeEngine

from polyadapt.tasks.directory import AdapterDirectory
from polyadapt.tasks.importing import Importer
from polyadapt_store.sources import Source, Sources
from polyadapt_store.staging import StagedUpload
from polyadapt_store.store import AdapterStore

pytestmark = pytest.mark.anyio
URI = "s3://bucket/poet"


class SlowSources(Sources):
    """Two files, the second of which comes with `may_come`."""

    def __init__(self) -> None:
        super().__init__(("s3://bucket",))
        self.may_come = threading.Event()
        self.num_begun = 0

    def fetch(self, source: Source, staged: StagedUpload) -> None:
        self.num_begun += 1
        with staged.add_file("adapter_config.json") as writer:
            writer.write(b"{}")
        assert self.may_come.wait(30)
        with staged.add_file("adapter_model.safetensors") as writer:
            writer.write(b"weights")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path, accept)


@pytest.fixture
async def directory(store: AdapterStore) -> AsyncIterator[AdapterDirectory]:
    engine = FakeEngine()
    await engine.start()
    yield AdapterDirectory(store, engine)
    store.close()


async def until(importer: Importer, import_id: str) -> object:
    while (job := await importer.get("t", import_id)).version is None and job.error is None:
        await asyncio.sleep(0.005)
    return job.version or job.error


async def test_a_fetch_takes_no_turn_of_those_who_upload(
    store: AdapterStore, directory: AdapterDirectory
) -> None:
    sources, uploads = SlowSources(), asyncio.Semaphore(1)
    importer = Importer(directory, store, sources, store.imports, uploads)
    job = await importer.begin("t", "poet", URI)
    while not sources.num_begun:
        await asyncio.sleep(0.005)
    assert not uploads.locked()
    async with uploads:
        sources.may_come.set()
        await asyncio.sleep(0.05)
        assert (await importer.get("t", job.id)).version is None, "storing takes one"
    assert await until(importer, job.id) == 1
    assert directory.owns("t", "poet")
    await importer.close()


async def test_one_that_takes_long_is_not_taken_for_lost(
    store: AdapterStore, directory: AdapterDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1_000_000.0]
    monkeypatch.setattr(store.imports, "_clock", lambda: now[0])
    sources, uploads = SlowSources(), asyncio.Semaphore(1)
    importer = Importer(directory, store, sources, store.imports, uploads, renew_s=0.01)
    jobs = [await importer.begin("t", f"poet{i}", URI) for i in range(6)]
    for _ in range(4):
        now[0] += 200
        await asyncio.sleep(0.1)
        for job in jobs:
            assert (await importer.get("t", job.id)).error is None
    assert sources.num_begun == 4, "the others wait"
    sources.may_come.set()
    for job in jobs:
        assert await until(importer, job.id) == 1
    await importer.close()


async def test_one_whose_server_is_gone_is_told_so(
    store: AdapterStore, directory: AdapterDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await asyncio.to_thread(store.imports.begin, "t", "poet", URI)
    importer = Importer(directory, store, SlowSources(), store.imports, asyncio.Semaphore(1))
    assert (await importer.get("t", job.id)).error is None
    monkeypatch.setattr(store.imports, "_clock", lambda: job.created + 301)
    error = (await importer.get("t", job.id)).error
    assert error is not None
    assert "ended" in error["error"]["message"]
    await importer.close()


async def test_the_end_of_a_server_ends_its_fetches(
    store: AdapterStore,
    directory: AdapterDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("polyadapt.tasks.importing._CLOSE_TIMEOUT_S", 0.05)
    sources = SlowSources()
    importer = Importer(directory, store, sources, store.imports, asyncio.Semaphore(1))
    jobs = [await importer.begin("t", f"poet{i}", URI) for i in range(6)]
    while sources.num_begun < 4:
        await asyncio.sleep(0.005)
    await asyncio.wait_for(importer.close(), 5)
    for job in jobs:
        error = (await importer.get("t", job.id)).error
        assert error is not None
        assert "ask again" in error["error"]["message"]
    sources.may_come.set()
    while list((tmp_path / "staging").iterdir()):
        await asyncio.sleep(0.005)
    assert sources.num_begun == 4, "who waited for a turn never had it"
    assert not directory.owns("t", "poet0")
