"""Events reach their reader in order and once, whoever is faster."""

from __future__ import annotations

import asyncio

import pytest
from tests.support.engines import greedy_request

from polyadapt.engine.output import Cancel, Command, StepOutput
from polyadapt.engine.streams import Streams
from polyadapt.errors import EngineUnavailable
from polyadapt.types import EngineStats, Event, Failed, Finished, Tokens

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """Run async tests on asyncio."""
    return "asyncio"


def make() -> tuple[Streams, list[Command]]:
    sent: list[Command] = []
    streams = Streams(sent.append)
    streams.capacity = 10
    return streams, sent


def token(request_id: str, token_id: int) -> Tokens:
    return Tokens(request_id, 0, (token_id,))


async def test_events_that_come_before_and_between_reads_are_read_in_order() -> None:
    streams, sent = make()
    events = streams.submit(greedy_request("r", [1]))
    first = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    early: list[Event] = [token("r", 1), token("other", 9), token("r", 2)]
    streams.absorb(StepOutput(early))
    streams.absorb(StepOutput([token("r", 3)]))
    found = [await first, await anext(events), await anext(events)]
    streams.absorb(StepOutput([Finished("r")]))
    found += [event async for event in events]
    assert found == [token("r", 1), token("r", 2), token("r", 3), Finished("r")]
    assert not streams.is_busy
    streams.absorb(StepOutput([token("r", 4)]))  # too late: nobody waits
    assert not [command for command in sent if isinstance(command, Cancel)]


async def test_a_reader_that_leaves_while_it_waits_cancels_its_request() -> None:
    streams, sent = make()
    events = streams.submit(greedy_request("r", [1]))
    waiting = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    waiting.cancel()
    # The event comes in the same round: it has no reader any more.
    streams.absorb(StepOutput([token("r", 1)]))
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert sent[-1] == Cancel("r")
    assert not streams.is_busy


async def test_an_engine_that_is_gone_fails_its_waiting_readers() -> None:
    streams, _ = make()
    events = streams.submit(greedy_request("r", [1]))
    waiting = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    streams.fail_all(EngineUnavailable("gone"))
    assert isinstance(await waiting, Failed)
    assert [event async for event in events] == []


async def test_counts_never_fall_when_an_engine_is_replaced() -> None:
    def life(num_steps: int) -> EngineStats:
        return EngineStats(
            num_steps, num_running=2, num_pages=64,
            counters={"loads": num_steps, str(num_steps): 1},
            steps_by_adapters={1: num_steps}, steps_by_rows={2: num_steps},
            load_seconds={"read": (1.0, 0.5)},
        )  # fmt: skip

    streams, _ = make()
    streams.absorb(StepOutput(stats=life(5)))
    assert streams.stats == life(5)
    for _ in range(2):  # the second time as one that could not be started
        streams.fail_all(EngineUnavailable("gone"))
        assert (streams.stats.num_running, streams.stats.num_pages) == (0, 0)
        assert streams.stats.counters == {"loads": 5, "5": 1}
    streams.absorb(StepOutput(stats=life(2)))
    streams.absorb(StepOutput(stats=life(3)))
    assert streams.stats == EngineStats(
        8, num_running=2, num_pages=64, counters={"loads": 8, "5": 1, "3": 1},
        steps_by_adapters={1: 8}, steps_by_rows={2: 8}, load_seconds={"read": (2.0, 1.0)},
    )  # fmt: skip
