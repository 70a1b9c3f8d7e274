"""Engine replicas as one EngineClient: an EngineFleet whose members come and go with Ray's.

Torch-free. Knows of Ray the handle alone, so that its tests need none: see Calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Protocol

from polyadapt.engine import wire
from polyadapt.engine.fleet import EngineFleet
from polyadapt.engine.output import Call, CallName, Reply, StepOutput, Submit
from polyadapt.engine.routing import RoutingPolicy
from polyadapt.errors import (
    AdapterRejected,
    EngineUnavailable,
    PolyadaptError,
    Problem,
    StartupError,
    by_code,
)
from polyadapt.ray_serve.board import Board, Statement
from polyadapt.types import (
    AdapterId,
    EngineInfo,
    EngineStats,
    Event,
    Failed,
    Finished,
    Request,
    Residency,
)

logger = logging.getLogger(__name__)

# A replica answers at once that it has a request; one that does not is not there.
_ACKNOWLEDGE_S = 10.0
_START_S = 1800.0  # for the first replica: it may have to fetch and load the model


class Calls(Protocol):
    """How replicas are reached; messages are engine/wire.py's. Raises ReplicaGone."""

    async def describe(self, replica: str) -> bytes: ...

    async def call(self, replica: str, message: bytes) -> bytes: ...

    def submit(
        self, replica: str, message: bytes, edge: str, num_tokens: int
    ) -> AsyncGenerator[bytes, None]:
        """Closing it early cancels the request."""
        ...


class ReplicaGone(Exception):
    """The replica, or the way to it, has failed."""


class ReplicaEngine:
    """One engine replica as an EngineClient; owned by its RayFleet."""

    def __init__(
        self, name: str, calls: Calls, edge: str, num_tokens: Callable[[Request], int]
    ) -> None:
        self._name = name
        self._calls = calls
        self._edge = edge
        self._num_tokens = num_tokens
        self._residencies: dict[str, Residency] = {}
        self._statement = Statement()
        self.info: EngineInfo | None = None

    def take(self, statement: Statement) -> None:
        """Have this statement as the newest."""
        if statement is not self._statement:
            self._statement = statement
            self._residencies = {each.digest: each for each in statement.residencies}

    @property
    def is_ready(self) -> bool:
        """See EngineClient; as last stated."""
        return self.info is not None and self._statement.is_ready

    @property
    def is_alive(self) -> bool:
        """See EngineClient; as last stated."""
        return self._statement.is_alive

    @property
    def num_restarts(self) -> int:
        """See EngineClient: of the replica's own supervisor."""
        return self._statement.num_restarts

    async def start(self) -> EngineInfo:
        """Ask what it is; the engine was started by Ray. Raises StartupError."""
        try:
            info = _message(await self._calls.describe(self._name))
        except (ReplicaGone, EngineUnavailable) as error:
            raise StartupError(f"the replica does not say what it serves: {error}") from None
        assert isinstance(info, EngineInfo)
        self.info = info
        return info

    async def stop(self) -> None:
        """Do nothing: replicas are Ray's to end."""

    async def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        """See EngineClient. A replica that dies is an engine that dies."""
        message = wire.encode_command(Submit(request))
        messages = self._calls.submit(self._name, message, self._edge, self._num_tokens(request))
        async with contextlib.aclosing(messages):
            try:
                async with asyncio.timeout(_ACKNOWLEDGE_S):
                    first = await anext(messages)
            except (ReplicaGone, TimeoutError, StopAsyncIteration) as error:
                raise EngineUnavailable(f"replica {self._name} is gone ({error!r})") from None
            _message(first)
            try:
                async for each in messages:
                    output = _message(each)
                    assert isinstance(output, StepOutput)
                    for event in output.events:
                        yield event
                        if isinstance(event, (Finished, Failed)):
                            return
                reason = "it ended early"
            except ReplicaGone as error:
                reason = str(error)
            logger.warning("request %s: replica %s failed: %s", request.id, self._name, reason)
            yield Failed(request.id, EngineUnavailable.code, "the engine has failed; try again")

    async def prepare_adapter(self, adapter: AdapterId) -> Residency:
        """See EngineClient."""
        return _residency(await self._call("prepare", adapter.digest))

    async def load_adapter(self, adapter: AdapterId, *, is_pinned: bool) -> Residency:
        """See EngineClient."""
        return _residency(await self._call("load", adapter.digest, is_pinned=is_pinned))

    async def unload_adapter(self, digest: str) -> None:
        """See EngineClient."""
        await self._call("unload", digest)

    async def cancel_adapter(self, digest: str) -> int:
        """See EngineClient."""
        return (await self._call("cancel_adapter", digest)).count

    def stats(self) -> EngineStats:
        """See EngineClient; as last stated."""
        return self._statement.stats

    def residencies(self) -> Mapping[str, Residency]:
        """See EngineClient; as last stated."""
        return self._residencies

    async def _call(self, name: CallName, digest: str, *, is_pinned: bool = False) -> Reply:
        message = wire.encode_command(Call(0, name, digest, is_pinned))
        try:
            output = _message(await self._calls.call(self._name, message))
        except ReplicaGone as error:
            raise EngineUnavailable(f"replica {self._name} is gone ({error})") from None
        assert isinstance(output, StepOutput)
        (reply,) = output.replies
        return reply


