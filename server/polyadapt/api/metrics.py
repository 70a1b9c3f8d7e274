"""Prometheus metrics: our own, and those that the Gateway API Inference Extension reads.

Everything lives on a registry of its own; labels hold a bounded number of values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from polyadapt.engine.client import EngineClient
from polyadapt.tasks.directory import AdapterDirectory
from polyadapt.types import AdapterId, EngineInfo, EngineStats, Residency

MAX_LISTED_ADAPTERS = 256  # names in one label
_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
_ADAPTER_BOUNDS = (*range(65), 128, 256, 512, 1024)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


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
        self._requests = Counter(
            "polyadapt_http_requests",
            "HTTP requests by route and status; 499 means that the caller went away",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "polyadapt_http_request_seconds",
            "Seconds until a reply, or its stream, was complete",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "polyadapt_prompt_tokens", "Tokens of accepted prompts", registry=self.registry
        )
        self.generated_tokens = Counter(
            "polyadapt_generated_tokens", "Tokens that were generated", registry=self.registry
        )
        self.first_token_seconds = Histogram(
            "polyadapt_time_to_first_token_seconds",
            "Seconds from the request to its first token",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.failed_generations = Counter(
            "polyadapt_failed_generations",
            "Generations that ended in an error, by its code",
            ["code"],
            registry=self.registry,
        )
        self.workflow_runs = Counter(
            "polyadapt_workflow_runs",
            "Runs of workflows by kind and how they ended: agreement, majority (declared, without "
            "agreement), none (no answer), failed, cancelled",
            ["kind", "outcome"],
            registry=self.registry,
        )
        self.workflow_rounds = Counter(
            "polyadapt_workflow_rounds",
            "Rounds of the runs that ended with an outcome, by kind",
            ["kind"],
            registry=self.registry,
        )
        self.choices = Counter(
            "polyadapt_choices",
            'Requests with model "auto" by why an adapter (best) or the base was chosen',
            ["reason"],
            registry=self.registry,
        )
        self.registry.register(_EngineCollector(engine, directory, is_ready, clock))

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one finished HTTP request; `route` is a path template, never what was asked for."""
        known_method = method if method in _METHODS else "other"
        self._requests.labels(known_method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def render(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self.registry)


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
        yield _gauge("polyadapt_ready", "1 while requests are taken", float(self._is_ready()))
        yield CounterMetricFamily(
            "polyadapt_engine_restarts",
            "Engines that were started again after one died or hung",
            value=float(self._engine.num_restarts),
        )
        yield CounterMetricFamily(
            "polyadapt_engine_steps", "Steps of the present engine", value=float(stats.num_steps)
        )
        yield _gauge("polyadapt_kv_pages_used", "KV pages in use", stats.num_used_pages)
        yield _gauge(
            "polyadapt_kv_pages_cached",
            "KV pages not in use that are kept for requests that begin alike",
            stats.num_cached_pages,
        )
        yield _gauge("polyadapt_kv_pages", "KV pages there are", stats.num_pages)
        yield _gauge(
            "polyadapt_adapter_bytes_used", "Device bytes of adapters", stats.adapter_bytes_used
        )
        if info is not None:
            yield _gauge("polyadapt_adapter_bytes", "Device bytes for adapters", info.adapter_bytes)
        events = CounterMetricFamily(
            "polyadapt_engine_events", "What happened in the present engine", labels=["event"]
        )
        for name, count in sorted(stats.counters.items()):
            events.add_metric([name], float(count))
        yield events
        yield _steps_by_adapters(stats)
        yield from self._routing(stats)
        yield from self._for_the_gateway(stats, info)

    def _routing(self, stats: EngineStats) -> Iterable[Metric]:
        """Yield what adapters with routers choose; the engine names only the busiest of them."""
        rows = GaugeMetricFamily(
            "polyadapt_adapter_routed_rows",
            "Rows that an adapter has routed, at every module, since it came to the device",
            labels=["adapter"],
        )
        shares = GaugeMetricFamily(
            "polyadapt_adapter_expert_share",
            "Part of the weight that an expert, or some neighbours of many, got of those rows",
            labels=["adapter", "expert"],
        )
        for digest, (count, *parts) in stats.routing.items():
            for name in self._names([digest])[:1]:
                rows.add_metric([name], count)
                for expert, share in enumerate(parts):
                    shares.add_metric([name, str(expert)], share)
        yield rows
        yield shares

    def _for_the_gateway(self, stats: EngineStats, info: EngineInfo | None) -> Iterable[Metric]:
        """Yield the names of kubernetes-sigs/gateway-api-inference-extension's protocol
        (docs/proposals/003-model-server-protocol)."""
        yield _gauge("vllm:num_requests_waiting", "Sequences in the queue", stats.num_waiting)
        yield _gauge("vllm:num_requests_running", "Sequences in the batch", stats.num_running)
        used = stats.num_used_pages / stats.num_pages if stats.num_pages else 0.0
        yield _gauge("vllm:kv_cache_usage_perc", "KV pages in use, from 0 to 1", used)
        if info is None:
            return
        config = GaugeMetricFamily(
            "vllm:cache_config_info", "The KV cache", labels=["block_size", "num_gpu_blocks"]
        )
        config.add_metric([str(info.page_size), str(info.num_pages)], 1.0)
        yield config
        resident = [r for r in self._engine.residencies().values() if r.tier == "device"]
        labels = (
            str(_num_fitting(resident, info)),
            ",".join(self._names(r.digest for r in resident)),
            ",".join(self._names(stats.waiting_digests)),
        )
        if labels != self._adapters:
            # A reader takes the series with the largest value: time must pass between two.
            self._adapters_changed = max(self._clock(), self._adapters_changed + 1e-6)
            self._adapters = labels
        lora = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters on the device and adapters that are waited for; the value is the time of "
            "the last change in unix seconds",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        lora.add_metric(labels, self._adapters_changed)
        yield lora

    def _names(self, digests: Iterable[str]) -> list[str]:
        """Return the names of digests: the bare name for its newest version, else name@version."""
        ids = [adapter for digest in digests for adapter in self._directory.ids_of(digest)]
        newest: dict[str, AdapterId] = {}
        for adapter in ids:
            if adapter.name not in newest or adapter.version > newest[adapter.name].version:
                newest[adapter.name] = adapter
        names = {a.name if newest[a.name] == a else f"{a.name}@{a.version}" for a in ids}
        return sorted(names)[:MAX_LISTED_ADAPTERS]


def _num_fitting(resident: Iterable[Residency], info: EngineInfo) -> int:
    """Return how many adapters fit on the device, judged by the size of those that are there.

    The pool is bounded in bytes; the protocol wants a number.
    """
    sizes = [r.nbytes for r in resident if r.nbytes > 0]
    if not sizes:
        return info.max_num_seqs
    mean = sum(sizes) / len(sizes)
    return max(len(sizes), int(info.adapter_bytes / mean))


def _steps_by_adapters(stats: EngineStats) -> HistogramMetricFamily:
    """Return how many distinct adapters a step served: one bucket for every count up to 64."""
    buckets = [
        (str(float(bound)), float(sum(n for d, n in stats.steps_by_adapters.items() if d <= bound)))
        for bound in _ADAPTER_BOUNDS
    ]
    total = float(sum(stats.steps_by_adapters.values()))
    family = HistogramMetricFamily(
        "polyadapt_step_distinct_adapters", "Distinct adapters that one step served"
    )
    sum_value = float(sum(d * n for d, n in stats.steps_by_adapters.items()))
    family.add_metric([], [*buckets, ("+Inf", total)], sum_value)
    return family


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=float(value))
