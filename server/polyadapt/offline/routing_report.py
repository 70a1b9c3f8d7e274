"""A RoutingReport as a table, as plain data and as a picture."""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

from rich.markup import escape as escape_markup
from rich.table import Table

from polyadapt.offline.routing import RoutingReport

_MAX_SHOWN = 16  # experts in the table
_CELL_WIDTH, _CELL_HEIGHT, _LABEL_WIDTH, _TOP = 18, 14, 300, 48


def to_data(report: RoutingReport) -> dict[str, Any]:
    """Return all of it as plain data; stable keys."""
    return {
        "num_tokens": report.num_tokens,
        "warning": report.warning,
        "modules": [
            {
                "path": module.path,
                "shares": list(module.shares),
                "effective_experts": module.effective_experts,
                "is_collapsed": module.is_collapsed,
            }
            for module in report.modules
        ],
    }


def to_table(report: RoutingReport) -> Table:
    """Return a row per module: its experts' parts in percent, and how many are in effect used."""
    table = Table("module", "in effect", "experts, % of the weight", pad_edge=False)
    for module in report.modules:
        shares = " ".join(f"{100 * share:.0f}" for share in module.shares[:_MAX_SHOWN])
        more = len(module.shares) - _MAX_SHOWN
        table.add_row(
            escape_markup(module.path),
            f"{module.effective_experts:.1f} of {len(module.shares)}",
            shares + (f" and {more} more" if more > 0 else ""),
            style="bold" if module.is_collapsed else None,
        )
    return table


def to_svg(report: RoutingReport) -> str:
    """Return a picture, a row per module and a column per expert: the darker, the more weight."""
    num_experts = max(len(module.shares) for module in report.modules)
    width = _LABEL_WIDTH + num_experts * _CELL_WIDTH + 20
    height = _TOP + len(report.modules) * _CELL_HEIGHT + 20
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="10">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="10" y="18" font-size="13">Weight of each expert over {report.num_tokens} '
        "tokens</text>",
        f'<text x="{_LABEL_WIDTH}" y="{_TOP - 8}">experts 0 to {num_experts - 1}</text>',
    ]
    for row, module in enumerate(report.modules):
        y = _TOP + row * _CELL_HEIGHT
        lines.append(
            f'<text x="{_LABEL_WIDTH - 8}" y="{y + 10}" text-anchor="end">{escape(module.path)}'
            "</text>"
        )
        for expert, share in enumerate(module.shares):
            x, shade = _LABEL_WIDTH + expert * _CELL_WIDTH, round(255 * (1 - share))
            lines.append(
                f'<rect x="{x}" y="{y}" width="{_CELL_WIDTH - 1}" height="{_CELL_HEIGHT - 1}" '
                f'fill="rgb({shade},{shade},255)"><title>{escape(module.path)}, expert {expert}: '
                f"{share:.1%}</title></rect>"
            )
    return "\n".join([*lines, "</svg>"]) + "\n"
