"""Marks over HTTP: whoever asks is told by the own bits or gets no answer, whatever is asked."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from tests.api.conftest import Maker, Server, peft_files
from tests.tasks.workflows.test_library import vote

from polyadapt.tasks.policy_admin import ISSUED
from polyadapt.types import AppliedAdapter, MarkSettings
from polyadapt.watermark.keys import SecretKey
from polyadapt_store.database import Database
from polyadapt_store.policies import PolicyBook, PolicyEntry

pytestmark = pytest.mark.anyio

KEK = SecretKey(bytes(range(32)))
OPERATOR = "sk-operator-" + "x" * 20
TRAITS = {
    "options": [
        {"name": "signature", "kind": "bits", "summary": "whose", "expected": "8 bits",
         "num_bits": 8}
    ]
}  # fmt: skip


@dataclass
class Marked:
    """A server with a mark, a task adapter and keys of some users."""

    server: Server
    secrets: dict[str, str] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)

    async def call(self, who: str, method: str, path: str, **options: Any) -> httpx.Response:
        secret = self.secrets.get(who, OPERATOR)
        headers = {"authorization": f"Bearer {secret}"}
        return await self.server.client.request(method, path, headers=headers, **options)

    async def ask(self, who: str, **fields: Any) -> httpx.Response:
        body = {"model": "fake-base", "messages": [{"role": "user", "content": "hi"}], **fields}
        return await self.call(who, "POST", "/v1/chat/completions", json=body)

    async def issue(self, user: str, bits: str, who: str = "operator") -> httpx.Response:
        path = f"/v1/watermarks/mark/users/{self.ids.get(user, user)}"
        return await self.call(who, "PUT", path, json={"signature": bits})

    def last(self) -> tuple[AppliedAdapter, ...]:
        return self.server.engine.requests[-1].adapters

    def bits(self) -> list[Any]:
        """Of the last request to the engine, one entry per use of the mark."""
        uses = [use for use in self.last() if use.adapter.name == "mark"]
        assert all(use.is_mandatory for use in uses)
        return [dict(use.options).get("signature") for use in uses]


@pytest.fixture
async def marked(make_server: Maker) -> Marked:
    server = await make_server(api_key=OPERATOR, mark_kek=KEK.to_text())
    found = Marked(server)
    for name, config in (("mark", {"traits": TRAITS}), ("poet", {}), ("chef", {})):
        reply = await found.call(
            "operator",
            "POST",
            "/v1/adapters",
            data={"name": name},
            files=peft_files(name, **config),
        )
        assert reply.status_code == 201, reply.text
    for user, scopes in (("ann", ["infer"]), ("bob", ["infer"]), ("nobody", ["infer"]),
                         ("clerk", ["watermarks"])):  # fmt: skip
        key, secret = server.store.keys.create("default", scopes, user)
        found.ids[user], found.secrets[user] = key.id, secret
    policy = {"tenant": "default", "required": True}
    reply = await found.call("operator", "PUT", "/v1/watermarks/mark/policy", json=policy)
    assert reply.status_code == 200, reply.text
    for user, bits in (("ann", "00110101"), ("bob", "f0")):
        reply = await found.issue(user, bits)
        assert reply.status_code == 201, reply.text
    return found


async def test_every_answer_is_told_by_who_asked(marked: Marked) -> None:
    for fields in (
        {},
        {"n": 2},
        {"stream": True},
        {"model": "poet"},
        {"model": "mark"},
        {"adapters": []},
        {"adapters": [{"name": "mark"}, {"name": "chef", "scale": 0.5}]},
        {"model": "poet", "on_cold": "base"},
        {"model": "poet", "on_cold": "fallback:chef"},
    ):
        for user, bits in (("ann", "00110101"), ("bob", "11110000")):
            reply = await marked.ask(user, **fields)
            assert reply.status_code == 200, reply.text
            assert marked.bits() == [bits]
            instead = marked.server.engine.requests[-1].when_cold.instead
            if "on_cold" in fields:
                assert instead is not None
                own = [dict(use.options) for use in instead if use.adapter.name == "mark"]
                assert own == [{"signature": bits}]
            assert bits not in reply.text


@pytest.mark.parametrize("who", ["nobody", "operator"])
@pytest.mark.parametrize("fields", [{}, {"model": "poet"}, {"stream": True}, {"on_cold": "base"},
                                    {"adapters": []}])  # fmt: skip
async def test_whoever_has_no_signature_gets_no_answer(
    marked: Marked, who: str, fields: dict[str, Any]
) -> None:
    before = len(marked.server.engine.requests)
    reply = await marked.ask(who, **fields)
    assert reply.status_code == 403
    error = reply.json()["error"]
    assert error["code"] == "forbidden"
    assert "has no signature" in error["message"]
    assert len(marked.server.engine.requests) == before


async def test_a_revoked_signature_holds_no_longer_and_a_new_one_at_once(marked: Marked) -> None:
    path = f"/v1/watermarks/mark/users/{marked.ids['ann']}"
    assert (await marked.ask("ann")).status_code == 200
    gone = await marked.call("operator", "DELETE", path)
    assert gone.json()["revoked_at"] is not None
    assert (await marked.ask("ann")).status_code == 403
    assert (await marked.call("operator", "DELETE", path)).status_code == 404
    made = await marked.issue("ann", "01010101")
    assert (made.status_code, made.json()["generation"]) == (201, 2)
    assert (await marked.issue("ann", "55")).status_code == 200  # the same bits
    assert (await marked.ask("ann")).status_code == 200
    assert marked.bits() == ["01010101"]
    listed = await marked.call("operator", "GET", "/v1/watermarks/mark/users")
    own = [one for one in listed.json()["data"] if one["user"] == marked.ids["ann"]]
    assert [(one["generation"], one["signature"]) for one in own] == [
        (1, "00110101"), (2, "01010101")
    ]  # fmt: skip


async def test_refusals_are_counted_by_why_the_user_could_not_be_told(marked: Marked) -> None:
    async def counted() -> dict[str, float]:
        text = (await marked.call("operator", "GET", "/metrics")).text
        found = {}
        for line in text.splitlines():
            if line.startswith("polyadapt_mark_refusals_total{"):
                found[line.split('"')[1]] = float(line.rpartition(" ")[2])
        return found

    assert await counted() == {"no_user": 0, "no_signature": 0, "not_opened": 0}
    await marked.ask("nobody")
    await marked.ask("nobody", model="auto")
    await marked.ask("operator")
    with marked.server.store.signatures._database.write() as connection:
        connection.exec_driver_sql("UPDATE signatures SET bits = 'sealed:'")
    assert (await marked.ask("ann", stream=True)).status_code == 503
    assert await counted() == {"no_user": 1, "no_signature": 2, "not_opened": 1}


@pytest.mark.parametrize("bits", ["00110101", "11110000", "no"])
async def test_a_request_cannot_name_bits_or_find_out_its_own(marked: Marked, bits: str) -> None:
    before = len(marked.server.engine.requests)
    adapters = [{"name": "mark", "options": {"signature": bits}}]
    reply = await marked.ask("ann", adapters=adapters)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "adapters[0].options.signature"
    assert bits not in reply.json()["error"]["message"]
    assert len(marked.server.engine.requests) == before


async def test_workflows_are_marked_or_refused_as_well(marked: Marked) -> None:
    library = marked.server.app.state.services.workflows
    await library.put("default", "flow", vote(), may_replace=True, user=marked.ids["bob"])
    before = len(marked.server.engine.requests)
    assert (await marked.ask("nobody", model="flow")).status_code == 403
    assert len(marked.server.engine.requests) == before
    await marked.ask("bob", model="flow")
    asked = marked.server.engine.requests[before:]
    assert asked
    for request in asked:
        own = [dict(use.options) for use in request.adapters if use.adapter.name == "mark"]
        assert own == [{"signature": "11110000"}]


async def test_bits_are_shown_to_admins_alone(marked: Marked) -> None:
    path = f"/v1/watermarks/mark/users/{marked.ids['ann']}"
    assert (await marked.call("operator", "GET", path)).json()["signature"] == "00110101"
    for found in (path, "/v1/watermarks/mark/users"):
        reply = await marked.call("clerk", "GET", found)
        assert reply.status_code == 200
        assert "00110101" not in reply.text
        assert (await marked.call("ann", "GET", found)).status_code == 403
    policy = {"tenant": "default", "required": False}
    reply = await marked.call("clerk", "PUT", "/v1/watermarks/mark/policy", json=policy)
    assert reply.status_code == 403


@pytest.mark.parametrize(
    ("user", "bits", "status", "words"),
    [
        ("nobody", "0011", 400, "8 bits"),
        ("nobody", "00110101", 409, "another user's"),
        ("key-none", "00000000", 404, "no API key"),
    ],
)
async def test_what_cannot_be_issued_is_refused(
    marked: Marked, user: str, bits: str, status: int, words: str
) -> None:
    reply = await marked.issue(user, bits)
    assert reply.status_code == status
    assert words in reply.json()["error"]["message"]


async def test_an_adapter_that_tells_nobody_is_no_mark(marked: Marked) -> None:
    policy = {"tenant": "default", "required": True}
    reply = await marked.call("operator", "PUT", "/v1/watermarks/poet/policy", json=policy)
    assert reply.status_code == 400
    assert "is no mark" in reply.json()["error"]["message"]
    policy["tenant"] = "elsewhere"
    reply = await marked.call("operator", "PUT", "/v1/watermarks/mark/policy", json=policy)
    assert reply.status_code == 404  # that tenant does not see it


async def test_a_policy_that_is_taken_back_leaves_what_else_it_names(marked: Marked) -> None:
    both = {"adapters": [{"name": "chef"}, {"name": "mark"}]}
    assert (await marked.call("operator", "PUT", "/v1/policies/default", json=both)).is_success
    policy = {"tenant": "default", "required": False}
    for _ in range(2):
        reply = await marked.call("operator", "PUT", "/v1/watermarks/mark/policy", json=policy)
        assert reply.status_code == 200
        assert (await marked.ask("nobody")).status_code == 200
        assert [use.adapter.name for use in marked.last()] == ["chef"]
    policy["required"] = True
    await marked.call("operator", "PUT", "/v1/watermarks/mark/policy", json=policy)
    assert (await marked.ask("nobody")).status_code == 403


@pytest.fixture
def elsewhere(marked: Marked) -> Iterator[PolicyBook]:
    """The policies at another server, whose writes `marked` has not seen yet."""
    database = Database(marked.server.config.store_dir / "registry.sqlite")
    yield PolicyBook(database)
    database.close()


async def test_a_required_mark_leaves_what_another_server_has_just_put_beside_it(
    marked: Marked, elsewhere: PolicyBook
) -> None:
    mark, chef = (marked.server.store.resolve("default", name) for name in ("mark", "chef"))
    assert (await marked.ask("ann")).status_code == 200, "the policy is at hand"
    elsewhere.put("default", [PolicyEntry(mark), PolicyEntry(chef)])
    policy = {"tenant": "default", "required": True}
    reply = await marked.call("operator", "PUT", "/v1/watermarks/mark/policy", json=policy)
    assert reply.status_code == 200
    assert (await marked.ask("ann")).status_code == 200
    assert {use.adapter.name for use in marked.last()} == {"chef", "mark"}


async def test_sealing_a_policys_bits_leaves_what_another_server_puts_beside_them(
    marked: Marked, elsewhere: PolicyBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = marked.server.app.state.services.policies
    mark, chef = (marked.server.store.resolve("default", name) for name in ("mark", "chef"))
    clear = PolicyEntry(mark, options=(("signature", "10000001"),))
    elsewhere.put("default", [clear])
    marked.server.store.refresh()
    issue = policies.signatures.book.issue

    def meanwhile(*args: str) -> Any:
        elsewhere.put("default", [PolicyEntry(chef), clear])
        return issue(*args)

    monkeypatch.setattr(policies.signatures.book, "issue", meanwhile)
    await policies.seal_signatures()
    assert [entry.record.name for entry in policies.policies.get("default").entries] == [
        "chef", "mark"
    ]  # fmt: skip
    assert (await marked.ask("nobody")).status_code == 200
    assert marked.bits() == ["10000001"]
    (policy,) = elsewhere.list()
    assert dict(policy.entries[1].options) == {"signature": ISSUED}


async def test_a_policys_own_signature_is_the_tenants(marked: Marked) -> None:
    own = {"adapters": [{"name": "mark", "options": {"signature": "10000001"}}]}
    assert (await marked.call("operator", "PUT", "/v1/policies/default", json=own)).is_success
    for who in ("nobody", "ann", "operator"):
        assert (await marked.ask(who)).status_code == 200
        assert marked.bits() == ["10000001"]


async def test_no_request_reads_the_registry_on_the_event_loop(
    marked: Marked, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = marked.server
    text = [MarkSettings("kgw", 2)]
    server.store.text_policies.put("default", text, is_required=False)
    library = server.app.state.services.workflows
    await library.put("default", "flow", vote("poet"), may_replace=True, user=marked.ids["bob"])
    await library.put("shared", "theirs", vote(), may_replace=True)
    read, loop, traces = Database.read, threading.get_ident(), []

    def seen(self: Database) -> AbstractContextManager[Any]:
        if threading.get_ident() == loop:
            traces.append("".join(traceback.format_stack(limit=12)))
        return read(self)

    monkeypatch.setattr(Database, "read", seen)
    chat = [
        {"model": "nobody"}, {"model": "poet"}, {"model": "poet@1"}, {"model": "auto"},
        {"model": "poet", "on_cold": "fallback:chef"}, {"model": "flow"}, {"model": "theirs"},
        {"adapters": [{"name": "chef"}, {"name": "nobody"}]},
    ]  # fmt: skip
    for who in ("ann", "nobody", "operator"):
        for fields in chat:
            server.store.keys.create("default", ["infer"])  # a write: nothing is known any more
            reply = await marked.ask(who, **fields)
            assert reply.status_code in (200, 403, 404), reply.text
            assert traces == [], (who, fields)
    for method, path, body in (
        ("GET", "/v1/models/poet", None), ("GET", "/v1/models", None),
        ("GET", "/v1/workflows/theirs", None), ("GET", "/v1/workflows", None),
        ("POST", "/tokenize", {"model": "chef", "prompt": "hi"}),
        ("POST", "/v1/adapters/poet/load", {}), ("POST", "/v1/adapters/poet/unload", {}),
        ("GET", "/v1/watermarks/mark", None), ("GET", "/v1/watermarks/mark/users", None),
        ("PUT", "/v1/watermarks/mark/policy", {"tenant": "default", "required": True}),
        ("PUT", "/v1/policies/default", {"adapters": [{"name": "mark"}]}),
    ):  # fmt: skip
        server.store.keys.create("default", ["infer"])
        reply = await marked.call("operator", method, path, json=body)
        assert reply.status_code == 200, (path, reply.text)
        assert traces == [], path
