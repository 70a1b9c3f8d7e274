"""`model: "auto"` over HTTP: what is chosen, by which profiles, and what is said of it.

The fake engine embeds a prompt as how often each letter is in it, see tests/support/fake_engine.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest
from tests.api.conftest import Maker, Server, listening, peft_files
from tests.support.fake_engine import FakeEngine, letters, make_info

from polyadapt.app import StartupAdapter
from polyadapt.errors import EngineUnavailable, StartupError
from polyadapt.tasks import auto as auto_module
from polyadapt.types import Request

pytestmark = pytest.mark.anyio

EXAMPLES = {"zed": ["zzz zz zzzz", "z zz zzz"], "queue": ["qqq q", "qq qqqq qq"]}


async def upload(
    server: Server, name: str, examples: Sequence[str] | None = None, marker: str | None = None
) -> dict[str, Any]:
    """Upload an adapter with the examples of its name; return its object."""
    metadata = {"examples": list(EXAMPLES.get(name, []) if examples is None else examples)}
    reply = await server.client.post(
        "/v1/adapters",
        data={"name": name, "metadata": json.dumps(metadata)},
        files=peft_files(marker or name),
    )
    assert reply.status_code in (200, 201), reply.text
    body: dict[str, Any] = reply.json()
    return body


@pytest.fixture
async def both(server: Server) -> Server:
    """A server with two adapters that have profiles, and one that has none."""
    for name in ("zed", "queue", "bare"):
        await upload(server, name)
    server.engine.requests.clear()
    return server


async def ask(server: Server, text: str, path: str = "chat", **fields: Any) -> httpx.Response:
    own = {"messages": [{"role": "user", "content": text}]} if path == "chat" else {"prompt": text}
    url = "/v1/chat/completions" if path == "chat" else "/v1/completions"
    return await server.client.post(url, json={"model": "auto", **own, **fields})


def said(reply: httpx.Response) -> dict[str, Any]:
    """The whole reply, or the last chunk before [DONE], which alone has a choice."""
    assert reply.status_code == 200, reply.text
    if not reply.headers["content-type"].startswith("text/event-stream"):
        whole: dict[str, Any] = reply.json()
        return whole
    events = [line[6:] for line in reply.text.split("\n\n") if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert all("candidates" not in event for event in events[:-2])
    last: dict[str, Any] = json.loads(events[-2])
    return last


def refused(reply: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (status, code, param), error
    message: str = error["message"]
    return message


def kinds(server: Server) -> list[str]:
    return [request.kind for request in server.engine.requests]


EXTRAS: list[dict[str, Any]] = [
    {},
    {"n": 2},
    {"stream": True},
    {"stream": True, "n": 2, "stream_options": {"include_usage": True}},
]


@pytest.mark.parametrize("path", ["chat", "completions"])
@pytest.mark.parametrize("extras", EXTRAS)
async def test_the_adapter_whose_examples_are_like_the_prompt_answers(
    both: Server, path: str, extras: dict[str, Any]
) -> None:
    for text, name in (("zz z zz", "zed"), ("q qq q q", "queue")):
        reply = await ask(both, text, path, **extras)
        body = said(reply)
        assert [served["name"] for served in body["adapters"]] == [name]
        assert reply.headers["x-adapter-digest"] == body["adapters"][0]["digest"]
        assert body["model"] == "auto"
        choice = body["choice"]
        assert (choice["adapter"], choice["reason"]) == (name, "best")
        assert choice["score"] > 0.9
        assert choice["threshold"] == both.config.server.auto_threshold
        assert choice["candidates"][0] == {"name": name, "score": choice["score"]}
        assert {candidate["name"] for candidate in choice["candidates"]} == {"zed", "queue"}
        assert f"I am {name}" in reply.text or "stream" in extras
    assert kinds(both) == ["embed", "text"] * 2
    assert both.engine.requests[0].adapters == ()


@pytest.mark.parametrize("path", ["chat", "completions"])
@pytest.mark.parametrize("extras", EXTRAS)
async def test_what_is_like_nobodys_examples_is_answered_by_the_base(
    both: Server, path: str, extras: dict[str, Any]
) -> None:
    reply = await ask(both, "hello there", path, **extras)
    body = said(reply)
    assert body["adapters"] == []
    assert "x-adapter-digest" not in reply.headers
    choice = body["choice"]
    assert (choice["adapter"], choice["reason"]) == (None, "below_threshold")
    assert choice["score"] < choice["threshold"]
    assert choice["score"] == choice["candidates"][0]["score"]
    assert len(choice["candidates"]) == 2


async def test_without_profiles_the_base_answers_and_nothing_is_embedded(server: Server) -> None:
    await upload(server, "bare")
    body = said(await ask(server, "zz"))
    assert body["adapters"] == []
    threshold = server.config.server.auto_threshold
    assert body["choice"] == {
        "adapter": None, "reason": "no_profiles", "score": None, "threshold": threshold,
        "candidates": [],
    }  # fmt: skip
    assert kinds(server) == ["text"]


async def test_a_named_model_has_no_choice(both: Server) -> None:
    for model in ("zed", "fake-base"):
        reply = await ask(both, "zz", model=model)
        assert "choice" not in reply.json()
    assert kinds(both) == ["text", "text"]


async def test_of_a_chat_the_turns_of_the_user_count(both: Server) -> None:
    messages = [
        {"role": "system", "content": "qqqqqqqq"},
        {"role": "user", "content": "zzz"},
        {"role": "assistant", "content": "qqq qqqq qqqqqqq"},
        {"role": "user", "content": [{"type": "text", "text": "z zz"}]},
    ]
    body = {"model": "auto", "messages": messages}
    reply = await both.client.post("/v1/chat/completions", json=body)
    assert said(reply)["choice"]["adapter"] == "zed"
    assert bytes(both.engine.requests[0].prompt_ids) == b"zzz\nz zz"
    # Where there are none, all of them.
    body = {"model": "auto", "messages": messages[:1]}
    assert said(await both.client.post("/v1/chat/completions", json=body))["choice"][
        "adapter"
    ] == ("queue")  # fmt: skip
    empty = {"model": "auto", "messages": [{"role": "user", "content": ""}]}
    reply = await both.client.post("/v1/chat/completions", json=empty)
    assert said(reply)["choice"]["reason"] == "empty_prompt"


async def test_of_a_long_prompt_the_end_counts(make_server: Maker) -> None:
    server = await make_server(FakeEngine(model=make_info(max_model_len=2000)))
    await upload(server, "zed")
    for prompt in ("q" * 900 + "z" * 512, [ord("q")] * 900 + [ord("z")] * 512):
        server.engine.requests.clear()
        reply = await ask(server, "", "completions", prompt=prompt)
        assert said(reply)["choice"]["adapter"] == "zed"
        assert bytes(server.engine.requests[0].prompt_ids) == b"z" * 512
    small = await make_server(FakeEngine(model=make_info(max_model_len=64)))
    await upload(small, "zed")
    refused(await ask(small, "z" * 100, "completions"), 400, "context_length_exceeded", "prompt")
    assert max(len(request.prompt_ids) for request in small.engine.requests) == 64


async def test_a_choice_reads_pages_that_its_answer_may_find(both: Server) -> None:
    await ask(both, "zz", cache_salt="mine", priority=3)
    embed, text = both.engine.requests
    assert embed.cache_salt == text.cache_salt == ("tenant", "default", "mine")
    assert embed.priority == text.priority == 3


async def test_what_a_choice_cannot_be_made_for_is_refused(both: Server) -> None:
    reply = await ask(both, "zz", adapters=[{"name": "zed"}])
    assert "leave `adapters` out" in refused(reply, 400, "invalid_request", "adapters")
    reply = await ask(both, "", "completions", prompt=["zz", "qq"])
    assert "one by one" in refused(reply, 400, "invalid_request", "prompt")
    reply = await ask(both, "", "completions", prompt=[300])
    refused(reply, 400, "invalid_request", "prompt")
    refused(await ask(both, "", "completions"), 400, "invalid_request", "prompt")
    reply = await ask(both, "zz", on_cold="fallback:nobody")
    refused(reply, 404, "model_not_found", "on_cold")
    assert kinds(both).count("embed") == 1, "what is wrong in itself is not chosen for again"


async def test_the_name_is_nobodys(server: Server, make_server: Maker) -> None:
    reply = await server.client.post("/v1/adapters", data={"name": "auto"}, files=peft_files("x"))
    assert "choice" in refused(reply, 400, "invalid_request", "name")
    member = {"adapter": None, "instruction": "", "template": "{question}"}
    body = {"definition": {"kind": "self_consistency", "reasoner": member}}
    reply = await server.client.put("/v1/workflows/auto", json=body)
    assert "choice" in refused(reply, 409, "conflict", "name")
    with pytest.raises(StartupError, match="auto"):
        await make_server(FakeEngine(model=make_info(name="auto")))


async def test_an_adapter_that_goes_while_it_is_chosen_is_not_missed(both: Server) -> None:
    def meanwhile(request: Request) -> Sequence[float]:
        if both.engine.embedding is meanwhile:
            both.engine.embedding = letters
            both.store.delete("default", "zed")
        return letters(request)

    both.engine.embedding = meanwhile
    body = said(await ask(both, "zz z"))
    assert body["adapters"] == []
    assert [candidate["name"] for candidate in body["choice"]["candidates"]] == ["queue"]


async def test_the_current_version_is_served(both: Server) -> None:
    await upload(both, "zed", [], marker="second")
    assert said(await ask(both, "zz"))["adapters"][0]["version"] == 2
    await both.client.delete("/v1/adapters/zed@2")
    assert said(await ask(both, "zz"))["adapters"][0]["version"] == 1
    await both.client.delete("/v1/adapters/zed")
    assert said(await ask(both, "zz"))["adapters"] == []


async def test_a_chosen_adapter_that_is_cold_is_like_any(both: Server) -> None:
    digest = (await both.client.get("/v1/adapters/zed")).json()["digest"]
    both.engine.cold = {digest}
    body = said(await ask(both, "zz", on_cold="base"))
    assert (body["choice"]["adapter"], body["adapters"]) == ("zed", [])
    refused(await ask(both, "zz", on_cold="fail"), 503, "adapter_cold")


async def test_a_choice_that_fails_has_its_own_status(both: Server) -> None:
    both.engine.refusal = EngineUnavailable("down")
    for extras in ({}, {"stream": True}):
        refused(await ask(both, "zz", **extras), 503, "engine_unavailable")
    both.engine.refusal = None
    both.engine.failure = (0, "numerical_error", "no")
    refused(await ask(both, "zz"), 500, "numerical_error")


async def test_a_caller_that_goes_while_it_is_chosen_for_is_noticed(make_server: Maker) -> None:
    gate = asyncio.Semaphore(1000)
    server = await make_server(FakeEngine(gate=gate))
    await upload(server, "zed")
    while not gate.locked():
        await gate.acquire()
    async with listening(server.app) as port, httpx.AsyncClient() as client:
        asking = asyncio.create_task(
            client.post(
                f"http://127.0.0.1:{port}/v1/completions",
                json={"model": "auto", "prompt": "zz", "stream": True},
            )
        )
        while not server.engine.running:
            await asyncio.sleep(0.001)
        asking.cancel()
        await asyncio.wait({asking})
        await asyncio.wait_for(server.engine.until_idle(), 10)
    assert len(server.engine.cancelled) == 1


async def test_another_tenants_adapters_are_no_candidates(make_server: Maker) -> None:
    operator = "sk-operator-" + "x" * 20
    server = await make_server(api_key=operator)
    keys = {
        tenant: server.store.keys.create(tenant, ["infer", "adapters:write", "adapters:read"])[1]
        for tenant in ("a", "b")
    }
    headers = {tenant: {"authorization": f"Bearer {key}"} for tenant, key in keys.items()}
    for tenant, name in (("a", "zed"), ("b", "queue")):
        server.client.headers = httpx.Headers(headers[tenant])
        await upload(server, name)
    for tenant, name in (("a", "zed"), ("b", "queue")):
        server.client.headers = httpx.Headers(headers[tenant])
        for text in ("zz", "qq"):
            candidates = said(await ask(server, text))["choice"]["candidates"]
            assert [candidate["name"] for candidate in candidates] == [name]
        foreign = {"zed": "queue", "queue": "zed"}[name]
        for call in (server.client.get, server.client.put, server.client.delete):
            reply = await call(f"/v1/adapters/{foreign}/profile")
            refused(reply, 404, "model_not_found")


async def test_choices_are_counted(both: Server) -> None:
    for text in ("zz", "qq", "hello"):
        await ask(both, text)
    text = (await both.client.get("/metrics")).text
    assert 'polyadapt_choices_total{reason="best"} 2.0' in text
    assert 'polyadapt_choices_total{reason="below_threshold"} 1.0' in text


async def test_the_threshold_is_a_setting(make_server: Maker) -> None:
    server = await make_server(auto_threshold=1.0)
    await upload(server, "zed")
    assert said(await ask(server, "zz zx"))["choice"]["adapter"] is None


# --------------------------------------------------------------------------- profiles
async def test_a_profile_is_put_read_and_deleted(server: Server) -> None:
    await upload(server, "bare")
    url = "/v1/adapters/bare/profile"
    assert "no profile" in refused(await server.client.get(url), 404, "not_found")
    refused(await server.client.put(url), 404, "not_found")
    put = await server.client.put(url, json={"examples": ["zz z", "zzz", "z z"]})
    assert put.status_code == 200, put.text
    profile = put.json()
    base_digest = server.engine.model.base.digest
    assert profile == {
        "object": "adapter.profile", "name": "bare", "examples": ["zz z", "zzz", "z z"],
        "num_centroids": 1, "is_fresh": True, "base_digest": base_digest, "own_share": 1.0,
        "created": profile["created"],
    }  # fmt: skip
    assert (await server.client.get(url)).json() == profile
    assert said(await ask(server, "zz"))["choice"]["adapter"] == "bare"
    reply = await server.client.put(url, json={"examples": ["qq"]})
    assert reply.json()["own_share"] is None, "one example has no others"
    assert said(await ask(server, "zz"))["choice"]["adapter"] is None
    gone = await server.client.delete(url)
    assert gone.json() == {"object": "adapter.profile.deleted", "name": "bare", "deleted": True}
    refused(await server.client.delete(url), 404, "not_found")
    assert said(await ask(server, "qq"))["choice"]["reason"] == "no_profiles"
    for name in ("nobody", "bare@1", "fake-base"):
        for call in (server.client.get, server.client.put, server.client.delete):
            refused(await call(f"/v1/adapters/{name}/profile"), 404, "model_not_found")


@pytest.mark.parametrize(
    "examples",
    [[], [""], ["x" * 4097], ["x"] * 257, ["x" * 4096] * 17, [1], "x", None, ["\ud800"]],
)
async def test_examples_are_bounded(server: Server, examples: Any) -> None:
    await upload(server, "bare")
    content = json.dumps({"examples": examples})
    reply = await server.client.put(
        "/v1/adapters/bare/profile", content=content, headers={"content-type": "application/json"}
    )
    status = 404 if examples is None else 400
    assert reply.status_code == status, reply.text
    if examples in ([], None):
        return  # an upload without examples
    reply = await server.client.post(
        "/v1/adapters",
        data={"name": "other", "metadata": content},
        files=peft_files("other"),
    )
    assert reply.status_code == 400, reply.text
    assert (await server.client.get("/v1/adapters/other")).status_code == 404


async def test_an_upload_whose_examples_cannot_be_embedded_leaves_nothing(server: Server) -> None:
    server.engine.refusal = EngineUnavailable("down")
    reply = await server.client.post(
        "/v1/adapters",
        data={"name": "zed", "metadata": json.dumps({"examples": ["zz"]})},
        files=peft_files("zed"),
    )
    refused(reply, 503, "engine_unavailable")
    server.engine.refusal = None
    assert (await server.client.get("/v1/adapters/zed")).status_code == 404
    await upload(server, "zed")


async def test_a_profile_of_another_background_is_left_out_until_it_is_made_anew(
    both: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_module, "BACKGROUND", ("another", "background"))
    url = "/v1/adapters/zed/profile"
    assert (await both.client.get(url)).json()["is_fresh"] is False
    await both.client.put("/v1/adapters/queue/profile")
    choice = said(await ask(both, "zz"))["choice"]
    assert [candidate["name"] for candidate in choice["candidates"]] == ["queue"]
    # A new version brings a profile up to date, and so does a PUT.
    await upload(both, "zed", [], marker="second")
    assert (await both.client.get(url)).json()["is_fresh"] is True
    assert said(await ask(both, "zz"))["choice"]["adapter"] == "zed"


async def test_the_background_is_embedded_once_for_all(both: Server) -> None:
    num = len(auto_module.BACKGROUND)
    assert kinds(both) == []
    await both.client.put("/v1/adapters/bare/profile", json={"examples": ["xx", "x"]})
    assert kinds(both) == ["embed"] * 2
    assert all(request.priority == 100 for request in both.engine.requests)
    fresh = auto_module.AutoService(
        both.app.state.services.text,
        both.app.state.services.auto._embedder,
        both.store.profiles,
        0.5,
    )
    await fresh._get_space()
    assert kinds(both) == ["embed"] * 2, "it was kept in the registry"
    assert num > 20


async def test_an_operators_adapters_bring_their_examples(
    make_server: Maker, tmp_path: Any
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for _, (name, content) in peft_files("zed"):
        (folder / name).write_bytes(content)
    startup = StartupAdapter("zed", folder, "about", tuple(EXAMPLES["zed"]))
    server = await make_server(startup=(startup,))
    assert said(await ask(server, "zz"))["choice"]["adapter"] == "zed"
    server.engine.requests.clear()
    auto, directory = server.app.state.services.auto, server.app.state.services.directory
    for examples, num in ((EXAMPLES["zed"], 0), ([], 0), (["zzz"], 1)):
        made = auto.new_profile("default", "zed", examples)
        await directory.register_directory("default", "zed", folder, new_profile=made)
        assert len(server.engine.requests) == num, "what is known is not embedded again"


async def test_a_shared_names_examples_are_not_copied(server: Server) -> None:
    """An own name that hides a shared one begins without a profile."""
    services = server.app.state.services
    for shared in ("zed", "queue"):
        with server.store.stage() as staged:
            for _, (name, content) in peft_files("shared"):
                with staged.add_file(name) as writer:
                    writer.write(content)
            server.store.publish(staged, shared, "shared")
        await services.auto.put("shared", shared, EXAMPLES[shared])
    assert said(await ask(server, "zz"))["choice"]["adapter"] == "zed"
    await upload(server, "queue")
    profile = (await server.client.get("/v1/adapters/queue/profile")).json()
    assert profile["examples"] == EXAMPLES["queue"], "what the shared one has is not its own"
    await server.client.delete("/v1/adapters/queue/profile")
    await upload(server, "zed", [])
    assert said(await ask(server, "zz"))["choice"]["reason"] == "no_profiles"
    reply = await server.client.get("/v1/adapters/zed/profile")
    refused(reply, 404, "not_found")


async def test_an_engine_that_starts_says_so(both: Server) -> None:
    both.engine.info = replace(both.engine.model)
    both.engine.is_ready = False
    refused(await ask(both, "zz"), 503, "engine_unavailable")
