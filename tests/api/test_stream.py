"""Streams on a real socket: order, failures, heartbeats, and callers that go away."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from tests.api.conftest import Maker, Server, listening
from tests.support.fake_engine import FakeEngine

from polyadapt.errors import EngineUnavailable, NumericalError, PolyadaptError, QueueFull

pytestmark = pytest.mark.anyio

BODY = {"model": "poet", "messages": [{"role": "user", "content": "hi"}], "stream": True}
PLAIN = {**BODY, "stream": False}


async def raw_request(port: int, body: dict[str, Any]) -> tuple[Any, asyncio.StreamWriter]:
    """Send a chat request on a socket of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    payload = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    writer.write(head.encode() + payload)
    await writer.drain()
    return reader, writer


async def until_running(engine: FakeEngine, num: int = 1) -> None:
    while len(engine.running) != num:
        await asyncio.sleep(0.001)


async def test_a_stream_has_the_headers_that_proxies_need(server: Server) -> None:
    poet = await server.upload("poet")
    async with listening(server.app) as port, httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        async with client.stream("POST", url, json=BODY) as reply:
            assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert reply.headers["cache-control"] == "no-cache"
            assert reply.headers["x-accel-buffering"] == "no"
            assert reply.headers["x-adapter-digest"] == poet["digest"]
            assert "content-length" not in reply.headers
            text = "".join([part async for part in reply.aiter_text()])
    assert text.endswith("data: [DONE]\n\n")


async def test_text_is_sent_as_it_comes(server: Server) -> None:
    await server.upload("poet")
    server.engine.gate = asyncio.Semaphore(1)
    async with listening(server.app) as port, httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        seen = ""
        async with client.stream("POST", url, json=BODY) as reply:
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    seen += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                    # One more token only after the one before has arrived.
                    server.engine.gate.release()
        assert seen == "I am poet 0."


@pytest.mark.parametrize(
    ("error", "status"), [(QueueFull("full", retry_after_s=7), 429), (EngineUnavailable("x"), 503)]
)
@pytest.mark.parametrize("body", [BODY, PLAIN], ids=["stream", "whole"])
async def test_a_refusal_has_its_status_before_the_stream(
    server: Server, error: PolyadaptError, status: int, body: dict[str, Any]
) -> None:
    await server.upload("poet")
    server.engine.refusal = error
    reply = await server.client.post("/v1/chat/completions", json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, error.code)
    assert reply.headers["retry-after"] == str(error.retry_after_s)  # type: ignore[attr-defined]


async def test_a_failure_in_a_stream_is_an_error_event_and_no_done(server: Server) -> None:
    await server.upload("poet")
    server.engine.failure = (3, NumericalError.code, "non-finite logits")
    reply = await server.client.post("/v1/chat/completions", json=BODY)
    assert reply.status_code == 200
    events = reply.text.strip().split("\n\n")
    assert events[-1].startswith("event: error\ndata: ")
    error = json.loads(events[-1].partition("data: ")[2])["error"]
    assert error["code"] == "numerical_error"
    assert "[DONE]" not in reply.text
    assert "I a" in "".join(
        json.loads(event[6:])["choices"][0]["delta"].get("content", "") for event in events[:-1]
    )


async def test_a_failure_of_a_whole_reply_has_its_status(server: Server) -> None:
    await server.upload("poet")
    server.engine.failure = (3, NumericalError.code, "non-finite logits")
    reply = await server.client.post("/v1/chat/completions", json=PLAIN)
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "numerical_error")


async def test_a_bug_in_a_stream_is_a_closed_error_event(server: Server) -> None:
    await server.upload("poet")
    server.engine.crash = RuntimeError("secret")
    reply = await server.client.post("/v1/chat/completions", json=BODY)
    assert reply.text.count("event: error") == 1
    assert "internal_error" in reply.text
    assert "secret" not in reply.text


async def test_a_silent_stream_has_heartbeats(make_server: Maker) -> None:
    server = await make_server(heartbeat_s=0.05)
    server.engine.gate = asyncio.Semaphore(0)
    async with listening(server.app) as port:
        reader, writer = await raw_request(port, {**BODY, "model": "fake-base"})
        received = b""
        while received.count(b": heartbeat\n\n") < 2:
            received += await reader.read(4096)
        assert b"200 OK" in received
        for _ in range(50):
            server.engine.gate.release()
        while b"[DONE]" not in received:
            received += await reader.read(4096)
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("num_steps", [0, 1, 5])
@pytest.mark.parametrize("body", [BODY, PLAIN], ids=["stream", "whole"])
@pytest.mark.parametrize("n", [1, 2])
async def test_a_caller_that_goes_away_is_cancelled(
    server: Server,
    caplog: pytest.LogCaptureFixture,
    num_steps: int,
    body: dict[str, Any],
    n: int,
) -> None:
    poet = await server.upload("poet")
    server.engine.gate = asyncio.Semaphore(num_steps)
    async with listening(server.app) as port:
        reader, writer = await raw_request(port, {**body, "n": n})
        await until_running(server.engine)
        if num_steps > 1 and body is BODY:
            await reader.read(100)
        writer.transport.abort()
        await server.engine.until_idle()
    assert len(server.engine.cancelled) == 1
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]
    services = server.app.state.services
    assert services.lifecycle.num_open == 0
    digest = poet["digest"]
    (adapter,) = services.directory.ids_of(digest)
    assert services.directory.num_uses(adapter) == 0


async def test_a_caller_that_stops_reading_politely_is_cancelled_too(server: Server) -> None:
    await server.upload("poet")
    server.engine.gate = asyncio.Semaphore(3)
    async with listening(server.app) as port, httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        async with client.stream("POST", url, json=BODY) as reply:
            await anext(reply.aiter_raw())
        await server.engine.until_idle()
    assert len(server.engine.cancelled) == 1


async def test_a_finished_stream_cancels_nothing(server: Server) -> None:
    await server.upload("poet")
    async with listening(server.app) as port, httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        for _ in range(5):
            assert (await client.post(url, json=BODY)).text.endswith("[DONE]\n\n")
    assert server.engine.cancelled == []


async def test_an_upload_that_is_cut_off_leaves_nothing(server: Server) -> None:
    async with listening(server.app) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        part = (
            b'--B\r\nContent-Disposition: form-data; name="name"\r\n\r\npoet\r\n--B\r\n'
            b'Content-Disposition: form-data; name="files"; filename="adapter_config.json"'
            b"\r\n\r\n{}"
        )
        writer.write(
            b"POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
            b"Content-Type: multipart/form-data; boundary=B\r\n\r\n" + part
        )
        await writer.drain()
        lifecycle = server.app.state.services.lifecycle
        while lifecycle.num_open == 0:
            await asyncio.sleep(0.001)
        writer.transport.abort()
        while lifecycle.num_open:
            await asyncio.sleep(0.001)
    assert (await server.client.get("/v1/adapters")).json()["data"] == []
    assert list((server.config.store_dir / "staging").iterdir()) == []


async def test_many_streams_at_once_keep_to_themselves(server: Server) -> None:
    names = ["poet", "chef", "clerk"]
    for name in names:
        await server.upload(name)

    async def ask(client: httpx.AsyncClient, url: str, name: str) -> str:
        text = ""
        async with client.stream("POST", url, json={**BODY, "model": name}) as reply:
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        return text

    async with listening(server.app) as port, httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        wanted = names * 8
        texts = await asyncio.gather(*(ask(client, url, name) for name in wanted))
    assert texts == [f"I am {name} 0." for name in wanted]
