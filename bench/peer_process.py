"""Runs bench/peers.py (PEFT and transformers) as a child process, within a time limit."""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.report import PeerCell

ROOT = Path(__file__).parents[1]


def measure_in_process(
    model: Path,
    adapters_root: Path,
    cells: Sequence[tuple[str, int, int]],
    *,
    dtype: str,
    threads: int,
    limit: float,
) -> tuple[list[PeerCell], dict[str, str]]:
    """Return the cells measured until `limit` (of time.monotonic()) and the peers' versions.

    Raises RuntimeError when the process fails by itself.
    """
    command = [sys.executable, "-m", "bench.peers", "--model", str(model)]
    command += ["--adapters", str(adapters_root), "--cells", json.dumps(cells)]
    command += ["--dtype", dtype, "--threads", str(threads)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    done: list[PeerCell] = []
    versions: dict[str, str] = {}
    try:
        for line in _lines_until(process, limit):
            row = json.loads(line)
            if "versions" in row:
                versions = row["versions"]
                continue
            done.append(PeerCell(**row))
            print(
                f"peer {row['kind']} {row['num_adapters']}@{row['batch']}: "
                f"{row['tokens_per_s']:.1f} tokens/s, {row['other_cores']} other cores",
                file=sys.stderr,
                flush=True,
            )
    finally:
        process.kill()
        process.wait()
    if process.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the peers' process ended with {process.returncode}")
    return done, versions


def _lines_until(process: subprocess.Popen[str], limit: float) -> Iterator[str]:
    """Yield the process' lines until its output ends or the time has passed."""
    assert process.stdout is not None
    while (left := limit - time.monotonic()) > 0:
        # One line is printed at a time, minutes apart: nothing stays behind in the text buffer.
        if not select.select([process.stdout], [], [], left)[0]:
            return
        line = process.stdout.readline()
        if not line:
            process.wait()
            return
        yield line
