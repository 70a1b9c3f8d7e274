"""The log line of a request: who was served with what, in what time, and nothing that was said."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator

import pytest
from tests.api.conftest import Maker, Server

from polyadapt.logs import JsonFormatter, TextFormatter

pytestmark = pytest.mark.anyio

CANARY = "canary-93c1"
KEY = "sk-operator-canary-77"
CHAT = {"messages": [{"role": "user", "content": CANARY}], "stop": ["stop-" + CANARY]}


class Lines(logging.Handler):
    """Formats every line of ours while the task that writes it runs, as a stream does."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@contextlib.contextmanager
def collected(formatter: logging.Formatter) -> Iterator[Lines]:
    handler = Lines(formatter)
    logger = logging.getLogger("polyadapt")
    before = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.fixture
def as_json() -> Iterator[Lines]:
    with collected(JsonFormatter("edge")) as lines:
        yield lines


@pytest.fixture(params=[JsonFormatter("edge"), TextFormatter()], ids=["json", "text"])
def lines(request: pytest.FixtureRequest) -> Iterator[Lines]:
    with collected(request.param) as lines:
        yield lines


async def test_a_request_has_one_line_with_its_adapters_tokens_and_times(
    server: Server, as_json: Lines
) -> None:
    await server.upload("poet")
    as_json.lines.clear()
    body = {**CHAT, "model": "poet", "stream": True}
    await server.client.post("/v1/chat/completions", json=body, headers={"x-request-id": "r-9"})
    found = [json.loads(line) for line in as_json.lines]
    assert {line["request_id"] for line in found} == {"r-9"}, "lines of one request share its id"
    (line,) = [line for line in found if line["logger"] == "polyadapt.api.middleware"]
    assert line["message"] == "POST /v1/chat/completions 200"
    assert line["adapters"] == ["poet@1"]
    assert line["generated_tokens"] == len("I am poet 0.") + 1
    assert line["prompt_tokens"] > len(CANARY)
    assert line["cached_tokens"] == 0
    assert 0 <= line["queue_ms"] <= line["first_token_ms"] <= line["duration_ms"]
    assert line["tenant"] == "default"


async def test_other_requests_have_no_tokens_in_their_line(server: Server, as_json: Lines) -> None:
    await server.client.get("/health")
    (line,) = map(json.loads, as_json.lines)
    assert line["message"] == "GET /health 200"
    assert "generated_tokens" not in line
    assert "tenant" not in line


async def test_nothing_that_was_said_and_no_key_is_in_any_line(
    make_server: Maker, lines: Lines
) -> None:
    server = await make_server(api_key=KEY)
    headers = {"authorization": f"Bearer {KEY}"}
    for body, key in (
        ({**CHAT, "model": "fake-base"}, headers),
        ({**CHAT, "model": "fake-base", "stream": True}, headers),
        ({**CHAT, "model": "fake-base", "n": -1}, headers),
        ({**CHAT, "model": "unknown"}, headers),
        ({**CHAT, "model": "fake-base"}, {"authorization": f"Bearer {KEY}x"}),
    ):
        await server.client.post("/v1/chat/completions", json=body, headers=key)
    server.engine.failure = (1, "numerical_error", "x")
    await server.client.post("/v1/chat/completions", json=CHAT | {"model": "auto"}, headers=headers)
    made = await server.client.post("/v1/keys", json={"scopes": ["infer"]}, headers=headers)
    text = "\n".join(lines.lines)
    assert len(lines.lines) > 6
    assert CANARY not in text
    assert KEY not in text
    assert made.json()["secret"] not in text


async def test_a_method_is_no_way_to_write_a_line(server: Server, lines: Lines) -> None:
    await server.client.request("X%0aINFO", "/health")
    (line,) = lines.lines
    assert "X%" not in line
