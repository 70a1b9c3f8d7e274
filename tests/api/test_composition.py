"""Several adapters in one request over HTTP, and on_cold: what reaches the engine, what is said."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from tests.api.conftest import Maker, Server
from tests.support.fake_engine import FakeEngine

from polyadapt.types import AppliedAdapter, WhenCold

pytestmark = pytest.mark.anyio

USER = [{"role": "user", "content": "hi"}]


async def ask(server: Server, path: str = "chat", **fields: Any) -> httpx.Response:
    own = {"messages": USER} if path == "chat" else {"prompt": "hi"}
    url = "/v1/chat/completions" if path == "chat" else "/v1/completions"
    return await server.client.post(url, json={"model": "fake-base", **own, **fields})


async def upload(server: Server, *names: str) -> dict[str, str]:
    """Upload adapters; return their digests."""
    return {name: (await server.upload(name))["digest"] for name in names}


def refused(reply: httpx.Response, status: int, code: str, param: str | None) -> str:
    """Check an error; return its message."""
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (status, code, param), error
    message: str = error["message"]
    return message


def last_chunk(reply: httpx.Response) -> dict[str, Any]:
    events = [line[6:] for line in reply.text.split("\n\n") if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunk: dict[str, Any] = json.loads(events[-2])
    return chunk


@pytest.mark.parametrize("path", ["chat", "completions"])
@pytest.mark.parametrize("extras", [{}, {"n": 2}, {"stream": True}, {"stream": True, "n": 2}])
async def test_several_adapters_answer_together_in_the_callers_order(
    server: Server, path: str, extras: dict[str, Any]
) -> None:
    digests = await upload(server, "d", "c", "b", "a")
    wanted = [{"name": n, "scale": s} for n, s in (("c", 0.5), ("a", -2), ("d", 1.0), ("b", 0))]
    reply = await ask(server, path, adapters=wanted, **extras)
    assert reply.status_code == 200, reply.text
    applied = server.engine.requests[-1].adapters
    assert [(use.adapter.name, use.scale) for use in applied] == [
        ("c", 0.5), ("a", -2.0), ("d", 1.0), ("b", 0.0)
    ]  # fmt: skip
    body = last_chunk(reply) if "stream" in extras else reply.json()
    order = ["c", "a", "d", "b"]
    assert [served["name"] for served in body["adapters"]] == order
    assert [served["digest"] for served in body["adapters"]] == [digests[n] for n in order]
    assert reply.headers["x-adapter-digest"] == ",".join(digests[name] for name in order)


async def test_a_composition_scores_and_echoes_like_one_adapter(server: Server) -> None:
    await upload(server, "a", "b")
    fields = {"adapters": [{"name": "a"}, {"name": "b"}], "echo": True, "logprobs": 1}
    choice = (await ask(server, "completions", **fields)).json()["choices"][0]
    assert choice["text"] == "hiI am a+b 0."
    assert len(choice["logprobs"]["tokens"]) == len(choice["text"])


async def test_a_rank_reaches_the_engine(server: Server) -> None:
    await upload(server, "a", "b")
    wanted = [{"name": "a", "rank": 4}, {"name": "b", "rank": None, "options": {}}]
    assert (await ask(server, adapters=wanted)).status_code == 200
    assert [use.rank for use in server.engine.requests[-1].adapters] == [4, None]


async def test_what_the_engine_refuses_names_its_field(make_server: Maker) -> None:
    failure = (0, "invalid_request", "rank is 9", "adapters[0].rank")
    server = await make_server(FakeEngine(failure=failure))
    await upload(server, "a")
    for extras in ({}, {"stream": True}):
        reply = await ask(server, adapters=[{"name": "a", "rank": 9}], **extras)
        if "stream" in extras:
            assert '"param":"adapters[0].rank"' in reply.text.replace(" ", "")
            assert "[DONE]" not in reply.text
        else:
            assert refused(reply, 400, "invalid_request", "adapters[0].rank") == "rank is 9"


async def test_an_unknown_name_is_named(server: Server) -> None:
    await upload(server, "a")
    reply = await ask(server, adapters=[{"name": "a"}, {"name": "nobody"}])
    assert "nobody" in refused(reply, 404, "model_not_found", "adapters[1].name")
    reply = await ask(server, adapters=[{"name": "a"}, {"name": "a@7"}])
    assert "a" in refused(reply, 404, "model_not_found", "adapters[1].name")
    assert server.engine.requests == []


async def test_options_reach_the_engine_by_name_and_null_is_absent(server: Server) -> None:
    await upload(server, "a", "b")
    options = {"tasks": ["y", "x"], "limit": 3, "weight": 0.5, "exact": False, "mode": "m"}
    wanted = [{"name": "a", "options": options | {"no": None}}, {"name": "b", "options": None}]
    assert (await ask(server, adapters=wanted)).status_code == 200
    assert [use.options for use in server.engine.requests[-1].adapters] == [
        (("exact", False), ("limit", 3), ("mode", "m"), ("tasks", ("y", "x")), ("weight", 0.5)),
        (),
    ]


async def test_an_option_that_the_adapter_does_not_have_names_its_field(
    make_server: Maker,
) -> None:
    param = "adapters[0].options.tempo"
    failure = (0, "unsupported_field", "adapter 'a' has no option 'tempo'", param)
    server = await make_server(FakeEngine(failure=failure))
    await upload(server, "a")
    reply = await ask(server, adapters=[{"name": "a", "options": {"tempo": 3}}])
    assert "'tempo'" in refused(reply, 400, "unsupported_field", param)


async def test_the_same_adapter_twice_is_refused_under_any_name(server: Server) -> None:
    await server.upload("a", "same")
    await server.upload("twin", "same")
    for second in ("a", "a@1", "twin"):
        reply = await ask(server, adapters=[{"name": "a"}, {"name": second}])
        assert "same adapter" in refused(reply, 400, "invalid_request", "adapters[1].name")


async def test_model_and_adapters_may_not_name_two_versions_of_one_adapter(server: Server) -> None:
    await server.upload("a", "one")
    await server.upload("a", "two")
    await upload(server, "b")
    for model, name in (("a@1", "a"), ("a", "a@1"), ("a@2", "a@1")):
        reply = await ask(server, model=model, adapters=[{"name": "b"}, {"name": name}])
        assert "version" in refused(reply, 400, "invalid_request", "adapters[1].name")
    for model, names in (("a@2", ["a"]), ("a", ["b", "a@2"]), ("a@1", ["b"]), ("a", [])):
        reply = await ask(server, model=model, adapters=[{"name": name} for name in names])
        assert [served["name"] for served in reply.json()["adapters"]] == [
            name.partition("@")[0] for name in names
        ]


# --------------------------------------------------------------------------- on_cold
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, WhenCold()),
        ({"on_cold": "wait"}, WhenCold()),
        ({"cold_timeout_ms": 250}, WhenCold(250)),
        ({"on_cold": "wait", "cold_timeout_ms": 0}, WhenCold(0)),
        ({"on_cold": "fail"}, WhenCold(0)),
        ({"on_cold": "fail", "cold_timeout_ms": 9}, WhenCold(9)),
        ({"on_cold": "base"}, WhenCold(0, ())),
        ({"on_cold": "base", "cold_timeout_ms": 30}, WhenCold(30, ())),
    ],
)
async def test_every_form_of_on_cold_reaches_the_engine(
    server: Server, fields: dict[str, Any], expected: WhenCold
) -> None:
    await upload(server, "a")
    assert (await ask(server, model="a", **fields)).status_code == 200
    assert server.engine.requests[-1].when_cold == expected
    assert (await ask(server, **fields)).status_code == 200
    assert server.engine.requests[-1].when_cold == WhenCold(), "the base is never cold"


async def test_a_fallback_is_resolved_and_held_like_an_adapter(server: Server) -> None:
    digests = await upload(server, "a", "b")
    reply = await ask(server, model="a", on_cold="fallback:b@1", cold_timeout_ms=20)
    assert reply.headers["x-adapter-digest"] == digests["a"]
    (held,) = server.engine.requests[-1].adapters
    cold = server.engine.requests[-1].when_cold
    assert cold.wait_ms == 20
    assert cold.instead is not None
    assert [use.adapter.digest for use in cold.instead] == [digests["b"]]
    assert cold.instead == (AppliedAdapter(cold.instead[0].adapter),)
    for adapter in (held.adapter, cold.instead[0].adapter):
        assert server.app.state.services.directory.num_uses(adapter) == 0


@pytest.mark.parametrize(
    ("fallback", "status", "code"),
    [
        ("nobody", 404, "model_not_found"),
        ("a b", 404, "model_not_found"),
        ("fake-base", 400, "invalid_request"),
        ("a", 400, "invalid_request"),
        ("twin", 400, "invalid_request"),
    ],
)
async def test_a_fallback_that_is_none_is_refused(
    server: Server, fallback: str, status: int, code: str
) -> None:
    await server.upload("a", "same")
    await server.upload("twin", "same")
    reply = await ask(server, model="a", on_cold=f"fallback:{fallback}")
    refused(reply, status, code, "on_cold")
    assert server.engine.requests == []


@pytest.mark.parametrize("is_stream", [False, True])
async def test_the_reply_says_what_served_in_place_of_a_cold_adapter(
    server: Server, is_stream: bool
) -> None:
    digests = await upload(server, "a", "b", "c")
    server.engine.cold = {digests["a"]}
    wanted = {"adapters": [{"name": "c"}, {"name": "a"}], "stream": is_stream}
    reply = await ask(server, **wanted, on_cold="base")
    assert reply.status_code == 200, reply.text
    assert (last_chunk(reply) if is_stream else reply.json())["adapters"] == []
    assert "I am base" in reply.text or "base" in reply.text
    assert "x-adapter-digest" not in reply.headers
    reply = await ask(server, **wanted, on_cold="fallback:b")
    body = last_chunk(reply) if is_stream else reply.json()
    assert [served["name"] for served in body["adapters"]] == ["b"]
    assert reply.headers["x-adapter-digest"] == digests["b"]
    reply = await ask(server, **wanted, on_cold="fail")
    refused(reply, 503, "adapter_cold", None)
    assert reply.headers["retry-after"] == "1"


async def test_a_stream_that_begins_undecided_has_no_digest(make_server: Maker) -> None:
    """The heartbeat opens it before the engine says what serves it."""
    import asyncio

    gate = asyncio.Semaphore(0)
    server = await make_server(FakeEngine(gate=gate), heartbeat_s=0.05)
    digests = await upload(server, "a")

    async def release() -> None:
        await asyncio.sleep(0.3)
        for _ in range(40):
            gate.release()

    for fields, expected in (({"on_cold": "base"}, None), ({}, digests["a"])):
        releasing = asyncio.create_task(release())
        reply = await ask(server, model="a", stream=True, **fields)
        await releasing
        assert reply.headers.get("x-adapter-digest") == expected
        assert last_chunk(reply)["adapters"][0]["name"] == "a"
        while not gate.locked():
            await gate.acquire()


async def test_prompts_that_could_be_answered_by_different_adapters_are_refused(
    server: Server,
) -> None:
    await upload(server, "a", "b")
    for on_cold in ("base", "fallback:b"):
        reply = await ask(server, "completions", model="a", prompt=["x", "y"], on_cold=on_cold)
        assert "one by one" in refused(reply, 400, "invalid_request", "on_cold")
        reply = await ask(server, "completions", model="a", prompt=["x"], on_cold=on_cold)
        assert reply.status_code == 200
    reply = await ask(server, "completions", model="a", prompt=["x", "y"], on_cold="fail")
    assert reply.status_code == 200
