"""Server-sent events, and noticing that a caller has gone. Knows no wire formats."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from polyadapt.errors import PolyadaptError

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
_HEARTBEAT = b": heartbeat\n\n"
_encode = msgspec.json.Encoder().encode


def data_frame(payload: str) -> bytes:
    """Return one event; `payload` is JSON and therefore has no line break."""
    return b"data: " + payload.encode() + b"\n\n"


class FrameTemplate:
    """Events that differ in one string: made from the JSON of one whose `field` is empty.

    Writes the bytes that data_frame returns for the same JSON with another string there.
    """

    def __init__(self, payload: str, field: str) -> None:
        # Inside a JSON string the quotes would be escaped, so that this is the field itself.
        head, tail = payload.split(f'"{field}":""')
        self._head = f'data: {head}"{field}":'.encode()
        self._tail = f"{tail}\n\n".encode()

    def frame(self, text: str) -> bytes:
        """Return the event with `text` in its field."""
        return self._head + _encode(text) + self._tail


def error_frame(error: PolyadaptError) -> bytes:
    """Return the event that ends a failed stream; no [DONE] follows it."""
    return b"event: error\n" + data_frame(json.dumps(error.envelope()))


async def disconnected(receive: Receive) -> None:
    """Return when the caller has gone; the request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """Return what `work` returns; cancel it and raise ClientDisconnect when the caller has gone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await _end(task, gone)


class EventStream(Response):
    """A reply of server-sent events from `frames`, which is closed however the stream ends.

    A comment is sent when nothing was for `heartbeat_s`, so that proxies keep the connection. When
    the caller goes, `frames` is cancelled at once, also while it waits for its next event.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        *,
        heartbeat_s: float,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(
            headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        )
        del self.headers["content-length"]
        self._frames = frames
        self._heartbeat_s = heartbeat_s
        self._last_write = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        self._last_write = loop.time()
        writer = asyncio.create_task(self._write(send))
        gone = asyncio.create_task(disconnected(receive))
        beat = asyncio.create_task(self._beat(send))
        try:
            await asyncio.wait({writer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not writer.done():
                raise ClientDisconnect
            writer.result()
        finally:
            try:
                await _end(writer, gone, beat)
            finally:
                await self._frames.aclose()

    async def _write(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        async for frame in self._frames:
            await send({"type": "http.response.body", "body": frame, "more_body": True})
            self._last_write = loop.time()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _beat(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        while True:
            silent_s = loop.time() - self._last_write
            if silent_s >= self._heartbeat_s:
                await send({"type": "http.response.body", "body": _HEARTBEAT, "more_body": True})
                self._last_write = loop.time()
                continue
            await asyncio.sleep(self._heartbeat_s - silent_s)


async def _end(*tasks: asyncio.Future[Any]) -> None:
    """Cancel the tasks and wait until they have ended; whoever needs their errors has looked."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # seen, so that the loop does not report it again
