"""Turns what a run on a device found into targets, a page and two charts. Reads only the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.plots import line_chart

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure is to be; `value` None: it was not measured."""

    name: str
    value: float | None
    limit: float
    is_least: bool  # the limit is the least that it may be, else the most

    @property
    def verdict(self) -> str:
        """met, missed or not measured."""
        if self.value is None:
            return "not measured"
        is_met = self.value >= self.limit if self.is_least else self.value <= self.limit
        return "met" if is_met else "missed"


def list_targets(result: Mapping[str, Any]) -> list[Target]:
    """The targets of the run's shape and rows, each beside what was found."""
    scale = result["scale"]
    rows, most = scale["adapter_rows"], max(scale["adapters"])
    targets = [
        Target(
            f"base decode at {rows} rows, part of the bandwidth limit",
            _value(result, "base", "part of limit", rows=rows),
            0.7,
            True,
        )
    ]
    for name in scale["targets"]:
        one = {"targets": name, "adapters": 1}
        many = {"targets": name, "adapters": most}
        targets += [
            Target(
                f"a step with {most} adapters on {name} over base + their bytes / bandwidth",
                _value(result, "adapters", "over ideal", **many),
                1.2,
                False,
            ),
            Target(
                f"throughput with one adapter on {name} over the base's",
                _value(result, "adapters", "of base", **one),
                0.97,
                True,
            ),
        ]
    return [
        *targets,
        Target(
            f"throughput over PEFT's mixed batch, {most} adapters at {rows} rows",
            _value(result, "peft", "ours over PEFT's"),
            10.0,
            True,
        ),
        Target(
            f"a step outside the forward at {max(scale['rows'])} rows, ms",
            _value(result, "overhead", "outside, ms"),
            0.5,
            False,
        ),
    ]


def render(result: Mapping[str, Any]) -> str:
    """Return the page."""
    method = result["method"]
    lines = [
        f"# On {result['device']}, {result['started']}",
        "",
        f"{method['shape']}; {method['dtype']}; contexts of {method['context']} tokens; adapters "
        f"of rank {method['rank']}. {method['engine']}. {method['versions']}.",
        "",
        *(f"- {note}" for note in method["notes"]),
        "",
        *table(
            ["target", "is", "limit", ""],
            [
                [t.name, "" if t.value is None else _text(t.value),
                 f"{'at least' if t.is_least else 'at most'} {t.limit:g}", t.verdict]
                for t in list_targets(result)
            ],
        ),
    ]  # fmt: skip
    for name, part in result["parts"].items():
        note = f": {part['note']}" if part["note"] else ""
        lines += ["", f"## {name}", "", f"{part['status']} in {part['seconds']:.1f} s{note}", ""]
        rows = part["rows"]
        if rows:
            columns = list(dict.fromkeys(key for row in rows for key in row))
            lines += table(
                columns, [[_text(row.get(column)) for column in columns] for row in rows]
            )
    return "\n".join([*lines, ""])


def charts(result: Mapping[str, Any]) -> dict[str, str]:
    """SVG by file name: decode steps over rows, and over adapters; those that have points."""
    found = {}
    base = _rows(result, "base")
    if base:
        series = {
            "measured": [(row["rows"], row["step, ms"]) for row in base],
            "bandwidth limit": [(row["rows"], row["limit, ms"]) for row in base],
        }
        found["gpu-base-decode.svg"] = line_chart(
            "A decode step of the base", "rows (logarithmic)", "milliseconds", series
        )
    measured = _rows(result, "adapters")
    over: dict[str, list[tuple[float, float]]] = {}
    for row in measured:
        if row["adapters"]:
            over.setdefault(row["targets"], []).append((row["adapters"], row["step, ms"]))
            ideal = over.setdefault(f"{row['targets']}, ideal", [])
            ideal.append((row["adapters"], row["ideal, ms"]))
    if over:
        rows = result["scale"]["adapter_rows"]
        found["gpu-adapters.svg"] = line_chart(
            f"A decode step of {rows} rows", "distinct adapters (logarithmic)", "milliseconds", over
        )
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _rows(result: Mapping[str, Any], part: str) -> Rows:
    rows: Rows = result["parts"].get(part, {"rows": []})["rows"]
    return rows


def _value(result: Mapping[str, Any], part: str, column: str, **where: Any) -> float | None:
    for row in _rows(result, part):
        if column in row and all(row.get(key) == value for key, value in where.items()):
            value: float = row[column]
            return value
    return None


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
