"""Several engines as one: routing, failover, commands and sums, over engines that are scripted."""

from __future__ import annotations

import asyncio
from dataclasses import fields, replace

import pytest
from tests.support.engines import greedy_request
from tests.support.fake_engine import FakeEngine, make_info

from polyadapt.engine.fleet import EngineFleet
from polyadapt.engine.routing import RoutingPolicy
from polyadapt.errors import (
    AdapterRejected,
    EngineUnavailable,
    Problem,
    QueueFull,
    StartupError,
)
from polyadapt.types import (
    AdapterId,
    EngineStats,
    Event,
    Failed,
    Finished,
    Request,
    Residency,
    Started,
    Tokens,
    WhenCold,
)

pytestmark = pytest.mark.anyio

A = AdapterId("a", 1, "sha256:a")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Mortal(FakeEngine):
    """Dies with `deaths` of its next requests, after `after` events of each; one is Started."""

    def __init__(self, deaths: int = 0, after: int = 1, **settings) -> None:
        super().__init__(**settings)
        self.deaths, self.after = deaths, after

    async def submit(self, request: Request):
        num_events, is_doomed = 0, self.deaths > 0
        self.deaths -= is_doomed
        async for event in super().submit(request):
            if is_doomed and num_events == self.after:
                yield Failed(request.id, EngineUnavailable.code, "the engine has failed")
                return
            num_events += 1
            yield event


async def started(*engines: FakeEngine, **policy) -> EngineFleet:
    fleet = EngineFleet({f"e{i}": e for i, e in enumerate(engines)}, RoutingPolicy(**policy))
    await fleet.start()
    return fleet


def a_request(number: int = 0, adapter: AdapterId | None = A, **options) -> Request:
    return greedy_request(f"r{number}", [1, 2, 3], adapter, 8, **options)


async def collect(fleet: EngineFleet, request: Request) -> list[Event]:
    return [event async for event in fleet.submit(request)]


def let_go(*engines: FakeEngine) -> None:
    """Let every request run to its end."""
    for engine in engines:
        for _ in range(200):
            engine.gate.release()


def home_of(fleet: EngineFleet, key: str = A.digest) -> str:
    return fleet.router.homes(key, 1)[0]


def by_home(fleet: EngineFleet, engines: list[FakeEngine]) -> list[FakeEngine]:
    """The engines in the order of A's home set."""
    return [engines[int(name[1:])] for name in fleet.router.homes(A.digest, len(engines))]


# ------------------------------------------------------------------ where requests go
async def test_requests_for_an_adapter_stay_where_it_is():
    engines = [FakeEngine() for _ in range(3)]
    fleet = await started(*engines)
    home, other, _ = by_home(fleet, engines)
    for number in range(4):
        assert (await collect(fleet, a_request(number)))[-1] == Finished(f"r{number}")
    assert len(home.requests) == 4
    home.resident.clear()
    other.resident[A.digest] = Residency(A.digest, "device", nbytes=100)
    await collect(fleet, a_request(5))
    assert [request.id for request in other.requests] == ["r5"]


async def test_a_hot_adapter_spreads_and_comes_back():
    engines = [FakeEngine(gate=asyncio.Semaphore(0)) for _ in range(3)]
    fleet = await started(*engines, least_bound=20)
    home = by_home(fleet, engines)[0]
    running = [asyncio.create_task(collect(fleet, a_request(i))) for i in range(12)]
    while sum(len(engine.requests) for engine in engines) < 12:
        await asyncio.sleep(0)
    assert sorted(len(engine.requests) for engine in engines) == [4, 4, 4]
    assert sum(member.load_tokens for member in fleet.members()) == 12 * (3 + 8)
    let_go(*engines)
    await asyncio.gather(*running)
    assert not any(member.load_tokens for member in fleet.members())
    fleet.router.check_integrity()
    await collect(fleet, a_request(12))
    assert home.requests[-1].id == "r12", "the copies of the burst are left alone"


async def test_the_load_shrinks_as_tokens_come_and_goes_when_the_caller_does():
    engine = FakeEngine(gate=asyncio.Semaphore(2))
    fleet = await started(engine)
    stream = fleet.submit(a_request())
    assert isinstance(await anext(stream), Started)
    assert fleet.router.load("e0") == 3 + 8
    assert isinstance(await anext(stream), Tokens)
    assert fleet.router.load("e0") == 7, "the prompt and a token are done"
    await stream.aclose()
    assert fleet.router.load("e0") == 0
    assert engine.cancelled == ["r0"]


