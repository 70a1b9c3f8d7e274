"""The values behind /metrics: what routes count, and what is read from the engine at a scrape.

What they are is said in meters.py. Everything lives on a registry of its own; labels hold a bounded
number of values. What is counted for every token is kept in plain numbers: it belongs to the event
loop alone, as a scrape does.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter as Counts
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from polyadapt.api.busiest import Busiest
from polyadapt.api.meters import METERS
from polyadapt.distribution import LOAD_SECONDS, Distribution
from polyadapt.engine.client import EngineClient
from polyadapt.tasks.directory import AdapterDirectory
from polyadapt.types import EngineInfo, EngineStats, Residency, ServedAdapter

MAX_LISTED_ADAPTERS = 256  # names in one label
MAX_NAMED_ADAPTERS = 50  # with counts of their own
_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
_ADAPTER_BOUNDS = (*range(65), 128, 256, 512, 1024)
_ROW_BITS = 21  # a step has fewer than 2^20 rows, see EngineConfig
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1,
                  0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0)  # fmt: skip
_TIERS = ("device", "host", "store")
# The engine's counters that have a name of their own, by what they are called there.
_NAMED_EVENTS = {
    "polyadapt_rows": "rows",
    "polyadapt_padded_rows": "padded_rows",
    "polyadapt_preemptions": "preemptions",
    "polyadapt_prefix_query_tokens": "prefix_query_tokens",
    "polyadapt_prefix_hit_tokens": "prefix_hit_tokens",
    "polyadapt_draft_tokens": "spec_drafted_tokens",
    "polyadapt_accepted_draft_tokens": "spec_accepted_tokens",
    "polyadapt_adapter_loads": "adapter_loads",
    "polyadapt_adapter_load_failures": "adapter_load_failures",
}


class Metrics:
    """Owns the registry; the counters are for the routes, the rest is read from the engine."""

    def __init__(
        self,
        engine: EngineClient,
        directory: AdapterDirectory,
        *,
        is_ready: Callable[[], bool],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter("polyadapt_http_requests")
        meter = METERS["polyadapt_http_request_seconds"]
        self._seconds = Histogram(
            meter.name, meter.text, meter.labels, buckets=_SECONDS, registry=self.registry
        )
        self.failed_generations = self._counter("polyadapt_failed_generations")
        self.workflow_runs = self._counter("polyadapt_workflow_runs")
        self.workflow_rounds = self._counter("polyadapt_workflow_rounds")
        self.choices = self._counter("polyadapt_choices")
        self.generations = GenerationCounts()
        self.registry.register(_EngineCollector(engine, directory, is_ready, clock))
        self.registry.register(self.generations)

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one finished HTTP request; `route` is a path template, never what was asked for."""
        known_method = method if method in _METHODS else "other"
        self._requests.labels(known_method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def render(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str) -> Counter:
        meter = METERS[name]
        return Counter(meter.name, meter.text, meter.labels, registry=self.registry)


class GenerationCounts(Collector):
    """What generations come to, as the edge sees them; see GenerationWatch, which adds to it."""

    def __init__(self) -> None:
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self.num_mandatory = 0
        self.num_mandatory_tokens = 0
        self.num_text_marked = 0
        self.num_text_marked_tokens = 0
        self.queue_seconds = Distribution(_SECONDS)
        self.first_token_seconds = Distribution(_SECONDS)
        self.inter_token_seconds = Distribution(_TOKEN_SECONDS)
        self.seconds = Distribution(_SECONDS)
        self.by_adapter = Busiest(MAX_NAMED_ADAPTERS)
        self._uses: Counts[str] = Counts()

    def count_uses(self, served: Sequence[ServedAdapter]) -> None:
        """Count where a generation's adapters were found."""
        for adapter in served:
            self._uses[adapter.tier] += 1

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the names are known to be free."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Yield every family of generations."""
        yield _count("polyadapt_prompt_tokens", self.num_prompt_tokens)
        yield _count("polyadapt_generated_tokens", self.num_generated_tokens)
        yield _count("polyadapt_mandatory_generations", self.num_mandatory)
        yield _count("polyadapt_mandatory_tokens", self.num_mandatory_tokens)
        yield _count("polyadapt_text_marked_generations", self.num_text_marked)
        yield _count("polyadapt_text_marked_tokens", self.num_text_marked_tokens)
        for name, taken in (
            ("polyadapt_queue_seconds", self.queue_seconds),
            ("polyadapt_time_to_first_token_seconds", self.first_token_seconds),
            ("polyadapt_inter_token_seconds", self.inter_token_seconds),
            ("polyadapt_generation_seconds", self.seconds),
        ):
            family = METERS[name].histogram()
            _add(family, (), taken.bounds, taken.snapshot())
            yield family
        uses = METERS["polyadapt_adapter_uses"].counter()
        for tier in _TIERS:
            uses.add_metric([tier], self._uses[tier])
        yield uses
        requests = METERS["polyadapt_adapter_requests"].counter()
        tokens = METERS["polyadapt_adapter_generated_tokens"].counter()
        for name, num_requests, num_tokens in self.by_adapter:
            requests.add_metric([name], num_requests)
            tokens.add_metric([name], num_tokens)
        yield requests
        yield tokens


class _EngineCollector(Collector):
    """Reads the engine's newest snapshot at each scrape."""

    def __init__(
        self,
        engine: EngineClient,
        directory: AdapterDirectory,
        is_ready: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._directory = directory
        self._is_ready = is_ready
        self._clock = clock
        self._adapters: tuple[str, str, str] | None = None
        self._adapters_changed = 0.0

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the names are known to be free, and an engine may not run yet."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Yield every family that depends on the engine."""
        stats, info = self._engine.stats(), self._engine.info
        yield _value("polyadapt_ready", self._is_ready())
        yield _count("polyadapt_engine_restarts", self._engine.num_restarts)
        refusals = METERS["polyadapt_mark_refusals"].counter()
        for reason, count in self._directory.mandatory.refusals.items():
            refusals.add_metric([reason], float(count))
        yield refusals
        yield from self._steps(stats)
        yield _value("polyadapt_kv_pages_used", stats.num_used_pages)
        yield _value("polyadapt_kv_pages_cached", stats.num_cached_pages)
        yield _value("polyadapt_kv_pages", stats.num_pages)
        residencies = list(self._engine.residencies().values())
        yield from self._residency(residencies, stats, info)
        yield from self._routing(stats)
        yield from self._for_the_gateway(residencies, stats, info)

    def _steps(self, stats: EngineStats) -> Iterable[Metric]:
        yield _count("polyadapt_engine_steps", stats.num_steps)
        for name, event in _NAMED_EVENTS.items():
            yield _count(name, stats.counters.get(event, 0))
        events = METERS["polyadapt_engine_events"].counter()
        for name, count in sorted(stats.counters.items()):
            events.add_metric([name], float(count))
        yield events
        yield _steps_by_adapters(stats)
        yield _steps_by_rows(stats)

    def _residency(
        self, residencies: Sequence[Residency], stats: EngineStats, info: EngineInfo | None
    ) -> Iterable[Metric]:
        """Yield where adapters are, and what brought them there."""
        yield _value("polyadapt_adapter_bytes_used", stats.adapter_bytes_used)
        if info is not None:
            yield _value("polyadapt_adapter_bytes", info.adapter_bytes)
        numbers = METERS["polyadapt_adapters"].gauge()
        sizes = METERS["polyadapt_adapter_tier_bytes"].gauge()
        for tier in _TIERS:
            there = [residency for residency in residencies if residency.tier == tier]
            numbers.add_metric([tier], len(there))
            sizes.add_metric([tier], sum(residency.nbytes for residency in there))
        yield numbers
        yield sizes
        yield _value("polyadapt_adapters_pinned", sum(r.is_pinned for r in residencies))
        yield _value("polyadapt_adapters_leased", sum(r.num_leases > 0 for r in residencies))
        yield _value("polyadapt_adapters_awaited", len(stats.waiting_digests))
        loads = METERS["polyadapt_adapter_load_seconds"].histogram()
        for stage, taken in stats.load_seconds.items():
            _add(loads, (stage,), LOAD_SECONDS, taken)
        yield loads
        evictions = METERS["polyadapt_adapter_evictions"].counter()
        evictions.add_metric(["device"], stats.counters.get("adapter_evictions", 0))
        evictions.add_metric(["host"], stats.counters.get("host_evictions", 0))
        yield evictions

    def _routing(self, stats: EngineStats) -> Iterable[Metric]:
        """Yield what adapters with routers choose; the engine names only the busiest of them."""
        rows = METERS["polyadapt_adapter_routed_rows"].gauge()
        shares = METERS["polyadapt_adapter_expert_share"].gauge()
        named: set[str] = set()
        for digest, (count, *parts) in sorted(
            stats.routing.items(), key=lambda of: of[1][0], reverse=True
        ):
            name = next(iter(self._names([digest])), None)
            if name is None or name in named:  # of a name that two tenants have, the busier one
                continue
            named.add(name)
            rows.add_metric([name], count)
            for expert, share in enumerate(parts):
                shares.add_metric([name, str(expert)], share)
        yield rows
        yield shares

    def _for_the_gateway(
        self, residencies: Sequence[Residency], stats: EngineStats, info: EngineInfo | None
    ) -> Iterable[Metric]:
        """Yield the names of kubernetes-sigs/gateway-api-inference-extension's protocol
        (docs/proposals/003-model-server-protocol)."""
        yield _value("vllm:num_requests_waiting", stats.num_waiting)
        yield _value("vllm:num_requests_running", stats.num_running)
        used = stats.num_used_pages / stats.num_pages if stats.num_pages else 0.0
        yield _value("vllm:kv_cache_usage_perc", used)
        if info is None:
            return
        config = METERS["vllm:cache_config_info"].gauge()
        config.add_metric([str(info.page_size), str(info.num_pages)], 1.0)
        yield config
        resident = [residency for residency in residencies if residency.tier == "device"]
        labels = (
            str(num_fitting(residencies, stats.adapter_bytes_used, info)),
            ",".join(self._names(r.digest for r in resident)),
            ",".join(self._names(stats.waiting_digests)),
        )
        if labels != self._adapters:
            # A reader takes the series with the largest value: time must pass between two.
            self._adapters_changed = max(self._clock(), self._adapters_changed + 1e-6)
            self._adapters = labels
        lora = METERS["vllm:lora_requests_info"].gauge()
        lora.add_metric(labels, self._adapters_changed)
        yield lora

    def _names(self, digests: Iterable[str]) -> list[str]:
        """Return what requests call the adapters of digests, as many as fit in a label."""
        return sorted(self._directory.names_of(digests))[:MAX_LISTED_ADAPTERS]


def num_fitting(residencies: Sequence[Residency], nbytes_used: int, info: EngineInfo) -> int:
    """Return how many adapters fit on the device: those that are there, and as many of median size
    as its free bytes hold.

    The pool is bounded in bytes; the protocol wants a number. While none is there the median is of
    those on the host, and while none was read at all the number is that of a step's rows.
    """
    on_device = [r.nbytes for r in residencies if r.tier == "device"]
    sizes = on_device or [r.nbytes for r in residencies if r.nbytes > 0]
    if not sizes:
        return min(info.max_num_seqs, info.max_adapters)
    free = max(info.adapter_bytes - nbytes_used, 0)
    num_more = int(free / max(statistics.median(sizes), 1))
    return min(len(on_device) + num_more, info.max_adapters)


def _steps_by_adapters(stats: EngineStats) -> HistogramMetricFamily:
    """Return how many distinct adapters a step served: one bucket for every count up to 64."""
    buckets = [
        (str(float(bound)), float(sum(n for d, n in stats.steps_by_adapters.items() if d <= bound)))
        for bound in _ADAPTER_BOUNDS
    ]
    total = float(sum(stats.steps_by_adapters.values()))
    family = METERS["polyadapt_step_distinct_adapters"].histogram()
    sum_value = float(sum(d * n for d, n in stats.steps_by_adapters.items()))
    family.add_metric([], [*buckets, ("+Inf", total)], sum_value)
    return family


def _steps_by_rows(stats: EngineStats) -> HistogramMetricFamily:
    """Return how many rows a step had, between powers of two."""
    counts = [stats.steps_by_rows.get(bits, 0) for bits in range(1, _ROW_BITS)]
    family = METERS["polyadapt_step_rows"].histogram()
    bounds = [float((1 << bits) - 1) for bits in range(1, _ROW_BITS)]
    _add(family, (), bounds, (*counts, 0, stats.counters.get("rows", 0)))
    return family


def _add(
    family: HistogramMetricFamily,
    labels: Sequence[str],
    bounds: Sequence[float],
    taken: Sequence[float],
) -> None:
    """Add the samples of Distribution.snapshot."""
    *counts, total = taken
    sofar, buckets = 0.0, []
    for bound, count in zip((*map(str, bounds), "+Inf"), counts, strict=True):
        sofar += count
        buckets.append((bound, sofar))
    family.add_metric(labels, buckets, total)


def _count(name: str, value: float) -> Metric:
    family = METERS[name].counter()
    family.add_metric([], float(value))
    return family


def _value(name: str, value: float) -> Metric:
    family = METERS[name].gauge()
    family.add_metric([], float(value))
    return family
