"""Where benchmarks find their model and put what they found."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from bench.machine import describe

from polyadapt.config import default_home
from polyadapt.models.fetch import fetch_model

ROOT = Path(__file__).parents[1]


def default_model() -> Path:
    """Return the directory of SmolLM2, fetched into the home when it is not there."""
    return fetch_model("smollm2", default_home(os.environ))


def results_folder(given: Path | None, started: datetime | None = None) -> Path:
    """Make and return `given`, else bench/results/<date>-<machine>, of today where no start is
    named.
    """
    day = started or datetime.now(UTC)
    folder = given or ROOT / "bench" / "results" / f"{day:%Y-%m-%d}-{describe().slug}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def work_folder(name: str) -> Path:
    """Make and return a folder in the home for what the next run can go on from."""
    folder = default_home(os.environ) / "bench" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