async def test_the_expected_output_is_learnt():
    fleet = await started(FakeEngine(reply=lambda request, index: [7] * 8))
    request = greedy_request("r", [1], None, 4000)
    before = fleet.num_tokens(request)
    for _ in range(100):
        await collect(fleet, request)
    assert before == 1 + 64
    assert fleet.num_tokens(request) == 1 + 8
    assert fleet.num_tokens(replace(request, n=3)) == 1 + 3 * 8
    assert fleet.num_tokens(replace(request, kind="embed")) == 1


async def test_requests_for_the_base_that_begin_alike_go_to_one_engine():
    engines = [FakeEngine() for _ in range(3)]
    fleet = await started(*engines)
    conversation = list(range(64))
    for turn in range(3):
        prompt = [*conversation, *range(turn)]
        await collect(fleet, greedy_request(f"r{turn}", prompt, None))
    assert sorted(len(engine.requests) for engine in engines) == [0, 0, 3]
    for number in range(40):
        await collect(fleet, greedy_request(f"s{number}", [number], None))
    assert all(engine.requests for engine in engines)


async def test_an_adapter_that_fits_nowhere_else_goes_where_there_is_room():
    full = make_info()
    engines = [FakeEngine(model=replace(full, adapter_bytes=150)) for _ in range(3)]
    fleet = await started(*engines, least_bound=1)
    home, second, third = by_home(fleet, engines)
    for engine in (home, second):
        engine.resident["sha256:b"] = Residency("sha256:b", "device", nbytes=100)
    names = fleet.router.homes(A.digest, 3)
    fleet.router.change_load(names[0], "other", 50)
    await collect(fleet, a_request())
    assert [len(engine.requests) for engine in (home, second, third)] == [0, 0, 1]


# ------------------------------------------------------------------ failover
@pytest.mark.parametrize("after", [0, 1])
async def test_a_request_that_had_not_begun_moves_and_nobody_sees_it(after):
    engines = [Mortal(), Mortal()]
    fleet = await started(*engines)
    home, other = by_home(fleet, engines)
    home.deaths, home.after = 1, after
    events = await collect(fleet, a_request())
    assert len({e.served for e in events if isinstance(e, Started)}) == 1
    first_token = next(i for i, e in enumerate(events) if isinstance(e, Tokens))
    assert all(isinstance(event, Started) for event in events[:first_token])
    assert "".join(chr(i) for e in events if isinstance(e, Tokens) for i in e.token_ids)[:6] == (
        "I am a"
    )
    assert events[-1] == Finished("r0")
    assert (len(home.requests), len(other.requests), fleet.num_failovers) == (1, 1, 1)
    assert not any(member.load_tokens for member in fleet.members())


async def test_a_request_that_would_move_to_other_adapters_than_announced_ends():
    engines = [Mortal(), Mortal()]
    fleet = await started(*engines)
    home, other = by_home(fleet, engines)
    home.deaths, other.cold = 1, {A.digest}
    request = replace(a_request(), when_cold=WhenCold(0.0, instead=()))
    announced, last = await collect(fleet, request)
    assert isinstance(announced, Started)
    assert isinstance(last, Failed)
    assert "announced" in last.message


async def test_a_request_that_was_announced_and_finds_no_other_engine_ends_in_an_event():
    engines = [Mortal(), Mortal()]
    fleet = await started(*engines)
    home, other = by_home(fleet, engines)
    home.deaths, other.refusal = 1, QueueFull("full")
    announced, last = await collect(fleet, a_request())
    assert isinstance(announced, Started)
    assert last == Failed("r0", "queue_full", "full")


async def test_a_request_that_had_begun_ends_in_an_error():
    engines = [Mortal(), Mortal()]
    fleet = await started(*engines)
    home, other = by_home(fleet, engines)
    home.deaths, home.after = 1, 2
    events = await collect(fleet, a_request())
    assert isinstance(events[-1], Failed)
    assert events[-1].code == "engine_unavailable"
    assert [type(event) for event in events[:-1]] == [Started, Tokens]
    assert not other.requests
    assert fleet.num_failovers == 0


async def test_a_request_under_which_two_engines_die_is_not_given_to_a_third():
    engines = [Mortal(deaths=1), Mortal(deaths=1), Mortal(deaths=1)]
    fleet = await started(*engines)
    *_, last = await collect(fleet, a_request())
    assert isinstance(last, Failed)
    assert sum(len(engine.requests) for engine in engines) == 2


