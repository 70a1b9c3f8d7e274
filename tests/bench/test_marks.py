"""The page about marks shows what was measured, and the tables are made from the saved figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import mark_classifier, mark_codes

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "2026-11-22-2-core-amd-epyc"


@pytest.mark.parametrize("bench", [mark_classifier, mark_codes])
def test_the_page_shows_the_table_of_the_saved_run(bench):
    name = bench.__name__.rpartition(".")[2].replace("_", "-")
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    table = bench.to_markdown(rows)
    assert table == (RESULTS / f"{name}.md").read_text()
    assert table in (ROOT / "docs" / "watermarks.md").read_text()


def test_every_setting_of_the_benches_was_run():
    rows = json.loads((RESULTS / "mark-codes.json").read_text())["rows"]
    assert {(row["design"], row["length"]) for row in rows} == {
        (setting.design, setting.length) for setting in mark_codes.SETTINGS
    }
    rows = json.loads((RESULTS / "mark-classifier.json").read_text())["rows"]
    assert {row["num_bits"] for row in rows} == {16, 32}
    assert {row["seed"] for row in rows} == set(range(5))
