"""Turns the cells of a run into one page of Markdown: targets, ratios, every figure, the method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.loadgen import LoadResult

# Above this many cores busy with other work, a figure is doubtful.
QUIET_CORES = 0.2


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement of our server."""

    num_adapters: int  # 0: the base only
    concurrency: int
    run: int
    result: LoadResult
    median_distinct_adapters: int  # per step of the engine
    num_steps: int
    is_valid: bool
    other_cores: float


@dataclass(frozen=True, slots=True)
class PeerCell:
    """One measurement of a peer."""

    kind: str
    batch: int
    num_adapters: int
    tokens_per_s: float
    wall_s: float
    other_cores: float


def render(result: dict[str, Any], ours: Sequence[Cell], peers: Sequence[PeerCell]) -> str:
    """Return the page."""
    machine, method = result["machine"], result["method"]
    is_quiet = all(cell.other_cores < QUIET_CORES for cell in (*ours, *peers))
    lines = [
        f"# Benchmark of {result['started']}",
        "",
        f"{machine['cpu']}, {machine['num_cores']} cores, {machine['memory_gib']} GiB, "
        f"{' '.join(machine['features']) or 'no AVX2'}; {machine['system']}; "
        + ", ".join(f"{name} {version}" for name, version in result["peer_versions"].items()),
        "",
        f"{method['model']}, {method['dtype']}, {method['threads']} threads on both sides; "
        f"{method['prompt_tokens']} random prompt tokens as ids, {method['output_tokens']} output "
        "tokens, greedy, end of sequence ignored, no prefix cache, no speculation. Ours: the "
        "server by its command line, closed loop over HTTP, streamed, twice as many requests as "
        "streams (at least 4). Peers: one batch in one process, no HTTP. Adapters: "
        f"{method['adapters']}. Order: {method['order']}.",
        "",
        *table(
            ["ratio", "target", "is", ""],
            [
                [name, f">= {target}", number(value), _verdict(value, target, is_quiet)]
                for name, target, value in targets(ours, peers)
            ],
        ),
        "",
        *([] if is_quiet else [_BUSY, ""]),
        "Our server, output tokens a second. `x base`: to our own base at the same concurrency; "
        "`x peer`: to the peer's batch of the same size. Distinct: median of distinct adapters per "
        "step. Other: cores busy with unrelated work meanwhile.",
        "",
        *table(
            _OUR_HEAD,
            _our_rows(ours, peers),
        ),
        "",
        "Peers:",
        "",
        *table(
            ["peer", "adapters", "batch", "tokens/s", "other"],
            [
                [PEER_NAMES[p.kind], p.num_adapters, p.batch, number(p.tokens_per_s), _cores(p)]
                for p in peers
            ],
        ),
        "",
    ]
    return "\n".join(lines)


def targets(
    ours: Sequence[Cell], peers: Sequence[PeerCell]
) -> list[tuple[str, float, float | None]]:
    """Return (what, at least, the ratio or None when a side is missing) for each target."""
    mixed, base = _mean(ours, 32, 32), _mean(ours, 0, 32)
    return [
        ("32 distinct adapters to our base, 32 streams", 0.4, ratio(mixed, base)),
        ("32 distinct adapters to PEFT's mixed batch", 5.0, ratio(mixed, _peer(peers, 32, 32))),
        ("base to transformers' generate, 32 streams", 1.0, ratio(base, _peer(peers, 0, 32))),
    ]


_BUSY = (
    "The machine was busy with unrelated work (cells marked `!`). OpenMP threads that wait for a "
    "preempted one make every figure too low, the peers' most of all: repeat on a quiet machine."
)
_OUR_HEAD = [
    *("adapters", "streams", "run 1", "run 2", "x base", "x peer", "distinct"),
    *("TTFT p50 s", "ITL p50 ms", "ITL p99 ms", "other", ""),
]
PEER_NAMES = {
    "generate": "transformers generate",
    "single": "PEFT, one active adapter",
    "mixed": "PEFT generate(adapter_names)",
}


def _our_rows(ours: Sequence[Cell], peers: Sequence[PeerCell]) -> list[list[object]]:
    rows: list[list[object]] = []
    for num_adapters, concurrency in sorted({(c.num_adapters, c.concurrency) for c in ours}):
        cells = [c for c in ours if (c.num_adapters, c.concurrency) == (num_adapters, concurrency)]
        by_run = {cell.run: cell for cell in cells}
        mean = _mean(ours, num_adapters, concurrency)
        last = cells[-1]
        invalid = [cell for cell in cells if not cell.is_valid]
        rows.append(
            [
                num_adapters or "base",
                concurrency,
                *(number(by_run[r].result.tokens_per_s) if r in by_run else "-" for r in (1, 2)),
                number(ratio(mean, _mean(ours, 0, concurrency))),
                number(ratio(mean, _peer(peers, num_adapters, concurrency))),
                min(cell.median_distinct_adapters for cell in cells),
                f"{last.result.ttft_p50_s:.2f}",
                f"{1000 * last.result.itl_p50_s:.0f}",
                f"{1000 * last.result.itl_p99_s:.0f}",
                "/".join(_cores(cell) for cell in cells),
                f"INVALID: {'; '.join(invalid[0].result.errors[:1]) or 'not mixed'}"
                if invalid
                else "",
            ]
        )
    return rows


def _mean(ours: Sequence[Cell], num_adapters: int, concurrency: int) -> float | None:
    """Return the mean over the valid runs of one cell; None if there is none."""
    found = [
        cell.result.tokens_per_s
        for cell in ours
        if (cell.num_adapters, cell.concurrency) == (num_adapters, concurrency) and cell.is_valid
    ]
    return sum(found) / len(found) if found else None


def _peer(peers: Sequence[PeerCell], num_adapters: int, batch: int) -> float | None:
    found = [p.tokens_per_s for p in peers if (p.num_adapters, p.batch) == (num_adapters, batch)]
    return found[0] if found else None


def ratio(a: float | None, b: float | None) -> float | None:
    """Return a / b; None when a side is missing or b is 0."""
    return a / b if a is not None and b else None


def _verdict(value: float | None, target: float, is_quiet: bool) -> str:
    if value is None:
        return "not measured"
    verdict = "reached" if value >= target else "missed"
    return verdict if is_quiet else f"{verdict}, doubtful"


def number(value: float | None) -> str:
    """Return a figure with two or three digits that mean something; `-` for None."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _cores(cell: Cell | PeerCell) -> str:
    return f"{cell.other_cores:.2f}" + ("!" if cell.other_cores >= QUIET_CORES else "")


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Return the lines of a Markdown table."""
    text = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return text + ["| " + " | ".join(map(str, row)) + " |" for row in rows]
