"""The official OpenAI client against the real server, the real model and the demo adapters."""

from __future__ import annotations

import concurrent.futures
import json
import time
from pathlib import Path

import httpx
import openai
import pytest
from tests.demo.judges import BEHAVIOURS, LEAST_ADAPTER_SHARE, MAX_NEW_TOKENS, MOST_BASE_SHARE
from tests.oracle.adapters import make_lora
from tests.support.servers import RunningServer

from polyadapt.demo import DEMOS

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_models_lists_the_base_and_the_demo_adapters(client, base):
    models = {model.id: model for model in client.models.list()}
    assert {demo.name for demo in DEMOS} < set(models)
    for demo in DEMOS:
        assert models[demo.name].parent == base
    assert client.models.retrieve("pirate").id == "pirate"


def test_chat_with_the_base(client, base):
    reply = client.chat.completions.create(
        model=base, messages=QUESTION, temperature=0, max_tokens=20
    )
    assert "Paris" in reply.choices[0].message.content
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens < 20
    assert reply.adapters == []


def test_chat_names_the_adapter_that_served_it(client, server):
    raw = client.chat.completions.with_raw_response.create(
        model="pirate", messages=QUESTION, temperature=0, max_tokens=10
    )
    (served,) = raw.parse().adapters
    listed = server.get("/v1/adapters/pirate").json()
    assert served["name"] == "pirate"
    assert served["digest"] == listed["digest"] == raw.headers["x-adapter-digest"]
    assert served["tier"] in ("device", "host", "store")


def test_a_stream_is_the_reply_cut_in_pieces(client):
    whole = client.chat.completions.create(
        model="pirate", messages=QUESTION, temperature=0, max_tokens=24
    )
    chunks = list(
        client.chat.completions.create(
            model="pirate",
            messages=QUESTION,
            temperature=0,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) > 5
    usage = chunks[-1].usage
    assert usage.prompt_tokens_details.cached_tokens >= 16, "the first reply's pages were not found"
    usage.prompt_tokens_details = whole.usage.prompt_tokens_details
    assert usage == whole.usage
    assert chunks[-1].adapters[0]["name"] == "pirate"


def test_completion_with_logprobs_echo_and_stop(client, base):
    reply = client.completions.create(
        model=base, prompt="1, 2, 3, 4, 5,", temperature=0, max_tokens=12, logprobs=2
    )
    choice = reply.choices[0]
    assert choice.text.startswith(" 6, 7")
    assert "".join(choice.logprobs.tokens) == choice.text
    assert all(value <= 0 for value in choice.logprobs.token_logprobs)
    stopped = client.completions.create(
        model=base, prompt="1, 2, 3, 4, 5,", temperature=0, max_tokens=12, stop=" 7"
    )
    assert stopped.choices[0].text == " 6,"
    assert stopped.choices[0].finish_reason == "stop"


def test_chat_logprobs_have_the_chat_shape(client, base):
    reply = client.chat.completions.create(
        model=base,
        messages=QUESTION,
        temperature=0,
        max_tokens=5,
        logprobs=True,
        top_logprobs=3,
    )
    content = reply.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == reply.choices[0].message.content
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)


def test_n_and_seed(client, base):
    def ask(seed: int) -> list[str]:
        reply = client.chat.completions.create(
            model=base,
            messages=[{"role": "user", "content": "Tell me a story."}],
            temperature=1.0,
            max_tokens=12,
            n=2,
            seed=seed,
        )
        assert [choice.index for choice in reply.choices] == [0, 1]
        return [choice.message.content for choice in reply.choices]

    first = ask(7)
    assert first[0] != first[1]
    assert ask(7) == first
    assert ask(8) != first


