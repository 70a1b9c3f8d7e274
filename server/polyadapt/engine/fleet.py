"""Several engines as one EngineClient: each with a device and a supervisor of its own.

Torch-free. Routes by engine/routing.py, moves requests that had not begun to an engine that lives,
and adds up what all of them say. Knows no processes: its members are EngineClients.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from array import array
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from polyadapt.engine.client import EngineClient
from polyadapt.engine.remaining import Remaining
from polyadapt.engine.routing import Demand, Router, RoutingPolicy, key_of
from polyadapt.engine.stats import sum_counts
from polyadapt.errors import EngineUnavailable, QueueFull, StartupError
from polyadapt.types import (
    AdapterId,
    EngineInfo,
    EngineStats,
    Event,
    Failed,
    Request,
    Residency,
    Started,
    Tier,
    Tokens,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A request under which engine after engine dies may be what kills them.
_MOST_DEATHS = 2
# Requests for the base alone that begin alike go to the engine that has their keys and values.
_NUM_AFFINE_TOKENS = 64
_FIRST_GUESS_OUTPUT = 64.0  # tokens of a sequence, until some have ended
_GUESS_STEP = 0.05
_TIERS: dict[Tier, int] = {"store": 0, "host": 1, "device": 2}


@dataclass(frozen=True, slots=True)
class MemberState:
    """One engine of the fleet, as the edge sees it now."""

    name: str
    is_ready: bool
    is_alive: bool
    num_restarts: int
    num_running: int
    num_waiting: int
    load_tokens: int  # sent there and not computed yet, as the router counts
    num_resident: int  # adapters on its device


class EngineFleet:
    """Owns its engines, and the router that has their loads. Lives on one event loop.

    What it adds up: counts, pages, bytes and rows over all engines; of an adapter's residency the
    best tier, the leases of all, and the bytes of one copy.
    """

    def __init__(
        self,
        engines: Mapping[str, EngineClient],
        policy: RoutingPolicy | None = None,
        *,
        may_grow: bool = False,
    ) -> None:
        """engines: by name, which decides what is whose home; raises ValueError without any, unless
        the fleet may grow.
        """
        if not engines and not may_grow:
            raise ValueError("a fleet needs at least one engine")
        self._engines = dict(engines)
        self.router = Router(policy)
        for name in self._engines:
            self.router.add(name, is_ready=False)
        self._residencies = _Residencies(self._engines)
        self._typical_output = _FIRST_GUESS_OUTPUT
        self._is_stopping = False
        self._earlier = EngineStats()  # what engines that have left had counted
        self._num_earlier_restarts = 0
        self.num_failovers = 0
        self.info: EngineInfo | None = None

    @property
    def is_ready(self) -> bool:
        """Whether any engine takes requests now."""
        return any(engine.is_ready for engine in self._engines.values())

    @property
    def is_alive(self) -> bool:
        """Whether any engine lives or is being started again."""
        return any(engine.is_alive for engine in self._engines.values())

    @property
    def num_restarts(self) -> int:
        """How often engines were started again."""
        now = sum(engine.num_restarts for engine in self._engines.values())
        return self._num_earlier_restarts + now

    def members(self) -> tuple[MemberState, ...]:
        """What each engine is doing, in the order in which they were given."""
        return tuple(self._member(name, engine) for name, engine in self._engines.items())

    def _member(self, name: str, engine: EngineClient) -> MemberState:
        stats = engine.stats()
        on_device = [r for r in engine.residencies().values() if r.tier == "device"]
        return MemberState(
            name, engine.is_ready, engine.is_alive, engine.num_restarts, stats.num_running,
            stats.num_waiting, self.router.load(name), len(on_device),
        )  # fmt: skip

    # ------------------------------------------------------------------ members
    def join(self, name: str, engine: EngineClient) -> None:
        """Have one more engine, which has started; raises ValueError for a name that there is, and
        StartupError for another base model.
        """
        assert engine.info is not None, "an engine joins once it has started"
        infos = [each.info for each in self._engines.values() if each.info is not None]
        together = _together([*infos, engine.info])
        self.router.add(name, is_ready=engine.is_ready)
        self._engines[name] = engine
        self.info = together

    def leave(self, name: str) -> None:
        """Have it no more: what runs there ends as it ends, and what it had counted stays counted.
        Raises KeyError.
        """
        self.router.remove(name)
        engine = self._engines.pop(name)
        self._earlier = sum_counts([self._earlier, engine.stats()])
        self._num_earlier_restarts += engine.num_restarts
        infos = [each.info for each in self._engines.values() if each.info is not None]
        if infos:  # without any, what the fleet was is what it will be
            self.info = _together(infos)

    # ------------------------------------------------------------------ life
    async def start(self) -> EngineInfo:
        """Start all engines at once and wait for every one; raises the first one's StartupError,
        with the others stopped.
        """
        started = await asyncio.gather(
            *(engine.start() for engine in self._engines.values()), return_exceptions=True
        )
        try:
            infos = [
                _info(name, outcome) for name, outcome in zip(self._engines, started, strict=True)
            ]
            self.info = _together(infos)
        except BaseException:
            await self.stop()
            raise
        self._look()
        logger.info("%d engines are ready: %s", len(infos), ", ".join(self._engines))
        return self.info

    async def stop(self) -> None:
        """End every request with an error, then all engines at once."""
        self._is_stopping = True
        await asyncio.gather(*(engine.stop() for engine in self._engines.values()))

    # ------------------------------------------------------------------ requests
    async def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        """See EngineClient. Until its first token, or whatever else tells of it beyond Started, has
        been yielded, a request whose engine dies begins anew on another one: Started comes again
        then, with the same adapters. After that it ends in Failed.
        """
        began = time.monotonic()
        refusal: EngineUnavailable | QueueFull | None = None
        announced: tuple[AdapterId, ...] | None = None
        num_deaths = 0
        for name in self._rank(request):
            sent = request if refusal is None else _later(request, time.monotonic() - began)
            attempt = _Attempt(self, name, request)
            try:
                async with contextlib.aclosing(
                    attempt.events(self._engines[name].submit(sent))
                ) as events:
                    async for event in events:
                        if isinstance(event, Started):
                            served = tuple(each.adapter for each in event.served)
                            if announced not in (None, served):  # on_cold has chosen otherwise
                                yield _unlike(request)
                                return
                            announced = served
                        yield event
            except (EngineUnavailable, QueueFull) as error:
                if attempt.has_begun:
                    raise
                refusal = _worse(refusal, error)
            finally:
                attempt.end()
            if attempt.death is None:
                if attempt.has_begun:
                    return
                continue
            num_deaths += 1
            if self._is_stopping or num_deaths == _MOST_DEATHS:
                yield attempt.death
                return
            refusal = _worse(refusal, EngineUnavailable(attempt.death.message))
            self.num_failovers += 1
            logger.warning("request %s: engine %s died before it began", request.id, name)
        refusal = refusal or EngineUnavailable("no engine is ready; try again", retry_after_s=2)
        if announced is None:
            raise refusal
        yield Failed(request.id, refusal.code, refusal.message)

    def _rank(self, request: Request) -> Iterator[str]:
        """The engines to try, in turn."""
        self._look()
        digests = [applied.adapter.digest for applied in request.adapters]
        demand = Demand(self.key(request), self.num_tokens(request))
        if not digests:
            return self.router.rank(demand, resident=self._engines)
        resident, near = set(), set()
        for name, engine in self._engines.items():
            known = engine.residencies()
            tiers = [known[digest].tier if digest in known else None for digest in digests]
            if all(tier == "device" for tier in tiers):
                resident.add(name)
            elif None not in tiers:
                near.add(name)
        return self.router.rank(
            demand, resident=resident, near=near, has_room=lambda name: self._fits(name, digests)
        )

    def _look(self) -> None:
        for name, engine in self._engines.items():
            self.router.set_ready(name, engine.is_ready)

    def _fits(self, name: str, digests: Sequence[str]) -> bool:
        """Whether the adapters fit on the engine's device beside all that is there; one of unknown
        size counts as the mean of those.
        """
        engine = self._engines[name]
        if engine.info is None:
            return False
        there = engine.residencies()
        sizes = [r.nbytes for r in there.values() if r.tier == "device" and r.nbytes]
        mean = sum(sizes) // len(sizes) if sizes else 0
        missing = [d for d in digests if d not in there or there[d].tier != "device"]
        known = [self._residencies.get(digest) for digest in missing]
        needed = sum(mean if found is None else found.nbytes or mean for found in known)
        return engine.stats().adapter_bytes_used + needed <= engine.info.adapter_bytes

    def key(self, request: Request) -> str:
        """What decides the request's home: its adapters, or how it begins when it has none."""
        if request.adapters:
            return key_of(applied.adapter.digest for applied in request.adapters)
        head = array("q", request.prompt_ids[:_NUM_AFFINE_TOKENS]).tobytes()
        salt = "\0".join(request.cache_salt).encode()
        return hashlib.blake2b(head + salt, digest_size=8).hexdigest()

    def num_tokens(self, request: Request) -> int:
        """Tokens that the request is expected to take."""
        return len(request.prompt_ids) + request.n * self.expected_output(request)

    def expected_output(self, request: Request) -> int:
        """Tokens of one of its sequences: what those before had, at most what it asks for."""
        if request.kind == "embed":
            return 0
        return min(request.sampling.max_tokens, max(round(self._typical_output), 1))

    def learn_output(self, num_tokens: float) -> None:
        """Take in how many tokens a sequence of a request that ended had."""
        self._typical_output += _GUESS_STEP * (num_tokens - self._typical_output)

    # ------------------------------------------------------------------ adapters
    async def prepare_adapter(self, adapter: AdapterId) -> Residency:
        """See EngineClient: at its home, or the next engine when that is down."""
        self._look()
        refusal = EngineUnavailable("no engine is ready; try again", retry_after_s=2)
        homes = self.router.homes(adapter.digest, len(self._engines))
        for engine in [self._engines[name] for name in homes]:  # some may leave meanwhile
            try:
                return await engine.prepare_adapter(adapter)
            except EngineUnavailable as error:
                refusal = error
        raise refusal

    async def load_adapter(self, adapter: AdapterId, *, is_pinned: bool) -> Residency:
        """See EngineClient: on every engine of its home set, which is one while nobody uses it;
        a pin is taken from all that have one, and from those that are down, which would restore it.
        """
        self._look()
        demand = Demand(adapter.digest)
        homes = self.router.homes(adapter.digest, self.router.num_homes(demand))
        if not homes:
            raise EngineUnavailable("no engine is ready; try again", retry_after_s=2)
        found = await asyncio.gather(
            *(self._engines[name].load_adapter(adapter, is_pinned=is_pinned) for name in homes)
        )
        for name, engine in list(self._engines.items()):
            there = engine.residencies().get(adapter.digest)
            may_pin = not engine.is_ready or (there is not None and there.is_pinned)
            if name not in homes and not is_pinned and may_pin:
                with contextlib.suppress(
                    EngineUnavailable
                ):  # it has forgotten the pin all the same
                    await engine.load_adapter(adapter, is_pinned=False)
        return self._residencies.get(adapter.digest) or found[0]

    async def unload_adapter(self, digest: str) -> None:
        """See EngineClient: on every engine."""
        await self._ask_all(lambda engine: engine.unload_adapter(digest))

    async def cancel_adapter(self, digest: str) -> int:
        """See EngineClient: on every engine."""
        return sum(await self._ask_all(lambda engine: engine.cancel_adapter(digest)))

    async def _ask_all(self, ask: Callable[[EngineClient], Awaitable[T]]) -> list[T]:
        """Ask every engine at once; one that is down holds nothing. Raises EngineUnavailable when
        all are, and whatever else one of them raises.
        """
        answers = await asyncio.gather(
            *(ask(engine) for engine in self._engines.values()), return_exceptions=True
        )
        found: list[T] = []
        down: EngineUnavailable | None = None
        for answer in answers:
            if isinstance(answer, EngineUnavailable):
                down = answer
            elif isinstance(answer, BaseException):
                raise answer
            else:
                found.append(answer)
        if not found and down is not None:
            raise down
        return found

    # ------------------------------------------------------------------ state
    def stats(self) -> EngineStats:
        """See EngineClient: the sum of all engines' newest."""
        return _sum([self._earlier, *(engine.stats() for engine in self._engines.values())])

    def residencies(self) -> Mapping[str, Residency]:
        """See EngineClient; `engines` of each says where it is."""
        return self._residencies


