"""The official client, unchanged, against a server on a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import openai
import pytest
from tests.api.conftest import Server, listening
from tests.support.fake_engine import say

from polyadapt.errors import QueueFull

pytestmark = pytest.mark.anyio


@pytest.fixture
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    await server.upload("poet")
    async with AsyncExitStack() as stack:
        port = await stack.enter_async_context(listening(server.app))
        yield await stack.enter_async_context(
            openai.AsyncOpenAI(
                base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
            )
        )


async def test_chats_completions_and_models_work(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in await client.models.list()] == ["fake-base", "poet"]
    chat = await client.chat.completions.create(
        model="poet",
        messages=[{"role": "user", "content": "hi"}],
        n=2,
        logprobs=True,
        top_logprobs=2,
        seed=1,
    )
    assert [c.message.content for c in chat.choices] == ["I am poet 0.", "I am poet 1."]
    assert chat.choices[0].logprobs is not None
    assert chat.model_extra is not None
    assert chat.model_extra["adapters"][0]["name"] == "poet"
    completion = await client.completions.create(model="fake-base", prompt="hi", logprobs=1)
    assert completion.choices[0].text == "I am base 0."
    follow = await client.chat.completions.create(
        model="poet",
        messages=[{"role": "user", "content": "hi"},
                  chat.choices[0].message.model_dump(),  # type: ignore[list-item]
                  {"role": "user", "content": "go on"}],
    )  # fmt: skip
    assert follow.usage is not None


async def test_streams_work(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="poet",
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "I am poet 0."
    assert chunks[-1].usage is not None
    assert chunks[-1].model_extra is not None
    assert chunks[-1].model_extra["adapters"][0]["name"] == "poet"


async def test_errors_become_the_clients_own(client: openai.AsyncOpenAI, server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.completions.create(model="nobody", prompt="hi")
    assert missing.value.code == "model_not_found"
    assert missing.value.request_id is not None
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.completions.create(model="poet", prompt="hi", n=0)
    assert wrong.value.param == "n"
    server.engine.refusal = QueueFull("full", retry_after_s=9)
    with pytest.raises(openai.RateLimitError) as full:
        await client.completions.create(model="poet", prompt="hi")
    assert full.value.response.headers["retry-after"] == "9"


async def test_an_error_in_a_stream_is_raised(client: openai.AsyncOpenAI, server: Server) -> None:
    server.engine.failure = (2, "numerical_error", "non-finite logits")
    stream = aiter(await client.completions.create(model="poet", prompt="hi", stream=True))
    text = "".join([(await anext(stream)).choices[0].text for _ in range(2)])
    assert text == "I "
    with pytest.raises(openai.APIError, match="non-finite"):
        await anext(stream)


async def test_closing_a_stream_cancels_it(client: openai.AsyncOpenAI, server: Server) -> None:
    server.engine.reply = say("x" * 100)
    server.engine.gate = asyncio.Semaphore(5)
    stream = await client.completions.create(model="poet", prompt="hi", stream=True, max_tokens=100)
    await anext(aiter(stream))
    await stream.close()
    await server.engine.until_idle()
    assert len(server.engine.cancelled) == 1
