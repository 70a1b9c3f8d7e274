"""Workflows on the real server and model: rounds of several questions share the engine's steps."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.support.servers import RunningServer

DEFINITION = {
    "kind": "lorid",
    "ir": {"adapter": "json", "instruction": "", "template": "{question}"},
    "kg": {"adapter": "tea-house", "instruction": "", "template": "{question}"},
    "dr": {"adapter": "pirate", "instruction": "", "template": "{knowledge} {question}"},
    "max_iterations": 2,
    "sampling": {"max_tokens": 8},
}
QUESTIONS = [f"What is {i} plus {i + 1}?" for i in (3, 5, 8)]


@pytest.fixture(scope="module")
def workflow(server: RunningServer) -> Iterator[str]:
    """The name of a workflow of the three demo adapters, which are on the device."""
    reply = server.post("/v1/workflows", json={"name": "three", "definition": DEFINITION})
    assert reply.status_code == 201, reply.text
    for name in ("json", "tea-house", "pirate"):
        server.post(f"/v1/adapters/{name}/load")
    yield "three"
    httpx.delete(f"{server.url}/v1/workflows/three", timeout=60)


def ask(server: RunningServer, workflow: str, question: str) -> dict[str, Any]:
    body = {"model": workflow, "messages": [{"role": "user", "content": question}], "seed": 11}
    reply = server.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def steps(server: RunningServer) -> float:
    return server.metric("polyadapt_engine_steps_total")


def test_rounds_of_several_questions_share_steps_and_change_no_answer(server, workflow, client):
    began = steps(server)
    alone = [ask(server, workflow, question) for question in QUESTIONS]
    one_by_one = steps(server) - began
    mixed_before = many_adapters(server)
    began = steps(server)
    with concurrent.futures.ThreadPoolExecutor(len(QUESTIONS) + 1) as pool:
        others = pool.submit(
            lambda: client.completions.create(
                model="pirate", prompt="A volcano is", max_tokens=24, temperature=0
            )
        )
        runs = list(pool.map(lambda question: ask(server, workflow, question), QUESTIONS))
        assert others.result().choices[0].text
    at_once = steps(server) - began
    assert at_once < 0.6 * one_by_one, (at_once, one_by_one)
    assert many_adapters(server) - mixed_before > 5, "no step served all three adapters"
    for run, known in zip(runs, alone, strict=True):
        assert run["workflow"]["trace"] == known["workflow"]["trace"]
        assert run["choices"] == known["choices"]
        entries = run["workflow"]["trace"]
        assert [entry["role"] for entry in entries[:3]] == ["ir", "kg", "dr"]
        assert run["usage"]["completion_tokens"] == sum(entry["tokens"] for entry in entries)
        assert {served["name"] for served in run["adapters"]} == {"json", "tea-house", "pirate"}


def many_adapters(server: RunningServer) -> float:
    """How many steps served three adapters or more."""
    name = "polyadapt_step_distinct_adapters"
    return server.metric(f"{name}_count") - server.metric(f'{name}_bucket{{le="2.0"}}')


def test_a_sample_of_the_trace_is_repeated_by_its_seed(server, workflow):
    entry = ask(server, workflow, QUESTIONS[0])["workflow"]["trace"][0]
    body = {
        "model": entry["adapter"],
        "messages": [{"role": "user", "content": QUESTIONS[0]}],
        "seed": entry["seed"],
        "temperature": 1.5,
        "top_p": 0.9,
        "top_k": 50,
        "max_tokens": 8,
    }
    choice = server.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["message"]["content"] == entry["text"]


def test_a_caller_that_goes_away_frees_every_member(server, workflow):
    definition = {**DEFINITION, "sampling": {"max_tokens": 400}, "max_iterations": 64}
    server.post("/v1/workflows", json={"name": "endless", "definition": definition})
    body = {"model": "endless", "messages": [{"role": "user", "content": QUESTIONS[0]}]}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=1.5)
    server.wait_until(
        "the members are cancelled",
        lambda: server.metric("vllm:num_requests_running") == 0,
        timeout_s=20,
    )
    time.sleep(0.1)
    before = steps(server)
    time.sleep(0.3)
    assert steps(server) == before, "something still runs"
    labels = 'kind="lorid",outcome="cancelled"'
    assert server.metric(f"polyadapt_workflow_runs_total{{{labels}}}") == 1
    httpx.delete(f"{server.url}/v1/workflows/endless", timeout=60)
