"""Text marks over HTTP: whoever asks is marked as who it is or refused, and a text is traced back.

The fake engine writes letters with the real sampler, so that what is served is what is read.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import torch
from tests.api.conftest import Maker, Server, peft_files
from tests.support.fake_engine import FakeEngine

from polyadapt.engine.request import RequestGroup
from polyadapt.engine.sampler import sample
from polyadapt.errors import InvalidRequest
from polyadapt.types import MarkSettings, Request
from polyadapt.watermark.evidence import verify
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.text import user_key
from polyadapt.watermark.text_reading import signer_of

pytestmark = pytest.mark.anyio

OPERATOR = "sk-operator-" + "x" * 20
MASTER = SecretKey(bytes(range(100, 132)))
LETTERS = [*range(97, 123), 32]
SCHEMES = ["kgw", "synthid", "gumbel"]
POLICY = "/v1/watermarks/text/policy"
ALPHA = (
    1e-5  # users are drawn anew in every run: at the default one of them would be named some day
)


def letters(request: Request, index: int) -> Sequence[int]:
    """Letters at random, as the engine's own sampler draws them for this request."""
    sequence = RequestGroup.of(request, 0.0).sequences[index]
    logits = torch.full((260,), -30.0)
    logits[LETTERS] = torch.linspace(0.0, 2.0, len(LETTERS))
    for _ in range(request.sampling.max_tokens):
        drawn = sample(logits, sequence, ())
        assert drawn is not None
        sequence.token_ids.append(drawn.token_id)
    return sequence.token_ids[sequence.num_prompt :]


