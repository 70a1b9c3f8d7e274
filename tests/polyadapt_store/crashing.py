"""Processes that publish and delete in a store and are killed at a step; made by forking one that
has imported everything already, so that hundreds take seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.polyadapt_store.support import BUCKET_VARIABLE, DATABASE_VARIABLE, open_store, upload

# Variables that tell where the store is.
_VARIABLES = (BUCKET_VARIABLE, DATABASE_VARIABLE)


def scenario(root: Path, failpoint: Callable[[str], None]) -> None:
    """Publish version 2 of a name that has one, then delete version 1 and its bytes."""
    with open_store(root, failpoint=failpoint) as store:
        upload(store, content=b"second")
        first = store.delete("a", "poet", 1)[0]
        store.delete_bytes(first.digest)


class Crasher:
    """Runs the scenario in a process that is killed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, root: Path, step: str = "", after_s: float = -1.0) -> int:
        """Kill it when it comes to `step`, or `after_s` after it began; return its status, as
        Popen.returncode.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        where = {name: os.environ[name] for name in os.environ if _tells_where(name)}
        order = {"root": str(root), "step": step, "after_s": after_s, "where": where}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@contextlib.contextmanager
def running_crasher() -> Iterator[Crasher]:
    """Start the process that the others are forked from."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.polyadapt_store.crashing"],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Crasher(process)
        assert process.stdin is not None
        process.stdin.close()


def _tells_where(name: str) -> bool:
    return name in _VARIABLES or name.startswith("AWS_")


def _main() -> None:
    import psycopg  # noqa: F401
    from obstore.store import S3Store  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            _crash(order)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _crash(order: dict[str, object]) -> None:
    """Do as ordered; never returns."""

    def kill(step: str) -> None:
        if step == order["step"]:
            os.kill(os.getpid(), signal.SIGKILL)

    def kill_later() -> None:
        time.sleep(float(order["after_s"]))  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGKILL)

    try:
        for name in [name for name in os.environ if _tells_where(name)]:
            del os.environ[name]
        os.environ.update(order["where"])  # type: ignore[arg-type]
        if float(order["after_s"]) >= 0:  # type: ignore[arg-type]
            threading.Thread(target=kill_later, daemon=True).start()
        scenario(Path(str(order["root"])), kill)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    _main()
