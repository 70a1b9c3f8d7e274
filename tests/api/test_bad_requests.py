"""Everything that is wrong is a 4xx that names the field, quickly, and reaches no engine."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.api.conftest import Maker, Server

from polyadapt.api.schemas.base import ErrorReply

pytestmark = pytest.mark.anyio

CHAT = {"model": "fake-base", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "fake-base", "prompt": "hi"}
NUMBERS: list[Any] = [-(2**63), 2**63, 10**400, float("nan"), float("inf"), True, "7", [], {}]
INTEGERS: list[Any] = [*NUMBERS, 1.5, 2**31]

WRONG_CHAT: list[tuple[dict[str, Any], str, str]] = [
    ({"model": ""}, "invalid_request", "model"),
    ({"model": "x" * 500}, "invalid_request", "model"),
    ({"model": 5}, "invalid_request", "model"),
    ({"model": "nobody"}, "model_not_found", "model"),
    ({"model": "../../etc/passwd"}, "model_not_found", "model"),
    ({"messages": []}, "invalid_request", "messages"),
    ({"messages": "hi"}, "invalid_request", "messages"),
    ({"messages": [{}]}, "invalid_request", "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "invalid_request", "messages"),
    ({"messages": [{"role": "king", "content": ""}]}, "invalid_request", "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "unsupported_field", "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "invalid_request", "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "unsupported_field",
        "messages[0].content",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
        "invalid_request",
        "messages[0].content",
    ),
    (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
        "unsupported_field",
        "messages[0].tool_calls",
    ),
    (
        {"messages": [{"role": "user", "content": "x", "mood": 1}]},
        "unsupported_field",
        "messages[0].mood",
    ),
    ({"surprise": 1}, "unsupported_field", "surprise"),
    ({"surprise": None}, "unsupported_field", "surprise"),
    ({"echo": True}, "unsupported_field", "echo"),
    ({"tools": [{"type": "function"}]}, "unsupported_field", "tools"),
    ({"tool_choice": "auto"}, "unsupported_field", "tool_choice"),
    ({"functions": [{}]}, "unsupported_field", "functions"),
    ({"response_format": {"type": "json_object"}}, "unsupported_field", "response_format"),
    ({"modalities": ["audio"]}, "unsupported_field", "modalities"),
    ({"audio": {"voice": "x"}}, "unsupported_field", "audio"),
    ({"store": True}, "unsupported_field", "store"),
    ({"service_tier": "flex"}, "unsupported_field", "service_tier"),
    ({"on_cold": "never"}, "invalid_request", "on_cold"),
    ({"on_cold": "fallback:"}, "invalid_request", "on_cold"),
    ({"on_cold": "base "}, "invalid_request", "on_cold"),
    ({"cold_timeout_ms": -1}, "invalid_request", "cold_timeout_ms"),
    ({"cold_timeout_ms": 1.5}, "invalid_request", "cold_timeout_ms"),
    ({"adapters": [{"name": name} for name in "abcde"]}, "invalid_request", "adapters"),
    ({"adapters": [{"name": "a", "weight": 1}]}, "unsupported_field", "adapters[0].weight"),
    ({"adapters": [{"name": "a", "rank": 0}]}, "invalid_request", "adapters[0].rank"),
    ({"adapters": [{"name": "nobody"}]}, "model_not_found", "adapters[0].name"),
    *(
        (
            {"adapters": [{"name": "a", "options": {"x": value}}]},
            "invalid_request",
            "adapters[0].options.x",
        )
        for value in ({}, [1], [["a"]], [None], 2**63, 1e999, "x" * 257, ["x"] * 257)
    ),
    *(
        (
            {"adapters": [{"name": "a", "options": options}]},
            "invalid_request",
            "adapters[0].options",
        )
        for options in ({"": 1}, {"a.b": 1}, {"x" * 65: 1}, {f"x{i}": 1 for i in range(17)}, [])
    ),
    ({"adapters": [{"name": "a", "scale": 1e9}]}, "invalid_request", "adapters[0].scale"),
    ({"adapters": "a"}, "invalid_request", "adapters"),
    ({"max_tokens": 0}, "invalid_request", "max_tokens"),
    ({"max_tokens": 256}, "context_length_exceeded", "messages"),
    ({"max_tokens": 2**31 - 1}, "context_length_exceeded", "messages"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "invalid_request", "max_tokens"),
    ({"n": 0}, "invalid_request", "n"),
    ({"n": 129}, "invalid_request", "n"),
    ({"temperature": -0.1}, "invalid_request", "temperature"),
    ({"temperature": 2.1}, "invalid_request", "temperature"),
    ({"top_p": 0}, "invalid_request", "top_p"),
    ({"top_p": 1.1}, "invalid_request", "top_p"),
    ({"min_p": 1.1}, "invalid_request", "min_p"),
    ({"presence_penalty": 3}, "invalid_request", "presence_penalty"),
    ({"frequency_penalty": -3}, "invalid_request", "frequency_penalty"),
    ({"repetition_penalty": 0}, "invalid_request", "repetition_penalty"),
    ({"top_logprobs": 3}, "invalid_request", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "invalid_request", "top_logprobs"),
    ({"logprobs": 3}, "invalid_request", "logprobs"),
    ({"stop": [""]}, "invalid_request", "stop[0]"),
    ({"stop": ["x"] * 17}, "invalid_request", "stop"),
    ({"stop": "x" * 300}, "invalid_request", "stop[0]"),
    ({"stop": 5}, "invalid_request", "stop"),
    ({"stop_token_ids": [260]}, "invalid_request", "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "invalid_request", "stop_token_ids[0]"),
    ({"stop_token_ids": [1] * 65}, "invalid_request", "stop_token_ids"),
    ({"logit_bias": {"a": 1}}, "invalid_request", "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "invalid_request", "logit_bias"),
    ({"logit_bias": {"1": 101}}, "invalid_request", "logit_bias"),
    ({"logit_bias": {"260": 1}}, "invalid_request", "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "invalid_request", "logit_bias"),
    ({"min_tokens": 10, "max_tokens": 5}, "invalid_request", "min_tokens"),
    ({"priority": -101}, "invalid_request", "priority"),
    ({"priority": 101}, "invalid_request", "priority"),
    ({"speculative_tokens": 17}, "invalid_request", "speculative_tokens"),
    ({"stream_options": {"include_usage": True}}, "invalid_request", "stream_options"),
    ({"stream": True, "prompt_logprobs": 1}, "invalid_request", "prompt_logprobs"),
    ({"stream": "yes"}, "invalid_request", "stream"),
    ({"metadata": {str(i): "" for i in range(17)}}, "invalid_request", "metadata"),
]

WRONG_COMPLETION: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ""}, "invalid_request", "prompt"),
    ({"prompt": []}, "invalid_request", "prompt"),
    ({"prompt": [""]}, "invalid_request", "prompt"),
    ({"prompt": [[]]}, "invalid_request", "prompt"),
    ({"prompt": None}, "invalid_request", "prompt"),
    ({"prompt": {}}, "invalid_request", "prompt"),
    ({"prompt": [1.5]}, "invalid_request", "prompt"),
    ({"prompt": [True]}, "invalid_request", "prompt"),
    ({"prompt": ["a", 1]}, "invalid_request", "prompt"),
    ({"prompt": [260]}, "invalid_request", "prompt"),
    ({"prompt": [-1]}, "invalid_request", "prompt"),
    ({"prompt": [2**70]}, "invalid_request", "prompt"),
    ({"prompt": ["a"] * 33}, "invalid_request", "prompt"),
    ({"prompt": ["a"] * 129}, "invalid_request", "prompt"),
    ({"prompt": ["a"] * 32, "n": 5}, "invalid_request", "n"),
    ({"prompt": "x" * 300}, "context_length_exceeded", "prompt"),
    ({"logprobs": 21}, "invalid_request", "logprobs"),
    ({"logprobs": True}, "invalid_request", "logprobs"),
    ({"best_of": 2}, "invalid_request", "best_of"),
    ({"suffix": "x"}, "unsupported_field", "suffix"),
    ({"priority": "high"}, "invalid_request", "priority"),
    ({"speculative_tokens": -1}, "invalid_request", "speculative_tokens"),
    ({"messages": []}, "unsupported_field", "messages"),
]


def _id(case: tuple[dict[str, Any], str, str]) -> str:
    return json.dumps(case[0])[:60]


async def check(server: Server, path: str, body: Any, code: str, param: str | None) -> None:
    reply = await server.client.post(
        path, content=json.dumps(body), headers={"content-type": "application/json"}
    )
    error = ErrorReply.model_validate(reply.json(), extra="forbid").error
    assert (error.code, error.param) == (code, param), error.message
    assert reply.status_code == (404 if code == "model_not_found" else 400)
    assert server.engine.requests == []


@pytest.mark.parametrize("case", WRONG_CHAT, ids=_id)
async def test_a_wrong_chat_is_refused(
    server: Server, case: tuple[dict[str, Any], str, str]
) -> None:
    await server.upload("a")
    await check(server, "/v1/chat/completions", {**CHAT, **case[0]}, case[1], case[2])


@pytest.mark.parametrize("case", WRONG_COMPLETION, ids=_id)
async def test_a_wrong_completion_is_refused(
    server: Server, case: tuple[dict[str, Any], str, str]
) -> None:
    await check(server, "/v1/completions", {**COMPLETION, **case[0]}, case[1], case[2])


@pytest.mark.parametrize(
    "field",
    ["n", "max_tokens", "min_tokens", "top_k", "prompt_logprobs", "max_completion_tokens",
     "top_logprobs", "speculative_tokens"],
)  # fmt: skip
async def test_no_odd_number_passes_for_a_count(server: Server, field: str) -> None:
    for value in INTEGERS:
        await check(
            server, "/v1/chat/completions", {**CHAT, field: value}, "invalid_request", field
        )


@pytest.mark.parametrize(
    "field",
    ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty",
     "repetition_penalty"],
)  # fmt: skip
async def test_no_odd_number_passes_for_a_measure(server: Server, field: str) -> None:
    for value in NUMBERS:
        await check(
            server, "/v1/chat/completions", {**CHAT, field: value}, "invalid_request", field
        )


@pytest.mark.parametrize("value", [-1, -100])
async def test_an_operator_can_forbid_urgency(make_server: Maker, value: int) -> None:
    server = await make_server(min_priority=0)
    await check(
        server, "/v1/chat/completions", {**CHAT, "priority": value}, "invalid_request", "priority"
    )
    reply = await server.client.post("/v1/chat/completions", json={**CHAT, "priority": 5})
    assert reply.status_code == 200


async def test_no_odd_number_passes_for_a_seed(server: Server) -> None:
    for value in (2**63, -(2**63) - 1, 1.5, "7", True):
        await check(
            server, "/v1/chat/completions", {**CHAT, "seed": value}, "invalid_request", "seed"
        )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"1" * 5000,
    ],
    ids=["empty", "cut", "list", "string", "null", "bytes", "deep list", "deep object", "digits"],
)
async def test_a_body_that_is_no_object_is_refused(server: Server, content: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        reply = await server.client.post(
            path, content=content, headers={"content-type": "application/json"}
        )
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_request")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "image/png"])
async def test_another_content_type_is_415(server: Server, kind: str) -> None:
    reply = await server.client.post(
        "/v1/completions", content=json.dumps(COMPLETION), headers={"content-type": kind}
    )
    assert (reply.status_code, reply.json()["error"]["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    "body",
    [
        {**CHAT, "messages": [{"role": "user", "content": "\ud800"}]},
        {**CHAT, "model": "\udfff"},
        {**CHAT, "\ud800": 1},
        {**CHAT, "stop": ["\ud800"]},
        {**CHAT, "metadata": {"a": "\ud800"}},
    ],
)
async def test_half_a_surrogate_pair_is_refused(server: Server, body: dict[str, Any]) -> None:
    reply = await server.client.post(
        "/v1/chat/completions",
        content=json.dumps(body),
        headers={"content-type": "application/json"},
    )
    assert reply.status_code == 400, reply.text
    assert "surrogate" in reply.json()["error"]["message"]


async def test_too_large_a_body_is_refused(server: Server) -> None:
    limit = int(server.config.limits.max_body_bytes)
    body = json.dumps({**COMPLETION, "prompt": "x" * limit})
    reply = await server.client.post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "payload_too_large")


async def test_a_large_body_without_a_length_is_cut_off_while_it_is_read(server: Server) -> None:
    num_sent = 0

    async def endless():  # type: ignore[no-untyped-def]
        nonlocal num_sent
        while True:
            num_sent += 1
            yield b"x" * 65536

    reply = await server.client.post(
        "/v1/completions", content=endless(), headers={"content-type": "application/json"}
    )
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "payload_too_large")
    assert num_sent * 65536 <= int(server.config.limits.max_body_bytes) + 2 * 65536


async def test_unknown_paths_and_methods_have_the_envelope(server: Server) -> None:
    for method, path, status, code in (
        ("GET", "/nope", 404, "not_found"),
        ("GET", "/v1/chat/completions/", 404, "not_found"),
        ("GET", "/v1//models", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("PATCH", "/v1/adapters", 405, "method_not_allowed"),
    ):
        reply = await server.client.request(method, path)
        error = ErrorReply.model_validate(reply.json(), extra="forbid").error
        assert (reply.status_code, error.code) == (status, code), path


async def test_a_fault_of_ours_has_a_closed_message_and_is_logged(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("secret /etc/shadow 0x7f00deadbeef")

    server.app.state.services.directory.find = broken
    reply = await server.client.get("/v1/models/x", headers={"x-request-id": "r-17"})
    assert reply.status_code == 500
    assert reply.headers["x-request-id"] == "r-17"
    error = reply.json()["error"]
    assert error["code"] == "internal_error"
    assert "secret" not in reply.text
    assert "r-17" in error["message"]
    assert any("r-17" in r.getMessage() and r.exc_info for r in caplog.records)


@pytest.mark.parametrize("given", ["a b", "x" * 200, "a\tb", ""])
async def test_an_odd_request_id_is_replaced(server: Server, given: str) -> None:
    reply = await server.client.get("/health", headers={"x-request-id": given})
    assert reply.headers["x-request-id"].startswith("req-")


async def test_no_error_shows_paths_or_traces(server: Server) -> None:
    bodies = [{**CHAT, **case[0]} for case in WRONG_CHAT]
    for body in bodies:
        reply = await server.client.post(
            "/v1/chat/completions",
            content=json.dumps(body),
            headers={"content-type": "application/json"},
        )
        for sign in ("Traceback", "site-packages", 'File "', " at 0x", "pydantic"):
            assert sign not in reply.text


async def test_prompts_and_keys_are_not_logged(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    canary = "canary-5b2f"
    for path, body in (
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": canary}]}),
        ("/v1/chat/completions", {**CHAT, "n": 0, "user": canary}),
        ("/v1/completions", {**COMPLETION, "prompt": canary, "stop": [canary]}),
        ("/v1/completions", {**COMPLETION, "prompt": canary * 100}),
    ):
        await server.client.post(
            path, json=body, headers={"authorization": f"Bearer {canary}"}, params={"q": canary}
        )
    ours = [r for r in caplog.records if not r.name.startswith(("httpx", "httpcore"))]
    assert ours
    assert not [r for r in ours if canary in r.getMessage()]
