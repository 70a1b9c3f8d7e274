"""Policies over HTTP: what is mandatory is served or nothing is, from one request to the next."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from tests.api.conftest import Maker, Server, peft_files
from tests.support.fake_engine import FakeEngine

from polyadapt.types import WhenCold

pytestmark = pytest.mark.anyio

OPERATOR = "sk-operator-" + "x" * 20


async def ask(server: Server, path: str = "chat", **fields: Any) -> httpx.Response:
    own: dict[str, Any] = {"prompt": "hi"}
    url = "/v1/completions"
    if path == "chat":
        own = {"messages": [{"role": "user", "content": "hi"}]}
        url = "/v1/chat/completions"
    return await server.client.post(url, json={"model": "fake-base", **own, **fields})


async def put(server: Server, *adapters: str | dict[str, Any], tenant: str = "default") -> Any:
    wanted = [{"name": a} if isinstance(a, str) else a for a in adapters]
    reply = await server.client.put(f"/v1/policies/{tenant}", json={"adapters": wanted})
    assert reply.status_code == 200, reply.text
    return reply.json()


def refused(reply: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (status, code, param), error
    message: str = error["message"]
    return message


def served(reply: httpx.Response) -> list[tuple[str, bool]]:
    """Names and whether they are mandatory, of a reply or of a stream's last chunk."""
    assert reply.status_code == 200, reply.text
    body = reply.text
    if reply.headers["content-type"].startswith("text/event-stream"):
        body = [line[6:] for line in body.split("\n\n") if line.startswith("data: ")][-2]
    return [(of["name"], of.get("mandatory", False)) for of in json.loads(body)["adapters"]]


def applied(server: Server) -> list[tuple[str, float, bool]]:
    used = server.engine.requests[-1].adapters
    return [(use.adapter.name, use.scale, use.is_mandatory) for use in used]


@pytest.fixture
async def guarded(server: Server) -> Server:
    """A server whose default tenant must be served through `guard`."""
    for name in ("guard", "poet", "chef"):
        await server.upload(name)
    await put(server, {"name": "guard", "scale": 0.5})
    return server


@pytest.mark.parametrize("path", ["chat", "completions"])
@pytest.mark.parametrize("extras", [{}, {"n": 2}, {"stream": True}])
async def test_every_request_is_served_through_the_policys_adapters(
    guarded: Server, path: str, extras: dict[str, Any]
) -> None:
    guard, digest = ("guard", 0.5, True), {}
    for name in ("guard", "poet", "chef"):
        digest[name] = (await guarded.client.get(f"/v1/adapters/{name}")).json()["digest"]
    for fields, own in (
        ({}, []),
        ({"adapters": []}, []),
        ({"model": "poet"}, [("poet", 1.0, False)]),
        ({"adapters": [{"name": "chef", "scale": 2}, {"name": "poet"}]},
         [("chef", 2.0, False), ("poet", 1.0, False)]),
        ({"adapters": [{"name": "poet", "scale": 0}]}, [("poet", 0.0, False)]),
    ):  # fmt: skip
        reply = await ask(guarded, path, **fields, **extras)
        assert served(reply) == [*((name, False) for name, *_ in own), ("guard", True)]
        assert applied(guarded) == [*own, guard]
        names = [*(name for name, *_ in own), "guard"]
        assert reply.headers["x-adapter-digest"] == ",".join(digest[name] for name in names)


async def test_a_policy_holds_from_the_next_request_on_and_not_after_it_is_removed(
    guarded: Server,
) -> None:
    assert served(await ask(guarded)) == [("guard", True)]
    await put(guarded, "chef", "poet")
    assert served(await ask(guarded)) == [("chef", True), ("poet", True)]
    gone = await guarded.client.delete("/v1/policies/default")
    assert gone.json() == {"object": "policy.deleted", "tenant": "default", "deleted": True}
    assert served(await ask(guarded)) == []
    assert served(await ask(guarded, model="guard")) == [("guard", False)]
    refused(await guarded.client.delete("/v1/policies/default"), 404, "not_found")


async def test_whoever_names_a_mandatory_adapter_gets_it_once_as_the_policy_says(
    guarded: Server,
) -> None:
    for fields in (
        {"model": "guard"},
        {"adapters": [{"name": "guard"}]},
        {"adapters": [{"name": "guard", "scale": 0.5}]},
    ):
        assert served(await ask(guarded, **fields)) == [("guard", True)]
        assert applied(guarded) == [("guard", 0.5, True)]
    reply = await ask(guarded, adapters=[{"name": "guard"}, {"name": "poet"}])
    assert served(reply) == [("guard", True), ("poet", False)]
    for other in ({"scale": 0}, {"scale": 0.4}, {"rank": 2}):
        reply = await ask(guarded, adapters=[{"name": "guard", **other}])
        assert "mandatory" in refused(reply, 400, "policy_conflict", "adapters")


