"""Charts as SVG text: lines, bars and heat maps, and two that are committed with a benchmark.

    python -m bench.plots bench/results/<date>-<machine>

draws registered-adapters.svg from the residency.json there (bench/compare.py draws its own).
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 170, 46, 56  # the legend stands right of the plot
_TICK_WIDTH = 32  # a number below the plot needs so much; those too near to another are left out
# Distinct also for readers who do not see red beside green (Okabe and Ito's palette).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def distinct_adapters_chart(series: Mapping[str, Points], num_streams: int) -> str:
    """Return throughput over distinct adapters in the load: server -> (adapters, tokens/s)."""
    return line_chart(
        f"Throughput over distinct adapters, {num_streams} streams",
        "distinct adapters (logarithmic)",
        "output tokens per second",
        series,
    )


def registered_adapters_chart(series: Mapping[str, Points]) -> str:
    """Return throughput over registered adapters: what is plotted -> (registered, tokens/s)."""
    return line_chart(
        "Throughput over registered adapters, the same load",
        "registered adapters (logarithmic)",
        "output tokens per second",
        series,
    )


def registered_series(result: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Read residency.json's figures named `N known, tokens/s`; raise ValueError if it has none."""
    points = [
        (float(found[1]), float(value))
        for part in result["parts"]
        for name, value in part["figures"].items()
        if (found := re.fullmatch(r"(\d+) known, tokens/s", name))
    ]
    if not points:
        raise ValueError("no part has figures named `N known, tokens/s`; run the part `registered`")
    return {"polyadapt": sorted(points)}


def line_chart(title: str, x_label: str, y_label: str, series: Mapping[str, Points]) -> str:
    """Return one SVG: x logarithmic (all > 0) with a tick at each value, y linear from 0.

    Series without points are left out. Raises ValueError when nothing is left or an x is not > 0.
    """
    shown = {name: sorted(points) for name, points in series.items() if points}
    xs = sorted({x for points in shown.values() for x, _ in points})
    if not xs or xs[0] <= 0:
        raise ValueError(f"a chart needs points with x > 0, but {title!r} was given x = {xs[:3]}")
    step = _nice_step(max(y for points in shown.values() for _, y in points))
    top = step * max(math.ceil(max(y for p in shown.values() for _, y in p) / step), 1)
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    span = math.log(xs[-1] / xs[0]) or 1.0

    def px(x: float) -> float:
        return round(_LEFT + width * math.log(x / xs[0]) / span, 1)

    def py(y: float) -> float:
        return round(_TOP + height * (1 - y / top), 1)

    parts = _frame(title, step, top)
    labelled = -math.inf
    for x in xs:
        parts.append(f'<path d="M{px(x)} {_TOP + height}v5" stroke="#444444"/>')
        if px(x) - labelled >= _TICK_WIDTH:
            labelled = px(x)
            parts.append(_text(px(x), _TOP + height + 20, f"{x:g}", 'text-anchor="middle"'))
    parts += _labels(x_label, y_label)
    for index, (name, points) in enumerate(shown.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        path = "L".join(f"{px(x)} {py(y)}" for x, y in points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{px(x)}" cy="{py(y)}" r="3.5" fill="{colour}"/>' for x, y in points]
        parts += _legend(index, name)
    return "\n".join([*parts, "</svg>", ""])


def bar_chart(
    title: str, x_label: str, y_label: str, series: Mapping[str, Mapping[str, float]]
) -> str:
    """Return one SVG: series -> group -> height, groups side by side in the first series' order.

    Heights are >= 0; a series may lack a group. Raises ValueError for an empty or negative one.
    """
    heights = [value for own in series.values() for value in own.values()]
    if not heights or min(heights) < 0:
        raise ValueError(f"a chart needs heights >= 0, but {title!r} was given {heights[:3]}")
    groups = list(dict.fromkeys(group for own in series.values() for group in own))
    step = _nice_step(max(heights))
    top = step * max(math.ceil(max(heights) / step), 1)
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    room = width / len(groups)
    bar = room * 0.8 / len(series)
    parts = _frame(title, step, top)
    for place, group in enumerate(groups):
        left = _LEFT + room * (place + 0.1)
        middle = left + room * 0.4
        parts.append(_text(round(middle, 1), _TOP + height + 20, group, 'text-anchor="middle"'))
        for index, own in enumerate(series.values()):
            if group in own:
                tall = height * own[group] / top
                parts.append(
                    f'<rect x="{left + bar * index:.1f}" y="{_TOP + height - tall:.1f}" '
                    f'width="{bar * 0.94:.1f}" height="{tall:.1f}" '
                    f'fill="{_COLOURS[index % len(_COLOURS)]}"/>'
                )
    parts += _labels(x_label, y_label)
    for index, name in enumerate(series):
        parts += _legend(index, name)
    return "\n".join([*parts, "</svg>", ""])


def heat_map(
    title: str,
    x_label: str,
    y_label: str,
    columns: Sequence[str],
    rows: Mapping[str, Sequence[float]],
) -> str:
    """Return one SVG: row -> a value >= 0 for every column, white at 0 and darkest at the largest.

    Values stand in the cells while there are at most 12 columns. Raises ValueError for rows of
    other lengths than `columns`, negative values, or nothing at all.
    """
    values = [value for row in rows.values() for value in row]
    if not values or min(values) < 0 or {len(row) for row in rows.values()} != {len(columns)}:
        raise ValueError(f"a heat map needs {len(columns)} values >= 0 in every row of {title!r}")
    top = max(values) or 1.0
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    wide, tall = width / len(columns), height / len(rows)
    every = max(1, len(columns) // 12)
    parts = [*_opening(title), *_labels(x_label, y_label)]
    for place, (name, row) in enumerate(rows.items()):
        y = _TOP + tall * place
        parts.append(_text(_LEFT + width + 8, round(y + tall / 2 + 4, 1), name))
        for column, value in enumerate(row):
            x = _LEFT + wide * column
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:.1f}" '
                f'fill="{_shade(value / top)}" stroke="#eeeeee"/>'
            )
            if len(columns) <= 12:
                ink = "#ffffff" if value > top / 2 else "#000000"
                at = round(x + wide / 2, 1), round(y + tall / 2 + 4, 1)
                parts.append(_text(*at, f"{value:.2f}", f'text-anchor="middle" fill="{ink}"'))
    for column in range(0, len(columns), every):
        x = round(_LEFT + wide * (column + 0.5), 1)
        parts.append(_text(x, _TOP + height + 20, columns[column], 'text-anchor="middle"'))
    return "\n".join([*parts, "</svg>", ""])


def _opening(title: str) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="13" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        _text(_LEFT, 26, title, 'font-size="16"'),
    ]


