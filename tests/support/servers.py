"""A real server process by its command line, for the tests that talk to it over HTTP."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

_START_TIMEOUT_S = 600.0  # of a machine that is busy with other things
_ADDRESS = re.compile(r"at (http://\S+)")


@dataclass
class RunningServer:
    """Where it listens, and its process."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str, **options: object) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=60, **options)  # type: ignore[arg-type]

    def post(self, path: str, **options: object) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", timeout=300, **options)  # type: ignore[arg-type]

    def metric(self, name: str) -> float:
        """The value of one sample of /metrics, named with its labels; 0 when it is absent."""
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.rpartition(" ")[2])
        return 0.0

    def event(self, name: str) -> float:
        """One of the engine's counters."""
        return self.metric(f'polyadapt_engine_events_total{{event="{name}"}}')

    def engine_pid(self) -> int:
        """The engine's process id, found as a user would: among the server's children."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if "polyadapt.engine.worker" in child.cmdline():
                return child.pid
        raise AssertionError("the server has no engine process")

    def wait_until(self, condition: str, probe: object, timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not probe():  # type: ignore[operator]
            assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {condition}"
            time.sleep(0.02)


@contextlib.contextmanager
def running_server(
    home: Path, model: Path | str, *options: str, subcommand: str = "serve"
) -> Iterator[RunningServer]:
    """Run `polyadapt serve` on a free port until the block ends, then stop it with SIGTERM."""
    log = home / "server.log"
    home.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "polyadapt", subcommand, "--model", str(model)),
        *("--home", str(home), "--host", "127.0.0.1", "--port", "0", *options),
    ]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("POLYADAPT_")}
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, env=environ
        )
    try:
        assert process.stdout is not None
        late = threading.Timer(_START_TIMEOUT_S, process.kill)  # ends the wait for the line, too
        late.start()
        line = process.stdout.readline().decode()  # empty when it ends before it is ready
        late.cancel()
        found = _ADDRESS.search(line)
        assert found, f"it did not start: {line!r} {log.read_text()[-3000:]}"
        yield RunningServer(found.group(1), process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"SIGTERM did not end it: {log.read_text()[-3000:]}") from None
        finally:
            if process.stdout is not None:
                process.stdout.close()
