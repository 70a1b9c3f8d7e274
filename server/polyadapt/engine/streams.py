"""The edge's half of an engine: who waits for which events, and how many may wait. Torch-free.

Both EngineClients use it; everything runs on the edge's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace

from polyadapt.engine.output import Call, CallName, Cancel, Command, Reply, StepOutput, Submit
from polyadapt.engine.stats import sum_counts
from polyadapt.errors import (
    AdapterRejected,
    EngineUnavailable,
    PolyadaptError,
    Problem,
    QueueFull,
    by_code,
)
from polyadapt.types import EngineStats, Event, Failed, Finished, Request, Residency


class Streams:
    """Routes an engine's output to the callers; `send` hands a command to the engine."""

    def __init__(self, send: Callable[[Command], None]) -> None:
        self._send = send
        self._events: dict[str, _Mailbox] = {}
        self._num_sequences: dict[str, int] = {}
        self._replies: dict[int, asyncio.Future[Reply]] = {}
        self._call_ids = itertools.count(1)
        self.capacity = 0  # sequences that may run and wait; set when the engine is ready
        self._stats = EngineStats()
        self._earlier: EngineStats | None = None  # what engines that are gone had counted
        self.residencies: dict[str, Residency] = {}  # by digest; the engine tells what changes

    @property
    def is_busy(self) -> bool:
        """Whether anybody waits for the engine."""
        return bool(self._events or self._replies)

    @property
    def stats(self) -> EngineStats:
        """The newest snapshot, its counts on top of those of the engines before."""
        if self._earlier is None:
            return self._stats
        total = sum_counts([self._earlier, self._stats])
        return replace(
            self._stats,
            num_steps=total.num_steps,
            counters=total.counters,
            steps_by_adapters=total.steps_by_adapters,
            steps_by_rows=total.steps_by_rows,
            load_seconds=total.load_seconds,
        )

    async def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        """Send the request and yield its events; leaving early cancels it."""
        taken = sum(self._num_sequences.values())
        if taken + request.n > self.capacity:
            raise QueueFull(
                f"{taken} sequences are running or waiting and {request.n} more would exceed the "
                f"limit of {self.capacity}; try again later"
            )
        mailbox = _Mailbox()
        self._events[request.id] = mailbox
        self._num_sequences[request.id] = request.n
        is_over = False
        try:
            self._send(Submit(request))
            while not is_over:
                if not mailbox.events:
                    await mailbox.filled()
                event = mailbox.events.popleft()
                # Set before the yield: a caller that stops at the last event cancels nothing.
                is_over = isinstance(event, (Finished, Failed))
                yield event
        finally:
            del self._events[request.id]
            del self._num_sequences[request.id]
            if not is_over:
                with contextlib.suppress(EngineUnavailable):  # then there is nothing to cancel
                    self._send(Cancel(request.id))

    async def prepare(self, digest: str) -> Residency:
        """Have the adapter read into host memory; raises what its reading raised."""
        return _residency(await self._call("prepare", digest))

    async def load(self, digest: str, *, is_pinned: bool) -> Residency:
        """Have the adapter brought to the device and its pin set."""
        return _residency(await self._call("load", digest, is_pinned=is_pinned))

    async def unload(self, digest: str) -> None:
        """Have every tier released, once no running request uses the digest."""
        await self._call("unload", digest)

    async def cancel_adapter(self, digest: str) -> int:
        """Have every request that uses the digest failed; returns their number."""
        return (await self._call("cancel_adapter", digest)).count

    def absorb(self, output: StepOutput) -> None:
        """Hand a step's events and replies to whoever waits; late ones for the gone are dropped."""
        mailboxes = self._events
        for event in output.events:
            mailbox = mailboxes.get(event.request_id)
            if mailbox is not None:
                mailbox.put(event)
        for reply in output.replies:
            future = self._replies.get(reply.id)
            if future is not None and not future.done():
                future.set_result(reply)
        for residency in output.residencies:
            self.residencies[residency.digest] = residency
        for digest in output.gone:
            self.residencies.pop(digest, None)
        if output.stats is not None:
            self._stats = output.stats

    def fail_all(self, error: EngineUnavailable) -> None:
        """End every request and call with the error, because the engine is gone."""
        self._earlier, self._stats = sum_counts([self.stats]), EngineStats()
        self.residencies.clear()
        for request_id, mailbox in self._events.items():
            mailbox.put(Failed(request_id, error.code, error.message))
        for future in self._replies.values():
            if not future.done():
                future.set_exception(EngineUnavailable(error.message))

    async def _call(self, name: CallName, digest: str, *, is_pinned: bool = False) -> Reply:
        """Send a command and wait for its reply; raises the error that it carries."""
        call_id = next(self._call_ids)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._replies[call_id] = future
        try:
            self._send(Call(call_id, name, digest, is_pinned))
            reply = await future
        finally:
            del self._replies[call_id]
        if reply.error_code is not None:
            raise _error(reply)
        return reply


class _Mailbox:
    """One request's events that nobody has read yet; has one reader.

    A reader is woken once for all that has come: asyncio.Queue does more for every token.
    """

    __slots__ = ("_waiter", "events")

    def __init__(self) -> None:
        self.events: deque[Event] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: Event) -> None:
        """Add an event and wake the reader."""
        self.events.append(event)
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def filled(self) -> None:
        """Return when there is an event."""
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter


def _residency(reply: Reply) -> Residency:
    assert reply.residency is not None, "a reply without an error says where the adapter is"
    return reply.residency


def _error(reply: Reply) -> PolyadaptError:
    if reply.error_code == AdapterRejected.code:
        return AdapterRejected([Problem(*problem) for problem in reply.problems])
    assert reply.error_code is not None
    return by_code(reply.error_code, reply.error_message)
