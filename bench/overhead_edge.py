"""What the edge costs a token: from an engine's message to the bytes of a server-sent event.

The real application, streams, wire format and tokenizer; no model and no sockets. Every step is
one message with one token of each stream, as the engine process sends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from polyadapt.app import build_app
from polyadapt.config import load_config
from polyadapt.engine import wire
from polyadapt.engine.output import Cancel, Command, StepOutput, Submit
from polyadapt.engine.streams import Streams
from polyadapt.tasks.detokenizer import Detokenizer
from polyadapt.tasks.tokenizer import Tokenizer
from polyadapt.types import (
    AdapterId,
    BaseSpec,
    EngineInfo,
    EngineStats,
    Event,
    Finished,
    Request,
    Residency,
    Started,
    Tokens,
)
from polyadapt_store.manifest import ValidationReport
from polyadapt_store.store import AdapterStore

TEXT = (
    "The quick brown fox jumps over the lazy dog, 42 times a day; "
    'it said: "naïve café — 東京 🙂", and\nthen {"a": [1, 2.5]} \\ went on. '
)
NUM_WARM = 10


@dataclass(frozen=True, slots=True)
class EdgeCost:
    """CPU microseconds per token over one path, of this process."""

    path: str
    encode_us: float  # the engine's side: events to a message
    edge_us: float  # everything after: message to bytes
    num_tokens: int


class Wired:
    """An EngineClient whose engine is this file: real streams, real messages."""

    def __init__(self, info: EngineInfo) -> None:
        self._model = info
        self._streams = Streams(self._send)
        self._streams.capacity = 1 << 20
        self.requests: list[Request] = []
        self.num_cancelled = 0
        self.info: EngineInfo | None = None
        self.is_ready = True
        self.is_alive = True
        self.num_restarts = 0

    async def start(self) -> EngineInfo:
        self.info = self._model
        return self._model

    async def stop(self) -> None:
        return None

    def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        return self._streams.submit(request)

    async def prepare_adapter(self, adapter: AdapterId) -> Residency:
        raise NotImplementedError("the bench has no adapters")

    async def load_adapter(self, adapter: AdapterId, *, is_pinned: bool) -> Residency:
        raise NotImplementedError("the bench has no adapters")

    async def unload_adapter(self, digest: str) -> None:
        raise NotImplementedError("the bench has no adapters")

    async def cancel_adapter(self, digest: str) -> int:
        raise NotImplementedError("the bench has no adapters")

    def stats(self) -> EngineStats:
        return self._streams.stats

    def residencies(self) -> dict[str, Residency]:
        """See EngineClient."""
        return self._streams.residencies

    def deliver(self, message: bytes) -> None:
        """Take one message as EngineProcess takes it from its socket."""
        output = wire.decode_output(message)
        assert isinstance(output, StepOutput)
        self._streams.absorb(output)

    def _send(self, command: Command) -> None:
        command = wire.decode_command(wire.encode_command(command))
        if isinstance(command, Submit):
            self.requests.append(command.request)
        self.num_cancelled += isinstance(command, Cancel)


@dataclass(slots=True)
class Sink:
    """Counts what one caller is sent."""

    num_frames: int = 0
    last: bytes = b""
    body: list[bytes] = field(default_factory=list)

    def take(self, data: bytes) -> None:
        self.num_frames += data.count(b"data: ")
        self.body.append(data)


def measure_edge(model_dir: Path, num_streams: int, num_steps: int) -> list[EdgeCost]:
    """Measure the application alone, and below uvicorn's HTTP protocol."""
    return asyncio.run(_measure(model_dir, num_streams, num_steps))


async def _measure(model_dir: Path, num_streams: int, num_steps: int) -> list[EdgeCost]:
    tokenizer = Tokenizer.load(model_dir)
    ids = _ids(tokenizer, num_steps + NUM_WARM)
    costs = []
    with tempfile.TemporaryDirectory(prefix="polyadapt-bench-") as scratch:
        for path, opened in (("application", _in_process), ("application + HTTP/1.1", _in_http)):
            async with _app(Path(scratch) / path.replace("/", "-"), tokenizer) as (app, engine):
                sinks = [Sink() for _ in range(num_streams)]
                async with opened(app, sinks):
                    costs.append(await _drive(path, engine, tokenizer, sinks, ids))
    return costs


async def _drive(
    path: str, engine: Wired, tokenizer: Tokenizer, sinks: list[Sink], ids: list[int]
) -> EdgeCost:
    """Feed every stream `ids`, one a step; the first steps are not counted."""
    while len(engine.requests) < len(sinks):
        await asyncio.sleep(0)
    names = [request.id for request in engine.requests]
    engine.deliver(wire.encode_output(StepOutput([Started(name) for name in names])))
    frames_after = _frames_after(tokenizer, ids)
    await _until_sent(sinks, 1)  # every stream begins with its role
    encode_s = edge_s = 0.0
    for step, token_id in enumerate(ids):
        is_last = step == len(ids) - 1
        events: list[Event] = [
            Tokens(name, 0, (token_id,), (), "length" if is_last else None) for name in names
        ]
        if is_last:
            events += [Finished(name) for name in names]
        began = time.process_time()
        message = wire.encode_output(StepOutput(events, num_rows=len(names)))
        encoded = time.process_time()
        engine.deliver(message)
        await _until_sent(sinks, frames_after[step])
        if step >= NUM_WARM:
            encode_s += encoded - began
            edge_s += time.process_time() - encoded
    _check(sinks, tokenizer.decode(ids))
    num_tokens = len(sinks) * (len(ids) - NUM_WARM)
    return EdgeCost(
        path, round(1e6 * encode_s / num_tokens, 2), round(1e6 * edge_s / num_tokens, 2), num_tokens
    )


