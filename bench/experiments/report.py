"""What an experiment found: claims with their figures, as JSON, a short page and plots."""

from __future__ import annotations

import argparse
import datetime
import inspect
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from bench.machine import describe

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Claim:
    """What was to be seen, decided before the run, and whether it was."""

    text: str
    measured: str
    is_shown: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything that one run has to say."""

    title: str
    claims: Sequence[Claim]
    tables: Sequence[str]  # Markdown
    charts: Mapping[str, str]  # file name -> SVG
    settings: Any  # a dataclass
    figures: Mapping[str, Any]  # for the JSON file
    notes: Sequence[str] = field(default=())


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; floats with three digits."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(_cell, row)) + " |" for row in rows])


def render(outcome: Outcome, method: str, wall_s: float) -> str:
    """The page: what was asked, what was seen, tables, plots."""
    machine = describe()
    claims = [
        [c.text, c.measured, "shown" if c.is_shown else "**not shown**"] for c in outcome.claims
    ]
    parts = [
        f"# {outcome.title}",
        method,
        *([table(["decided before the run", "measured", ""], claims)] if claims else []),
        *outcome.tables,
        *(f"![{Path(name).stem}]({name})" for name in outcome.charts),
        *outcome.notes,
        f"{wall_s:.0f} s on {machine.cpu} ({machine.num_cores} cores, {torch.get_num_threads()} "
        f"thread(s)), torch {version('torch')}.",
    ]
    return "\n\n".join(parts) + "\n"


def save(name: str, outcome: Outcome, method: str, wall_s: float, out: Path) -> None:
    """Write NAME.json, NAME.md and the charts."""
    out.mkdir(parents=True, exist_ok=True)
    result = {
        "experiment": name,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": asdict(describe()),
        "versions": {"torch": version("torch"), "transformers": version("transformers")},
        "num_threads": torch.get_num_threads(),
        "wall_s": round(wall_s, 1),
        "settings": asdict(outcome.settings),
        "claims": [asdict(claim) for claim in outcome.claims],
        "figures": rounded(outcome.figures),
    }
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / f"{name}.md").write_text(render(outcome, method, wall_s))
    for file, chart in outcome.charts.items():
        (out / file).write_text(chart)


def rounded(value: Any) -> Any:
    """The same with floats of five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [rounded(item) for item in value]
    return value


def main(module: ModuleType) -> None:
    """Run one experiment by its command line; `module` has NAME, FULL, QUICK and run()."""
    parser = argparse.ArgumentParser(description=inspect.getdoc(module))
    parser.add_argument("--quick", action="store_true", help="seconds, for a look at the code")
    parser.add_argument("--out", type=Path, help="default: bench/experiments/results, or nowhere")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = args.out or (None if args.quick else RESULTS)
    run_one(module.NAME, module, is_quick=args.quick, out=out)


def run_one(name: str, module: ModuleType, *, is_quick: bool, out: Path | None) -> Outcome:
    """Run, print the page, and save it where `out` is given."""
    run: Callable[[Any, Path], Outcome] = module.run
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="polyadapt-experiment-") as scratch:
        outcome = run(module.QUICK if is_quick else module.FULL, Path(scratch))
    wall_s = time.monotonic() - began
    method = inspect.getdoc(module) or ""
    print(render(outcome, method, wall_s))
    if out is not None:
        save(name, outcome, method, wall_s, out)
        print(f"saved under {out}", file=sys.stderr)
    return outcome


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
