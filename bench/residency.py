"""What loading, evicting and knowing many adapters costs those who are served meanwhile.

    python -m bench.residency [--model DIR] [--out DIR]

Four parts, each a ratio of two figures of this run: twice as many adapters as fit, 100 cold loads
beside a stream, the first token of a cold adapter, and 10 to 10,000 known adapters. The first three
drive the engine's own process through its client, without HTTP; the last steps an engine in this
process, to see what a step costs besides the forward. Results go to
bench/results/<date>-<machine>/residency.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import gc
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.adapters import make_adapters
from bench.machine import CpuWatch, Machine, describe
from bench.places import default_model, results_folder

from polyadapt.config import EngineConfig
from polyadapt.engine import wire
from polyadapt.engine.build import build_engine
from polyadapt.engine.output import Call, StepOutput, Submit
from polyadapt.engine.process import EngineProcess
from polyadapt.types import AdapterId, AppliedAdapter, Request, SamplingParams, Tokens
from polyadapt_store.blobs import BlobStore, list_files
from polyadapt_store.manifest import digest_of

PARTS = ("many", "cold", "registered")
RANK = 8  # on all seven linears
NUM_FITTING, NUM_REQUESTS, CONCURRENCY = 8, 32, 4
NUM_COLD_LOADS, NUM_ALONE_TOKENS = 100, 120
NUM_ROUNDS = 10  # of as many cold loads, so that the tail between tokens is more than one token
NUM_FIRST_TOKENS = 10
REGISTERED = (10, 100, 1000, 10_000)
NUM_ROWS, NUM_SERVED, NUM_ROW_TOKENS = 16, 8, 64


@dataclass(frozen=True, slots=True)
class Part:
    """One comparison: `value` must not exceed `limit`."""

    name: str
    value: float
    limit: float
    figures: dict[str, Any]
    num_samples: int
    other_cores: float

    @property
    def is_met(self) -> bool:
        """Whether the ratio is within its limit."""
        return self.value <= self.limit


@dataclass(slots=True)
class Stream:
    """When the tokens of one request came, in seconds of the monotonic clock."""

    submitted: float
    times: list[float] = field(default_factory=list)

    @property
    def first_token_s(self) -> float:
        """Seconds from the request to its first token."""
        return self.times[0] - self.submitted

    def gaps(self) -> list[float]:
        """Seconds between neighbouring tokens."""
        return [later - sooner for sooner, later in itertools.pairwise(self.times)]


def main() -> int:
    """Run the four parts; the exit status is 1 when a target was missed."""
    args = _parse()
    machine = describe()
    started = datetime.datetime.now(datetime.UTC)
    parts: list[Part] = []
    with tempfile.TemporaryDirectory(prefix="polyadapt-bench-") as scratch:
        bench = Bench(args.model or default_model(), Path(scratch), machine, args.threads)
        if "many" in args.parts:
            parts += asyncio.run(bench.many())
        if "cold" in args.parts:
            parts += asyncio.run(bench.cold())
        if "registered" in args.parts:
            parts += bench.registered(REGISTERED)
    text = render(parts)
    print(text)
    out = results_folder(args.out, started)
    result = {
        "started": started.isoformat(timespec="seconds"),
        "machine": asdict(machine),
        "method": {
            "model": bench.model.name,
            "dtype": machine.dtype,
            "threads": bench.threads,
            "adapters": f"rank {RANK} on all seven linears; registered: rank 1 on one projection",
            "order": "all-resident before twice as many; loads alone before beside a stream",
        },
        "parts": [asdict(part) | {"is_met": part.is_met} for part in parts],
    }
    (out / "residency.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"saved under {out}")
    return 0 if all(part.is_met for part in parts) else 1


def render(parts: Sequence[Part]) -> str:
    """Return the parts as a table."""
    lines = ["| what | ratio | limit | samples | other cores |", "|---|---|---|---|---|"]
    for part in parts:
        mark = "" if part.is_met else " **missed**"
        lines.append(
            f"| {part.name} | {part.value:.2f}{mark} | {part.limit:g} | {part.num_samples} "
            f"| {part.other_cores} |"
        )
        for name, figure in part.figures.items():
            lines.append(f"| &nbsp; {name} | {figure} | | | |")
    return "\n".join(lines)


def percentile(values: Sequence[float], part: float) -> float:
    """Return the smallest value that at least `part` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)]