async def test_what_does_not_fit_beside_them_is_refused(guarded: Server) -> None:
    names = ["poet", "chef", "third", "fourth"]
    for name in names[2:]:
        await guarded.upload(name)
    three = [{"name": name} for name in names[:3]]
    assert len(served(await ask(guarded, adapters=three))) == 4
    num = len(guarded.engine.requests)
    reply = await ask(guarded, adapters=[{"name": name} for name in names])
    message = refused(reply, 400, "policy_conflict", "adapters")
    assert "'guard'" in message
    assert "at most 4" in message
    await put(guarded, *names)
    reply = await ask(guarded, model="guard")
    refused(reply, 400, "policy_conflict", "adapters")
    assert len(guarded.engine.requests) == num


async def test_nothing_is_dropped_when_something_is_cold(guarded: Server) -> None:
    digests = {
        name: (await guarded.client.get(f"/v1/adapters/{name}")).json()["digest"]
        for name in ("guard", "poet", "chef")
    }
    for on_cold, instead in (("base", []), ("fallback:chef", ["chef"]), ("fallback:guard", [])):
        guarded.engine.cold = set()
        assert served(await ask(guarded, model="poet", on_cold=on_cold)) == [
            ("poet", False), ("guard", True)
        ]  # fmt: skip
        cold = guarded.engine.requests[-1].when_cold
        assert cold.instead is not None
        assert [(use.adapter.name, use.scale) for use in cold.instead] == [
            *((name, 1.0) for name in instead), ("guard", 0.5)
        ]  # fmt: skip
        guarded.engine.cold = {digests["poet"]}
        reply = await ask(guarded, model="poet", on_cold=on_cold)
        assert served(reply) == [*((name, False) for name in instead), ("guard", True)]
    # Nothing of its own is cold: what is mandatory is waited for, unless it shall fail.
    guarded.engine.cold = set()
    for fields, expected in (
        ({"on_cold": "base"}, WhenCold()),
        ({"on_cold": "fallback:chef"}, WhenCold()),
        ({"on_cold": "fail"}, WhenCold(0)),
        ({"cold_timeout_ms": 7}, WhenCold(7)),
    ):
        await ask(guarded, **fields)
        assert guarded.engine.requests[-1].when_cold == expected
    directory = guarded.app.state.services.directory
    assert all(
        directory.num_uses(identity) == 0
        for digest in digests.values()
        for identity in directory.ids_of(digest)
    )


async def test_a_fallback_that_does_not_fit_is_refused(guarded: Server) -> None:
    for name in ("third", "fourth"):
        await guarded.upload(name)
    await put(guarded, "guard", "chef", "third", "fourth")
    reply = await ask(guarded, model="guard", on_cold="fallback:poet")
    refused(reply, 400, "policy_conflict", "on_cold")


async def test_what_a_policy_names_cannot_be_deleted(guarded: Server) -> None:
    for url in ("/v1/adapters/guard", "/v1/adapters/guard@1", "/v1/adapters/guard?mode=now"):
        message = refused(await guarded.client.delete(url), 409, "conflict")
        assert "/v1/policies/default" in message
    reply = await guarded.client.post("/v1/unload_lora_adapter", json={"lora_name": "guard"})
    refused(reply, 409, "conflict")
    assert served(await ask(guarded)) == [("guard", True)]
    await guarded.client.delete("/v1/policies/default")
    assert (await guarded.client.delete("/v1/adapters/guard")).status_code == 200


async def test_a_policy_stays_with_its_versions(guarded: Server) -> None:
    first = (await guarded.client.get("/v1/policies/default")).json()["adapters"][0]
    await guarded.upload("guard", "second")
    reply = await ask(guarded)
    assert reply.json()["adapters"][0]["version"] == first["version"] == 1
    assert reply.json()["adapters"][0]["digest"] == first["digest"]
    assert (await put(guarded, "guard"))["adapters"][0]["version"] == 2
    assert (await ask(guarded)).json()["adapters"][0]["version"] == 2
    assert (await put(guarded, "guard@1"))["adapters"][0]["version"] == 1


