"""Run experiments one after the other: python -m bench.experiments [--quick] [NAME ...]"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import torch
from bench.experiments import report

NAMES = (
    "rank_curve", "learning_rates", "mixture", "mixture_longer", "rank_usage", "scalings",
    "forgetting", "agreement",
)  # fmt: skip


def main() -> None:
    """Run all of them or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="seconds each, for a look at the code")
    parser.add_argument("--out", type=Path, help="default: bench/experiments/results, or nowhere")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(NAMES))
    if unknown:
        parser.error(f"no experiment is called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    torch.set_num_threads(args.threads)
    out = args.out or (None if args.quick else report.RESULTS)
    for name in args.names or NAMES:
        module = importlib.import_module(f"bench.experiments.{name}")
        report.run_one(name, module, is_quick=args.quick, out=out)


if __name__ == "__main__":
    main()
