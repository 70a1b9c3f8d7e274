"""Every metric that /metrics shows: name, kind, labels and what it means. Knows no values.

The reference in the docs is made of this list, and a scrape shows nothing that is not on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Meter:
    """One metric family. A counter's samples are called `name` and `_total`."""

    name: str
    kind: Kind
    text: str
    labels: tuple[str, ...] = ()

    @property
    def sample(self) -> str:
        """What a query asks for; a histogram's has _bucket, _sum and _count behind it."""
        return f"{self.name}_total" if self.kind == "counter" else self.name

    def counter(self) -> CounterMetricFamily:
        """Return the family, without samples."""
        assert self.kind == "counter", f"{self.name} is a {self.kind}"
        return CounterMetricFamily(self.name, self.text, labels=self.labels)

    def gauge(self) -> GaugeMetricFamily:
        """Return the family, without samples."""
        assert self.kind == "gauge", f"{self.name} is a {self.kind}"
        return GaugeMetricFamily(self.name, self.text, labels=self.labels)

    def histogram(self) -> HistogramMetricFamily:
        """Return the family, without samples."""
        assert self.kind == "histogram", f"{self.name} is a {self.kind}"
        return HistogramMetricFamily(self.name, self.text, labels=self.labels)


# Sections of the reference, in its order.
SECTIONS: dict[str, tuple[Meter, ...]] = {
    "The server": (
        Meter("polyadapt_ready", "gauge", "1 while requests are taken"),
        Meter(
            "polyadapt_engine_restarts",
            "counter",
            "Engines that were started again after one died or hung",
        ),
        Meter(
            "polyadapt_http_requests",
            "counter",
            "HTTP requests by route and status; 499 means that the caller went away",
            ("method", "route", "status"),
        ),
        Meter(
            "polyadapt_http_request_seconds",
            "histogram",
            "Seconds until a reply, or its stream, was complete",
            ("route",),
        ),
    ),
    "Generations": (
        Meter("polyadapt_prompt_tokens", "counter", "Tokens of accepted prompts"),
        Meter("polyadapt_generated_tokens", "counter", "Tokens that were generated"),
        Meter(
            "polyadapt_queue_seconds",
            "histogram",
            "Seconds from a generation's submission until it was admitted, its adapters on the "
            "device",
        ),
        Meter(
            "polyadapt_time_to_first_token_seconds",
            "histogram",
            "Seconds from the request, or a workflow's sample, to its first token",
        ),
        Meter(
            "polyadapt_inter_token_seconds",
            "histogram",
            "Seconds between two tokens of one sequence; tokens that come together share the time",
        ),
        Meter(
            "polyadapt_generation_seconds",
            "histogram",
            "Seconds from the request to the last token of a generation that succeeded",
        ),
        Meter(
            "polyadapt_failed_generations",
            "counter",
            "Generations that ended in an error, by its code",
            ("code",),
        ),
        Meter(
            "polyadapt_mandatory_generations",
            "counter",
            "Generations that were served through what a policy makes mandatory, such as a mark",
        ),
        Meter(
            "polyadapt_mandatory_tokens",
            "counter",
            "Tokens that were generated through what a policy makes mandatory",
        ),
        Meter(
            "polyadapt_mark_refusals",
            "counter",
            "Requests that a mark is required for and that got no answer, by why the user could "
            "not be told: no_user, no_signature, or not_opened, a signature that does not decrypt",
            ("reason",),
        ),
        Meter(
            "polyadapt_text_marked_generations",
            "counter",
            "Generations whose tokens were drawn with the caller's text mark",
        ),
        Meter("polyadapt_text_marked_tokens", "counter", "Tokens of those generations"),
        Meter(
            "polyadapt_choices",
            "counter",
            'Requests with model "auto" by why an adapter (best) or the base was chosen',
            ("reason",),
        ),
        Meter(
            "polyadapt_workflow_runs",
            "counter",
            "Runs of workflows by kind and how they ended: agreement, majority (declared, without "
            "agreement), none (no answer), failed, cancelled",
            ("kind", "outcome"),
        ),
        Meter(
            "polyadapt_workflow_rounds",
            "counter",
            "Rounds of the runs that ended with an outcome, by kind",
            ("kind",),
        ),
    ),
    "Steps": (
        Meter("polyadapt_engine_steps", "counter", "Steps of the present engine"),
        Meter("polyadapt_rows", "counter", "Rows (tokens) that the steps computed"),
        Meter(
            "polyadapt_padded_rows",
            "counter",
            "Rows that steps computed for nobody, to fill a captured graph; 0 on a CPU, which pads "
            "nothing",
        ),
        Meter("polyadapt_step_rows", "histogram", "Rows of one step"),
        Meter(
            "polyadapt_step_distinct_adapters",
            "histogram",
            "Distinct adapters that one step served",
        ),
        Meter(
            "polyadapt_preemptions",
            "counter",
            "Sequences that were stopped for want of KV pages and computed again later",
        ),
        Meter(
            "polyadapt_engine_events",
            "counter",
            "Every counter of the present engine, by its own name",
            ("event",),
        ),
    ),
    "Keys and values": (
        Meter("polyadapt_kv_pages", "gauge", "KV pages there are"),
        Meter("polyadapt_kv_pages_used", "gauge", "KV pages in use"),
        Meter(
            "polyadapt_kv_pages_cached",
            "gauge",
            "KV pages not in use that are kept for requests that begin alike",
        ),
        Meter(
            "polyadapt_prefix_query_tokens",
            "counter",
            "Tokens that were looked for in the prefix cache",
        ),
        Meter(
            "polyadapt_prefix_hit_tokens",
            "counter",
            "Tokens that were found there and not computed again",
        ),
        Meter("polyadapt_draft_tokens", "counter", "Tokens that were guessed ahead"),
        Meter("polyadapt_accepted_draft_tokens", "counter", "Guesses that proved right"),
    ),
    "Adapters": (
        Meter("polyadapt_adapter_bytes", "gauge", "Device bytes for adapters"),
        Meter("polyadapt_adapter_bytes_used", "gauge", "Device bytes of adapters"),
        Meter(
            "polyadapt_adapters",
            "gauge",
            "Adapters by where they are: device, host, or store while they are read; others are "
            "in the store alone and not counted",
            ("tier",),
        ),
        Meter(
            "polyadapt_adapter_tier_bytes",
            "gauge",
            "Bytes of those adapters, once they were read",
            ("tier",),
        ),
        Meter("polyadapt_adapters_pinned", "gauge", "Adapters that are never evicted"),
        Meter("polyadapt_adapters_leased", "gauge", "Adapters that running requests use"),
        Meter("polyadapt_adapters_awaited", "gauge", "Adapters that queued requests ask for"),
        Meter(
            "polyadapt_adapter_uses",
            "counter",
            "Adapters of admitted generations by where they were found: device is a hit; host and "
            "store are misses, counted for the request that the adapter was brought for",
            ("tier",),
        ),
        Meter(
            "polyadapt_adapter_load_seconds",
            "histogram",
            "Seconds that the stages of an adapter's way to the device took: read (from the store, "
            "and its checks), pack (into the device's form, unless it was cached), copy",
            ("stage",),
        ),
        Meter("polyadapt_adapter_loads", "counter", "Adapters that came to the device"),
        Meter("polyadapt_adapter_load_failures", "counter", "Adapters that could not"),
        Meter(
            "polyadapt_adapter_evictions",
            "counter",
            "Adapters that left a tier to make room for others",
            ("tier",),
        ),
        Meter(
            "polyadapt_adapter_requests",
            "counter",
            'Generations by adapter: the busiest by name, the rest as "other"',
            ("adapter",),
        ),
        Meter(
            "polyadapt_adapter_generated_tokens",
            "counter",
            'Tokens that were generated by adapter: the busiest by name, the rest as "other"',
            ("adapter",),
        ),
        Meter(
            "polyadapt_adapter_routed_rows",
            "gauge",
            "Rows that an adapter has routed, at every module, since it came to the device",
            ("adapter",),
        ),
        Meter(
            "polyadapt_adapter_expert_share",
            "gauge",
            "Part of the weight that an expert, or some neighbours of many, got of those rows",
            ("adapter", "expert"),
        ),
    ),
    # kubernetes-sigs/gateway-api-inference-extension: docs/proposals/003-model-server-protocol
    "For the Gateway API Inference Extension": (
        Meter("vllm:num_requests_waiting", "gauge", "Sequences in the queue"),
        Meter("vllm:num_requests_running", "gauge", "Sequences in the batch"),
        Meter("vllm:kv_cache_usage_perc", "gauge", "KV pages in use, from 0 to 1"),
        Meter("vllm:cache_config_info", "gauge", "The KV cache", ("block_size", "num_gpu_blocks")),
        Meter(
            "vllm:lora_requests_info",
            "gauge",
            "Adapters on the device and adapters that are waited for; the value is the time of "
            "the last change in unix seconds. max_lora: those on the device and how many of their "
            "median size still fit",
            ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        ),
    ),
}

