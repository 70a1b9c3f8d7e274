"""How a real server ends: readiness first, then new work refused, running streams finished."""

from __future__ import annotations

import concurrent.futures
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from tests.support.servers import RunningServer, running_server

DRAIN = {"x-polyadapt-drain": "now"}
NOTICE_S = 3.0  # a busy machine answers late, too
LONG = {"prompt": "one two", "max_tokens": 240, "ignore_eos": True, "n": 48, "stream": True}
SHORT = {"prompt": "one two", "max_tokens": 2, "priority": -100}  # before the queue of LONG


@pytest.fixture
def server(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> Iterator[tuple[RunningServer, str, str]]:
    """A server with a tiny model, the address of its internal port, and the model's name."""
    model = tiny_model("llama")
    options = ("--internal-port", "0", "--drain-notice-s", str(NOTICE_S))
    options += ("--drain-grace-s", "120", "--max-num-seqs", "4")
    with running_server(tmp_path / "home", model, *options) as running:
        found = re.search(r"without a key at (\S+)", running.log.read_text())
        assert found
        yield running, found[1], model.name


def begun(lines: Iterator[str]) -> str:
    return next(line for line in lines if line.startswith("data:"))


def complete(server: RunningServer, model: str) -> httpx.Response:
    return server.post("/v1/completions", json=SHORT | {"model": model})


def test_a_drain_turns_readiness_off_before_work_is_refused_and_streams_finish(server):
    running, internal, model = server
    with (
        concurrent.futures.ThreadPoolExecutor(1) as threads,
        httpx.stream(
            "POST", f"{running.url}/v1/completions", json=LONG | {"model": model}, timeout=60
        ) as stream,
    ):
        lines = stream.iter_lines()
        begun(lines)
        assert httpx.get(f"{internal}/drain").status_code == 403, "a drain without the header"
        assert running.get("/ready").status_code == 200

        draining = threads.submit(httpx.get, f"{internal}/drain", headers=DRAIN, timeout=30)
        running.wait_until("not ready", lambda: running.get("/ready").status_code == 503, NOTICE_S)
        assert not draining.done(), "new work was refused at once"
        late = complete(running, model)
        assert late.status_code == 200, "sent before the load balancer can know"
        assert late.headers["connection"] == "close", "the next one would come here again"

        assert draining.result(30).json()["status"] == "draining"
        refused = complete(running, model)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert running.get("/health").status_code == 200, "draining, not dead"
        scrape = httpx.get(f"{internal}/metrics")
        assert scrape.status_code == 200
        assert "polyadapt_ready 0.0" in scrape.text
        for path in ("/v1/models", "/health", "/openapi.json", "/v1/adapters"):
            assert httpx.get(f"{internal}{path}").status_code == 404, "not for the internal port"

        began = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line.startswith("data:")]
        assert rest[-1] == "data: [DONE]"
    assert running.process.wait(20) == 0
    assert time.monotonic() - began < 20


def test_a_second_signal_aborts_what_still_runs(server):
    running, _, model = server
    with httpx.stream(
        "POST", f"{running.url}/v1/completions", json=LONG | {"model": model}, timeout=60
    ) as stream:
        lines = stream.iter_lines()
        begun(lines)
        running.process.send_signal(signal.SIGTERM)
        running.wait_until("not ready", lambda: running.get("/ready").status_code == 503, NOTICE_S)
        running.process.send_signal(signal.SIGTERM)
        try:
            rest = [line for line in lines if line.startswith("data:")]
        except httpx.RemoteProtocolError:
            rest = []
    assert "data: [DONE]" not in rest
    assert running.process.wait(20) == 0
