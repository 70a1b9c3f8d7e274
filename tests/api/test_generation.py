"""Chat completions and completions over HTTP: OpenAI's shapes, and what was served."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from tests.api.conftest import Maker, Server
from tests.support.fake_engine import EOS, FakeEngine, say

from polyadapt.api.schemas.chat import ChatChunk, ChatReply, ChatRequest
from polyadapt.api.schemas.completions import CompletionReply, CompletionRequest
from polyadapt.tasks.directory import DEFAULT_TENANT

pytestmark = pytest.mark.anyio

USER = [{"role": "user", "content": "hi"}]


async def chat(server: Server, **fields: Any) -> httpx.Response:
    body = {"model": "fake-base", "messages": USER, **fields}
    return await server.client.post("/v1/chat/completions", json=body)


async def complete(server: Server, **fields: Any) -> httpx.Response:
    body = {"model": "fake-base", "prompt": "hi", **fields}
    return await server.client.post("/v1/completions", json=body)


def chunks(reply: httpx.Response) -> list[dict[str, Any]]:
    """Return a stream's JSON events; it must end in [DONE]."""
    assert reply.status_code == 200, reply.text
    events = [line[6:] for line in reply.text.split("\n\n") if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


async def test_a_chat_reply_has_openais_shape(server: Server) -> None:
    reply = await chat(server, n=2)
    assert reply.status_code == 200
    body = ChatReply.model_validate(reply.json(), extra="forbid")
    assert [choice.message.content for choice in body.choices] == ["I am base 0.", "I am base 1."]
    assert body.usage.completion_tokens == 2 * 13
    assert body.usage.total_tokens == body.usage.prompt_tokens + body.usage.completion_tokens
    assert body.adapters == []
    assert "x-adapter-digest" not in reply.headers


async def test_the_usage_says_how_much_of_the_prompts_was_found(server: Server) -> None:
    server.engine.num_cached_tokens = 16
    assert (await chat(server)).json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}
    stream = chunks(await chat(server, stream=True, stream_options={"include_usage": True}))
    assert stream[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}
    reply = await complete(server, prompt=["one", "two"])
    assert reply.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 32}


@pytest.mark.parametrize("ask", [chat, complete])
async def test_a_salt_parts_the_prefixes_of_its_tenant_alone(server: Server, ask: Any) -> None:
    tenant = DEFAULT_TENANT
    for salt in (None, "mine", tenant):
        reply = await ask(server, cache_salt=salt)
        assert reply.status_code == 200, reply.text
    salts = [request.cache_salt for request in server.engine.requests]
    owner = ("tenant", tenant)
    assert salts == [owner, (*owner, "mine"), (*owner, tenant)]
    assert (await ask(server, cache_salt="")).status_code == 400


async def test_tenants_of_a_pool_share_prefixes_and_no_others(make_server: Maker) -> None:
    server = await make_server(api_key="sk-operator", prefix_pools={"legal": ["a", "b"]})
    for tenant in ("a", "b", "c", "legal"):
        key = server.store.keys.create(tenant, ["infer"])[1]
        for salt in (None, "mine"):
            headers = {"authorization": f"Bearer {key}"}
            body = {"model": "fake-base", "prompt": "one", "cache_salt": salt}
            reply = await server.client.post("/v1/completions", json=body, headers=headers)
            assert reply.status_code == 200, reply.text
    salts = [request.cache_salt for request in server.engine.requests]
    pool = [("pool", "legal"), ("pool", "legal", "mine")]
    assert salts[:4] == pool * 2
    assert not set(salts[4:]) & set(pool)
    assert len(set(salts[4:])) == 4


async def test_an_adapter_is_named_in_body_and_header(server: Server) -> None:
    poet = await server.upload("poet")
    for model in ("poet", "poet@1", "fake-base:poet", "fake-base::poet@1"):
        reply = await chat(server, model=model)
        body = reply.json()
        assert body["choices"][0]["message"]["content"] == "I am poet 0."
        assert body["model"] == model
        assert body["adapters"] == [
            {"name": "poet", "version": 1, "digest": poet["digest"], "tier": "device",
             "load_ms": 1.5}
        ]  # fmt: skip
        assert reply.headers["x-adapter-digest"] == poet["digest"]


@pytest.mark.parametrize("ask", [chat, complete])
async def test_what_is_approximate_says_so_in_the_reply(server: Server, ask: Any) -> None:
    await server.upload("poet")
    asked = [{"name": "poet", "options": {"frozen_after": 3}}]
    (served,) = (await ask(server, adapters=asked)).json()["adapters"]
    assert served["approximate"] is True
    (served,) = (await ask(server, adapters=[{"name": "poet"}])).json()["adapters"]
    assert "approximate" not in served


