"""The tables of docs/adapters.md, made of the families' own words.

python -m tools.adapters_table          write them into docs/adapters.md
python -m tools.adapters_table --check  status 1 if they are not what is there
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from polyadapt.adapters import registry
from polyadapt.adapters.adapter import Family
from polyadapt.ops import cells

PAGE = Path(__file__).parents[1] / "docs" / "adapters.md"

_OVERRIDES = {
    cells.TRANSFORM: "transform of the input",
    cells.SWAP: "exchange of outputs",
    cells.DENSE: "dense difference",
    cells.WEIGHT: "norm weight",
}


def families_table(families: Sequence[Family]) -> str:
    """Return one row per family."""
    rows = [
        (
            f"`{family.name}`",
            ", ".join(f"`{name}`" for name in sorted(family.peft_types)),
            family.summary,
            family.scaling,
            ", ".join(name for bit, name in _OVERRIDES.items() if family.overrides & bit) or "none",
        )
        for family in sorted(families, key=lambda family: family.name)
    ]
    return _table(("family", "`peft_type`", "how it is served", "scalable", "slow parts"), rows)


def refused_table(refused: Mapping[str, str]) -> str:
    """Return one row per type of PEFT's that is known and refused."""
    if not refused:
        return "Every other `peft_type` is refused by name."
    rows = [(f"`{name}`", reason) for name, reason in sorted(refused.items())]
    return _table(("`peft_type`", "why it is refused"), rows)


def with_tables(page: str) -> str:
    """Return the page with both tables as they are now; raises ValueError without their places."""
    served = {name for family in registry.FAMILIES for name in family.peft_types}
    known: Mapping[str, str] = vars(registry).get("UNSERVED", {})
    refused = {name: reason for name, reason in known.items() if name not in served}
    tables = {"families": families_table(registry.FAMILIES), "refused": refused_table(refused)}
    for name, table in tables.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"the page has no place between {begin.strip()} and {end.strip()}")
        page = f"{before}{begin}\n{table}\n\n{end}{after}"
    return page


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *rows]
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


def main(arguments: Sequence[str]) -> int:
    """Write or check; returns the exit status."""
    there = PAGE.read_text(encoding="utf-8")
    made = with_tables(there)
    if "--check" not in arguments:
        PAGE.write_text(made, encoding="utf-8")
    elif made != there:
        print(f"{PAGE} is not what the families say; run: python -m tools.adapters_table")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
