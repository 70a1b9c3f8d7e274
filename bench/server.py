"""Our server as a child process: started by its command line, asked over HTTP, always stopped."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 45.0

_BUCKET = re.compile(r'^polyadapt_step_distinct_adapters_bucket\{le="([^"]+)"\} (\S+)$', re.M)
_EVENT = re.compile(
    r'^polyadapt_engine_events_total\{event="steps_with_(\d+)_adapters"\} (\S+)$', re.M
)


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: where it listens and the process that was started."""

    url: str
    pid: int

    def version(self) -> dict[str, object]:
        """Return what GET /version says."""
        return dict(httpx.get(f"{self.url}/version", timeout=30).raise_for_status().json())

    def base_model(self) -> str:
        """Return the id of the one model that is no adapter."""
        listed = httpx.get(f"{self.url}/v1/models", timeout=30).raise_for_status().json()["data"]
        (base,) = [entry["id"] for entry in listed if not entry.get("parent")]
        return str(base)

    def upload(self, name: str, directory: Path) -> float:
        """Upload a PEFT directory over HTTP and return the seconds it took; idempotent."""
        files = [("files", (path.name, path.read_bytes())) for path in sorted(directory.iterdir())]
        start = time.perf_counter()
        reply = httpx.post(f"{self.url}/v1/adapters", data={"name": name}, files=files, timeout=300)
        if reply.status_code not in (200, 201):
            raise RuntimeError(f"upload of {name}: {reply.status_code} {reply.text[:500]}")
        return time.perf_counter() - start

    def steps_by_distinct_adapters(self) -> Counter[int]:
        """Return number of distinct adapters -> steps that had so many, since its start."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).raise_for_status().text
        return parse_steps(text)


def parse_steps(metrics: str) -> Counter[int]:
    """Read number of distinct adapters -> steps from Prometheus' text.

    From the histogram if there is one: a bucket (lo, hi] then counts as lo + 1, so that a median is
    never overstated. Otherwise from the engine's exact event counters. An engine that made no step
    yet has neither; the result is empty.
    """
    found: Counter[int] = Counter()
    lowest, below = 0, 0.0
    for bound, cumulative in _BUCKET.findall(metrics):
        found[lowest] += int(float(cumulative) - below)
        below = float(cumulative)
        lowest = int(float(bound)) + 1 if bound != "+Inf" else lowest
    if not found:
        for distinct, steps in _EVENT.findall(metrics):
            found[int(distinct)] += int(float(steps))
    return found


@contextlib.contextmanager
def running_server(
    model: Path, home: Path, log: Path, *, dtype: str, threads: int, options: list[str]
) -> Iterator[Server]:
    """Start `polyadapt serve` on a free loopback port, wait for /ready, and stop it in any case.

    `options` are further arguments of the command. Raises RuntimeError with the end of its log
    when it does not become ready.
    """
    port = free_port()
    command = [sys.executable, "-m", "polyadapt", "serve", "--model", str(model)]
    command += ["--home", str(home), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", dtype, "--num-threads", str(threads), *options]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("POLYADAPT_")}
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environ
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(process, url, log)
        yield Server(url=url, pid=process.pid)
    finally:
        _stop(process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}: {_tail(log)}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"the server was not ready after {START_TIMEOUT_S:.0f} s: {_tail(log)}")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process by its pid, and its children if it could not do that itself."""
    children: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):  # psutil checks that the pid is still it
            child.kill()
