"""A closed-loop load generator for any OpenAI-compatible completions endpoint.

    python -m bench.loadgen --url http://127.0.0.1:8000 --model base --concurrency 8

Every request is one random prompt given as token ids, streamed, greedy, of a fixed output length.
Worker i always asks for models[i % len(models)], so as many models as workers means that every
row of a step has its own adapter.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import httpx


@dataclass(frozen=True, slots=True)
class Load:
    """What one cell of a benchmark asks for."""

    models: tuple[str, ...]
    concurrency: int
    num_requests: int
    vocab_size: int
    num_prompt_tokens: int = 128
    num_output_tokens: int = 64
    seed: int = 0
    stop_after_s: float = math.inf  # no request starts later, so a slow machine ends in time too
    cut_after_s: float = math.inf  # requests that are not finished then are ended
    # What a model's requests carry, for servers that do not choose an adapter by `model` alone.
    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """One finished request: seconds from its start, and what went wrong if anything did."""

    ttft_s: float = 0.0
    end_s: float = 0.0
    num_tokens: int = 0
    gaps_s: tuple[float, ...] = ()  # between chunks of the stream
    error: str | None = None
    is_cut: bool = False  # ended by us: its figures are those of the part that arrived

    @property
    def itl_s(self) -> float:
        """Mean time per output token after the first."""
        return (self.end_s - self.ttft_s) / max(self.num_tokens - 1, 1)


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Figures of one cell; times in seconds, throughput in output tokens a second.

    A request that was cut counts with the chunks that it had received (at most its tokens), and
    one that waited for its first token until then with that wait as its time to first token.
    """

    tokens_per_s: float
    wall_s: float
    num_requests: int
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p50_s: float
    itl_p99_s: float
    gap_p99_s: float
    errors: tuple[str, ...]
    num_cut: int = 0


async def run_load(
    url: str,
    load: Load,
    *,
    api_key: str | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
    on_warm: Callable[[], None] | None = None,
) -> LoadResult:
    """Warm the server with a short request of every worker, then measure the closed loop.

    `transport` replaces the network in tests; `on_warm` is called between the two parts.
    """
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    # A connection for each request: some servers close an idle one while the next request is sent.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(
        base_url=url,
        headers=headers,
        limits=limits,
        timeout=httpx.Timeout(600.0),
        transport=transport,
    ) as client:
        rng = random.Random(load.seed)
        until = time.perf_counter() + load.cut_after_s
        warm = [
            _request(client, load, worker, _prompt(load, rng), 8, until)
            for worker in range(load.concurrency)
        ]
        warm_samples = await asyncio.gather(*warm)
        if any(sample.is_cut for sample in warm_samples):
            late = f"the warm-up was not finished after {load.cut_after_s:.0f} s"
            return _summary([Sample(error=late)], wall_s=1.0)
        warm_errors = [sample.error for sample in warm_samples if sample.error]
        if warm_errors:
            return _summary([Sample(error=error) for error in warm_errors], wall_s=1.0)

        prompts = iter([_prompt(load, rng) for _ in range(load.num_requests)])
        samples: list[Sample] = []

        async def worker(index: int) -> None:
            for prompt in prompts:
                if time.perf_counter() - start > min(load.stop_after_s, load.cut_after_s):
                    return
                samples.append(
                    await _request(client, load, index, prompt, load.num_output_tokens, cut)
                )

        if on_warm is not None:
            on_warm()
        start = time.perf_counter()
        cut = start + load.cut_after_s
        await asyncio.gather(*(worker(index) for index in range(load.concurrency)))
        return _summary(samples, wall_s=time.perf_counter() - start)


def _prompt(load: Load, rng: random.Random) -> list[int]:
    """Return random ids; the first ones of a vocabulary are special tokens and stay out."""
    return [rng.randrange(64, load.vocab_size - 64) for _ in range(load.num_prompt_tokens)]


async def _request(
    client: httpx.AsyncClient,
    load: Load,
    worker: int,
    prompt: list[int],
    num_tokens: int,
    until: float,
) -> Sample:
    """Send one request of a worker and read its answer, at most until that time of the clock."""
    model = load.models[worker % len(load.models)]
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **load.fields.get(model, {}),
    }
    start = time.perf_counter()
    arrivals: list[float] = []
    counted = None
    try:
        async with (
            asyncio.timeout(None if until == math.inf else until - start),
            client.stream("POST", "/v1/completions", json=body) as response,
        ):
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                return Sample(error=f"{response.status_code}: {text[:300]}")
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line[len("data: ") :])
                if "error" in chunk:
                    return Sample(error=f"in the stream: {chunk['error']}")
                if chunk.get("choices"):
                    arrivals.append(time.perf_counter() - start)
                if chunk.get("usage"):
                    counted = chunk["usage"]["completion_tokens"]
    except TimeoutError:
        return _cut(arrivals, time.perf_counter() - start, num_tokens)
    except httpx.HTTPError as error:
        return Sample(error=f"{type(error).__name__}: {error}")
    if counted != num_tokens or not arrivals:
        return Sample(error=f"{counted} output tokens instead of {num_tokens}")
    gaps = tuple(b - a for a, b in pairwise(arrivals))
    return Sample(ttft_s=arrivals[0], end_s=arrivals[-1], num_tokens=counted, gaps_s=gaps)


def _cut(arrivals: Sequence[float], waited_s: float, num_tokens: int) -> Sample:
    """Return what is known of a request that was ended before its last token."""
    return Sample(
        ttft_s=arrivals[0] if arrivals else waited_s,
        end_s=arrivals[-1] if arrivals else waited_s,
        num_tokens=min(len(arrivals), num_tokens),
        gaps_s=tuple(b - a for a, b in pairwise(arrivals)),
        is_cut=True,
    )


def _summary(samples: Sequence[Sample], wall_s: float) -> LoadResult:
    good = [sample for sample in samples if sample.error is None]
    return LoadResult(
        tokens_per_s=sum(sample.num_tokens for sample in good) / wall_s,
        wall_s=wall_s,
        num_requests=sum(not s.is_cut for s in good),
        ttft_p50_s=_quantile([s.ttft_s for s in good], 0.5),
        ttft_p99_s=_quantile([s.ttft_s for s in good], 0.99),
        itl_p50_s=_quantile([s.itl_s for s in good if s.num_tokens > 1], 0.5),
        itl_p99_s=_quantile([s.itl_s for s in good if s.num_tokens > 1], 0.99),
        gap_p99_s=_quantile([gap for s in good for gap in s.gaps_s], 0.99),
        errors=tuple(s.error for s in samples if s.error is not None),
        num_cut=sum(s.is_cut for s in good),
    )


def _quantile(values: Sequence[float], q: float) -> float:
    if len(values) < 2:
        return values[0] if values else 0.0
    if q == 0.5:
        return statistics.median(values)
    ordered = sorted(values)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


def main() -> None:
    """Run one cell against a server that is already there and print its figures as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", action="append", required=True, help="may be given repeatedly")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--requests", type=int, default=None, help="default: twice the concurrency")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--api-key")
    args = parser.parse_args()
    load = Load(
        models=tuple(args.model),
        concurrency=args.concurrency,
        num_requests=args.requests or 2 * args.concurrency,
        vocab_size=args.vocab_size,
    )
    result = asyncio.run(run_load(args.url, load, api_key=args.api_key))
    print(json.dumps(asdict(result), indent=2))


if __name__ == "__main__":
    main()
