"""Engine replicas as one engine, without Ray: what comes and goes, dies, misleads and is stated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from tests.support.engines import greedy_request
from tests.support.fake_engine import FakeEngine

from polyadapt.engine import wire
from polyadapt.engine.output import Reply, StepOutput
from polyadapt.errors import EngineUnavailable, QueueFull
from polyadapt.ray_serve.board import Board, Statement, encode_statement
from polyadapt.ray_serve.fleet import RayFleet, ReplicaGone
from polyadapt.types import AdapterId, EngineStats, Event, Failed, Finished, Request, Residency

pytestmark = pytest.mark.anyio

A = AdapterId("a", 1, "sha256:a")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class FakeReplicas:
    """Calls to engines in this process; a replica of `dying` dies after so many events."""

    def __init__(self, **engines: FakeEngine) -> None:
        self.engines = engines
        self.dying: dict[str, int] = {}
        self.refusing: dict[str, Reply] = {}
        self.board = Board()

    def post(self, **statements: Statement) -> None:
        self.board.post(
            {
                name: encode_statement(statements[name]) if name in statements else None
                for name in self.engines
            }
        )

    async def describe(self, replica: str) -> bytes:
        if replica and replica not in self.engines:
            raise ReplicaGone(replica)
        engine = self.engines[replica or next(iter(self.engines))]
        return wire.encode_info(await engine.start())

    async def call(self, replica: str, message: bytes) -> bytes:
        if replica not in self.engines:
            raise ReplicaGone(replica)
        command = wire.decode_command(message)
        adapter = AdapterId("?", 0, command.digest)
        engine = self.engines[replica]
        found = await engine.load_adapter(adapter, is_pinned=command.is_pinned)
        return wire.encode_output(StepOutput(replies=[Reply(0, found)]))

    async def submit(
        self, replica: str, message: bytes, edge: str, num_tokens: int
    ) -> AsyncGenerator[bytes, None]:
        left = self.dying.get(replica, 1 << 30)
        if left == 0:
            raise ReplicaGone(replica)
        if replica in self.refusing:
            yield wire.encode_output(StepOutput(replies=[self.refusing[replica]]))
            return
        yield wire.encode_output(StepOutput())
        async for event in self.engines[replica].submit(wire.decode_command(message).request):
            left -= 1
            if left == 0:
                raise ReplicaGone(replica)
            yield wire.encode_output(StepOutput([event]))


async def started(replicas: FakeReplicas) -> RayFleet:
    fleet = RayFleet(replicas, replicas.board, "edge")
    replicas.post()
    await fleet.start()
    await members(fleet, len(replicas.engines))
    return fleet


async def members(fleet: RayFleet, count: int) -> None:
    async with asyncio.timeout(5):
        while len(fleet.members()) != count:
            await asyncio.sleep(0.001)


def a_request(number: int = 0) -> Request:
    return greedy_request(f"r{number}", [1, 2, 3], A, 8)


async def collect(fleet: RayFleet, request: Request) -> list[Event]:
    return [event async for event in fleet.submit(request)]


def in_order(fleet: RayFleet) -> tuple[str, ...]:
    return fleet.router.homes(A.digest, 9)


async def test_requests_for_an_adapter_go_to_its_home_replica():
    replicas = FakeReplicas(x=FakeEngine(), y=FakeEngine(), z=FakeEngine())
    fleet = await started(replicas)
    for number in range(3):
        assert (await collect(fleet, a_request(number)))[-1] == Finished(f"r{number}")
    home = in_order(fleet)[0]
    assert [len(e.requests) for n, e in replicas.engines.items() if n == home] == [3]


async def test_where_a_replica_says_that_the_adapter_is_there_it_is_sought():
    replicas = FakeReplicas(x=FakeEngine(), y=FakeEngine())
    fleet = await started(replicas)
    other = in_order(fleet)[1]
    replicas.post(**{other: Statement(residencies=(Residency(A.digest, "device", nbytes=9),))})
    await asyncio.sleep(0.01)
    assert fleet.residencies()[A.digest].engines == ((other, "device"),)
    await collect(fleet, a_request())
    assert len(replicas.engines[other].requests) == 1


@pytest.mark.parametrize("after", [0, 1, 2])
async def test_a_request_that_had_not_begun_moves_when_its_replica_dies(after: int):
    replicas = FakeReplicas(x=FakeEngine(), y=FakeEngine())
    fleet = await started(replicas)
    home, other = in_order(fleet)
    replicas.dying[home] = after
    events = await collect(fleet, a_request())
    assert events[-1] == Finished("r0")
    assert len(replicas.engines[other].requests) == 1
    fleet.router.check_integrity()


async def test_a_stream_that_had_begun_ends_in_an_error_when_its_replica_dies():
    replicas = FakeReplicas(x=FakeEngine(), y=FakeEngine())
    fleet = await started(replicas)
    home, other = in_order(fleet)
    replicas.dying[home] = 4
    events = await collect(fleet, a_request())
    assert isinstance(events[-1], Failed)
    assert events[-1].code == EngineUnavailable.code
    assert not replicas.engines[other].requests


async def test_a_replica_that_refuses_is_passed_over_and_all_full_is_a_full_queue():
    replicas = FakeReplicas(x=FakeEngine(), y=FakeEngine())
    fleet = await started(replicas)
    home, other = in_order(fleet)
    refusal = Reply(0, error_code=QueueFull.code, error_message="full")
    replicas.refusing[home] = refusal
    assert (await collect(fleet, a_request()))[-1] == Finished("r0")
    replicas.refusing[other] = refusal
    with pytest.raises(QueueFull, match="full"):
        await collect(fleet, a_request(1))


async def test_replicas_come_and_go():
    replicas = FakeReplicas(x=FakeEngine(), y=FakeEngine())
    fleet = await started(replicas)
    gone = in_order(fleet)[0]
    lost = replicas.engines.pop(gone)
    replicas.engines["new"] = FakeEngine()
    replicas.post()
    async with asyncio.timeout(5):
        while {member.name for member in fleet.members()} != set(replicas.engines):
            await asyncio.sleep(0.001)
    assert fleet.info is not None
    assert fleet.info.max_num_seqs == 2 * 8
    assert (await collect(fleet, a_request()))[-1] == Finished("r0")
    assert not lost.requests
    fleet.router.check_integrity()
    await fleet.stop()


async def test_a_fleet_that_has_lost_every_replica_refuses_until_one_is_back():
    replicas = FakeReplicas(x=FakeEngine())
    fleet = await started(replicas)
    engine = replicas.engines.pop("x")
    replicas.post()
    await members(fleet, 0)
    assert not fleet.is_ready
    with pytest.raises(EngineUnavailable):
        await collect(fleet, a_request())
    replicas.engines["x2"] = engine
    replicas.post()
    await members(fleet, 1)
    assert (await collect(fleet, a_request()))[-1] == Finished("r0")


async def test_what_other_edges_sent_counts_as_load_and_own_requests_count_once():
    replicas = FakeReplicas(x=FakeEngine(gate=asyncio.Semaphore(1)))
    fleet = await started(replicas)
    stream = fleet.submit(a_request())
    await anext(stream)  # 11 tokens of this edge
    replicas.post(x=Statement(loads={"edge": 11}))
    await asyncio.sleep(0.01)
    assert fleet.router.load("x") == 11
    stated = Statement(loads={"edge": 11, "other": 100}, stats=EngineStats(num_waiting=4))
    replicas.post(x=stated)
    await asyncio.sleep(0.01)
    assert fleet.router.load("x") == 111
    assert fleet.stats().num_waiting == 4
    await stream.aclose()
    replicas.post(x=stated)  # what was true a moment ago
    await asyncio.sleep(0.01)
    assert fleet.router.load("x") == 100
    replicas.post(x=Statement())
    await asyncio.sleep(0.01)
    assert fleet.router.load("x") == 0
    fleet.router.check_integrity()


async def test_an_adapter_is_loaded_at_its_home():
    replicas = FakeReplicas(x=FakeEngine(), y=FakeEngine())
    fleet = await started(replicas)
    await fleet.load_adapter(A, is_pinned=False)
    home, other = in_order(fleet)
    assert A.digest in replicas.engines[home].resident
    assert A.digest not in replicas.engines[other].resident
