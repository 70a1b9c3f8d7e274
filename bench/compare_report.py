"""Turns the rows of a comparison with peers into one page: targets, ratios, figures, method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bench.loadgen import LoadResult
from bench.report import QUIET_CORES, number, ratio, table

OURS = "polyadapt"


@dataclass(frozen=True, slots=True)
class CellSpec:
    """One load: `num_adapters` distinct adapters (0: the base) over `concurrency` streams."""

    num_adapters: int
    concurrency: int

    def __str__(self) -> str:
        return f"{self.num_adapters or 'base'}@{self.concurrency}"


def parse_cell(text: str) -> CellSpec:
    """Read `base@8` or `32@32`; more adapters than streams could never be in one step."""
    name, _, streams = text.partition("@")
    if streams.isdecimal() and (name == "base" or name.isdecimal()):
        cell = CellSpec(0 if name == "base" else int(name), int(streams))
        if 0 <= cell.num_adapters <= cell.concurrency > 0:
            return cell
    raise ValueError(
        f"{text!r} is no cell; give ADAPTERS@STREAMS with at most as many adapters as streams, "
        "such as 8@8, or base@8"
    )


@dataclass(frozen=True, slots=True)
class Row:
    """One measured cell of one server; a figure that does not exist for it is None."""

    server: str
    block: int  # position of the server in the order of the run
    cell: CellSpec
    tokens_per_s: float | None
    other_cores: float | None = None
    ttft_p50_s: float | None = None
    ttft_p99_s: float | None = None
    itl_p50_s: float | None = None
    itl_p99_s: float | None = None
    num_errors: int = 0
    is_valid: bool = True  # no errors, and ours really served the adapters in the same steps
    distinct_adapters: int | None = None  # median per step of our engine
    note: str = ""
    is_curve: bool = False  # one point of the plot, not of the tables


def row_of(
    server: str, block: int, cell: CellSpec, result: LoadResult, other_cores: float, **more: Any
) -> Row:
    """Return the row of a load; with errors it has no throughput, and the first one is its note."""
    notes = [more.pop("note", "")]
    if result.errors:
        notes.append(f"{len(result.errors)} errors: {result.errors[0][:200]}")
    if result.num_cut:
        notes.append(f"cut at {result.wall_s:.0f} s, {result.num_requests} requests finished")
    has_times = result.ttft_p50_s > 0
    return Row(
        server=server,
        block=block,
        cell=cell,
        tokens_per_s=None if result.errors else result.tokens_per_s,
        other_cores=other_cores,
        ttft_p50_s=result.ttft_p50_s if has_times else None,
        ttft_p99_s=result.ttft_p99_s if has_times else None,
        itl_p50_s=result.itl_p50_s or None,
        itl_p99_s=result.itl_p99_s or None,
        num_errors=len(result.errors),
        is_valid=more.pop("is_valid", True) and not result.errors,
        note="; ".join(note for note in notes if note),
        **more,
    )


@dataclass(frozen=True, slots=True)
class Target:
    """A ratio of ours to another server's cell, and what it must be (None: reported only)."""

    text: str
    ours: CellSpec
    other: str
    theirs: CellSpec
    bound: float | None
    kind: Literal["tokens", "ttft"] = "tokens"  # at least the bound of tokens/s, at most of TTFT


def _cell(text: str) -> CellSpec:
    return parse_cell(text)


def _same(cell: str, other: str, bound: float | None, text: str) -> Target:
    return Target(text, _cell(cell), other, _cell(cell), bound)


