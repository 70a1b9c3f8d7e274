"""The residency benchmark: what it stores is read, and its table says what was missed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from bench.machine import Machine

from bench import residency

MACHINE = Machine("a cpu", 1, 1, (), "a system")


def test_the_known_adapters_are_distinct_and_are_served(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(residency, "NUM_ROW_TOKENS", 3)
    bench = residency.Bench(tiny_model("llama"), tmp_path, MACHINE, 1)
    assert len(set(bench._large(3)) | set(bench._tiny(3))) == 6
    throughput, host = bench.registered((2, 5))
    assert set(throughput.figures) == {"2 known, tokens/s", "5 known, tokens/s"}
    assert min(throughput.figures.values()) > 0
    assert min(host.figures.values()) > 0


def test_the_table_marks_what_was_missed():
    met = residency.Part("one", 1.5, 2.0, {"a, ms": 3}, 10, 0.1)
    missed = residency.Part("two", 2.5, 2.0, {}, 10, 0.1)
    page = residency.render([met, missed])
    assert "| one | 1.50 | 2 | 10 | 0.1 |" in page
    assert "| two | 2.50 **missed** |" in page
    assert "a, ms | 3" in page


def test_a_percentile_is_one_of_the_values():
    assert residency.percentile(range(200), 0.99) == 198
    assert residency.percentile([5.0], 0.99) == 5.0
