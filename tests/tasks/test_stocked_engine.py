"""Files are here before the engine is asked, stay as long as it needs them, and are not waited
for by those who would not.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import Counter

import pytest
from tests.support.fake_engine import FakeEngine

from polyadapt.errors import AdapterUnavailable
from polyadapt.tasks.stocked_engine import StockedEngine
from polyadapt.types import (
    AdapterId,
    AppliedAdapter,
    Event,
    Failed,
    Finished,
    Request,
    SamplingParams,
    WhenCold,
)

pytestmark = pytest.mark.anyio

_NUMBERS = itertools.count()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class FakeBytes:
    """Files that come when `may_come` is set; `lost` never do."""

    def __init__(self) -> None:
        self.here: set[str] = set()
        self.holds: Counter[str] = Counter()
        self.num_fetches = 0
        self.lost: set[str] = set()
        self.may_come = threading.Event()
        self.may_come.set()

    def try_hold(self, digest: str) -> bool:
        if digest in self.here:
            self.holds[digest] += 1
        return digest in self.here

    def hold(self, digest: str) -> None:
        self.num_fetches += 1
        assert self.may_come.wait(30)
        if digest in self.lost:
            raise AdapterUnavailable("it is lost")
        self.here.add(digest)
        self.holds[digest] += 1

    def release(self, digest: str) -> None:
        assert self.holds[digest] > 0
        self.holds[digest] -= 1


@pytest.fixture
async def engine() -> FakeEngine:
    fake = FakeEngine()
    await fake.start()
    return fake


@pytest.fixture
def files() -> FakeBytes:
    return FakeBytes()


def request(*names: str, when_cold: WhenCold | None = None) -> Request:
    adapters = tuple(AppliedAdapter(AdapterId(name, 1, name)) for name in names)
    sampling = SamplingParams(max_tokens=4)
    return Request(
        f"r{next(_NUMBERS)}", (1, 2), sampling, adapters, when_cold=when_cold or WhenCold()
    )


async def run(stocked: StockedEngine, asked: Request) -> list[Event]:
    return [event async for event in stocked.submit(asked)]


async def test_many_wait_for_one_fetch(engine: FakeEngine, files: FakeBytes) -> None:
    stocked = StockedEngine(engine, files)
    files.may_come.clear()
    runs = [asyncio.create_task(run(stocked, request("a", "b"))) for _ in range(5)]
    await asyncio.sleep(0.02)
    assert engine.requests == []
    files.may_come.set()
    for events in await asyncio.gather(*runs):
        assert isinstance(events[-1], Finished)
    assert files.num_fetches == 2
    assert not +files.holds


async def test_files_are_held_until_the_request_ends(engine: FakeEngine, files: FakeBytes) -> None:
    stocked = StockedEngine(engine, files)
    engine.gate = asyncio.Semaphore(1)
    events = stocked.submit(request("a"))
    await anext(events)
    assert files.holds["a"] == 1
    await events.aclose()
    assert files.holds["a"] == 0
    assert len(engine.cancelled) == 1


async def test_what_cannot_be_had_ends_the_request(engine: FakeEngine, files: FakeBytes) -> None:
    files.lost.add("b")
    (event,) = await run(StockedEngine(engine, files), request("a", "b"))
    assert isinstance(event, Failed)
    assert (event.code, event.message) == ("adapter_unavailable", "it is lost")
    assert engine.requests == []
    assert not +files.holds


async def test_a_caller_who_does_not_wait_fails_and_the_fetch_goes_on(
    engine: FakeEngine, files: FakeBytes
) -> None:
    stocked = StockedEngine(engine, files)
    files.may_come.clear()
    (event,) = await run(stocked, request("a", when_cold=WhenCold(0)))
    assert isinstance(event, Failed)
    assert event.code == "adapter_cold"
    files.may_come.set()
    while not files.here or stocked._fetches:
        await asyncio.sleep(0.001)
    events = await run(stocked, request("a", when_cold=WhenCold(0)))
    assert isinstance(events[-1], Finished)
    assert not +files.holds


async def test_a_fallback_is_served_instead_of_what_is_not_here(
    engine: FakeEngine, files: FakeBytes
) -> None:
    stocked = StockedEngine(engine, files)
    files.here.add("b")
    files.may_come.clear()
    instead = (AppliedAdapter(AdapterId("b", 1, "b")),)
    await run(stocked, request("a", when_cold=WhenCold(5, instead)))
    assert [applied.adapter.name for applied in engine.requests[0].adapters] == ["b"]
    await run(stocked, request("a", when_cold=WhenCold(5, ())))
    assert engine.requests[1].adapters == ()
    files.may_come.set()


async def test_a_fallback_that_is_not_here_is_not_waited_for(
    engine: FakeEngine, files: FakeBytes
) -> None:
    stocked = StockedEngine(engine, files)
    files.here.add("a")
    files.may_come.clear()
    instead = (AppliedAdapter(AdapterId("b", 1, "b")),)
    asked = request("a", when_cold=WhenCold(0, instead))
    events = await asyncio.wait_for(run(stocked, asked), 5)
    assert isinstance(events[-1], Finished)
    assert (engine.requests[0].adapters, engine.requests[0].when_cold) == (
        asked.adapters,
        WhenCold(),
    )
    files.may_come.set()
    while not stocked._fetches.keys().isdisjoint({"b"}):
        await asyncio.sleep(0.001)
    assert "b" in files.here, "for the next one"
    files.here.remove("b")
    files.lost.add("b")
    assert isinstance((await run(stocked, asked))[-1], Finished)


@pytest.mark.parametrize("deleted", ["a", "b", "c"])
async def test_a_deletion_ends_what_still_waits_for_files(
    deleted: str, engine: FakeEngine, files: FakeBytes
) -> None:
    stocked = StockedEngine(engine, files)
    files.here.add("a")
    files.may_come.clear()
    instead = (AppliedAdapter(AdapterId("c", 1, "c")),)
    asked = request("a", "b", when_cold=WhenCold(60_000, instead))
    running = asyncio.create_task(run(stocked, asked))
    await asyncio.sleep(0.02)
    assert await stocked.cancel_adapter("another") == 0
    assert await stocked.cancel_adapter(deleted) == 1
    (event,) = await asyncio.wait_for(running, 5)
    assert isinstance(event, Failed)
    assert event.code == "adapter_deleted"
    assert (engine.requests, +files.holds) == ([], {})
    files.may_come.set()


async def test_a_deletion_ends_what_is_served_with_something_else(
    engine: FakeEngine, files: FakeBytes
) -> None:
    stocked = StockedEngine(engine, files)
    files.may_come.clear()
    engine.gate = asyncio.Semaphore(1)
    events = stocked.submit(request("a", when_cold=WhenCold(0, ())))
    await anext(events)
    assert await stocked.cancel_adapter("a") == 1
    engine.gate.release()
    (event,) = [event async for event in events]
    assert isinstance(event, Failed)
    assert event.code == "adapter_deleted"
    assert len(engine.cancelled) == 1
    files.may_come.set()


async def test_time_spent_fetching_counts(engine: FakeEngine, files: FakeBytes) -> None:
    stocked = StockedEngine(engine, files)
    await run(stocked, request("a", when_cold=WhenCold(5000)))
    left = engine.requests[0].when_cold.wait_ms
    assert left is not None
    assert 0 < left < 5000


async def test_a_pin_keeps_the_files(engine: FakeEngine, files: FakeBytes) -> None:
    stocked = StockedEngine(engine, files)
    adapter = AdapterId("a", 1, "a")
    await stocked.load_adapter(adapter, is_pinned=True)
    await stocked.load_adapter(adapter, is_pinned=True)
    assert files.holds["a"] == 1
    await stocked.unload_adapter("a")
    assert files.holds["a"] == 0
    await stocked.prepare_adapter(adapter)
    assert files.holds["a"] == 0
