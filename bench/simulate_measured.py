"""The run that the simulation is held to: two real engines behind the real EngineFleet."""

from __future__ import annotations

import asyncio
import shutil
import statistics
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from bench.adapters import make_adapters
from bench.simulate import Service, Setup

from polyadapt.config import EngineConfig
from polyadapt.engine.fleet import EngineFleet
from polyadapt.engine.process import EngineProcess
from polyadapt.engine.routing import RoutingPolicy
from polyadapt.types import (
    AdapterId,
    AppliedAdapter,
    Event,
    Failed,
    Request,
    SamplingParams,
    Started,
    Tokens,
)
from polyadapt_store.blobs import BlobStore, list_files
from polyadapt_store.manifest import digest_of

NUM_ROWS, VOCABULARY = 16, 512


class Watched(EngineProcess):
    """Counts what is submitted."""

    num_submitted = 0

    def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        """See EngineClient."""
        self.num_submitted += 1
        return super().submit(request)


class Rig:
    """A fleet of two over a tiny model, and its adapters."""

    def __init__(self, fleet: EngineFleet, engines: list[Watched], adapters: list[AdapterId]):
        self.fleet, self.engines, self.adapters = fleet, engines, adapters
        self.num_rows = NUM_ROWS
        self._count = 0

    @classmethod
    async def start(
        cls, root: Path, *, num_adapters: int, rank: int, num_slots: int, least_bound: int
    ) -> Rig:
        """Make the model, the adapters and the engines, which hold num_slots adapters each."""
        model, blobs = root / "model", root / "blobs"
        width = _make_model(model)
        store = BlobStore(blobs)
        adapters = []
        for name, directory in make_adapters(model, root / "adapters", num_adapters, rank).items():
            digest = digest_of(list_files(directory))
            staged = store.new_staging()
            shutil.copytree(directory, staged, dirs_exist_ok=True)
            store.put(staged, digest)
            adapters.append(AdapterId(name, 1, digest))
        config = EngineConfig.model_validate(
            {
                "model": str(model), "device": "cpu", "dtype": "float32", "num_threads": 1,
                "max_num_seqs": NUM_ROWS, "kv_cache_bytes": 16 << 20, "max_model_len": 256,
                "max_adapter_bytes": num_slots * rank * width * 4 + 64, "prefix_cache": False,
            }
        )  # fmt: skip
        engines = [Watched(config, model, blobs, name=f"e{i}", log_level="error") for i in range(2)]
        named = {f"e{i}": engine for i, engine in enumerate(engines)}
        fleet = EngineFleet(named, RoutingPolicy(least_bound=least_bound))
        await fleet.start()
        return cls(fleet, engines, adapters)

    async def stop(self) -> None:
        """End the engines."""
        await self.fleet.stop()

    async def calibrate(self, num_prompt: int, num_output: int) -> Service:
        """Measure steps of one row and of many, prompts and loads, with both engines busy."""
        for adapter in self.adapters:  # packed once, as they are when they have been used before
            await self._on(self.engines[0], adapter, num_prompt, 1)
            await self._on(self.engines[1], adapter, num_prompt, 1)
        one = await self._both(1, num_prompt, num_output)
        many = await self._both(NUM_ROWS // 2, num_prompt, num_output)
        loads = []
        for adapter in self.adapters[:24]:
            first = await self._on(self.engines[0], adapter, num_prompt, 1)
            again = await self._on(self.engines[0], adapter, num_prompt, 1)
            loads.append((first[0], again[0]))
        warm = statistics.median(again for _, again in loads)
        cold = statistics.median(first for first, _ in loads)
        step = one[1] / (num_output - 1)
        row = max(many[1] / (num_output - 1) - step, 0.0) / (NUM_ROWS // 2 - 1)
        prompt = max(warm - step, 0.0) / num_prompt
        return Service(step, row, prompt, max(cold - warm, 0.0))

    async def drive(self, setup: Setup, arrivals: Sequence[tuple[float, int]]) -> dict[str, float]:
        """Send the arrivals when they are due; return what happened after the warm-up."""
        for adapter in self.adapters:
            await self.fleet.unload_adapter(adapter.digest)
        began = time.monotonic()
        tiers: Counter[str] = Counter()
        latencies: list[float] = []

        async def send(number: int, at: float, adapter: AdapterId) -> None:
            await asyncio.sleep(max(began + at - time.monotonic(), 0.0))
            if number == setup.num_warm:
                for engine in self.engines:
                    engine.num_submitted = 0
            started = time.monotonic()
            request = self._request(adapter, setup.num_prompt, setup.num_output)
            async for event in self.fleet.submit(request):
                assert not isinstance(event, Failed), event
                if isinstance(event, Started) and number >= setup.num_warm:
                    tiers[event.served[0].tier] += 1
            if number >= setup.num_warm:
                latencies.append(time.monotonic() - started)

        before = 0.0
        tasks = [
            asyncio.create_task(send(number, at, self.adapters[index]))
            for number, (at, index) in enumerate(arrivals)
        ]
        await asyncio.gather(*tasks[: setup.num_warm])
        before = float(self.fleet.stats().counters["adapter_loads"])
        await asyncio.gather(*tasks)
        await asyncio.sleep(0.3)
        loads = self.fleet.stats().counters["adapter_loads"] - before
        counts = [engine.num_submitted for engine in self.engines]
        return {
            "hit_rate": tiers["device"] / sum(tiers.values()),
            "cold_starts": loads,
            "busiest_share": max(counts) / (sum(counts) / len(counts)),
            "mean_latency_s": statistics.fmean(latencies),
        }

    async def _both(self, count: int, num_prompt: int, num_output: int) -> tuple[float, float]:
        """Run `count` requests at once on each engine, with adapters that are there; return the
        means of seconds to the first token and from there to the last.
        """
        chosen = self.adapters[: min(count, 8)]
        for adapter in chosen:
            for engine in self.engines:
                await self._on(engine, adapter, num_prompt, 1)
        found = await asyncio.gather(
            *(
                self._on(engine, chosen[i % len(chosen)], num_prompt, num_output)
                for engine in self.engines
                for i in range(count)
            )
        )
        return statistics.fmean(f for f, _ in found), statistics.fmean(r for _, r in found)

    async def _on(
        self, engine: EngineProcess, adapter: AdapterId, num_prompt: int, num_output: int
    ) -> tuple[float, float]:
        began, first = time.monotonic(), 0.0
        async for event in engine.submit(self._request(adapter, num_prompt, num_output)):
            assert not isinstance(event, Failed), event
            if isinstance(event, Tokens) and not first:
                first = time.monotonic()
        return first - began, time.monotonic() - first

    def _request(self, adapter: AdapterId, num_prompt: int, num_output: int) -> Request:
        self._count += 1
        prompt = tuple((self._count * 31 + i * 7) % VOCABULARY for i in range(num_prompt))
        sampling = SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True)
        return Request(f"r{self._count}", prompt, sampling, (AppliedAdapter(adapter),))


def _make_model(directory: Path) -> int:
    """Write a Llama of random weights; return what the inputs and outputs of its linears add up
    to, over all layers.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    hidden, inner, heads, kv_heads, layers = 256, 512, 4, 2, 8
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=kv_heads, num_hidden_layers=layers, vocab_size=VOCABULARY,
        max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    kv = hidden // heads * kv_heads
    pairs = ((hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden), (hidden, inner),
             (hidden, inner), (inner, hidden))  # fmt: skip
    return layers * sum(map(sum, pairs))
