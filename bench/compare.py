"""Our server beside llama.cpp, mistral.rs, vLLM, PEFT and transformers: `make bench-peers`.

    python -m bench.compare [--peers llama.cpp,peft] [--cells base@8,8@8] [--minutes 60]

Every peer is installed once into a folder of its own under --peers-dir. Order of the measurement:
ours, a peer, ours, the next peer, ..., ours; one server at a time. A peer that does not install,
start or convert here is reported with its reason. Results: bench/results/<date>-<machine>/peers.*.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from bench.adapters import make_adapters
from bench.compare_report import OURS, CellSpec, Row, is_ours, parse_cell, render, row_of
from bench.loadgen import Load, run_load
from bench.machine import CpuWatch, describe
from bench.peer_process import measure_in_process
from bench.peer_servers import peer_servers
from bench.peer_servers.base import CannotRun, PeerServer, Setup, running
from bench.places import default_model, results_folder
from bench.plots import distinct_adapters_chart
from bench.run import measure_cell
from bench.server import running_server

PEFT = "peft"  # measured in a process of its own (bench/peers.py), with transformers for the base
RANKS = (8, 16, 32, 64)
# The most important first: the time may run out.
CELLS = "base@8,8@8,1@8,base@1,1@1,32@32,base@32"
CURVE = "1,2,4,8,16,32,64"
# Warm-up and load of a peer's cell are each ended then; the row says so.
CELL_LIMIT_S = 120.0


@dataclass(slots=True)
class Comparison:
    """What one run holds constant, and the rows it has measured so far."""

    model: Path
    adapters: Mapping[str, Path]
    vocab_size: int
    dtype: str
    threads: int
    requests_per_stream: int
    scratch: Path
    peer_dtypes: Mapping[str, str] = field(
        default_factory=dict
    )  # where a peer is better at another
    deadline: float = 0.0  # of time.monotonic()
    rows: list[Row] = field(default_factory=list)
    cannot_run: dict[str, str] = field(default_factory=dict)

    def load(self, cell: CellSpec, names: Sequence[str], **more: Any) -> Load:
        """Return the load of a cell; `names` is how this server calls base or adapters."""
        return Load(
            models=tuple(names),
            concurrency=cell.concurrency,
            num_requests=max(4, self.requests_per_stream * cell.concurrency),
            vocab_size=self.vocab_size,
            # Every server gets the same prompts in a cell, and no two cells share one.
            seed=1000 * cell.concurrency + cell.num_adapters,
            **more,
        )

    def add(self, row: Row) -> None:
        """Keep a peer's row and say it (ours are said by measure_cell)."""
        self.rows.append(row)
        rate = "-" if row.tokens_per_s is None else f"{row.tokens_per_s:.1f}"
        ttft = "" if row.ttft_p50_s is None else f", TTFT p50 {row.ttft_p50_s:.2f} s"
        say(f"{row.server} {row.cell}: {rate} tokens/s{ttft}, other {row.other_cores} {row.note}")