class _Attempt:
    """One request at one engine: what it adds to the load, and whether anybody has seen of it."""

    def __init__(self, fleet: EngineFleet, engine: str, request: Request) -> None:
        self._fleet = fleet
        self._engine = engine
        self._n = request.n
        self._key = fleet.key(request)
        num_tokens = fleet.num_tokens(request)
        self._remaining = Remaining(request, num_tokens)
        self._num_output = 0
        self.has_begun = False
        self.death: Failed | None = None  # the engine was gone before the request began
        fleet.router.change_load(engine, self._key, num_tokens)

    async def events(self, source: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        """Yield the engine's events; end where it dies before one beyond Started."""
        async with contextlib.aclosing(source) as events:
            async for event in events:
                if not self.has_begun and not isinstance(event, Started):
                    if isinstance(event, Failed) and event.code == EngineUnavailable.code:
                        self.death = event
                        return
                    self.has_begun = True
                if isinstance(event, Tokens):
                    self._num_output += len(event.token_ids)
                self._give(self._remaining.take(event))
                yield event

    def end(self) -> None:
        """Take what is left from the load; the length of what came is learnt from."""
        self._give(self._remaining.take_all())
        if self._num_output:
            self._fleet.learn_output(self._num_output / self._n)

    def _give(self, num_tokens: int) -> None:
        if num_tokens:
            self._fleet.router.change_load(self._engine, self._key, -num_tokens)


class _Residencies(Mapping[str, Residency]):
    """The engines' residencies as one, put together when they are looked at."""

    def __init__(self, engines: Mapping[str, EngineClient]) -> None:
        self._engines = engines

    def __getitem__(self, digest: str) -> Residency:
        found = [
            (name, residency)
            for name, engine in self._engines.items()
            if (residency := engine.residencies().get(digest)) is not None
        ]
        if not found:
            raise KeyError(digest)
        each = [residency for _, residency in found]
        return Residency(
            digest,
            max((r.tier for r in each), key=_TIERS.__getitem__),
            any(r.is_pinned for r in each),
            sum(r.num_leases for r in each),
            max(r.last_used for r in each),
            max(r.nbytes for r in each),
            tuple((name, residency.tier) for name, residency in found),
        )

    def __iter__(self) -> Iterator[str]:
        digests = (digest for e in self._engines.values() for digest in e.residencies())
        return iter(dict.fromkeys(digests))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _worse(
    refusal: EngineUnavailable | QueueFull | None, error: EngineUnavailable | QueueFull
) -> EngineUnavailable | QueueFull:
    """Of several engines' refusals the one to tell: a full queue says more than a dead engine."""
    return refusal if isinstance(refusal, QueueFull) else error


def _unlike(request: Request) -> Failed:
    return Failed(
        request.id,
        EngineUnavailable.code,
        "the engine has failed, and another one would not answer with the adapters that were "
        "announced; try again",
    )


def _later(request: Request, waited_s: float) -> Request:
    """The request with what is left of its time limits."""
    when_cold = request.when_cold
    if when_cold.wait_ms is not None:
        when_cold = replace(when_cold, wait_ms=max(when_cold.wait_ms - waited_s * 1e3, 0.0))
    timeout_s = request.timeout_s
    if timeout_s is not None:
        timeout_s = max(timeout_s - waited_s, 1e-3)
    return replace(request, timeout_s=timeout_s, when_cold=when_cold)


def _info(name: str, outcome: EngineInfo | BaseException) -> EngineInfo:
    """What an engine is, or why it could not start, with its name."""
    if isinstance(outcome, StartupError):
        raise StartupError(f"engine {name}: {outcome.message}") from outcome
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _together(infos: Sequence[EngineInfo]) -> EngineInfo:
    first = infos[0]
    if any(info.base.digest != first.base.digest for info in infos):
        raise StartupError("the engines have loaded different base models")
    return replace(
        first,
        base=replace(first.base, max_model_len=min(i.base.max_model_len for i in infos)),
        device=",".join(info.device for info in infos),
        num_pages=sum(info.num_pages for info in infos),
        max_num_seqs=sum(info.max_num_seqs for info in infos),
        max_waiting=sum(info.max_waiting for info in infos),
        max_adapters=sum(info.max_adapters for info in infos),
        adapter_bytes=sum(info.adapter_bytes for info in infos),
    )


def _sum(parts: Sequence[EngineStats]) -> EngineStats:
    counts = sum_counts(parts)
    routing: dict[str, tuple[float, ...]] = {}
    for part in parts:
        for digest, shares in part.routing.items():
            routing[digest] = _joined(routing.get(digest), shares)
    return replace(
        counts,
        num_running=sum(part.num_running for part in parts),
        num_waiting=sum(part.num_waiting for part in parts),
        num_used_pages=sum(part.num_used_pages for part in parts),
        num_cached_pages=sum(part.num_cached_pages for part in parts),
        num_pages=sum(part.num_pages for part in parts),
        adapter_bytes_used=sum(part.adapter_bytes_used for part in parts),
        waiting_digests=tuple(dict.fromkeys(d for part in parts for d in part.waiting_digests)),
        routing=routing,
    )


def _joined(one: tuple[float, ...] | None, other: tuple[float, ...]) -> tuple[float, ...]:
    """What an adapter routed on two engines: the rows added, the experts' parts by rows."""
    if one is None:
        return other
    rows = one[0] + other[0]
    parts = zip(one[1:], other[1:], strict=True)
    return (rows, *((a * one[0] + b * other[0]) / max(rows, 1.0) for a, b in parts))