METERS = {meter.name: meter for meters in SECTIONS.values() for meter in meters}

# Of each engine, where there are several: a scrape of one engine's server has none of these.
FLEET_METERS = {
    meter.name: meter
    for meter in (
        Meter(
            "polyadapt_fleet_engine_ready",
            "gauge",
            "1 while the engine takes requests",
            ("engine",),
        ),
        Meter(
            "polyadapt_fleet_engine_load_tokens",
            "gauge",
            "Tokens sent to the engine and not computed yet, as the router expects them",
            ("engine",),
        ),
        Meter(
            "polyadapt_fleet_engine_running",
            "gauge",
            "Sequences in the engine's batch",
            ("engine",),
        ),
        Meter(
            "polyadapt_fleet_engine_waiting",
            "gauge",
            "Sequences in the engine's queue",
            ("engine",),
        ),
        Meter(
            "polyadapt_fleet_engine_resident_adapters",
            "gauge",
            "Adapters on the engine's device",
            ("engine",),
        ),
        Meter(
            "polyadapt_fleet_engine_restarts",
            "counter",
            "How often the engine was started again after it died or hung",
            ("engine",),
        ),
        Meter(
            "polyadapt_fleet_failovers",
            "counter",
            "Requests that began anew on another engine because theirs died before they began",
        ),
    )
}
