"""The benchmark: our server beside PEFT's mixed batch and transformers' generate, in one run.

    python -m bench.run [--quick]

Order: our server, the peers, our server again, so that drift of the machine shows. Results go to
bench/results/<date>-<machine>/ as JSON and as a table. Compare figures of one run only.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.adapters import make_adapters
from bench.loadgen import Load, LoadResult, run_load
from bench.machine import CpuWatch, describe
from bench.peer_process import measure_in_process
from bench.places import default_model, results_folder
from bench.report import Cell, PeerCell, render, targets
from bench.server import Server, running_server

NUM_ADAPTERS = 32
# A cell is invalid when fewer distinct adapters than this part of what is possible share a step.
MIXED_FLOOR = 0.9
# The first cells are measured even when the time has run out: without them a run says nothing.
NUM_ALWAYS = 2
MIN_PEERS_S = 150.0
# Requests of a cell that were not started by then are left out. Room for two whole waves on a slow
# machine: a second wave of some streams only would not be the mix that the cell is named for.
MAX_CELL_S = 150.0

# (number of distinct adapters, concurrency), the most important first: time may run out.
CELLS = [(0, 32), (32, 32), (8, 32), (1, 32), (0, 8), (8, 8), (1, 8), (0, 1), (1, 1)]
QUICK_CELLS = [(0, 32), (32, 32), (8, 8), (0, 1)]
PEERS = [("generate", 32, 0), ("mixed", 32, 32), ("mixed", 8, 8), ("generate", 8, 0),
         ("generate", 1, 0), ("mixed", 32, 8), ("single", 32, 1), ("single", 1, 1)]  # fmt: skip
QUICK_PEERS = [("generate", 32, 0), ("mixed", 32, 32)]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a whole run holds constant."""

    model: Path
    adapters: dict[str, Path]
    adapters_root: Path
    vocab_size: int
    dtype: str
    threads: int
    deadline: float  # time.monotonic() of the end
    home: Path
    log: Path
    server_options: tuple[str, ...]


