"""Two servers behind a load balancer, one after the other drained and started anew under load.

`make test-rolling`: five starts of a server, too long for `make test`.
"""

from __future__ import annotations

import concurrent.futures
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from tests.oracle.adapters import make_lora
from tests.support.load_balancer import PROBE_PERIOD_S, LoadBalancer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

NUM_CLIENTS = 8
NOTICE_S = 3 * PROBE_PERIOD_S  # also on a busy machine the balancer hears of it
BODY = {"model": "mine", "prompt": "one two three", "max_tokens": 8, "ignore_eos": True}


class Replica:
    """One server on a port of its own, which is started again and again."""

    def __init__(self, home: Path, model: Path, adapter: Path, notice_s: float) -> None:
        with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("", 0)) as other:
            self.port, self.internal = one.getsockname()[1], other.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [
            *(sys.executable, "-m", "polyadapt", "serve", "--model", str(model)),
            *("--home", str(home), "--port", str(self.port), "--device", "cpu"),
            *("--internal-port", str(self.internal), "--adapter", f"mine={adapter}"),
            *("--drain-notice-s", str(notice_s), "--drain-grace-s", "120"),
        ]
        self._log = home.with_suffix(".log")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; returns at once."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)

    def await_ready(self) -> None:
        deadline = time.monotonic() + 900
        while True:
            assert self._process is not None
            assert self._process.poll() is None, self._log.read_text()[-3000:]
            assert time.monotonic() < deadline, self._log.read_text()[-3000:]
            try:
                if httpx.get(f"{self.url}/ready", verify=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)

    def restart(self) -> None:
        """As a kubelet: the hook, then SIGTERM, then a new process, and wait until it is ready."""
        assert self._process is not None
        drain = f"http://127.0.0.1:{self.internal}/drain"
        reply = httpx.get(drain, headers={"x-polyadapt-drain": "1"}, timeout=60)
        assert reply.status_code == 200
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(150) == 0, self._log.read_text()[-3000:]
        self.start()
        self.await_ready()

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


class Load:
    """Clients that send one request after the other, every second one streamed."""

    def __init__(self, url: str) -> None:
        self.outcomes: Counter[str] = Counter()
        self._url = f"{url}/v1/completions"
        self._stop = threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(NUM_CLIENTS)
        self._clients = [self._pool.submit(self._run, number) for number in range(NUM_CLIENTS)]

    def end(self) -> Counter[str]:
        """Let every client finish its request; return how often each outcome was seen."""
        self._stop.set()
        for client in self._clients:
            client.result(300)
        self._pool.shutdown()
        return self.outcomes

    def _run(self, number: int) -> None:
        with httpx.Client(timeout=300, verify=False) as client:
            while not self._stop.is_set():
                number += 1
                outcome = self._stream(client) if number % 2 else self._ask(client)
                self.outcomes[outcome] += 1
                time.sleep(0.05)  # the replica that starts needs the processor, too

    def _ask(self, client: httpx.Client) -> str:
        reply = client.post(self._url, json=BODY)
        if reply.status_code != 200:
            return f"{reply.status_code} {reply.text[:100]}"
        is_whole = reply.json()["usage"]["completion_tokens"] == BODY["max_tokens"]
        return "answered" if is_whole else "cut"

    def _stream(self, client: httpx.Client) -> str:
        try:
            with client.stream("POST", self._url, json=BODY | {"stream": True}) as stream:
                if stream.status_code != 200:
                    return f"{stream.status_code}"
                lines = [line for line in stream.iter_lines() if line.startswith("data:")]
        except httpx.TransportError as error:
            return f"stream: {error!r}"
        is_whole = lines[-1] == "data: [DONE]" and "error" not in json.loads(lines[-2][5:])
        return "streamed" if is_whole else "stream cut"


@pytest.fixture
def make_replicas(tiny_model: Callable[[str], Path], tmp_path: Path):
    """A function that starts two replicas with this notice."""
    model = tiny_model("llama")
    adapter = make_lora(model, tmp_path / "adapter", 4, seed=1)
    made: list[Replica] = []

    def make(notice_s: float) -> list[Replica]:
        made.extend(Replica(tmp_path / f"home{n}", model, adapter, notice_s) for n in range(2))
        for replica in made:
            replica.start()
        for replica in made:
            replica.await_ready()
        return made

    yield make
    for replica in made:
        replica.kill()


def test_a_rolling_restart_under_load_fails_no_request(make_replicas) -> None:
    replicas = make_replicas(NOTICE_S)
    with LoadBalancer([replica.url for replica in replicas]).running() as balancer:
        load = Load(balancer.url)
        for replica in replicas:
            balancer.await_probe()
            before = balancer.num_sent[replica.url]
            replica.restart()
            balancer.await_probe()
            time.sleep(PROBE_PERIOD_S)
            assert balancer.num_sent[replica.url] > before, "it serves again"
        outcomes = load.end()
    print(dict(outcomes))
    assert set(outcomes) == {"answered", "streamed"}, outcomes
    assert outcomes.total() > 50


def test_without_a_notice_requests_fail_so_that_the_test_can(make_replicas) -> None:
    replicas = make_replicas(0.0)
    with LoadBalancer([replica.url for replica in replicas]).running() as balancer:
        load = Load(balancer.url)
        balancer.await_probe()
        replicas[0].restart()
        outcomes = load.end()
    assert set(outcomes) - {"answered", "streamed"}, "the notice is not what saves the requests"
