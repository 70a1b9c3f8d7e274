"""What every peer server is: installed into a folder of its own, started, asked, always stopped.

Nothing of a peer is copied into this project: it is installed from its package and run as it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
from bench.server import free_port

STOP_TIMEOUT_S = 20.0
BASE = "base"  # the name by which every peer serves the model without an adapter


class CannotRun(Exception):
    """This peer does not install, start or convert on this machine; the message says why."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a peer is given: where it was installed, what to serve and how."""

    root: Path  # the peer's own folder; it keeps it between runs
    scratch: Path  # gone after the run
    model: Path  # a transformers directory
    adapters: Mapping[str, Path]  # name -> PEFT directory
    dtype: str  # float32 or bfloat16
    threads: int
    max_streams: int
    max_rank: int


@dataclass(frozen=True, slots=True)
class Launch:
    """A command that serves on 127.0.0.1; `health` answers 200 once it does."""

    argv: Sequence[str]
    health: str = "/health"
    environ: Mapping[str, str] = field(default_factory=dict)
    start_timeout_s: float = 300.0


class PeerServer(Protocol):
    """One peer; its methods raise CannotRun with the reason."""

    name: str
    about: str  # version and the settings that matter, for the page

    def install(self, root: Path) -> None:
        """Install into `root`; nothing to do when it is there already."""

    def prepare(self, setup: Setup) -> None:
        """Convert the model and the adapters where the peer needs another format."""

    def launch(self, setup: Setup, port: int, *, has_adapters: bool) -> Launch:
        """Return how to serve the base alone (as fast as it can) or with all adapters."""

    def register(self, setup: Setup, url: str) -> None:
        """Make the adapters known to a running server that does not know them from its start."""

    def body(self, setup: Setup, adapter: str | None, *, has_adapters: bool) -> dict[str, Any]:
        """Return the fields by which a request names its adapter (None: the base)."""


@dataclass(frozen=True, slots=True)
class RunningPeer:
    """A peer that listens, and the process that was started."""

    url: str
    pid: int


@contextlib.contextmanager
def running(
    peer: PeerServer, setup: Setup, log: Path, *, has_adapters: bool
) -> Iterator[RunningPeer]:
    """Start the peer on a free loopback port, wait until it is healthy, and stop it in any case.

    It leads a process group of its own and is stopped by that group's id. Raises CannotRun with
    the end of its log when it does not become healthy.
    """
    port = free_port()
    launch = peer.launch(setup, port, has_adapters=has_adapters)
    with log.open("ab") as output:
        output.write(f"\n$ {shlex.join(launch.argv)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            launch.argv,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**clean_environ(), **launch.environ},
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(peer.name, process, url + launch.health, launch.start_timeout_s, log)
        if has_adapters:
            peer.register(setup, url)
        yield RunningPeer(url=url, pid=process.pid)
    finally:
        _stop_group(process)


def _wait_until_healthy(
    name: str, process: subprocess.Popen[bytes], url: str, timeout_s: float, log: Path
) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if (status := _exit_status(process)) is not None:
            raise CannotRun(f"{name} ended at its start with {_status(status)}: {last_lines(log)}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=5).status_code == 200:
                return
        time.sleep(0.2)
    raise CannotRun(f"{name} was not ready after {timeout_s:.0f} s: {last_lines(log)}")


def _exit_status(process: subprocess.Popen[bytes]) -> int | None:
    """Return the exit status (a signal as its negative) without reaping; None while it runs."""
    ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _status(status: int) -> str:
    """Return an exit status in words: a machine without an instruction shows as its signal."""
    return signal.Signals(-status).name if status < 0 else f"status {status}"


def _stop_group(process: subprocess.Popen[bytes]) -> None:
    """End every process of the group, politely first.

    The leader is reaped last: until then its id cannot be given to another group.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while _exit_status(process) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def clean_environ() -> dict[str, str]:
    """Return the environment without our own settings and without any use of the network."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("POLYADAPT_", "PYTHONPATH"))}
    return {**ours, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}


def call(argv: Sequence[str], log: Path, *, environ: Mapping[str, str] | None = None) -> None:
    """Run one command of an installation or a conversion; its output goes to `log`.

    Raises CannotRun with the end of the output when it fails or is not there.
    """
    with log.open("ab") as output:
        output.write(f"\n$ {shlex.join(argv)}\n".encode())
        output.flush()
        try:
            status = subprocess.run(
                argv,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**clean_environ(), **(environ or {})},
                check=False,
            ).returncode
        except FileNotFoundError as error:
            raise CannotRun(f"{argv[0]} is not installed on this machine") from error
    if status:
        raise CannotRun(
            f"`{shlex.join(argv)[:120]}` ended with {_status(status)}: {last_lines(log)}"
        )


def last_lines(log: Path, num: int = 3) -> str:
    """Return the last lines that the last command said, as one short line."""
    said = log.read_text(errors="replace").rpartition("\n$ ")[2].splitlines()[1:]
    lines = [line.strip() for line in said if line.strip()]
    return " / ".join(lines[-num:])[-500:]


def make_venv(root: Path, log: Path) -> Path:
    """Make an environment of the peer's own and return its interpreter."""
    python = root / "venv" / "bin" / "python"
    if not python.exists():
        call([sys.executable, "-m", "venv", str(root / "venv")], log)
    return python


def is_installed(root: Path, what: str) -> bool:
    """Return whether `mark_installed` has recorded exactly this installation."""
    stamp = root / "installed.txt"
    return stamp.is_file() and stamp.read_text() == what


def mark_installed(root: Path, what: str) -> None:
    """Record a whole installation, so that a failed one is tried again."""
    (root / "installed.txt").write_text(what)


def readable_by_older(model: Path, out: Path) -> Path:
    """Return a view of a transformers 5 directory for readers of the older config.json.

    Weights and tokenizer are links; rope_theta and torch_dtype stand at the top level again.
    """
    if out.exists():
        return out
    out.mkdir(parents=True)
    for path in model.iterdir():
        if path.name != "config.json":
            (out / path.name).symlink_to(path.resolve())
    config = json.loads((model / "config.json").read_text())
    for key in ("_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    rope = config.get("rope_parameters") or {}
    config.setdefault("rope_theta", rope.get("rope_theta", 10_000.0))
    config.setdefault("torch_dtype", config.get("dtype", "float32"))
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return out