def main() -> int:
    """Run the benchmark; the exit status is 1 when a cell had errors, was not really mixed, or a
    target could not be judged."""
    args = _parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` stops the server
    machine = describe()
    dtype = machine.dtype if args.dtype == "auto" else args.dtype
    threads = args.threads or machine.num_cores
    model = args.model or default_model()
    started = datetime.datetime.now(datetime.UTC)
    with tempfile.TemporaryDirectory(prefix="polyadapt-bench-") as scratch:
        root = Path(scratch)
        settings = Settings(
            model=model,
            adapters=make_adapters(model, root / "adapters", NUM_ADAPTERS),
            adapters_root=root / "adapters",
            vocab_size=json.loads((model / "config.json").read_text())["vocab_size"],
            dtype=dtype,
            threads=threads,
            deadline=time.monotonic() + 60 * (args.minutes or (4 if args.quick else 15)),
            home=root / "home",
            log=root / "server.log",
            server_options=tuple(args.server_option),
        )
        cells = QUICK_CELLS if args.quick else CELLS
        ours, about = _ours(settings, cells, run=1, until=0.4)
        peers, versions = _peers(settings, QUICK_PEERS if args.quick else PEERS, until=0.8)
        again, _ = _ours(settings, cells, run=2, until=1.0)
    ours += again
    result: dict[str, Any] = {
        "started": started.isoformat(timespec="seconds"),
        "machine": asdict(machine),
        "method": {
            "model": model.name,
            "dtype": dtype,
            "threads": threads,
            "prompt_tokens": 128,
            "output_tokens": 64,
            "adapters": "rank 16 on all seven linears, random, one per row in mixed cells",
            "order": "ours, peers, ours",
            "is_quick": args.quick,
            "server_options": args.server_option,
        },
        "server": about,
        "peer_versions": versions,
        "ours": [asdict(cell) for cell in ours],
        "peers": [asdict(cell) for cell in peers],
    }
    text = render(result, ours, peers)
    out = results_folder(args.out, started)
    (out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    (out / "README.md").write_text(text)
    print(text)
    print(f"saved under {out}")
    is_judged = all(value is not None for _, _, value in targets(ours, peers))
    return 0 if is_judged and all(cell.is_valid for cell in ours) else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cells, about 4 minutes")
    parser.add_argument("--minutes", type=float, help="time limit (default 15, quick 4)")
    parser.add_argument("--model", type=Path, help="a Llama-like transformers directory")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--threads", type=int, help="of the server and of the peers")
    parser.add_argument("--out", type=Path, help="instead of bench/results/<date>-<machine>")
    parser.add_argument(
        "--server-option", action="append", default=[], help="one more argument of the server"
    )
    return parser.parse_args()


def _ours(
    settings: Settings, cells: list[tuple[int, int]], *, run: int, until: float
) -> tuple[list[Cell], dict[str, Any]]:
    """Measure our server's cells; those that would start after `until` of the time are skipped.

    The adapters are uploaded in the first run and are still in the home in the second.
    """
    done: list[Cell] = []
    with running_server(
        settings.model,
        settings.home,
        settings.log,
        dtype=settings.dtype,
        threads=settings.threads,
        # The peers have no prefix cache either: every token of every prompt is computed.
        options=["--no-prefix-cache", *settings.server_options],
    ) as server:
        about = server.version()
        if run == 1:
            uploads = [server.upload(name, path) for name, path in settings.adapters.items()]
            about["mean_upload_s"] = round(sum(uploads) / len(uploads), 3)
        base = server.base_model()
        limit = _limit(settings, until)
        for position, (num_adapters, concurrency) in enumerate(cells):
            if position >= NUM_ALWAYS and time.monotonic() > limit:
                _say(f"ours {num_adapters}@{concurrency}: skipped, out of time")
                continue
            models = tuple(settings.adapters)[:num_adapters] or (base,)
            load = Load(
                models=models,
                concurrency=concurrency,
                num_requests=max(4, 2 * concurrency),
                vocab_size=settings.vocab_size,
                seed=1000 * concurrency + num_adapters,
                stop_after_s=MAX_CELL_S,
            )
            done.append(measure_cell(server, load, num_adapters, run))
    return done, about


def measure_cell(server: Server, load: Load, num_adapters: int, run: int) -> Cell:
    """Run one cell's load against our server; valid if it had no errors and was really mixed."""
    watch = CpuWatch([os.getpid(), server.pid])
    before: Counter[int] = Counter()
    # The warm-up loads adapters one after another: its steps say nothing of the load's.
    result: LoadResult = asyncio.run(
        run_load(
            server.url, load, on_warm=lambda: before.update(server.steps_by_distinct_adapters())
        )
    )
    steps = server.steps_by_distinct_adapters() - before
    if not steps:
        raise RuntimeError(
            "GET /metrics has neither polyadapt_step_distinct_adapters nor the events "
            "steps_with_N_adapters: whether a cell is mixed cannot be judged"
        )
    median = median_of(steps)
    # With fewer adapters than rows, every adapter can be in every step and no more.
    possible = min(num_adapters, load.concurrency)
    cell = Cell(
        num_adapters=num_adapters,
        concurrency=load.concurrency,
        run=run,
        result=result,
        median_distinct_adapters=median,
        num_steps=steps.total(),
        is_valid=not result.errors and median >= MIXED_FLOOR * possible,
        other_cores=watch.other_cores(),
    )
    note = "" if cell.is_valid else f"  INVALID: {result.errors[:1] or 'not mixed enough'}"
    _say(
        f"ours {num_adapters}@{load.concurrency}: {result.tokens_per_s:.1f} tokens/s, "
        f"{median} adapters a step, {cell.other_cores} other cores{note}"
    )
    return cell


def median_of(steps: Counter[int]) -> int:
    """Return the lower median over steps of the number of distinct adapters."""
    half = (steps.total() + 1) // 2
    for distinct in sorted(steps):
        half -= steps[distinct]
        if half <= 0:
            return distinct
    return 0


def _peers(
    settings: Settings, cells: list[tuple[str, int, int]], *, until: float
) -> tuple[list[PeerCell], dict[str, str]]:
    """Measure the peers in their own process; it is ended when `until` of the time has passed."""
    limit = max(_limit(settings, until), time.monotonic() + MIN_PEERS_S)
    done, versions = measure_in_process(
        settings.model,
        settings.adapters_root,
        cells,
        dtype=settings.dtype,
        threads=settings.threads,
        limit=limit,
    )
    if len(done) < len(cells):
        _say(f"peers: {len(cells) - len(done)} cells skipped, out of time")
    return done, versions


def _limit(settings: Settings, part: float) -> float:
    """Return when `part` of the time that is left now in this run will have passed."""
    return time.monotonic() + part * max(settings.deadline - time.monotonic(), 0.0)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
