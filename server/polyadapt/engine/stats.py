"""Sums of what engines have counted: of several, or of one over its lives. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from polyadapt.types import EngineStats


def sum_counts(parts: Sequence[EngineStats]) -> EngineStats:
    """Return the sums of what only grows in an engine's life, and nothing of its present state."""
    counters: Counter[str] = Counter()
    steps: Counter[int] = Counter()
    rows: Counter[int] = Counter()
    load_seconds: dict[str, tuple[float, ...]] = {}
    for part in parts:
        counters.update(part.counters)
        steps.update(part.steps_by_adapters)
        rows.update(part.steps_by_rows)
        for stage, counts in part.load_seconds.items():
            before = load_seconds.get(stage, (0.0,) * len(counts))
            load_seconds[stage] = tuple(a + b for a, b in zip(before, counts, strict=True))
    return EngineStats(
        num_steps=sum(part.num_steps for part in parts),
        counters=dict(counters),
        steps_by_adapters=dict(steps),
        steps_by_rows=dict(rows),
        load_seconds=load_seconds,
    )