def _frame(title: str, step: float, top: float) -> list[str]:
    """The title, and a line with its value at every step from 0 to top."""
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    parts = _opening(title)
    for number in range(round(top / step) + 1):
        y = round(_TOP + height * (1 - number * step / top), 1)
        parts.append(f'<path d="M{_LEFT} {y}H{_LEFT + width}" stroke="#dddddd"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"{number * step:g}", 'text-anchor="end"'))
    return parts


def _labels(x_label: str, y_label: str) -> list[str]:
    width, middle = _WIDTH - _LEFT - _RIGHT, _TOP + (_HEIGHT - _TOP - _BOTTOM) / 2
    turned = f'text-anchor="middle" transform="rotate(-90 20 {middle:g})"'
    return [
        _text(_LEFT + width / 2, _HEIGHT - 12, x_label, 'text-anchor="middle"'),
        _text(20, middle, y_label, turned),
    ]


def _legend(index: int, name: str) -> list[str]:
    colour, line = _COLOURS[index % len(_COLOURS)], _TOP + 10 + 22 * index
    start = _WIDTH - _RIGHT + 16
    return [
        f'<path d="M{start} {line}h20" stroke="{colour}" stroke-width="2"/>',
        _text(start + 26, line + 4, name),
    ]


def _shade(share: float) -> str:
    """From white to the first colour."""
    dark = [int(_COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(255 + (full - 255) * share):02x}" for full in dark)


def _nice_step(highest: float) -> float:
    """Return a round distance of about six lines up to `highest`."""
    if highest <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(highest / 5))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power * 6 >= highest)


def _text(x: float, y: float, text: str, attributes: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" {attributes}>{escape(text)}</text>'


def main() -> None:
    """Draw the chart of a folder of results."""
    folder = Path(sys.argv[1])
    series = registered_series(json.loads((folder / "residency.json").read_text()))
    (folder / "registered-adapters.svg").write_text(registered_adapters_chart(series))


if __name__ == "__main__":
    main()