TARGETS = (
    _same("base@1", "vllm", 0.95, "base to vLLM (compiled, LoRA off), 1 stream"),
    _same("base@8", "vllm", 1.0, "base to vLLM (compiled, LoRA off), 8 streams"),
    _same("base@32", "vllm", 1.0, "base to vLLM (compiled, LoRA off), 32 streams"),
    _same("base@1", "llama.cpp", None, "base to llama.cpp, 1 stream"),
    _same("1@8", "llama.cpp", 1.5, "one adapter to llama.cpp, 8 streams"),
    _same("1@8", "vllm", 8.0, "one adapter to vLLM with LoRA, 8 streams"),
    _same("8@8", "llama.cpp", 3.0, "8 distinct adapters to llama.cpp, 8 streams"),
    _same("8@8", "vllm", 6.0, "8 distinct adapters to vLLM with LoRA, 8 streams"),
    _same("8@8", "peft", 6.0, "8 distinct adapters to PEFT's mixed batch, 8 rows"),
    _same("8@8", "mistralrs", None, "8 distinct adapters to mistral.rs, 8 streams"),
    Target(
        "median TTFT with 8 distinct adapters to our base's, 8 streams",
        *(_cell("8@8"), OURS, _cell("base@8"), 1.3, "ttft"),
    ),
    _same("32@32", "vllm", 10.0, "32 distinct adapters to vLLM with LoRA, 32 streams"),
    _same("32@32", "peft", 10.0, "32 distinct adapters to PEFT's mixed batch, 32 rows"),
    Target(
        "one adapter to our base, 8 streams",
        *(_cell("1@8"), OURS, _cell("base@8"), 0.9),
    ),
)


def target_rows(
    rows: Sequence[Row], cannot_run: Mapping[str, str], ours: str = OURS
) -> list[list[str]]:
    """Return target, bound, measured ratio and verdict for each target."""
    found = []
    for target in TARGETS:
        value, is_quiet = _measured(rows, target, ours)
        sign = ">=" if target.kind == "tokens" else "<="
        bound = "reported" if target.bound is None else f"{sign} {target.bound}"
        found.append([target.text, bound, number(value), _verdict(target, value, is_quiet)])
        # A reason may concern one of a peer's two starts: `vllm (with adapters)`.
        if value is None and target.other in {name.partition(" ")[0] for name in cannot_run}:
            found[-1][-1] = f"{target.other} cannot run here"
    return found


def _measured(rows: Sequence[Row], target: Target, ours: str) -> tuple[float | None, bool]:
    """Return the ratio (None when a side is missing) and whether both sides were quiet.

    A peer is compared with our blocks beside its own, so that drift of the machine cancels. Runs
    that other work disturbed count only where a cell has no others.
    """
    other = ours if target.other == OURS else target.other
    theirs = _quiet([r for r in _measured_rows(rows, other, target.theirs) if _value(r, target)])
    mine = [r for r in _measured_rows(rows, ours, target.ours) if _value(r, target)]
    if other != ours and theirs:
        beside = [r for r in mine if abs(r.block - theirs[0].block) == 1]
        mine = beside or mine
    mine = _quiet(mine)
    value = ratio(
        _mean([_value(r, target) for r in mine]), _mean([_value(r, target) for r in theirs])
    )
    return value, all(map(_is_quiet, (*mine, *theirs)))


def _quiet(rows: list[Row]) -> list[Row]:
    return [row for row in rows if _is_quiet(row)] or rows


def _is_quiet(row: Row) -> bool:
    return (row.other_cores or 0.0) < QUIET_CORES


def _value(row: Row, target: Target) -> float | None:
    return row.tokens_per_s if target.kind == "tokens" else row.ttft_p50_s


def _measured_rows(rows: Sequence[Row], server: str, cell: CellSpec) -> list[Row]:
    return [
        row
        for row in rows
        if row.server == server and row.cell == cell and not row.is_curve and row.is_valid
    ]


def _verdict(target: Target, value: float | None, is_quiet: bool) -> str:
    if value is None:
        return "not measured"
    if target.bound is None:
        return "" if is_quiet else "doubtful"
    is_met = value >= target.bound if target.kind == "tokens" else value <= target.bound
    return ("met" if is_met else "NOT met") + ("" if is_quiet else ", doubtful")


