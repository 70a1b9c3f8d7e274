"""Two engines behind one edge, over HTTP: one engine's answers, and less harm when one dies."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from tests.e2e.test_openai_client import upload
from tests.oracle.adapters import make_lora
from tests.support.engines import Driver, greedy_request, new_engine, put_blob
from tests.support.servers import RunningServer, running_server

from polyadapt.engine.routing import Router

PROMPT = "one two three four five six seven"
NUM_ADAPTERS = 6
PAGES_BYTES = 640 << 10
FLAGS = (
    *("--device", "cpu", "--engines", "2", "--dtype", "float32", "--max-num-seqs", "12"),
    *("--kv-cache-bytes", str(PAGES_BYTES), "--max-adapter-bytes", "2MiB"),
    *("--max-model-len", "128", "--max-num-batched-tokens", "64"),
)


@pytest.fixture(scope="module")
def adapters(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    model = tiny_model("llama")
    return {f"a{i}": make_lora(model, root / f"a{i}", 4, seed=i) for i in range(NUM_ADAPTERS)}


@pytest.fixture(scope="module")
def fleet(
    tiny_model: Callable[[str], Path],
    adapters: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RunningServer]:
    home = tmp_path_factory.mktemp("fleet")
    with running_server(home, tiny_model("llama"), *FLAGS) as running:
        for name, directory in adapters.items():
            assert upload(running, name, directory).status_code == 201
        yield running
        children = psutil.Process(running.process.pid).children(recursive=True)
        engines = [child for child in children if "polyadapt.engine.worker" in child.cmdline()]
        assert len(engines) == 2
    assert running.process.returncode == 0
    assert not psutil.wait_procs(engines, timeout=10)[1], "engines outlive the server"


def body(name: str, number: int = 0, **options: object) -> dict[str, object]:
    return {
        "model": name,
        "prompt": f"{PROMPT} {number}",
        "temperature": 0,
        "max_tokens": 40,
        "ignore_eos": True,
    } | options


def text(server: RunningServer, name: str, number: int = 0) -> str:
    reply = server.post("/v1/completions", json=body(name, number))
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"]


def where(server: RunningServer, name: str) -> dict[str, str]:
    return server.get(f"/v1/adapters/{name}").json()["residency"]["engines"]


def page_nbytes(model: Path) -> int:
    """Bytes of a page of 16 tokens: keys and values of every layer in float32."""
    config = json.loads((model / "config.json").read_text())
    width = config["hidden_size"] // config["num_attention_heads"]
    return 16 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * width * 4


def of_engine(server: RunningServer, metric: str, engine: str) -> float:
    return server.metric(f'polyadapt_fleet_engine_{metric}{{engine="{engine}"}}')


def pid_of(server: RunningServer, engine: str) -> int:
    """The process of an engine, which the log names."""
    lines = server.log.read_text().splitlines()
    (*_, last) = [line for line in lines if f"engine {engine} is ready in process" in line]
    return int(last.rsplit(" ", 1)[1])


def until_both_are_ready(server: RunningServer) -> None:
    server.wait_until(
        "both engines are ready",
        lambda: all(of_engine(server, "ready", f"cpu/{i}") for i in range(2)),
    )


def test_two_engines_answer_as_one_does(fleet, adapters, tiny_model, tmp_path):
    model = tiny_model("llama")
    ids = fleet.post("/tokenize", json={"prompt": f"{PROMPT} 0"}).json()["tokens"]
    one = Driver(new_engine(model, tmp_path))
    known = {name: put_blob(tmp_path, path, name) for name, path in adapters.items()}
    (base,) = [m["id"] for m in fleet.get("/v1/models").json()["data"] if m["id"] not in adapters]
    names = [*adapters, base]
    one.run(*(greedy_request(name, ids, known.get(name), 40) for name in names))
    expected = [one.transcripts[name].tokens for name in names]

    def ask(name: str) -> list[int]:
        reply = fleet.post("/v1/completions", json=body(name, return_token_ids=True))
        return reply.json()["choices"][0]["token_ids"]

    with concurrent.futures.ThreadPoolExecutor(12) as threads:
        assert list(threads.map(ask, names * 3)) == expected * 3
    # The device's budget is for both.
    assert fleet.metric("polyadapt_adapter_bytes") == 2 << 20
    pages = fleet.metric("polyadapt_kv_pages")
    assert 2 * (PAGES_BYTES // 2 // page_nbytes(model)) == pages


def test_each_adapter_has_one_home_while_the_load_is_light(fleet):
    for _ in range(2):
        for name in (f"a{i}" for i in range(NUM_ADAPTERS)):
            assert fleet.post(f"/v1/adapters/{name}/unload").status_code == 200
            assert where(fleet, name) is None
            text(fleet, name)
            text(fleet, name, 1)
    router = Router()
    for engine in ("cpu/0", "cpu/1"):
        router.add(engine)
    for name in (f"a{i}" for i in range(NUM_ADAPTERS)):
        (home,) = router.homes(fleet.get(f"/v1/adapters/{name}").json()["digest"], 1)
        assert where(fleet, name) == {home: "device"}
    listed = fleet.get("/metrics").text
    series = [line for line in listed.splitlines() if line.startswith("vllm:lora_requests_info{")]
    assert len(series) == 1
    assert 'running_lora_adapters="a0,a1,a2,a3,a4,a5"' in series[0]
    resident = [of_engine(fleet, "resident_adapters", f"cpu/{i}") for i in range(2)]
    assert sum(resident) == NUM_ADAPTERS


def test_a_hot_adapter_spreads_over_both(fleet):
    with concurrent.futures.ThreadPoolExecutor(24) as threads:
        texts = list(threads.map(lambda number: text(fleet, "a0", number % 4), range(48)))
    assert texts == texts[:4] * 12
    assert where(fleet, "a0") == {"cpu/0": "device", "cpu/1": "device"}


def test_a_request_that_had_not_begun_moves_when_its_engine_is_killed(fleet):
    until_both_are_ready(fleet)
    expected = text(fleet, "a1", 7)
    (home,) = where(fleet, "a1")
    moved = fleet.metric("polyadapt_fleet_failovers_total")
    restarts = of_engine(fleet, "restarts_total", home)
    pid = pid_of(fleet, home)
    os.kill(pid, signal.SIGSTOP)  # takes the request and never begins it
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(text, fleet, "a1", 7) for _ in range(4)]
        fleet.wait_until("it was sent", lambda: of_engine(fleet, "load_tokens", home) > 0)
        time.sleep(0.2)
        os.kill(pid, signal.SIGKILL)
        assert [future.result(60) for future in asked] == [expected] * 4
    assert fleet.metric("polyadapt_fleet_failovers_total") > moved
    assert fleet.get("/ready").status_code == 200
    assert text(fleet, "a1", 7) == expected, "the other engine serves while it is down"
    until_both_are_ready(fleet)
    assert of_engine(fleet, "restarts_total", home) == restarts + 1
    assert pid_of(fleet, home) != pid


def test_a_stream_that_had_begun_ends_in_an_error_event(fleet):
    until_both_are_ready(fleet)
    text(fleet, "a2")
    (home,) = where(fleet, "a2")
    events: list[str] = []
    long = body("a2", max_tokens=90, n=12, stream=True)
    with httpx.stream("POST", f"{fleet.url}/v1/completions", json=long, timeout=60) as stream:
        for line in stream.iter_lines():
            if line.startswith("data:"):
                if not events:
                    os.kill(pid_of(fleet, home), signal.SIGKILL)
                events.append(line)
    assert "[DONE]" not in events[-1]
    assert "engine_unavailable" in events[-1]
    until_both_are_ready(fleet)


def test_pins_and_deletions_reach_every_engine(fleet, tiny_model, tmp_path):
    until_both_are_ready(fleet)
    directory = make_lora(tiny_model("llama"), tmp_path / "doomed", 4, seed=99)
    assert upload(fleet, "doomed", directory).status_code == 201
    pinned = fleet.post("/v1/adapters/doomed/load", json={"pin": True}).json()["residency"]
    assert (pinned["tier"], pinned["pinned"], len(pinned["engines"])) == ("device", True, 1)
    before = [of_engine(fleet, "resident_adapters", f"cpu/{i}") for i in range(2)]
    with concurrent.futures.ThreadPoolExecutor(24) as threads:
        list(threads.map(lambda number: text(fleet, "doomed", number), range(36)))
    assert len(where(fleet, "doomed")) == 2
    assert httpx.delete(f"{fleet.url}/v1/adapters/doomed?mode=drain", timeout=60).is_success
    after = [of_engine(fleet, "resident_adapters", f"cpu/{i}") for i in range(2)]
    assert sum(after) == sum(before) - 1
    assert fleet.post("/v1/completions", json=body("doomed")).status_code == 404
