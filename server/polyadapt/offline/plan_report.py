"""A Plan for people and for machines."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from polyadapt.offline.plan import Plan, RankPlan


def to_data(plan: Plan) -> dict[str, Any]:
    """Return all of it as plain data; bytes, tokens and seconds."""
    return {"is_enough": plan.is_enough, **asdict(plan)}


def to_table(plan: Plan) -> RenderableType:
    """Return what there is in one table, and rank by rank in another."""
    head = Table(show_header=False, box=None, pad_edge=False)
    head.add_column(style="bold", no_wrap=True)
    head.add_column()
    targets = ", ".join(plan.targets) or "every linear module but the head"
    rows = {
        "model": f"{plan.model} ({plan.architecture}, {plan.dtype})",
        "device": _size(plan.device_nbytes),
        "weights": _size(plan.weight_nbytes),
        "reserve": f"{_size(plan.reserve_nbytes)} for activations, workspaces and graphs",
        "KV pages": f"{_size(plan.kv_bytes)}: {plan.chosen.num_kv_tokens} tokens in pages of "
        f"{plan.page_size}",
        "adapters": f"{_size(plan.adapter_bytes)}, on {targets}",
        "sequences": f"{plan.chosen.num_sequences} of {plan.context} tokens at once",
    }
    if plan.num_adapters is not None:
        verdict = "fit" if plan.is_enough else "DO NOT fit"
        rows["asked for"] = f"{plan.num_adapters} adapters of rank {plan.chosen.rank} {verdict}"
    for name, value in rows.items():
        head.add_row(name, value)
    return Group(head, "", _ranks(plan))


def _ranks(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("rank", "bytes each", "fit at once", "KV tokens each costs"):
        table.add_column(name, justify="right")
    has_times = plan.chosen.step_s is not None
    if has_times:
        for name in ("step, base alone", "step, all distinct", "tokens/s at most"):
            table.add_column(name, justify="right")
    for each in sorted((plan.chosen, *plan.others), key=lambda found: found.rank):
        cells = [
            f"{each.rank}{'*' if each is plan.chosen else ''}",
            _size(each.adapter_nbytes),
            str(each.num_fitting),
            f"{each.kv_tokens_per_adapter:.0f}",
        ]
        table.add_row(*cells, *(_times(each) if has_times else ()))
    return table


def _times(each: RankPlan) -> tuple[str, str, str]:
    assert each.base_step_s is not None
    assert each.step_s is not None
    return (
        f"{each.base_step_s * 1e3:.1f} ms",
        f"{each.step_s * 1e3:.1f} ms",
        f"{each.tokens_per_s:.0f}",
    )


def _size(nbytes: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes} B"