def main() -> int:
    """Run the comparison; the exit status is 1 when a cell of ours had errors or was not mixed."""
    args = _parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` stops the servers
    known = peer_servers(args.llama_outtype)
    machine = describe()
    model = args.model or default_model()
    started = datetime.datetime.now(datetime.UTC)
    curve = [CellSpec(count, max(args.curve_streams, count)) for count in args.curve]
    count = max((cell.num_adapters for cell in (*args.cells, *curve)), default=0)
    with tempfile.TemporaryDirectory(prefix="polyadapt-bench-") as scratch:
        run = Comparison(
            model=model,
            adapters=make_adapters(model, Path(scratch) / "adapters", max(count, 1), RANKS),
            vocab_size=json.loads((model / "config.json").read_text())["vocab_size"],
            dtype=machine.dtype if args.dtype == "auto" else args.dtype,
            threads=args.threads or machine.num_cores,
            requests_per_stream=args.requests_per_stream,
            scratch=Path(scratch),
            peer_dtypes=dict(args.peer_dtype),
        )
        chosen = [known[name] for name in args.peers if name != PEFT]
        their_cells = [*args.cells, *(c for c in curve if c.num_adapters in args.peer_curve)]
        setups = _prepared(run, chosen, args.peers_dir, their_cells)
        if args.install_only:
            return 0 if not run.cannot_run else 1
        names = [name for name in args.peers if name == PEFT or name in setups]
        run.deadline = time.monotonic() + 60 * args.minutes
        about = _measure(run, names, known, setups, args, curve)
    result: dict[str, Any] = {
        "started": started.isoformat(timespec="seconds"),
        "machine": asdict(machine),
        "method": {
            "model": model.name,
            "dtype": run.dtype,
            "threads": run.threads,
            "prompt_tokens": 128,
            "output_tokens": 64,
            "adapters": "ranks 8, 16, 32 and 64 in turn on all seven linears, random, one a stream",
            "order": " - ".join(dict.fromkeys(f"{r.server} ({r.block})" for r in run.rows)),
            "server_options": args.server_option,
            "variants": dict(args.also),
            "requests_per_stream": args.requests_per_stream,
            "curve_streams": args.curve_streams,
        },
        "peers": about,
        "cannot_run": run.cannot_run,
        "rows": [asdict(row) for row in run.rows],
    }
    out = results_folder(args.out, started)
    print(save(out, result, run.rows, about, run.cannot_run))
    print(f"saved under {out}")
    failed = [r for r in run.rows if is_ours(r.server) and not r.is_valid]
    return 1 if failed else 0


def save(
    out: Path,
    result: Mapping[str, Any],
    rows: Sequence[Row],
    about: Mapping[str, str],
    cannot_run: Mapping[str, str],
) -> str:
    """Write peers.json, peers.md and the plot into `out`; return the page."""
    plots = {}
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.is_curve and row.tokens_per_s is not None:
            series.setdefault(row.server, []).append((row.cell.num_adapters, row.tokens_per_s))
    if series:
        plots["Throughput over distinct adapters"] = "peers-distinct-adapters.svg"
        chart = distinct_adapters_chart(series, result["method"]["curve_streams"])
        (out / "peers-distinct-adapters.svg").write_text(chart)
    (out / "peers.json").write_text(json.dumps(result, indent=2) + "\n")
    page = render(result, rows, about=about, cannot_run=cannot_run, plots=plots)
    (out / "peers.md").write_text(page)
    return page


def _prepared(
    run: Comparison,
    peers: Sequence[PeerServer],
    peers_dir: Path,
    cells: Sequence[CellSpec],
) -> dict[str, Setup]:
    """Install the peers and convert for them; those that cannot run here are left out.

    They get as many adapters and streams as their own cells need: slots cost some of them memory.
    """
    setups = {}
    count = max(cell.num_adapters for cell in cells)
    adapters = dict(list(run.adapters.items())[:count])
    for peer in peers:
        scratch = run.scratch / peer.name
        scratch.mkdir()
        setup = Setup(
            root=peers_dir / peer.name,
            scratch=scratch,
            model=run.model.absolute(),
            adapters=adapters,
            dtype=run.peer_dtypes.get(peer.name, run.dtype),
            threads=run.threads,
            max_streams=max(cell.concurrency for cell in cells),
            max_rank=max(RANKS),
        )
        say(f"{peer.name}: installing under {setup.root} (nothing to do after the first time)")
        setup.root.mkdir(parents=True, exist_ok=True)
        try:
            peer.install(setup.root)
            peer.prepare(setup)
        except CannotRun as reason:
            _give_up(run, peer.name, reason)
        else:
            setups[peer.name] = setup
    return setups


def _measure(
    run: Comparison,
    names: Sequence[str],
    known: Mapping[str, PeerServer],
    setups: Mapping[str, Setup],
    args: argparse.Namespace,
    curve: Sequence[CellSpec],
) -> dict[str, str]:
    """Measure ours and the peers in turn, then the variants of ours and the curve; return what
    the page says about each peer."""
    about: dict[str, str] = {}
    start = time.monotonic()
    block = 0
    ours(run, OURS, block, args.cells, args.server_option)
    our_cost = time.monotonic() - start
    for position, name in enumerate(names):
        num_left = len(names) - position
        # Each peer gets an equal part of what our own blocks leave.
        free = run.deadline - time.monotonic() - our_cost * (num_left + len(args.also))
        limit = time.monotonic() + max(free / num_left, 2 * CELL_LIMIT_S)
        if name == PEFT:
            about[name] = _peft(run, block + 1, args.cells, limit)
        elif not theirs(run, known[name], setups[name], block + 1, args.cells, limit):
            continue
        else:
            about[name] = f"{known[name].about}; {setups[name].dtype}"
        block += 2
        ours(run, OURS, block, args.cells, args.server_option)
    for variant, option in args.also:
        block += 1
        options = [*args.server_option, *option.split()]
        ours(run, f"{OURS} {variant}", block, args.cells, options)
    if curve:
        ours(run, OURS, block + 1, curve, args.server_option, is_curve=True)
    peer_curve = [cell for cell in curve if cell.num_adapters in args.peer_curve]
    for name in names if peer_curve else []:
        if name in setups:
            block += 2
            limit = run.deadline
            theirs(run, known[name], setups[name], block, peer_curve, limit, is_curve=True)
    return about


def ours(
    run: Comparison,
    name: str,
    block: int,
    cells: Sequence[CellSpec],
    options: Sequence[str],
    *,
    is_curve: bool = False,
) -> None:
    """Measure our server's cells; after the deadline none is started but the first two of a run."""
    with running_server(
        run.model,
        run.scratch / "home",
        run.scratch / "server.log",
        dtype=run.dtype,
        threads=run.threads,
        options=list(options),
    ) as server:
        for adapter, path in run.adapters.items():
            server.upload(adapter, path)  # idempotent: the home keeps them between the blocks
        base = server.base_model()
        for position, cell in enumerate(cells):
            if time.monotonic() > run.deadline and (position >= 2 or is_curve):
                say(f"{name} {cell}: skipped, out of time")
                continue
            names = tuple(run.adapters)[: cell.num_adapters] or (base,)
            load = run.load(cell, names, stop_after_s=CELL_LIMIT_S, cut_after_s=2 * CELL_LIMIT_S)
            done = measure_cell(server, load, cell.num_adapters, block)
            run.rows.append(
                row_of(
                    name,
                    block,
                    cell,
                    done.result,
                    done.other_cores,
                    distinct_adapters=done.median_distinct_adapters,
                    is_valid=done.is_valid,
                    note="" if done.is_valid or done.result.errors else "NOT mixed",
                    is_curve=is_curve,
                )
            )


def theirs(
    run: Comparison,
    peer: PeerServer,
    setup: Setup,
    block: int,
    cells: Sequence[CellSpec],
    limit: float,
    *,
    is_curve: bool = False,
) -> bool:
    """Measure a peer's cells that start before `limit`; return whether any figure came out.

    The base is served without what adapters need: it shows the peer at its best.
    """
    num_before = len(run.rows)
    for has_adapters in (False, True):
        part = [cell for cell in cells if bool(cell.num_adapters) == has_adapters]
        if not part or time.monotonic() > limit:
            continue
        try:
            log = setup.scratch / "server.log"
            with running(peer, setup, log, has_adapters=has_adapters) as server:
                for cell in part:
                    if time.monotonic() > limit:
                        say(f"{peer.name} {cell}: skipped, out of time")
                        continue
                    chosen: list[str | None] = [*list(setup.adapters)[: cell.num_adapters]]
                    fields = {
                        (adapter or ""): peer.body(setup, adapter, has_adapters=has_adapters)
                        for adapter in chosen or [None]
                    }
                    load = run.load(cell, tuple(fields), fields=fields, cut_after_s=CELL_LIMIT_S)
                    watch = CpuWatch([os.getpid(), server.pid])
                    result = asyncio.run(run_load(server.url, load))
                    other = 0.0
                    # A server that died has no times; its errors are in the row.
                    with suppress(psutil.NoSuchProcess):
                        other = watch.other_cores()
                    run.add(row_of(peer.name, block, cell, result, other, is_curve=is_curve))
        except CannotRun as reason:
            what = "with adapters" if has_adapters else "the base"
            _give_up(run, f"{peer.name} ({what})", reason)
    return len(run.rows) > num_before


def _peft(run: Comparison, block: int, cells: Sequence[CellSpec], limit: float) -> str:
    """Measure transformers' generate (base) and PEFT (adapters) in their process."""
    kinds = {cell: _kind(cell) for cell in cells}
    wanted = [(kind, cell.concurrency, cell.num_adapters) for cell, kind in kinds.items()]
    dtype = run.peer_dtypes.get(PEFT, run.dtype)
    done, versions = measure_in_process(
        run.model,
        next(iter(run.adapters.values())).parent,
        wanted,
        dtype=dtype,
        threads=run.threads,
        limit=limit,
    )
    for cell in done:
        run.add(
            Row(
                server="transformers" if cell.kind == "generate" else PEFT,
                block=block,
                cell=CellSpec(cell.num_adapters, cell.batch),
                tokens_per_s=cell.tokens_per_s,
                other_cores=cell.other_cores,
                note="one batch in one process, no HTTP",
            )
        )
    if len(done) < len(wanted):
        say(f"{PEFT}: {len(wanted) - len(done)} cells skipped, out of time")
    return ", ".join(f"{name} {version}" for name, version in versions.items()) + f"; {dtype}"


def _kind(cell: CellSpec) -> str:
    return {0: "generate", 1: "single"}.get(cell.num_adapters, "mixed")


def _give_up(run: Comparison, name: str, reason: CannotRun) -> None:
    run.cannot_run[name] = str(reason)
    say(f"{name} cannot run here: {reason}")


def say(text: str) -> None:
    """Report progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def _parse() -> argparse.Namespace:
    known = (*peer_servers(), PEFT)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=_names(known), default=list(known), help=",".join(known))
    parser.add_argument("--cells", type=_cells, default=_cells(CELLS), help=CELLS)
    parser.add_argument("--minutes", type=float, default=60.0, help="of measuring (default 60)")
    parser.add_argument(
        "--peers-dir", type=Path, default=_default_peers_dir(), help="where peers are installed"
    )
    parser.add_argument("--install-only", action="store_true", help="install, convert, and end")
    parser.add_argument("--model", type=Path, help="a Llama-like transformers directory")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument(
        "--peer-dtype",
        type=_peer_dtype,
        action="append",
        default=[],
        metavar="PEER=DTYPE",
        help="for a peer that is better at another dtype than the run's",
    )
    parser.add_argument("--llama-outtype", help="GGUF type for llama.cpp, such as f16 or q8_0")
    parser.add_argument("--threads", type=int, help="of every server (default: all cores)")
    parser.add_argument("--requests-per-stream", type=int, default=2)
    parser.add_argument(
        "--curve", type=_counts, default=_counts(CURVE), help=f"plotted; default {CURVE}"
    )
    parser.add_argument("--curve-streams", type=int, default=64)
    parser.add_argument(
        "--peer-curve", type=_counts, default=[], help="points of the curve for the peers too"
    )
    parser.add_argument(
        "--server-option", action="append", default=[], help="one more argument of our server"
    )
    parser.add_argument(
        "--also",
        type=_variant,
        action="append",
        default=[],
        metavar="NAME=OPTIONS",
        help="a table of its own for our server with these options, such as exact=--exact",
    )
    parser.add_argument("--out", type=Path, help="instead of bench/results/<date>-<machine>")
    return parser.parse_args()


def _names(known: Sequence[str]) -> Any:
    def names(text: str) -> list[str]:
        found = [name for name in text.split(",") if name]
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown} are no peers; known: {', '.join(known)}")
        return found

    return names


def _cells(text: str) -> list[CellSpec]:
    try:
        return [parse_cell(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _variant(text: str) -> tuple[str, str]:
    name, equals, options = text.partition("=")
    if not (name.isidentifier() and equals and options):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=OPTIONS, such as exact=--exact")
    return name, options


def _peer_dtype(text: str) -> tuple[str, str]:
    peer, _, dtype = text.partition("=")
    if peer in (*peer_servers(), PEFT) and dtype in ("float32", "bfloat16"):
        return peer, dtype
    raise argparse.ArgumentTypeError(f"{text!r} is not PEER=DTYPE, such as vllm=bfloat16")


def _default_peers_dir() -> Path:
    from polyadapt.config import default_home

    return default_home(os.environ) / "peers"


if __name__ == "__main__":
    sys.exit(main())