async def test_a_moved_request_has_what_is_left_of_its_time():
    engines = [Mortal(), Mortal()]
    fleet = await started(*engines)
    home, other = by_home(fleet, engines)
    home.deaths = 1
    request = replace(a_request(), timeout_s=50.0, when_cold=WhenCold(20_000.0))
    await collect(fleet, request)
    (moved,) = other.requests
    assert 0 < moved.timeout_s < 50.0
    assert 0 < moved.when_cold.wait_ms < 20_000.0
    assert replace(moved, timeout_s=50.0, when_cold=request.when_cold) == request


async def test_a_full_engine_passes_requests_on_and_all_full_is_said():
    engines = [FakeEngine(), FakeEngine()]
    fleet = await started(*engines)
    home, other = by_home(fleet, engines)
    home.refusal = QueueFull("full")
    assert (await collect(fleet, a_request()))[-1] == Finished("r0")
    assert len(other.requests) == 1
    other.refusal = EngineUnavailable("gone")
    with pytest.raises(QueueFull):
        await collect(fleet, a_request(1))
    other.is_ready = home.is_ready = False
    with pytest.raises(EngineUnavailable, match="no engine"):
        await collect(fleet, a_request(2))


async def test_nothing_moves_while_the_fleet_stops():
    engines = [FakeEngine(gate=asyncio.Semaphore(0)) for _ in range(2)]
    fleet = await started(*engines)
    running = asyncio.create_task(collect(fleet, a_request()))
    while not any(engine.requests for engine in engines):
        await asyncio.sleep(0)
    await fleet.stop()
    (last,) = await running
    assert isinstance(last, Failed)
    assert [engine.num_stops for engine in engines] == [1, 1]


# ------------------------------------------------------------------ commands
async def test_an_adapter_is_prepared_loaded_and_pinned_at_home_and_freed_everywhere():
    engines = [FakeEngine() for _ in range(3)]
    fleet = await started(*engines)
    home, other, _ = by_home(fleet, engines)
    assert (await fleet.prepare_adapter(A)).tier == "host"
    assert home.prepared == [A]
    pinned = await fleet.load_adapter(A, is_pinned=True)
    assert pinned.engines == ((home_of(fleet), "device"),)
    assert pinned.is_pinned
    # Pinned elsewhere too, as after a time in which the home was down.
    other.resident[A.digest] = Residency(A.digest, "device", is_pinned=True, nbytes=100)
    assert not (await fleet.load_adapter(A, is_pinned=False)).is_pinned
    await fleet.unload_adapter(A.digest)
    assert [engine.unloaded for engine in engines] == [[A.digest]] * 3
    assert A.digest not in fleet.residencies()


async def test_a_pin_is_taken_from_an_engine_that_is_down_too():
    class Down(FakeEngine):
        has_forgotten = False

        async def load_adapter(self, adapter: AdapterId, *, is_pinned: bool) -> Residency:
            self.has_forgotten = not is_pinned
            raise EngineUnavailable("down")

    engines = [FakeEngine(), FakeEngine(), Down()]
    fleet = await started(*engines)
    engines[2].is_ready = False
    await fleet.load_adapter(A, is_pinned=True)
    assert not engines[2].has_forgotten
    assert not (await fleet.load_adapter(A, is_pinned=False)).is_pinned
    assert engines[2].has_forgotten
    assert sum(A.digest in engine.resident for engine in engines) == 1, "nobody else loads it"


async def test_what_a_home_that_is_down_cannot_do_the_next_one_does():
    engines = [FakeEngine(), FakeEngine()]
    fleet = await started(*engines)
    home, other = by_home(fleet, engines)
    home.prepare_error = EngineUnavailable("down")
    await fleet.prepare_adapter(A)
    assert other.prepared == [A]
    home.is_ready = False
    await fleet.load_adapter(A, is_pinned=True)
    assert A.digest in other.resident
    other.prepare_error = AdapterRejected([Problem("bad", "it is bad")])
    with pytest.raises(AdapterRejected):
        await fleet.prepare_adapter(A)


async def test_a_deleted_adapter_is_cancelled_on_every_engine_that_lives():
    class Down(FakeEngine):
        async def cancel_adapter(self, digest: str) -> int:
            raise EngineUnavailable("down")

    engines = [FakeEngine(gate=asyncio.Semaphore(0)) for _ in range(2)]
    fleet = await started(*engines, Down(), least_bound=1)
    running = [asyncio.create_task(collect(fleet, a_request(i))) for i in range(4)]
    while sum(len(engine.running) for engine in engines) < 2:
        await asyncio.sleep(0)
    count = sum(len(engine.running) for engine in engines)
    assert await fleet.cancel_adapter(A.digest) == count
    let_go(*engines)
    await asyncio.gather(*running)
    with pytest.raises(EngineUnavailable):
        await (await started(Down())).cancel_adapter(A.digest)


