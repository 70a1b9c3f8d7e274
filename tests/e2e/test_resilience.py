"""What the server does when clients leave, memory runs out, and the engine is killed."""

from __future__ import annotations

import concurrent.futures
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from tests.e2e.test_openai_client import upload
from tests.oracle.adapters import make_lora
from tests.support.servers import RunningServer, running_server

PROMPT = "one two three four five six seven"


@pytest.fixture(scope="module")
def small(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A tiny model with little room: few pages, and adapters that do not all fit."""
    model = tiny_model("llama")
    root = tmp_path_factory.mktemp("small")
    memory = ("--kv-cache-bytes", "160KiB", "--max-adapter-bytes", "64KiB", "--max-num-seqs", "12")
    with running_server(root / "home", model, *memory, "--max-model-len", "128") as running:
        for number in range(8):
            directory = make_lora(model, root / f"a{number}", 4, seed=number)
            assert upload(running, f"a{number}", directory).status_code == 201
        yield running


def complete(server: RunningServer, number: int, **options: object) -> httpx.Response:
    body = {
        "model": f"a{number % 8}",
        "prompt": f"{PROMPT} {number}",
        "temperature": 0,
        "max_tokens": 40,
        "ignore_eos": True,
    }
    return server.post("/v1/completions", json=body | options)


def test_overcommitted_memory_changes_no_answer(small):
    alone = [complete(small, number).json()["choices"][0]["text"] for number in range(8)]
    with concurrent.futures.ThreadPoolExecutor(24) as threads:
        replies = list(threads.map(lambda number: complete(small, number % 8), range(48)))
    assert [reply.status_code for reply in replies] == [200] * 48
    texts = [reply.json()["choices"][0]["text"] for reply in replies]
    assert texts == alone * 6
    # The prompts of one call are there at once, however fast the engine is.
    prompts = [f"{number} {PROMPT}" for number in range(12)]
    each = [complete(small, 0, prompt=prompt).json()["choices"][0]["text"] for prompt in prompts]
    crowd = complete(small, 0, prompt=prompts).json()["choices"]
    assert [choice["text"] for choice in crowd] == each
    assert small.event("preemptions") > 0
    assert small.event("adapter_evictions") > 0
    assert small.metric("polyadapt_kv_pages_used") == 0


def test_a_client_that_leaves_frees_its_pages_at_the_next_step(small):
    # The tiny model is fast: many sequences keep it busy long enough to be left.
    body = {"model": "a0", "prompt": PROMPT, "max_tokens": 100, "ignore_eos": True, "n": 12}
    before = small.event("cancelled_requests")
    with httpx.stream(
        "POST", f"{small.url}/v1/completions", json=body | {"stream": True}, timeout=60
    ) as stream:
        for line in stream.iter_lines():
            if line.startswith("data:"):
                break
    small.wait_until(
        "the request is cancelled and its pages are free",
        lambda: (
            small.event("cancelled_requests") > before
            and small.metric("polyadapt_kv_pages_used") == 0
        ),
        timeout_s=10,
    )


def test_a_killed_engine_means_503_and_then_everything_is_back(small):
    listed = [a["name"] for a in small.get("/v1/adapters").json()["data"]]
    expected = complete(small, 3).json()["choices"][0]["text"]
    body = {"model": "a1", "prompt": PROMPT, "max_tokens": 100, "ignore_eos": True, "n": 12}
    restarts = small.metric("polyadapt_engine_restarts_total")
    events = []
    with httpx.stream(
        "POST", f"{small.url}/v1/completions", json=body | {"stream": True}, timeout=60
    ) as stream:
        for line in stream.iter_lines():
            if line.startswith("data:"):
                if not events:
                    os.kill(small.engine_pid(), signal.SIGKILL)
                events.append(line)
    assert "[DONE]" not in events[-1], "a stream that fails has no [DONE]"
    assert "engine_unavailable" in events[-1]
    refused = complete(small, 3)
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert small.get("/ready").status_code == 503
    assert small.get("/health").status_code == 200, "it is being restarted, not dead"
    small.wait_until("it is ready again", lambda: small.get("/ready").status_code == 200)
    assert small.metric("polyadapt_engine_restarts_total") == restarts + 1
    assert [a["name"] for a in small.get("/v1/adapters").json()["data"]] == listed
    assert complete(small, 3).json()["choices"][0]["text"] == expected


def test_deleting_an_adapter_lets_its_running_requests_finish(small, tiny_model, tmp_path):
    directory = make_lora(tiny_model("llama"), tmp_path / "doomed", 4, seed=99)
    assert upload(small, "doomed", directory).status_code == 201
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        body = {"model": "doomed", "prompt": PROMPT, "max_tokens": 100, "ignore_eos": True}
        with httpx.stream(
            "POST", f"{small.url}/v1/completions", json=body | {"stream": True}, timeout=60
        ) as stream:
            lines = stream.iter_lines()
            first = next(line for line in lines if line.startswith("data:"))
            deleting = threads.submit(
                httpx.delete, f"{small.url}/v1/adapters/doomed?mode=drain", timeout=60
            )
            rest = [line for line in lines if line.startswith("data:")]
        assert first
        assert rest[-1] == "data: [DONE]"
        assert deleting.result(60).status_code == 200
    missing = small.post("/v1/completions", json=body)
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_the_store_survives_a_restart(tiny_model, tmp_path):
    model = tiny_model("llama")
    directory = make_lora(model, tmp_path / "kept", 4, seed=1)
    home = tmp_path / "home"
    with running_server(home, model) as first:
        body = upload(first, "kept", directory).json()
        text = complete(first, 0, model="kept").json()["choices"][0]["text"]
    with running_server(home, model) as second:
        assert second.get("/v1/adapters/kept").json()["digest"] == body["digest"]
        assert complete(second, 0, model="kept").json()["choices"][0]["text"] == text


def test_a_server_that_cannot_start_says_so_in_one_line(tiny_model, tmp_path):
    import subprocess
    import sys

    def serve(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "polyadapt", "serve", "--home", str(tmp_path), *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    model = str(tiny_model("llama"))
    missing = serve("--model", str(tmp_path / "nowhere"))
    exposed = serve("--model", model, "--host", "0.0.0.0", "--port", "0")
    unknown = serve("--model", model, "--device", "tpu")
    for result in (missing, exposed, unknown):
        assert result.returncode != 0
        assert not result.stdout
        assert "Traceback" not in result.stderr
        lines = [line for line in result.stderr.splitlines() if line.startswith("polyadapt:")]
        assert len(lines) == 1, result.stderr
    assert "key" in exposed.stderr


def test_errors_reach_the_official_client_as_its_own_types(small):
    with openai.OpenAI(base_url=f"{small.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(model="nobody", prompt="x")
        assert missing.value.code == "model_not_found"
        assert missing.value.request_id
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(model="a0", prompt=PROMPT * 200, max_tokens=4)
        assert long.value.code == "context_length_exceeded"
