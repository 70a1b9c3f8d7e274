"""The documentation of adapters is what the families say of themselves."""

from __future__ import annotations

import pytest
from tools.adapters_table import PAGE, families_table, main, refused_table, with_tables

from polyadapt.adapters.families.lora import Lora
from polyadapt.adapters.registry import FAMILIES
from polyadapt.ops import cells


def test_the_committed_tables_are_those_that_the_code_makes() -> None:
    assert main(["--check"]) == 0, "run: python -m tools.adapters_table"


def test_every_family_has_a_row() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for family in FAMILIES:
        assert f"| `{family.name}` |" in page
        assert family.summary in page


def test_slow_parts_are_named() -> None:
    class Slow(Lora):
        overrides = cells.DENSE | cells.WEIGHT
        scaling = "no"

    last = families_table([Slow()]).splitlines()[-1]
    assert last.endswith("| no | dense difference, norm weight |")
    assert (
        families_table([Lora()]).splitlines()[-1].endswith("| yes, except DoRA and KaSA | none |")
    )


def test_refused_types_are_listed_with_their_reason() -> None:
    assert refused_table({"B": "because", "A": "why | not"}).splitlines()[2:] == [
        r"| `A` | why \| not |",
        "| `B` | because |",
    ]
    assert "refused by name" in refused_table({})


def test_a_page_without_the_place_is_an_error() -> None:
    with pytest.raises(ValueError, match="families: begin"):
        with_tables("# nothing\n")