# ------------------------------------------------------------------ sums
async def test_residency_is_the_best_tier_and_says_where():
    first, second = FakeEngine(), FakeEngine()
    fleet = await started(first, second)
    assert not fleet.residencies()
    first.resident = {A.digest: Residency(A.digest, "host", False, 1, 5.0, 100)}
    second.resident = {
        A.digest: Residency(A.digest, "device", True, 2, 3.0, 100),
        "b": Residency("b", "host"),
    }
    where = (("e0", "host"), ("e1", "device"))
    assert fleet.residencies()[A.digest] == Residency(A.digest, "device", True, 3, 5.0, 100, where)
    assert set(fleet.residencies()) == {A.digest, "b"}
    assert fleet.residencies()["b"].engines == (("e1", "host"),)


async def test_statistics_are_sums():
    class Busy(FakeEngine):
        def stats(self) -> EngineStats:
            return EngineStats(
                3, 1, 2, 5, 1, 64, 100, ("x", "y"), {"steps": 3}, {1: 2, 2: 1}, {3: 3},
                {"read": (1.0, 2.0, 0.5)}, {"x": (float(rows), share, 1 - share)},
            )  # fmt: skip

    rows, share = 10, 0.5
    fleet = await started(Busy(), Busy())
    total = fleet.stats()
    assert total.counters == {"steps": 6}
    assert (total.num_steps, total.num_running, total.num_waiting) == (6, 2, 4)
    assert (total.num_used_pages, total.num_cached_pages, total.num_pages) == (10, 2, 128)
    assert total.adapter_bytes_used == 200
    assert total.waiting_digests == ("x", "y")
    assert total.steps_by_adapters == {1: 4, 2: 2}
    assert total.steps_by_rows == {3: 6}
    assert total.load_seconds == {"read": (2.0, 4.0, 1.0)}
    untold = EngineStats()
    kept = [f.name for f in fields(total) if getattr(total, f.name) == getattr(untold, f.name)]
    assert not kept, "a figure is not added up"
    assert total.routing == {"x": (20.0, 0.5, 0.5)}


async def test_what_an_engine_that_left_had_counted_stays_counted():
    fleet = await started(FakeEngine(num_restarts=2), FakeEngine())
    fleet.leave("e0")
    total = fleet.stats()
    assert (total.num_steps, total.counters, total.num_pages) == (14, {"preemptions": 6}, 64)
    assert fleet.num_restarts == 2


async def test_what_the_fleet_is_adds_up():
    small = make_info(max_model_len=100)
    fleet = await started(FakeEngine(), FakeEngine(model=small))
    info, one = fleet.info, make_info()
    assert info.base.max_model_len == 100
    assert (info.num_pages, info.max_num_seqs) == (2 * one.num_pages, 2 * one.max_num_seqs)
    assert (info.max_waiting, info.adapter_bytes) == (2 * one.max_waiting, 2 * one.adapter_bytes)
    assert info.device == "cpu,cpu"


async def test_the_fleet_is_ready_and_alive_while_any_engine_is():
    engines = [FakeEngine(), FakeEngine(num_restarts=2)]
    fleet = await started(*engines)
    engines[0].is_ready = engines[0].is_alive = False
    assert fleet.is_ready
    assert fleet.is_alive
    assert [(m.name, m.is_ready, m.num_restarts) for m in fleet.members()] == [
        ("e0", False, 0),
        ("e1", True, 2),
    ]
    engines[1].is_ready = engines[1].is_alive = False
    assert not fleet.is_ready
    assert not fleet.is_alive
    assert fleet.num_restarts == 2


async def test_an_engine_that_cannot_start_stops_the_others():
    class Broken(FakeEngine):
        async def start(self):
            raise StartupError("no memory")

    whole = FakeEngine()
    with pytest.raises(StartupError, match="engine e1: no memory"):
        await started(whole, Broken())
    assert whole.num_stops == 1
    other = replace(make_info(), base=replace(make_info().base, digest="sha256:other"))
    with pytest.raises(StartupError, match="different base"):
        await started(FakeEngine(), FakeEngine(model=other))
    with pytest.raises(ValueError, match="at least one"):
        EngineFleet({})