def render(
    result: Mapping[str, Any],
    rows: Sequence[Row],
    *,
    about: Mapping[str, str],
    cannot_run: Mapping[str, str],
    plots: Mapping[str, str],
) -> str:
    """Return the page; `about` tells of each peer, `plots` maps a caption to its file."""
    machine, method = result["machine"], result["method"]
    peers = [name for name in dict.fromkeys(r.server for r in rows) if not is_ours(name)]
    lines = [
        f"# Beside the peers, {result['started']}",
        "",
        f"{machine['cpu']}, {machine['num_cores']} cores, {machine['memory_gib']} GiB, "
        f"{' '.join(machine['features']) or 'no AVX2'}; {machine['system']}.",
        "",
        f"{method['model']}, {method['dtype']}, {method['threads']} threads for every server; "
        f"{method['prompt_tokens']} random prompt tokens, {method['output_tokens']} output tokens, "
        "greedy, end of sequence ignored, no prefix cache, no speculation; closed loop over HTTP, "
        f"streamed, one server at a time. Adapters: {method['adapters']}. "
        f"Order: {method['order']}. Server options of ours: "
        f"{' '.join(method['server_options']) or 'none'}.",
        "",
        *(f"- {name}: {text}" for name, text in about.items()),
        *(f"- {name} **cannot run here**: {reason}" for name, reason in cannot_run.items()),
        "",
    ]
    for ours in [name for name in dict.fromkeys(r.server for r in rows) if is_ours(name)]:
        lines += [
            f"## {ours}",
            "",
            *table(["ratio", "target", "measured", "met?"], target_rows(rows, cannot_run, ours)),
            "",
            "Tokens/s: output tokens a second, prefill included, each run of this server. Ratios: "
            "to our own base at the same concurrency, and to each peer in the same cell, against "
            "our runs beside it. Distinct: median of distinct adapters per step. Other: cores busy "
            f"with unrelated work meanwhile; from {QUIET_CORES} on (`!`) a figure is doubtful, and "
            "is left out of ratios where the cell has others.",
            "",
            *table(
                [
                    *("adapters", "streams", "tokens/s", "x base", *(f"x {p}" for p in peers)),
                    *("distinct", "TTFT p50/p99 s", "ITL p50/p99 ms", "errors", "other", "note"),
                ],
                _our_rows(rows, ours, peers),
            ),
            "",
        ]
    lines += [
        "## Peers",
        "",
        *table(
            [
                *("peer", "adapters", "streams", "tokens/s"),
                *("TTFT p50/p99 s", "ITL p50/p99 ms", "errors", "other", "note"),
            ],
            [
                [row.server, row.cell.num_adapters or "base", row.cell.concurrency,
                 number(row.tokens_per_s), *_times(row), row.num_errors, _cores(row), row.note]
                for row in rows
                if not is_ours(row.server) and not row.is_curve
            ],
        ),
        "",
        *(f"![{caption}]({file})\n" for caption, file in plots.items()),
    ]  # fmt: skip
    return "\n".join(lines)


def is_ours(server: str) -> bool:
    """Return whether rows of that name are ours: `polyadapt`, or `polyadapt NAME` of a variant."""
    return server.partition(" ")[0] == OURS


def _our_rows(rows: Sequence[Row], ours: str, peers: Sequence[str]) -> list[list[object]]:
    mine = [row for row in rows if row.server == ours and not row.is_curve]
    out: list[list[object]] = []
    for cell in sorted({r.cell for r in mine}, key=lambda c: (c.num_adapters, c.concurrency)):
        runs = [row for row in mine if row.cell == cell]
        base = Target("", cell, OURS, CellSpec(0, cell.concurrency), None)
        last = runs[-1]
        out.append(
            [
                *(cell.num_adapters or "base", cell.concurrency),
                " / ".join(number(row.tokens_per_s) for row in runs),
                number(_measured(rows, base, ours)[0]),
                *(
                    number(_measured(rows, Target("", cell, peer, cell, None), ours)[0])
                    for peer in peers
                ),
                min(
                    (r.distinct_adapters for r in runs if r.distinct_adapters is not None),
                    default="-",
                ),
                *_times(last),
                sum(row.num_errors for row in runs),
                " / ".join(_cores(row) for row in runs),
                "; ".join(dict.fromkeys(row.note for row in runs if row.note)),
            ]
        )
    return out


def _times(row: Row) -> tuple[str, str]:
    if row.ttft_p50_s is None or row.ttft_p99_s is None:
        return "-", "-"
    ttft = f"{row.ttft_p50_s:.2f} / {row.ttft_p99_s:.2f}"
    if row.itl_p50_s is None or row.itl_p99_s is None:
        return ttft, "-"
    return ttft, f"{1000 * row.itl_p50_s:.0f} / {1000 * row.itl_p99_s:.0f}"


def _cores(row: Row) -> str:
    if row.other_cores is None:
        return "-"
    return f"{row.other_cores:.2f}" + ("!" if row.other_cores >= QUIET_CORES else "")


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None