@dataclass
class Marked:
    """A server whose texts are marked, and keys of some users."""

    server: Server
    secrets: dict[str, str] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)

    async def call(self, who: str, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.secrets.get(who, OPERATOR)}"}
        return await self.server.client.request(method, path, headers=headers, **options)

    async def ask(self, who: str, **fields: Any) -> httpx.Response:
        body = {"model": "fake-base", "messages": [{"role": "user", "content": "hi"}], **fields}
        return await self.call(who, "POST", "/v1/chat/completions", json=body)

    async def text(self, who: str, **fields: Any) -> str:
        reply = await self.ask(who, max_tokens=200, **fields)
        assert reply.status_code == 200, reply.text
        content: str = reply.json()["choices"][0]["message"]["content"]
        return content

    async def require(self, scheme: str, tenant: str = "default", **fields: Any) -> Any:
        body = {"tenant": tenant, "required": True, "scheme": scheme, **fields}
        reply = await self.call("operator", "PUT", POLICY, json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    async def trace(self, text: str, who: str = "clerk", **fields: Any) -> httpx.Response:
        return await self.call(
            who, "POST", "/v1/watermarks/text/trace", json={"text": text, "alpha": ALPHA, **fields}
        )

    async def detect(self, text: str, who: str = "clerk", **fields: Any) -> httpx.Response:
        return await self.call(
            who, "POST", "/v1/watermarks/text/detect", json={"text": text, "alpha": ALPHA, **fields}
        )


async def start(make_server: Maker, **settings: Any) -> Marked:
    server = await make_server(FakeEngine(reply=letters), api_key=OPERATOR, **settings)
    found = Marked(server)
    for user, tenant, scopes in (
        ("ann", "default", ["infer"]), ("bob", "default", ["infer"]),
        ("clerk", "default", ["watermarks"]), ("eve", "other", ["infer"]),
        ("other clerk", "other", ["watermarks"]),
    ):  # fmt: skip
        key, secret = server.store.keys.create(tenant, scopes, user)
        found.ids[user], found.secrets[user] = key.id, secret
    return found


@pytest.fixture
async def marked(make_server: Maker) -> Marked:
    return await start(make_server, text_mark_key=MASTER.to_text())


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_a_text_is_traced_to_who_asked_for_it_and_nobody_elses_is(
    marked: Marked, scheme: str
) -> None:
    before = await marked.text("ann")
    await marked.require(scheme)
    texts = {user: await marked.text(user) for user in ("ann", "bob")}
    for user, text in texts.items():
        found = (await marked.trace(text)).json()
        assert (found["verdict"], found["num_users"]) == ("named", 3)
        assert [entry["user"] for entry in found["accused"]] == [marked.ids[user]]
        first = found["ranked"][0]
        assert first["family_p_value"] < 1e-5
        assert first["score"] > first["expected"]
        assert first["settings"]["scheme"] == scheme
        own = (await marked.detect(text, user=marked.ids[user])).json()
        assert (own["verdict"], own["num_users"]) == ("named", 1)
    assert (await marked.detect(texts["ann"], user=marked.ids["bob"])).json()["verdict"] == "nobody"
    nobody = (await marked.trace(before)).json()
    assert (nobody["verdict"], nobody["accused"], len(nobody["ranked"])) == ("nobody", [], 3)
    assert (await marked.text("eve")) is not None, "another tenant is served as before"
    assert marked.server.engine.requests[-1].text_mark is None


@pytest.mark.parametrize("fields", [
    {}, {"n": 2}, {"stream": True}, {"model": "poet"}, {"adapters": []}, {"logprobs": True},
    {"temperature": 0.7, "top_p": 0.9}, {"model": "poet", "on_cold": "base"}, {"user": "bob"},
])  # fmt: skip
async def test_every_request_carries_its_own_users_key_alone(
    marked: Marked, fields: dict[str, Any]
) -> None:
    reply = await marked.call(
        "operator", "POST", "/v1/adapters", data={"name": "poet"}, files=peft_files("poet")
    )
    assert reply.status_code == 201
    await marked.require("synthid", context_width=3, depth=9)
    for user in ("ann", "bob"):
        reply = await marked.ask(user, **fields)
        assert reply.status_code == 200, reply.text
        mark = marked.server.engine.requests[-1].text_mark
        assert mark is not None
        assert mark.key == tuple(user_key(MASTER, marked.ids[user]).tolist())
        assert mark.settings == MarkSettings("synthid", 3, depth=9)


async def test_every_prompt_of_a_completion_is_marked(marked: Marked) -> None:
    await marked.require("kgw")
    reply = await marked.call(
        "ann", "POST", "/v1/completions", json={"model": "fake-base", "prompt": ["a", "b"]}
    )
    assert reply.status_code == 200
    assert all(request.text_mark for request in marked.server.engine.requests[-2:])


async def test_every_sample_of_a_workflow_is_marked_as_whoever_asked(marked: Marked) -> None:
    reasoner = {"adapter": None, "instruction": "", "template": "{question}"}
    body = {
        "name": "vote",
        "definition": {"kind": "self_consistency", "reasoner": reasoner, "num_samples": 3},
    }
    reply = await marked.call("operator", "POST", "/v1/workflows", json=body)
    assert reply.status_code == 201, reply.text
    await marked.require("synthid")
    engine = marked.server.engine
    for user in ("ann", "bob"):
        engine.requests.clear()
        reply = await marked.ask(user, model="vote")
        assert reply.status_code == 200, reply.text
        keys = [request.text_mark and request.text_mark.key for request in engine.requests]
        assert keys == [tuple(user_key(MASTER, marked.ids[user]).tolist())] * 3
    engine.requests.clear()
    reply = await marked.ask("operator", model="vote")
    assert (reply.status_code, engine.requests) == (403, [])


async def test_whoever_is_no_user_gets_no_text(marked: Marked) -> None:
    await marked.require("kgw")
    before = len(marked.server.engine.requests)
    reply = await marked.ask("operator")
    assert reply.status_code == 403
    assert "key of its own" in reply.json()["error"]["message"]
    assert len(marked.server.engine.requests) == before
    off = {"tenant": "default", "required": False, "scheme": "kgw"}
    assert (await marked.call("operator", "PUT", POLICY, json=off)).status_code == 200
    assert (await marked.ask("operator")).status_code == 200, "nothing but the policy refused it"


async def test_what_is_marked_and_what_is_refused_is_counted(marked: Marked) -> None:
    await marked.ask("ann", max_tokens=3)
    await marked.require("kgw")
    await marked.ask("bob", max_tokens=5, stream=True)
    await marked.ask("operator")
    scrape = (await marked.call("operator", "GET", "/metrics")).text
    assert "polyadapt_text_marked_generations_total 1.0" in scrape
    assert "polyadapt_text_marked_tokens_total 5.0" in scrape
    assert "polyadapt_generated_tokens_total 8.0" in scrape
    assert 'polyadapt_failed_generations_total{code="forbidden"} 1.0' in scrape


async def test_without_a_key_nothing_is_required_and_what_was_is_refused(
    make_server: Maker, marked: Marked
) -> None:
    keyless = await start(make_server)
    body = {"tenant": "default", "required": True, "scheme": "kgw"}
    reply = await keyless.call("operator", "PUT", POLICY, json=body)
    assert reply.status_code == 503
    assert "TEXT_MARK_KEY_FILE" in reply.json()["error"]["message"]
    assert (await keyless.ask("ann")).status_code == 200
    # A policy of a time when there was a key.
    keyless.server.store.text_policies.put("default", [MarkSettings("kgw", 2)], is_required=True)
    reply = await keyless.ask("ann")
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "policy_unavailable"
    assert (await keyless.trace("hello")).status_code == 503


@pytest.mark.parametrize("scheme", ["synthid", "gumbel"])
@pytest.mark.parametrize("sharp", [
    {"temperature": 0.0}, {"temperature": 0.19}, {"top_k": 1}, {"top_p": 0.05}, {"min_p": 0.9},
])  # fmt: skip
async def test_what_leaves_no_choice_is_refused_or_marked_otherwise(
    marked: Marked, scheme: str, sharp: dict[str, Any]
) -> None:
    await marked.require(scheme)
    before = len(marked.server.engine.requests)
    reply = await marked.ask("ann", **sharp)
    assert reply.status_code == 400
    assert "temperature from 0.2" in reply.json()["error"]["message"]
    assert len(marked.server.engine.requests) == before
    await marked.require(scheme, sharp="kgw", bias=6.0)
    text = await marked.text("ann", **sharp)
    mark = marked.server.engine.requests[-1].text_mark
    assert mark is not None
    assert (mark.settings.scheme, mark.settings.bias) == ("kgw", 6.0)
    assert text
    assert (await marked.ask("ann")).status_code == 200
    usual = marked.server.engine.requests[-1].text_mark
    assert usual is not None
    assert usual.settings.scheme == scheme


async def test_texts_of_earlier_policies_are_still_traced(marked: Marked) -> None:
    texts = []
    for fields in ({"scheme": "kgw"}, {"scheme": "gumbel", "key_version": 2}, {"scheme": "kgw"}):
        await marked.require(**fields)
        texts.append(await marked.text("bob"))
    found = [(await marked.trace(text)).json()["accused"] for text in texts]
    assert [[entry["user"] for entry in accused] for accused in found] == [[marked.ids["bob"]]] * 3
    listed = (await marked.call("operator", "GET", POLICY)).json()["data"]
    assert [(policy["generation"], policy["required"]) for policy in listed] == [(3, True)]


async def test_findings_are_signed(marked: Marked) -> None:
    await marked.require("kgw")
    text = await marked.text("ann")
    reply = (await marked.trace(text)).json()
    record = verify(reply["evidence"].encode(), signer_of(MASTER).public_key)
    assert record["verdict"] == "named"
    assert record["accused"][0]["user"] == marked.ids["ann"]
    assert record["key_id"] == MASTER.id
    assert text not in reply["evidence"]


async def test_tenants_read_their_own_marks_alone(marked: Marked) -> None:
    await marked.require("kgw")
    await marked.require("kgw", tenant="other")
    text = await marked.text("eve")
    assert (await marked.trace(text)).json()["verdict"] == "nobody"
    other = (await marked.trace(text, "other clerk")).json()
    assert [entry["user"] for entry in other["accused"]] == [marked.ids["eve"]]
    assert (await marked.trace(text, tenant="other")).status_code == 403
    assert (await marked.trace(text, users=[marked.ids["eve"]])).status_code == 404
    assert (await marked.detect(text, user=marked.ids["eve"])).status_code == 404
    assert (await marked.trace(text, "operator", tenant="other")).json()["verdict"] == "named"
    assert (await marked.trace(text, "ann")).status_code == 403
    listed = (await marked.call("other clerk", "GET", POLICY)).json()["data"]
    assert [policy["tenant"] for policy in listed] == ["other"]
    named = await marked.trace(text, "operator", users=[marked.ids["eve"], "key-deleted"])
    assert named.json()["num_users"] == 2


async def test_texts_for_transformers_detector_are_not_read_here(marked: Marked) -> None:
    await marked.require("kgw", seeding="lefthash")
    reply = await marked.trace(await marked.text("ann"))
    assert reply.status_code == 400
    assert "WatermarkDetector" in reply.json()["error"]["message"]
    await marked.require("kgw")
    found = (await marked.trace(await marked.text("ann"))).json()
    assert found["verdict"] == "named"
    assert [own["seeding"] for own in found["unread"]] == ["lefthash"]


@pytest.mark.parametrize("body", [
    {"scheme": "kgw", "bias": 0.1}, {"scheme": "kgw", "ratio": 0.9}, {"scheme": "no"},
    {"scheme": "synthid", "depth": 33}, {"scheme": "kgw", "context_width": 9},
    {"scheme": "synthid", "seeding": "lefthash"}, {"scheme": "kgw", "key": "mine"},
    {"scheme": "kgw", "seeding": "lefthash", "context_width": 2},
])  # fmt: skip
async def test_policies_that_mean_nothing_are_refused(marked: Marked, body: dict[str, Any]) -> None:
    given = {"tenant": "default", "required": True, **body}
    assert (await marked.call("operator", "PUT", POLICY, json=given)).status_code == 400
    assert (await marked.call("clerk", "PUT", POLICY, json=given)).status_code in (400, 403)


async def test_texts_have_bounds_and_an_unmarked_tenants_are_nobodys(marked: Marked) -> None:
    assert (await marked.trace("hello")).status_code == 404, "nothing was ever marked"
    await marked.require("kgw")
    assert (await marked.trace("")).status_code == 400
    assert (await marked.trace("a" * 65_537)).status_code == 400
    assert (await marked.trace("hello", alpha=0.7)).status_code == 400
    assert (await marked.detect("hello", "operator")).status_code == 400
    assert (await marked.trace("x")).json()["verdict"] == "nobody"


async def test_no_key_is_in_any_reply_log_or_error(
    marked: Marked, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    await marked.require("gumbel")
    replies = [await marked.ask("ann"), await marked.trace("hello there, is it mine?")]
    replies += [await marked.ask("ann", temperature=0.0), await marked.ask("operator")]
    marked.server.engine.crash = RuntimeError("injected")
    replies.append(await marked.ask("ann"))
    assert replies[-1].status_code == 500
    replies.append(await marked.call("operator", "GET", "/metrics"))
    shown = caplog.text + "".join(reply.text for reply in replies)
    words = user_key(MASTER, marked.ids["ann"]).tolist()
    secrets = [MASTER.to_text(), base64.b64decode(MASTER.to_text()).hex()]
    secrets += [str(word) for word in words] + [f"{word & (2**64 - 1):x}" for word in words]
    for secret in secrets:
        assert secret not in shown
    assert json.loads(replies[1].text)["verdict"] == "nobody"


async def test_a_bad_key_stops_the_server_without_being_shown(make_server: Maker) -> None:
    for bad in ("not base64 at all!", base64.b64encode(b"short").decode()):
        with pytest.raises(InvalidRequest) as caught:
            await make_server(text_mark_key=bad)
        assert bad not in str(caught.value)