async def test_a_tenant_cannot_put_its_own_adapter_in_the_place_of_a_shared_one(
    make_server: Maker,
) -> None:
    server = await make_server(api_key=OPERATOR)
    with server.store.stage() as staged:
        for _, (name, content) in peft_files("shared"):
            with staged.add_file(name) as writer:
                writer.write(content)
        shared, _ = server.store.publish(staged, "guard", "shared")
    key = server.store.keys.create("a", ["infer", "adapters:write"])[1]
    admin = {"authorization": f"Bearer {OPERATOR}"}
    server.client.headers = httpx.Headers(admin)
    entry = (await put(server, "guard", tenant="a"))["adapters"][0]
    assert (entry["tenant"], entry["digest"]) == ("shared", shared.digest)
    server.client.headers = httpx.Headers({"authorization": f"Bearer {key}"})
    own = await server.upload("guard", "own")
    assert own["tenant"] == "a"
    body = (await ask(server)).json()
    assert [of["digest"] for of in body["adapters"]] == [shared.digest]
    # Its own of that name is another adapter.
    body = (await ask(server, model="guard")).json()
    assert [of["digest"] for of in body["adapters"]] == [own["digest"], shared.digest]
    for call in ("put", "get", "delete"):
        reply = await server.client.request(call, "/v1/policies/a")
        refused(reply, 403, "forbidden")
    server.client.headers = httpx.Headers(admin)
    assert served(await ask(server)) == [], "the operator's own tenant has no policy"


async def test_an_operator_makes_what_a_tenants_policy_needs_over_http(
    make_server: Maker,
) -> None:
    server = await make_server(api_key=OPERATOR)
    admin = {"authorization": f"Bearer {OPERATOR}"}

    async def key_of(tenant: str, scope: str) -> dict[str, str]:
        body = {"tenant": tenant, "scopes": [scope], "label": "mine"}
        made = await server.client.post("/v1/keys", json=body, headers=admin)
        assert (made.status_code, made.json()["tenant"]) == (201, tenant)
        listed = await server.client.get(f"/v1/keys?tenant={tenant}", headers=admin)
        assert [key["label"] for key in listed.json()["data"]] == ["mine"]
        return {"authorization": f"Bearer {made.json()['secret']}"}

    shared, acme = await key_of("shared", "adapters:write"), await key_of("acme", "infer")
    server.client.headers = httpx.Headers(shared)
    await server.upload("guard")
    server.client.headers = httpx.Headers(admin)
    await put(server, {"name": "guard", "scale": 0.5}, tenant="acme")
    assert served(await ask(server)) == []
    assert (await server.client.get("/v1/keys")).json()["data"] == []
    server.client.headers = httpx.Headers(acme)
    assert served(await ask(server)) == [("guard", True)]
    reply = await server.client.post("/v1/keys", json={"scopes": ["infer"], "tenant": "default"})
    refused(reply, 403, "forbidden")


async def test_an_adapter_of_another_base_fails_requests_and_says_why(guarded: Server) -> None:
    info = guarded.engine.model
    other = replace(info, base=replace(info.base, digest="sha256:" + "c" * 64))
    guarded.engine.info = other
    for extras in ({}, {"stream": True}, {"on_cold": "base"}):
        reply = await ask(guarded, **extras)
        assert "guard@1" in refused(reply, 503, "policy_unavailable")
        assert reply.headers["retry-after"] == "60"
    await guarded.client.delete("/v1/policies/default")
    assert served(await ask(guarded)) == []


async def test_what_the_engine_cannot_load_is_not_left_out(make_server: Maker) -> None:
    failure = (0, "adapter_unavailable", "gone")
    server = await make_server(FakeEngine(failure=failure))
    await server.upload("guard")
    await put(server, "guard")
    refused(await ask(server), 503, "adapter_unavailable")
    assert len(server.engine.requests) == 1


async def test_a_policy_is_shown_and_listed(guarded: Server) -> None:
    digest = (await guarded.client.get("/v1/adapters/guard")).json()["digest"]
    shown = (await guarded.client.get("/v1/policies/default")).json()
    assert shown == {
        "object": "policy", "tenant": "default", "created": shown["created"],
        "adapters": [{"name": "guard", "version": 1, "digest": digest, "tenant": "default",
                      "scale": 0.5, "rank": None, "options": {}}],
    }  # fmt: skip
    assert (await guarded.client.get("/v1/policies")).json() == {
        "object": "list", "data": [shown], "has_more": False,
        "first_id": "default", "last_id": "default",
    }  # fmt: skip
    refused(await guarded.client.get("/v1/policies/nobody"), 404, "not_found")
    refused(await guarded.client.get("/v1/policies?after=nobody"), 400, "invalid_request", "after")
    assert (await guarded.client.get("/v1/policies?after=default")).json()["data"] == []