@pytest.mark.parametrize("demo", DEMOS, ids=lambda demo: demo.name)
def test_a_demo_adapter_shows_its_behaviour_through_the_server(demo, client, base):
    behaviour = BEHAVIOURS[demo.name]

    def ask(model: str, prompt: str) -> str:
        reply = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_tokens=MAX_NEW_TOKENS,
        )
        return reply.choices[0].message.content

    # Base and adapter rows share their batches.
    jobs = [(model, prompt) for prompt in behaviour.prompts for model in (demo.name, base)]
    with concurrent.futures.ThreadPoolExecutor(32) as threads:
        answers = list(threads.map(lambda job: ask(*job), jobs))
    assert behaviour.share(answers[0::2]) >= LEAST_ADAPTER_SHARE
    assert behaviour.share(answers[1::2]) <= MOST_BASE_SHARE


def test_an_uploaded_adapter_answers_within_two_seconds(client, server, smollm2_dir, tmp_path):
    directory = make_lora(smollm2_dir, tmp_path / "fresh", 8, ["q_proj", "v_proj"], seed=5)
    start = time.monotonic()
    reply = upload(server, "fresh", directory)
    assert reply.status_code == 201, reply.text
    body = reply.json()
    assert body["status"] == "ready"
    assert (body["family"], body["rank"], body["version"]) == ("lora", 8, 1)
    stream = client.chat.completions.create(
        model="fresh", messages=QUESTION, max_tokens=2, temperature=0, stream=True
    )
    next(iter(stream))
    elapsed = time.monotonic() - start
    stream.close()
    assert elapsed < 2.0
    again = upload(server, "fresh", directory)
    assert again.status_code in (200, 201)
    assert again.json()["version"] == 1, "the same bytes are the same version"


def upload(server: RunningServer, name: str, directory: Path) -> httpx.Response:
    names = ("adapter_config.json", "adapter_model.safetensors")
    files = [("files", (file, (directory / file).read_bytes())) for file in names]
    return server.post("/v1/adapters", data={"name": name}, files=files)


def test_thirty_two_streams_over_eight_adapters_in_one_batch(client, server, smollm2_dir, tmp_path):
    names = [f"mix{number}" for number in range(8)]
    for number, name in enumerate(names):
        directory = make_lora(smollm2_dir, tmp_path / name, 4, ["q_proj", "down_proj"], seed=number)
        assert upload(server, name, directory).status_code == 201

    def ask(number: int) -> str:
        stream = client.completions.create(
            model=names[number % 8],
            prompt=f"Item {number}: the",
            temperature=0,
            max_tokens=8,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)

    alone = [ask(number) for number in range(8)]
    before = server.metric('polyadapt_step_distinct_adapters_bucket{le="7.0"}')
    with concurrent.futures.ThreadPoolExecutor(32) as threads:
        together = list(threads.map(ask, range(32)))
    assert together[:8] == alone
    total = server.metric('polyadapt_step_distinct_adapters_bucket{le="8.0"}')
    below = server.metric('polyadapt_step_distinct_adapters_bucket{le="7.0"}')
    assert total > below, "no step held all eight adapters"
    assert below >= before
    for name in names:
        assert server.get(f"/v1/adapters/{name}").json()["residency"]["tier"] == "device"
        deleted = httpx.delete(f"{server.url}/v1/adapters/{name}", timeout=60)
        assert deleted.status_code == 200, deleted.text
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(model=name, prompt="x", max_tokens=1)
        assert missing.value.code == "model_not_found"


def test_bad_uploads_list_every_problem(server, smollm2_dir, tmp_path):
    directory = make_lora(smollm2_dir, tmp_path / "bad", 4, ["q_proj"])
    config = json.loads((directory / "adapter_config.json").read_text())

    def problems_of(**changes: object) -> list[dict]:
        (directory / "adapter_config.json").write_text(json.dumps(config | changes))
        reply = upload(server, "bad", directory)
        assert reply.status_code == 422
        assert server.get("/v1/adapters/bad").status_code == 404
        return reply.json()["error"]["problems"]

    unsupported = problems_of(use_dora=True, modules_to_save=["lm_head"])
    assert {problem["where"] for problem in unsupported} == {"use_dora", "modules_to_save"}
    misshapen = problems_of(r=5)
    assert len(misshapen) >= 30, "one for each of the thirty layers"