async def test_the_adapters_field_replaces_the_models_own(server: Server) -> None:
    await server.upload("poet")
    await server.upload("chef")
    reply = await chat(server, model="poet", adapters=[{"name": "chef", "scale": 0.5}])
    assert reply.json()["adapters"][0]["name"] == "chef"
    assert server.engine.requests[-1].adapters[0].scale == 0.5
    assert (await chat(server, model="poet", adapters=[])).json()["adapters"] == []


async def test_a_chat_stream_adds_up_to_the_whole_reply(server: Server) -> None:
    whole = (await chat(server, n=2, logprobs=True, top_logprobs=2)).json()
    stream = chunks(await chat(server, n=2, logprobs=True, top_logprobs=2, stream=True))
    texts, scores, reasons = ["", ""], [[], []], [None, None]  # type: ignore[var-annotated]
    for chunk in stream:
        ChatChunk.model_validate(chunk, extra="forbid")
        for choice in chunk["choices"]:
            index = choice["index"]
            texts[index] += choice["delta"].get("content", "")
            scores[index] += (choice["logprobs"] or {"content": []})["content"]
            reasons[index] = choice["finish_reason"] or reasons[index]
    for choice in whole["choices"]:
        index = choice["index"]
        assert choice["message"]["content"] == texts[index]
        assert choice["logprobs"]["content"] == scores[index]
        assert choice["finish_reason"] == reasons[index]
    assert [c["choices"][0]["delta"] for c in stream[:2]] == [
        {"role": "assistant", "content": ""}
    ] * 2


@pytest.mark.parametrize("include_usage", [True, False])
async def test_only_the_last_chunk_says_what_was_served(
    server: Server, include_usage: bool
) -> None:
    await server.upload("poet")
    options = {"include_usage": include_usage}
    stream = chunks(await chat(server, model="poet", n=2, stream=True, stream_options=options))
    assert [i for i, chunk in enumerate(stream) if "adapters" in chunk] == [len(stream) - 1]
    assert stream[-1]["adapters"][0]["name"] == "poet"
    if include_usage:
        assert stream[-1]["choices"] == []
        assert stream[-1]["usage"]["completion_tokens"] == 2 * 13
    else:
        assert stream[-1]["choices"][0]["finish_reason"] == "stop"
        assert "usage" not in stream[-1]


async def test_chat_logprobs_name_tokens_and_bytes(server: Server) -> None:
    server.engine.reply = lambda request, index: [*"é".encode(), EOS]
    reply = await chat(server, logprobs=True, top_logprobs=1)
    first, second = reply.json()["choices"][0]["logprobs"]["content"]
    assert (first["token"], first["bytes"], first["logprob"]) == ("\ufffd", [0xC3], -0.5)
    assert second["bytes"] == [0xA9]
    assert len(first["top_logprobs"]) == 1


async def test_logprobs_without_top_ones(server: Server) -> None:
    content = (await chat(server, logprobs=True)).json()["choices"][0]["logprobs"]["content"]
    assert [token["top_logprobs"] for token in content] == [[]] * len("I am base 0.")


async def test_stop_strings_end_a_reply(server: Server) -> None:
    server.engine.reply = say("one two three")
    body = (await chat(server, stop="two")).json()
    assert body["choices"][0]["message"]["content"] == "one "
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == len("one two")


async def test_max_tokens_end_a_reply(server: Server) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        body = (await chat(server, **{field: 4})).json()
        assert body["choices"][0]["message"]["content"] == "I am"
        assert body["choices"][0]["finish_reason"] == "length"


async def test_token_ids_are_returned_on_request(server: Server) -> None:
    server.engine.reply = say("ok")
    body = (await chat(server, return_token_ids=True)).json()
    assert body["choices"][0]["token_ids"] == [*b"ok", EOS]
    assert len(body["prompt_token_ids"]) == body["usage"]["prompt_tokens"]
    stream = chunks(await chat(server, return_token_ids=True, stream=True))
    ids = [i for chunk in stream for i in chunk["choices"][0].get("token_ids", [])]
    assert ids == [*b"ok", EOS]
    assert stream[0]["prompt_token_ids"] == body["prompt_token_ids"]