class RayFleet(EngineFleet):
    """An EngineFleet of the replicas that the board shows.

    Loads are what this edge has sent, and what the replica states that other edges have sent. k of
    a home set grows with this edge's own requests.
    """

    def __init__(
        self, calls: Calls, board: Board, edge: str, policy: RoutingPolicy | None = None
    ) -> None:
        """edge: this one's name among all that send to the replicas."""
        super().__init__({}, policy, may_grow=True)
        self._calls = calls
        self._edge = edge
        self._board = board
        self._foreign: dict[str, int] = {}  # of a replica's load, what other edges sent
        self._joining: dict[str, asyncio.Task[None]] = {}
        self._has_changed = asyncio.Event()

    async def start(self) -> EngineInfo:
        """Wait for the first replica; the others join as they come. Raises StartupError."""
        self._board.listen(self._follow)
        try:
            async with asyncio.timeout(_START_S):
                await self._calls.describe("")  # Ray makes its router at the first call
                self._follow()
                while self.info is None:
                    self._has_changed.clear()
                    await self._has_changed.wait()
        except (TimeoutError, ReplicaGone) as error:
            await self.stop()
            raise StartupError(
                f"no engine replica is there within {_START_S:g} s ({error!r}); `serve status` and "
                "Ray's logs say why"
            ) from None
        return self.info

    async def stop(self) -> None:
        """Follow the replicas no more; what is running goes on until its caller leaves."""
        self._is_stopping = True
        self._board.listen(None)
        tasks = list(self._joining.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _follow(self) -> None:
        """Bring the members to what the board shows."""
        statements = self._board.statements
        for name in self._engines.keys() - statements.keys():
            logger.warning("engine replica %s has left", name)
            self._foreign.pop(name, None)
            self.leave(name)
        for name, statement in statements.items():
            member = self._engines.get(name)
            if member is not None:
                assert isinstance(member, ReplicaEngine)
                member.take(statement)
                self._take_loads(name, statement.loads)
            elif name not in self._joining and not self._is_stopping:
                task = asyncio.create_task(self._join(name), name=f"join-{name}")
                self._joining[name] = task
        self._has_changed.set()

    async def _join(self, name: str) -> None:
        try:
            member = ReplicaEngine(name, self._calls, self._edge, self.num_tokens)
            await member.start()
            if name in self._board.statements:  # not gone meanwhile
                self.join(name, member)
                logger.info("engine replica %s has joined", name)
        except (StartupError, PolyadaptError) as error:
            logger.warning("engine replica %s has not joined: %s", name, error)
            await asyncio.sleep(1.0)  # and is tried again at the next statement
        finally:
            del self._joining[name]
            self._has_changed.set()
        if name in self._board.statements:
            self._follow()

    def _take_loads(self, name: str, loads: Mapping[str, int]) -> None:
        own = self.router.load(name) - self._foreign.get(name, 0)
        self._foreign[name] = sum(load for edge, load in loads.items() if edge != self._edge)
        self.router.set_load(name, own + self._foreign[name])


def _message(message: bytes) -> StepOutput | EngineInfo:
    """Decode what a replica sent; raises the error that it carries."""
    output = wire.decode_output(message)
    assert not isinstance(output, str)
    if isinstance(output, StepOutput):
        for reply in output.replies:
            if reply.error_code == AdapterRejected.code:
                raise AdapterRejected([Problem(*problem) for problem in reply.problems])
            if reply.error_code is not None:
                raise by_code(reply.error_code, reply.error_message)
    return output


def _residency(reply: Reply) -> Residency:
    assert reply.residency is not None, "a reply without an error says where the adapter is"
    return reply.residency
