"""Line charts as SVG text, and the two that are committed with a benchmark's results.

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

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="13" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        _text(_LEFT, 26, title, 'font-size="16"'),
    ]
    for number in range(round(top / step) + 1):
        y = py(number * step)
        parts.append(f'<path d="M{_LEFT} {y}H{_LEFT + width}" stroke="#dddddd"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"{number * step:g}", 'text-anchor="end"'))
    for x in xs:
        parts.append(f'<path d="M{px(x)} {_TOP + height}v5" stroke="#444444"/>')
        parts.append(_text(px(x), _TOP + height + 20, f"{x:g}", 'text-anchor="middle"'))
    middle = _TOP + height / 2
    parts.append(_text(_LEFT + width / 2, _HEIGHT - 12, x_label, 'text-anchor="middle"'))
    turned = f'text-anchor="middle" transform="rotate(-90 20 {middle:g})"'
    parts.append(_text(20, middle, y_label, turned))
    for index, (name, points) in enumerate(shown.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        path = "L".join(f"{px(x)} {py(y)}" for x, y in points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{px(x)}" cy="{py(y)}" r="3.5" fill="{colour}"/>' for x, y in points]
        line = _TOP + 10 + 22 * index
        start = _LEFT + width + 16
        parts.append(f'<path d="M{start} {line}h20" stroke="{colour}" stroke-width="2"/>')
        parts.append(_text(start + 26, line + 4, name))
    return "\n".join([*parts, "</svg>", ""])


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