async def test_every_sampling_field_reaches_the_engine(server: Server) -> None:
    await chat(
        server, temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, presence_penalty=1.0,
        frequency_penalty=-1, repetition_penalty=1.2, seed=-1, stop_token_ids=[7],
        logit_bias={"65": -100, "66": 1.5}, min_tokens=2, ignore_eos=True, max_tokens=9,
        logprobs=True, top_logprobs=3,
    )  # fmt: skip
    sampling = server.engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 5)
    assert (sampling.min_p, sampling.presence_penalty) == (0.1, 1.0)
    assert (sampling.frequency_penalty, sampling.repetition_penalty) == (-1.0, 1.2)
    assert (sampling.seed, sampling.stop_token_ids) == (2**63 - 1, (7,))
    assert sampling.logit_bias == ((65, -100.0), (66, 1.5))
    assert (sampling.min_tokens, sampling.ignore_eos, sampling.max_tokens) == (2, True, 9)
    assert (sampling.num_logprobs, sampling.num_prompt_logprobs) == (3, None)


async def test_priority_and_speculation_reach_the_engine(server: Server) -> None:
    for call in (chat, complete):
        assert (await call(server, priority=-7, speculative_tokens=0)).status_code == 200
        assert (await call(server)).status_code == 200
    asked = [(r.priority, r.speculative_tokens) for r in server.engine.requests]
    assert asked == [(-7, 0), (0, None)] * 2


@pytest.mark.parametrize("is_stream", [False, True])
async def test_several_tokens_in_one_event_answer_like_one_after_the_other(
    make_server: Maker, is_stream: bool
) -> None:
    fields = {"logprobs": True, "top_logprobs": 2, "return_token_ids": True, "stop": ["zz"]}

    def fold(reply: httpx.Response) -> list[Any]:
        choices = [chunk["choices"][0] for chunk in chunks(reply)] if is_stream else None
        if choices is None:
            choice = reply.json()["choices"][0]
            scores = choice["logprobs"]["content"]
            return [choice["message"]["content"], choice["token_ids"], scores,
                    choice["finish_reason"]]  # fmt: skip
        scored = [s for c in choices if c.get("logprobs") for s in c["logprobs"]["content"]]
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
        ids = [i for choice in choices for i in choice.get("token_ids", [])]
        return [text, ids, scored, choices[-1]["finish_reason"]]

    for text in ("grüße und mehr", "an end zz and more"):
        answers = []
        for num_tokens in (1, 3, 5):
            server = await make_server(FakeEngine(reply=say(text), tokens_per_event=num_tokens))
            answers.append(fold(await chat(server, stream=is_stream, **fields)))
        assert answers[0] == answers[1] == answers[2]


async def test_temperature_zero_is_not_taken_for_absent(server: Server) -> None:
    await chat(server, temperature=0)
    await chat(server)
    assert [r.sampling.temperature for r in server.engine.requests] == [0.0, 1.0]


async def test_fields_that_change_nothing_are_accepted(server: Server) -> None:
    reply = await chat(
        server, user="u", metadata={"a": "b"}, store=False, service_tier="auto",
        parallel_tool_calls=True, tools=[], tool_choice="none", response_format={"type": "text"},
        modalities=["text"], on_cold="wait", safety_identifier="s", prompt_cache_key="k",
        functions=None, stop=None, max_tokens=None, stream=None,
    )  # fmt: skip
    assert reply.status_code == 200, reply.text


async def test_null_is_absent_for_every_optional_field(server: Server) -> None:
    plain = (await chat(server)).json(), (await complete(server)).json()
    for call, schema, expected in zip(
        (chat, complete), (ChatRequest, CompletionRequest), plain, strict=True
    ):
        for name, field in schema.model_fields.items():
            if not field.is_required():
                reply = await call(server, **{name: None})
                assert reply.status_code == 200, f"{name}: {reply.text}"
                assert reply.json()["choices"] == expected["choices"]


async def test_messages_of_every_kind_are_rendered(server: Server) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "audio": None},
        {"role": "user", "content": "d", "name": "Ann"},
    ]
    await chat(server, messages=messages)
    text = bytes(i for i in server.engine.requests[0].prompt_ids if i < 256).decode()
    assert text == "system\nBe brief.\nuser\na\nb\nassistant\nc\nuser\nd\nassistant\n"


async def test_a_completion_has_openais_shape(server: Server) -> None:
    reply = await complete(server, prompt=["a", "b"], n=2)
    body = CompletionReply.model_validate(reply.json(), extra="forbid")
    assert [choice.index for choice in body.choices] == [0, 1, 2, 3]
    assert body.usage is not None
    assert body.usage.prompt_tokens == 2
    assert server.engine.requests[0].sampling.max_tokens == 16


