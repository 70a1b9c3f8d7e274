"""`polyadapt apply`: reads the file, asks the server, says what is done. See apply.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from polyadapt.errors import StartupError
from polyadapt.offline.apply import Server, Step, carry_out, plan, read_entries

_TIMEOUT_S = 600.0
_READY_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class Run:
    """What to apply where."""

    file: Path
    url: str
    api_key: str | None
    is_dry: bool = False
    prune: bool = False


def apply(run: Run, wait_s: float, every_s: float | None, say: Callable[[str], object]) -> bool:
    """Apply the file, again and again if `every_s` says so; return whether no entry failed.

    Raises StartupError when the file is none, or the server is not ready after `wait_s`.
    """
    headers = {} if run.api_key is None else {"authorization": f"Bearer {run.api_key}"}
    with httpx.Client(base_url=run.url, headers=headers, timeout=_TIMEOUT_S) as client:
        if wait_s > 0:
            _await_ready(client, wait_s)
        while True:
            try:
                is_good = apply_once(run, Server(client), say)
            except StartupError as error:
                if every_s is None:
                    raise
                say(f"failed     {error.message}")
                is_good = False
            if every_s is None:
                return is_good
            time.sleep(every_s)


def apply_once(run: Run, server: Server, say: Callable[[str], object]) -> bool:
    """Plan and carry out, with a line for each name; return whether none failed."""
    root = run.file.absolute().parent
    entries, failed = read_entries(run.file)
    done = []
    for step in plan(entries, failed, server, root, prune=run.prune):
        done.append(step if run.is_dry else carry_out(step, server, root))
        say(_line(done[-1]))
    counts = {action: sum(step.action == action for step in done) for action in _ACTIONS}
    told = ", ".join(f"{count} {action}" for action, count in counts.items() if count)
    say(f"{'would be: ' if run.is_dry else ''}{told or 'the file names no adapter'}")
    return counts["failed"] == 0


_ACTIONS = ("create", "update", "unchanged", "delete", "failed")


def _line(step: Step) -> str:
    return f"{step.action:<10} {step.name}  {step.why}"


def _await_ready(client: httpx.Client, wait_s: float) -> None:
    until = time.monotonic() + wait_s
    while True:
        try:
            if client.get("/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        if time.monotonic() > until:
            raise StartupError(f"the server at {client.base_url} was not ready in {wait_s:g} s")
        time.sleep(_READY_POLL_S)
