"""What the server itself costs, without a model: per decode step and per streamed token.

    python -m bench.overhead [--model DIR] [--out bench/results/<date>-<machine>]

One thread, its CPU time, real objects. The first target is for scheduling and preparing a step,
the second for everything from the engine's events to the bytes of a stream.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path

import torch
from bench.machine import CpuWatch, describe
from bench.overhead_edge import EdgeCost, measure_edge
from bench.overhead_step import Timing, measure_step
from bench.places import default_model

NUM_ROWS = 256
STEP_TARGET_US = 1000.0
TOKEN_TARGET_US = 100.0


def main() -> None:
    """Measure, print a table, and write overhead.json under --out."""
    args = _parse()
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    watch = CpuWatch([os.getpid()])
    steps = measure_step(NUM_ROWS, args.steps)
    edges = measure_edge(args.model or default_model(), NUM_ROWS, args.steps)
    other = watch.other_cores()
    print(render(steps, edges, other))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        result = {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": asdict(describe()),
            "method": {"rows": NUM_ROWS, "adapters": NUM_ROWS, "steps": args.steps, "threads": 1},
            "other_cores": other,
            "step": [asdict(timing) for timing in steps],
            "edge": [asdict(cost) for cost in edges],
        }
        (args.out / "overhead.json").write_text(json.dumps(result, indent=2) + "\n")


def render(steps: list[Timing], edges: list[EdgeCost], other_cores: float) -> str:
    """Return both tables as Markdown."""
    lines = [
        f"Microseconds of CPU, one thread, {NUM_ROWS} rows of {NUM_ROWS} adapters; "
        f"{other_cores:.2f} other cores were busy",
        "",
        "| a step's | median | p99 | a row | target |",
        "|---|---|---|---|---|",
    ]
    for timing in steps:
        target = f"{STEP_TARGET_US:.0f}" if timing.phase == "schedule + prepare" else ""
        lines.append(
            f"| {timing.phase} | {timing.median_us:.0f} | {timing.p99_us:.0f} "
            f"| {timing.median_us / NUM_ROWS:.2f} | {target} |"
        )
    lines += [
        "",
        "| a token's way through | engine's encoding | edge | both | target |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {cost.path} | {cost.encode_us:.1f} | {cost.edge_us:.1f} "
        f"| {cost.encode_us + cost.edge_us:.1f} | {TOKEN_TARGET_US:.0f} |"
        for cost in edges
    ]
    return "\n".join(lines)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a directory with a tokenizer and a template")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, help="bench/results/<date>-<machine>")
    return parser.parse_args()


if __name__ == "__main__":
    main()