@pytest.mark.parametrize(
    "prompt", ["hi", ["hi"], [104, 105], [[104, 105]]], ids=["text", "texts", "ids", "id lists"]
)
async def test_prompts_come_in_four_forms(server: Server, prompt: Any) -> None:
    await complete(server, prompt=prompt)
    assert server.engine.requests[0].prompt_ids == (104, 105)


async def test_completion_logprobs_are_parallel_lists(server: Server) -> None:
    server.engine.reply = say("aé")
    logprobs = (await complete(server, logprobs=1)).json()["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["a", "\ufffd", "\ufffd"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"a": -0.5}, {"\ufffd": -0.5}, {"\ufffd": -0.5}],
        "text_offset": [0, 1, 1],
    }


async def test_echo_puts_the_scored_prompt_in_front(server: Server) -> None:
    server.engine.reply = say("!")
    choice = (await complete(server, echo=True, logprobs=0)).json()["choices"][0]
    assert choice["text"] == "hi!"
    assert choice["logprobs"]["tokens"] == ["h", "i", "!"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert choice["logprobs"]["top_logprobs"] is None
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]


@pytest.mark.parametrize("logprobs", [None, 1])
async def test_an_echoed_stream_adds_up_to_the_whole_reply(
    server: Server, logprobs: int | None
) -> None:
    fields = {"prompt": ["ab", [99, 256]], "n": 2, "echo": True, "logprobs": logprobs}
    whole = (await complete(server, **fields)).json()
    texts, offsets = [""] * 4, [[], [], [], []]  # type: ignore[var-annotated]
    for chunk in chunks(await complete(server, stream=True, **fields)):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
            if choice["logprobs"] is not None:
                offsets[choice["index"]] += choice["logprobs"]["text_offset"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert texts[2].startswith("c<|im_start|>")
    if logprobs is not None:
        assert offsets == [choice["logprobs"]["text_offset"] for choice in whole["choices"]]


async def test_prompt_logprobs_have_one_place_for_each_token(server: Server) -> None:
    for reply in (
        (await complete(server, prompt_logprobs=1)).json()["choices"][0],
        (await chat(server, prompt_logprobs=1)).json(),
    ):
        places = reply["prompt_logprobs"]
        assert places[0] is None
        assert all(len(place) == 1 for place in places[1:])
    assert reply["prompt_logprobs"][1]["117"] == {"logprob": -0.5, "decoded_token": "u"}


async def test_an_impossible_token_has_a_finite_logprob(server: Server) -> None:
    from polyadapt.api.token_text import prompt_logprobs
    from polyadapt.types import TokenLogprob

    tokenizer = server.app.state.services.text.tokenizer
    places = prompt_logprobs(tokenizer, [TokenLogprob(97, float("-inf"))])
    assert places[1] is not None
    assert places[1]["97"].logprob == -9999.0


async def test_special_tokens_in_a_message_are_text(server: Server) -> None:
    await chat(server, messages=[{"role": "user", "content": "<|im_end|><|im_start|>"}])
    special = [i for i in server.engine.requests[0].prompt_ids if i >= 256]
    assert special == [256, 257, 256]


async def test_models_are_the_base_and_its_adapters(server: Server) -> None:
    await server.upload("poet")
    await server.upload("chef")
    body = (await server.client.get("/v1/models")).json()
    assert [model["id"] for model in body["data"]] == ["fake-base", "chef", "poet"]
    assert [model["parent"] for model in body["data"]] == [None, "fake-base", "fake-base"]
    page = (await server.client.get("/v1/models", params={"limit": 1, "after": "chef"})).json()
    assert [model["id"] for model in page["data"]] == ["poet"]
    assert not page["has_more"]
    one = (await server.client.get("/v1/models/fake-base::poet@1")).json()
    assert (one["id"], one["parent"]) == ("fake-base::poet@1", "fake-base")
    missing = await server.client.get("/v1/models/nobody")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


async def test_tokenize_and_detokenize_are_inverse(server: Server) -> None:
    reply = await server.client.post(
        "/tokenize", json={"prompt": "é<|im_end|>", "return_token_strs": True}
    )
    assert reply.json() == {
        "count": 3,
        "max_model_len": 256,
        "tokens": [0xC3, 0xA9, 257],
        "token_strs": ["\ufffd", "\ufffd", "<|im_end|>"],
    }
    back = await server.client.post("/detokenize", json={"tokens": reply.json()["tokens"]})
    assert back.json() == {"prompt": "é<|im_end|>"}


async def test_tokenize_renders_chats(server: Server) -> None:
    reply = await server.client.post("/tokenize", json={"messages": USER, "model": "fake-base"})
    await chat(server)
    assert tuple(reply.json()["tokens"]) == server.engine.requests[0].prompt_ids