@pytest.mark.parametrize(
    ("adapters", "status", "code", "param"),
    [
        ([], 400, "invalid_request", "adapters"),
        ([{"name": "nobody"}], 404, "model_not_found", "adapters[0].name"),
        ([{"name": "poet@7"}], 404, "model_not_found", "adapters[0].name"),
        ([{"name": "fake-base"}], 404, "model_not_found", "adapters[0].name"),
        ([{"name": "poet"}, {"name": "poet@1"}], 400, "invalid_request", "adapters[1].name"),
        ([{"name": "poet", "scale": 0}], 400, "invalid_request", "adapters[0].scale"),
        ([{"name": "poet", "scale": 1e9}], 400, "invalid_request", "adapters[0].scale"),
        ([{"name": "poet", "rank": 0}], 400, "invalid_request", "adapters[0].rank"),
        ([{"name": "poet", "weight": 2}], 400, "unsupported_field", "adapters[0].weight"),
        ([{"name": "poet"}] * 5, 400, "invalid_request", "adapters"),
        (None, 400, "invalid_request", "adapters"),
    ],
)
async def test_a_policy_that_could_not_be_served_is_refused(
    guarded: Server, adapters: Any, status: int, code: str, param: str
) -> None:
    reply = await guarded.client.put("/v1/policies/default", json={"adapters": adapters})
    refused(reply, status, code, param)
    assert served(await ask(guarded)) == [("guard", True)], "the one before it still holds"


async def test_a_choice_is_served_through_them_too(guarded: Server) -> None:
    reply = await guarded.client.put("/v1/adapters/poet/profile", json={"examples": ["zz z"]})
    assert reply.status_code == 200
    guarded.engine.requests.clear()
    reply = await ask(guarded, "completions", model="auto", prompt="zzz")
    assert served(reply) == [("poet", False), ("guard", True)]
    assert [request.kind for request in guarded.engine.requests] == ["embed", "text"]
    assert guarded.engine.requests[0].adapters == (), "profiles are those of the base"
    reply = await ask(guarded, "completions", model="auto", prompt="hello")
    assert served(reply) == [("guard", True)]


async def test_loading_an_adapter_needs_no_policy(guarded: Server) -> None:
    reply = await guarded.client.post("/v1/adapters/poet/load", json={"pin": True})
    assert reply.status_code == 200
    assert list(guarded.engine.resident) == [reply.json()["digest"]]


async def test_every_member_of_a_workflow_is_served_through_them(guarded: Server) -> None:
    for adapter in ("poet", None, "guard"):
        definition = {
            "kind": "self_consistency", "num_samples": 2,
            "reasoner": {"adapter": adapter, "instruction": "", "template": "{question}"},
        }  # fmt: skip
        reply = await guarded.client.put("/v1/workflows/vote", json={"definition": definition})
        assert reply.status_code in (200, 201), reply.text
        guarded.engine.requests.clear()
        reply = await ask(guarded, model="vote")
        own = [] if adapter != "poet" else [("poet", False)]
        assert served(reply) == [*own, ("guard", True)]
        assert len(guarded.engine.requests) == 2
        for request in guarded.engine.requests:
            used = [(use.adapter.name, use.is_mandatory) for use in request.adapters]
            assert used == [*own, ("guard", True)]
        named = {entry["adapter"] for entry in reply.json()["workflow"]["trace"]}
        assert named == {None if adapter is None else f"{adapter}@1"}, "its own, not what is beside"


async def test_options_and_ranks_are_those_of_a_request(guarded: Server) -> None:
    entry = {"name": "guard", "rank": 2, "options": {"tasks": ["a", "b"], "k": 1.5, "on": True}}
    shown = (await put(guarded, entry))["adapters"][0]
    assert (shown["rank"], shown["options"], shown["scale"]) == (2, entry["options"], 1.0)
    await ask(guarded)
    (used,) = guarded.engine.requests[-1].adapters
    assert (used.rank, used.is_mandatory) == (2, True)
    assert used.options == (("k", 1.5), ("on", True), ("tasks", ("a", "b")))
    assert served(await ask(guarded, adapters=[entry])) == [("guard", True)]
    reply = await ask(guarded, adapters=[{"name": "guard", "options": {"k": 2}}])
    refused(reply, 400, "policy_conflict", "adapters")