class Bench:
    """The model, the blobs and how an engine is driven."""

    def __init__(self, model: Path, scratch: Path, machine: Machine, threads: int | None) -> None:
        self.model = model
        self.threads = threads or machine.num_cores
        self._dtype = machine.dtype
        self._scratch = scratch
        self._blob_root = scratch / "blobs"
        self._blobs = BlobStore(self._blob_root)
        self._random = random.Random(0)
        self._ids = itertools.count()
        self._vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]

    # ------------------------------------------------------------------ the parts
    async def many(self) -> list[Part]:
        """Uniform traffic over twice as many adapters as fit, beside as many as fit."""
        adapters = self._large(2 * NUM_FITTING)
        room = NUM_FITTING * self._large_nbytes() + 4096
        async with self._engine(max_adapter_bytes=room) as engine:
            await self._upload(engine, adapters)
            watch = CpuWatch([os.getpid()])
            medians, loads = [], []
            for served in (adapters[:NUM_FITTING], adapters):
                for adapter in served[:NUM_FITTING]:
                    await engine.load_adapter(adapter, is_pinned=False)
                before = engine.stats().counters.get("adapter_loads", 0)
                medians.append(statistics.median(await self._traffic(engine, served)))
                loads.append(engine.stats().counters.get("adapter_loads", 0) - before)
            other = watch.other_cores()  # while the engine's process can still be asked
        figures = {
            "median first token, all resident, ms": round(medians[0] * 1e3, 1),
            "median first token, twice as many, ms": round(medians[1] * 1e3, 1),
            "loads while twice as many were served": loads[1],
        }
        return [
            Part(
                "twice as many adapters as fit: median first token",
                medians[1] / medians[0], 2.0, figures, NUM_REQUESTS, other,
            )
        ]  # fmt: skip

    async def _traffic(self, engine: EngineProcess, adapters: list[AdapterId]) -> list[float]:
        """First-token seconds of NUM_REQUESTS requests, CONCURRENCY at a time."""
        left = iter(range(NUM_REQUESTS))
        found: list[float] = []

        async def work() -> None:
            for _ in left:
                adapter = self._random.choice(adapters)
                found.append((await self._run(engine, adapter, 8)).first_token_s)

        await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
        return found

    async def cold(self) -> list[Part]:
        """Cold loads beside a stream, and the first token of a cold adapter."""
        first, *others = self._large(NUM_COLD_LOADS + 1)
        room = (NUM_COLD_LOADS + 2) * self._large_nbytes()
        async with self._engine(max_adapter_bytes=room) as engine:
            gc.freeze()  # the process that measures must not pause of itself
            await self._upload(engine, (first, *others))
            await self._load_all(engine, others)  # the arena's memory is touched for the first time
            await self._forget(engine, others)
            watch = CpuWatch([os.getpid()])
            tokens = await self._first_tokens(engine, others[:NUM_FIRST_TOKENS], watch)
            await self._forget(engine, others)
            alone = []
            for _ in range(NUM_ROUNDS):
                alone.append(await self._load_all(engine, others))
                await self._forget(engine, others)
            watch = CpuWatch([os.getpid()])
            before = (await self._run(engine, first, NUM_ALONE_TOKENS)).gaps()
            counters = dict(engine.stats().counters)
            ready = asyncio.Event()
            streaming = asyncio.create_task(self._run(engine, first, 10_000, ready))
            await ready.wait()
            rounds = []
            for _ in range(NUM_ROUNDS):
                began = time.monotonic()
                await self._load_all(engine, others)
                rounds.append((began, time.monotonic()))
                await self._forget(engine, others)
            streaming.cancel()
            stream = await streaming
            after = engine.stats().counters
            other = watch.other_cores()
        beside = [
            later - sooner
            for sooner, later in itertools.pairwise(stream.times)
            if any(began < later and sooner < ended for began, ended in rounds)
        ]
        alone_s = statistics.median(alone)
        beside_s = statistics.median(ended - began for began, ended in rounds)
        figures = {
            "p99 between tokens, alone, ms": round(percentile(before, 0.99) * 1e3, 1),
            "p99 between tokens, beside loads, ms": round(percentile(beside, 0.99) * 1e3, 1),
            "p50 between tokens, alone, ms": round(statistics.median(before) * 1e3, 1),
            "p50 between tokens, beside loads, ms": round(statistics.median(beside) * 1e3, 1),
        } | {
            name: after.get(name, 0) - counters.get(name, 0)
            for name in ("adapter_loads_waited", "adapter_loads_overlapped")
        }
        loads = {"alone, s": round(alone_s, 3), "beside a stream, s": round(beside_s, 3)}
        ratio = percentile(beside, 0.99) / percentile(before, 0.99)
        return [
            Part(f"{len(others)} cold loads beside a stream: p99 between tokens", ratio, 1.3,
                 figures, len(beside), other),
            Part(f"{len(others)} cold loads beside a stream: time of the loads",
                 beside_s / alone_s, 2.0, loads, NUM_ROUNDS, other),
            tokens,
        ]  # fmt: skip

    async def _first_tokens(
        self, engine: EngineProcess, adapters: list[AdapterId], watch: CpuWatch
    ) -> Part:
        cold, warm = [], []
        for adapter in adapters:
            cold.append((await self._run(engine, adapter, 1, num_prompt=128)).first_token_s)
            warm.append((await self._run(engine, adapter, 1, num_prompt=128)).first_token_s)
        figures = {
            "cold, ms": round(statistics.median(cold) * 1e3, 1),
            "warm, ms": round(statistics.median(warm) * 1e3, 1),
        }
        return Part(
            "first token of a cold adapter, its file in the page cache",
            statistics.median(cold) / statistics.median(warm), 1.5, figures, len(cold),
            watch.other_cores(),
        )  # fmt: skip

    def registered(self, counts: Sequence[int]) -> list[Part]:
        """Throughput and host time of a step over the number of adapters that the pool knows."""
        adapters = self._tiny(counts[-1])
        config = self._config(max_adapter_bytes=64 << 20, max_num_seqs=NUM_ROWS)
        wake = threading.Event()
        engine = build_engine(config, self.model, self._blob_root, wake.set, name="base")
        watch = CpuWatch([os.getpid()])
        forward_s = 0.0
        run = engine.runner.run

        def timed(batch: Any) -> Any:
            nonlocal forward_s
            started = time.perf_counter()
            try:
                return run(batch)
            finally:
                forward_s = time.perf_counter() - started

        engine.runner.run = timed  # type: ignore[method-assign]
        rates: dict[int, float] = {}
        hosts: dict[int, float] = {}
        known = 0
        for count in counts:
            for number in range(known, count):
                engine.execute(Call(number, "prepare", adapters[number].digest))
            known = count
            while engine.has_work:
                if engine.step().num_rows == 0:
                    wake.wait(0.01)  # the reader needs the interpreter
                    wake.clear()
            for row in range(NUM_ROWS):
                adapter = adapters[row % min(NUM_SERVED, count)]
                engine.execute(Submit(self._request(adapter, NUM_ROW_TOKENS, 8)))
            host: list[float] = []
            num_tokens, began = 0, time.perf_counter()
            while engine.has_work:
                started = time.perf_counter()
                forward_s = 0.0
                output = wire.decode_output(wire.encode_output(engine.step()))
                assert isinstance(output, StepOutput)
                if output.num_rows:
                    host.append(time.perf_counter() - started - forward_s)
                num_tokens += sum(isinstance(event, Tokens) for event in output.events)
            rates[count] = num_tokens / (time.perf_counter() - began)
            hosts[count] = statistics.median(host)
        engine.pool.close()
        other = watch.other_cores()
        figures = {f"{count} known, tokens/s": round(rates[count], 1) for count in counts}
        times = {f"{count} known, us": round(hosts[count] * 1e6) for count in counts}
        least, most = counts[0], counts[-1]
        return [
            Part(f"throughput with {least} known adapters over that with {most}",
                 rates[least] / rates[most], 1.1, figures, NUM_ROW_TOKENS, other),
            Part(f"a step besides the forward: {most} known adapters over {least}",
                 hosts[most] / hosts[least], 1.2, times, NUM_ROW_TOKENS, other),
        ]  # fmt: skip

    # ------------------------------------------------------------------ the engine
    @contextlib.asynccontextmanager
    async def _engine(self, **settings: Any) -> AsyncIterator[EngineProcess]:
        config = self._config(**settings)
        engine = EngineProcess(config, self.model, self._blob_root, log_level="warning")
        await engine.start()
        try:
            yield engine
        finally:
            await engine.stop()

    def _config(self, **settings: Any) -> EngineConfig:
        return EngineConfig(
            model=str(self.model),
            device="cpu",
            dtype=self._dtype,
            num_threads=self.threads,
            kv_cache_bytes=512 << 20,
            **settings,
        )

    def _request(self, adapter: AdapterId, num_tokens: int, num_prompt: int) -> Request:
        prompt = tuple(self._random.randrange(self._vocab_size) for _ in range(num_prompt))
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        return Request(f"bench-{next(self._ids)}", prompt, params, (AppliedAdapter(adapter),))

    async def _run(
        self,
        engine: EngineProcess,
        adapter: AdapterId,
        num_tokens: int,
        ready: asyncio.Event | None = None,
        num_prompt: int = 64,
    ) -> Stream:
        """Serve one request to its end, or until this task is cancelled."""
        stream = Stream(time.monotonic())
        events = engine.submit(self._request(adapter, num_tokens, num_prompt))
        with contextlib.suppress(asyncio.CancelledError):
            async for event in events:
                if isinstance(event, Tokens):
                    stream.times.append(time.monotonic())
                    if ready is not None and len(stream.times) > 5:
                        ready.set()
        await events.aclose()
        return stream

    async def _load_all(self, engine: EngineProcess, adapters: list[AdapterId]) -> float:
        started = time.monotonic()
        await asyncio.gather(*(engine.load_adapter(each, is_pinned=False) for each in adapters))
        return time.monotonic() - started

    async def _upload(self, engine: EngineProcess, adapters: Sequence[AdapterId]) -> None:
        """Have the engine read each once, as an upload does, and forget it."""
        for adapter in adapters:
            await engine.prepare_adapter(adapter)
            await engine.unload_adapter(adapter.digest)

    async def _forget(self, engine: EngineProcess, adapters: list[AdapterId]) -> None:
        await asyncio.gather(*(engine.unload_adapter(each.digest) for each in adapters))

    # ------------------------------------------------------------------ the adapters
    def _large_nbytes(self) -> int:
        """Device bytes of one large adapter."""
        (source,) = self._source(RANK, 1).values()
        stored = (source / "adapter_model.safetensors").stat().st_size  # bfloat16 and a header
        return stored * (1 if self._dtype == "bfloat16" else 2)

    def _large(self, count: int) -> list[AdapterId]:
        (source,) = self._source(RANK, 1).values()
        config = json.loads((source / "adapter_config.json").read_text())
        weights = (source / "adapter_model.safetensors").read_bytes()
        return [self._put(f"large-{n}", config, weights, n) for n in range(count)]

    def _tiny(self, count: int) -> list[AdapterId]:
        """Rank 1 on one projection of the first layer."""
        from safetensors.torch import load_file, save

        (source,) = self._source(1, 1).values()
        config = json.loads((source / "adapter_config.json").read_text())
        config |= {"target_modules": ["q_proj"], "layers_to_transform": [0]}
        tensors = load_file(source / "adapter_model.safetensors")
        kept = {key: t for key, t in tensors.items() if ".layers.0.self_attn.q_proj." in key}
        weights = save(kept)
        return [self._put(f"tiny-{n}", config, weights, n) for n in range(count)]

    def _source(self, rank: int, count: int) -> dict[str, Path]:
        directory = self._scratch / f"rank-{rank}"
        if directory.is_dir():
            return {path.name: path for path in directory.iterdir()}
        return make_adapters(self.model, directory, count, rank)

    def _put(self, name: str, config: dict[str, Any], weights: bytes, number: int) -> AdapterId:
        """Store a copy that differs in its last weight's lowest bits, and so in its digest."""
        staged = self._blobs.new_staging()
        tail = (number % 0x3F00).to_bytes(2, "little")  # a small bfloat16
        (staged / "adapter_config.json").write_text(json.dumps(config))
        (staged / "adapter_model.safetensors").write_bytes(weights[:-2] + tail)
        digest = digest_of(list_files(staged))
        target = self._blobs.path(digest)
        if target.exists():
            self._blobs.discard(staged)
        else:
            staged.rename(target)  # BlobStore.put without waiting for the disk
        return AdapterId(name, 1, digest)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a Llama-like transformers directory")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", type=int, help="of the engine")
    parser.add_argument("--out", type=Path, help="instead of bench/results/<date>-<machine>")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