async def _until_sent(sinks: list[Sink], num_frames: int) -> None:
    # Two rounds more than needed at least: streams without news in this step take theirs too.
    for _ in range(2):
        await asyncio.sleep(0)
    while any(sink.num_frames < num_frames for sink in reversed(sinks)):
        await asyncio.sleep(0)


def _frames_after(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Return how many frames a stream has had after each token; half a character has none."""
    detokenizer = Detokenizer(tokenizer)
    frames, found = 1, []
    for token_id in ids[:-1]:
        frames += bool(detokenizer.push(token_id))
        found.append(frames)
    return [*found, frames + 2]  # the last token, with its finish reason, and [DONE]


def _check(sinks: list[Sink], text: str) -> None:
    """Raise when a stream's text is not what its tokens say."""
    for sink in sinks:
        parts = b"".join(sink.body).split(b"data: ")[1:]
        chunks = [json.loads(part[: part.index(b"\n\n")]) for part in parts[:-1]]
        said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        if said != text:
            raise RuntimeError(f"a stream said {said!r} instead of {text!r}")


def _ids(tokenizer: Tokenizer, count: int) -> list[int]:
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    return (ids * (count // len(ids) + 1))[:count]


@contextlib.asynccontextmanager
async def _app(home: Path, tokenizer: Tokenizer) -> AsyncIterator[tuple[FastAPI, Wired]]:
    config = load_config({"home": home}, environ={})
    engine = Wired(_info(tokenizer))
    with AdapterStore(config.store_dir, _no_adapters) as store:
        app = build_app(config, engine, store, tokenizer)
        async with app.router.lifespan_context(app):
            yield app, engine


def _no_adapters(directory: Path) -> ValidationReport:
    raise NotImplementedError("the bench registers no adapters")


def _info(tokenizer: Tokenizer) -> EngineInfo:
    spec = BaseSpec(
        name="bench", digest="sha256:" + "b" * 64, architecture="LlamaForCausalLM",
        vocab_size=tokenizer.vocab_size, max_model_len=8192, is_tied=True,
        embedding_path="embed", head_path="head", sites=(),
    )  # fmt: skip
    return EngineInfo(
        base=spec, eos_token_ids=(2,), device="cpu", dtype="float32", num_pages=1 << 20,
        page_size=16, max_num_seqs=1 << 20, max_waiting=0, adapter_bytes=0, strategy="none",
    )  # fmt: skip


_BODY = json.dumps(
    {"model": "bench", "messages": [{"role": "user", "content": "hi"}], "stream": True}
).encode()


@contextlib.asynccontextmanager
async def _in_process(app: FastAPI, sinks: list[Sink]) -> AsyncIterator[None]:
    """Call the application as an ASGI server would, without HTTP."""
    tasks = [asyncio.create_task(_call(app, sink)) for sink in sinks]
    yield
    await asyncio.gather(*tasks)


async def _call(app: FastAPI, sink: Sink) -> None:
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions",
        "query_string": b"", "root_path": "", "client": ("127.0.0.1", 1), "server": ("x", 80),
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    }  # fmt: skip
    has_body = False
    never = asyncio.Event()

    async def receive() -> dict[str, Any]:
        nonlocal has_body
        if has_body:
            await never.wait()
        has_body = True
        return {"type": "http.request", "body": _BODY, "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            sink.take(message["body"])

    await app(scope, receive, send)


class _Transport(asyncio.Transport):
    """A connection that writes into a sink."""

    def __init__(self, sink: Sink) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 80)})
        self._sink = sink
        self._is_closing = False

    def write(self, data: Any) -> None:
        self._sink.take(bytes(data))

    def is_closing(self) -> bool:
        return self._is_closing

    def close(self) -> None:
        self._is_closing = True

    def pause_reading(self) -> None:
        return None

    def resume_reading(self) -> None:
        return None


@contextlib.asynccontextmanager
async def _in_http(app: FastAPI, sinks: list[Sink]) -> AsyncIterator[None]:
    """Speak HTTP/1.1 with the application through uvicorn's protocol."""
    config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False)
    config.load()
    state = ServerState()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(_BODY)}\r\n\r\n"
    )
    for sink in sinks:
        protocol = H11Protocol(config, state, {})
        protocol.connection_made(_Transport(sink))
        protocol.data_received(head.encode() + _BODY)
    yield
    await asyncio.gather(*state.tasks)
