"""An Inspection for people and for machines."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from polyadapt.offline.inspection import Inspection

_VERDICTS = {
    "served": "it is served, and the engine computes what was read from its files",
    "refused": "it is refused",
    "differs": "it would be served WRONGLY; please report this",
    "unknown": "nothing speaks against it so far",
}


def show(found: Inspection, out: Console, *, as_json: bool) -> None:
    """Print the inspection."""
    if as_json:
        # Not through rich, which would wrap and colour it.
        out.file.write(json.dumps(to_data(found), indent=2) + "\n")
    else:
        out.print(to_table(found))


def to_data(found: Inspection) -> dict[str, Any]:
    """Return all of it as plain data; stable keys, shares and bytes included."""
    data = {"verdict": found.verdict, **asdict(found)}
    if found.cost is not None:
        data["cost"] |= {
            "device_share": found.cost.device_share,
            "compute_share": found.cost.compute_share,
            "device_bytes": _device_bytes(found.cost.num_elements),
        }
    if found.parity is not None:
        data["parity"]["is_equal"] = found.parity.is_equal
    return data


def to_table(found: Inspection) -> Table:
    """Return a table of two columns."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, value: object) -> None:
        if value is not None and value != "":
            table.add_row(name, escape(str(value)))

    row("adapter", found.directory)
    row("verdict", _VERDICTS[found.verdict])
    row("family", found.family)
    row("served as", found.summary)
    row("rank", found.rank)
    row("modules", ", ".join(found.target_modules))
    row("files", ", ".join(f"{name} {_size(size)}" for name, size in found.files.items()))
    row("tensors", found.num_tensors)
    if found.traits is not None:
        for name, value in _traits(found):
            row(name, value)
    if found.cost is not None:
        cost = found.cost
        sizes = ", ".join(f"{_size(n)} in {d}" for d, n in _device_bytes(cost.num_elements).items())
        row("on the device", f"{sizes}: {cost.device_share:.2%} of the base")
        row("per token", f"{cost.compute_share:.2%} more multiply-adds than the base's linears")
        slow = ", ".join(f"{name} of {num} modules" for name, num in cost.slow_parts.items())
        row("slow parts", f"{slow}; computed adapter by adapter" if slow else "none")
    if found.parity is not None:
        parity = found.parity
        at = f" at ranks {', '.join(map(str, parity.ranks))}" if parity.ranks else ""
        row(
            "parity",
            f"{'equal' if parity.is_equal else 'DIFFERENT'}{at}: log-probabilities of "
            f"{parity.num_tokens} tokens differ by {parity.largest_difference:.1e} at most from "
            f"those of edited float32 weights (rounding: {parity.tolerance:.1e}); the adapter "
            f"changes them by up to {parity.largest_effect:.1e}",
        )
    for note in found.notes:
        row("note", note)
    for text in found.unchecked:
        row("not checked", text)
    for problem in found.problems:
        row("problem", f"{problem.code}: {problem.message}")
    return table


def _traits(found: Inspection) -> list[tuple[str, str]]:
    traits = found.traits
    assert traits is not None
    is_squared = traits.is_scale_squared
    how = "by any number, which acts squared" if is_squared else "by any number"
    rows = [("scalable", how if traits.is_scalable else "0 and 1 only")]
    if traits.is_kv_neutral:
        rows.append(("prefix cache", "shared with the base: it keeps every key and value"))
    if traits.replaced:
        first, more = traits.replaced[:4], len(traits.replaced) - 4
        rest = f" and {more} more" if more > 0 else ""
        rows.append(("replaces", ", ".join(first) + rest))
    if traits.invocation:
        rows.append(("acts from", f"tokens {list(traits.invocation)} on"))
    if traits.token_cost > 1:
        rows.append(("in a step", f"a token counts as {traits.token_cost}"))
    if traits.nested_rank:
        rows.append(("ranks", f"{traits.min_nested_rank} to {traits.nested_rank}, by request"))
    return rows


def _device_bytes(num_elements: int) -> dict[str, int]:
    return {"bfloat16": 2 * num_elements, "float32": 4 * num_elements}


def _size(nbytes: int) -> str:
    if nbytes < 1 << 10:
        return f"{nbytes} bytes"
    if nbytes < 1 << 20:
        return f"{nbytes / (1 << 10):.1f} KiB"
    return f"{nbytes / (1 << 20):.1f} MiB"
