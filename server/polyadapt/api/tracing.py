"""Spans of requests for OpenTelemetry: the request, and the engine's queue, loads, prefill, decode.

The one module that needs the extra `polyadapt[otel]`; nobody imports it where tracing is off. Spans
are made when a request has ended, of times that were noted: no token waits for one. Names are
those of OpenTelemetry's conventions for HTTP and for generative AI, which are still in development.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import Scope

import polyadapt
from polyadapt.types import Timeline

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
}
# A line of the log and a span say the same things by other names.
_ATTRIBUTES = {
    "model": "gen_ai.request.model",
    "adapters": "polyadapt.adapters",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "generated_tokens": "gen_ai.usage.output_tokens",
}
_PROBES = frozenset({"/health", "/ready", "/metrics"})


class Tracing:
    """Makes the spans of requests and hands them to a processor of the SDK."""

    def __init__(self, processor: SpanProcessor, *, ratio: float = 1.0) -> None:
        """ratio: the part of requests that are traced, of those whose caller has not decided."""
        resource = Resource.create(
            {"service.name": "polyadapt", "service.version": polyadapt.__version__}
        )
        sampler = ParentBased(TraceIdRatioBased(ratio))
        self._provider = TracerProvider(sampler, resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("polyadapt", polyadapt.__version__)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, scope: Scope) -> RequestTrace | None:
        """Return the trace of an HTTP request that begins; None when it is not traced."""
        if scope["path"] in _PROBES:
            return None
        headers = Headers(scope=scope)
        names = ("traceparent", "tracestate")
        carrier = {name: headers[name] for name in names if name in headers}
        span = self._tracer.start_span(
            scope["method"], self._propagator.extract(carrier), SpanKind.SERVER
        )
        return RequestTrace(span, self._tracer, self._propagator) if span.is_recording() else None

    def close(self) -> None:
        """Send what is left; nothing is traced afterwards."""
        self._provider.shutdown()


def open_tracing(endpoint: str, ratio: float) -> Tracing:
    """Return tracing that sends to an OTLP receiver by HTTP; `endpoint` is the address before
    /v1/traces. Headers for it are read from OTEL_EXPORTER_OTLP_HEADERS, by the SDK.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
    return Tracing(BatchSpanProcessor(exporter), ratio=ratio)


class RequestTrace:
    """One HTTP request's span and what was noted for those below it."""

    def __init__(
        self, span: Span, tracer: trace.Tracer, propagator: TraceContextTextMapPropagator
    ) -> None:
        self._span = span
        self._tracer = tracer
        self._context = trace.set_span_in_context(span)
        self._timelines: dict[str, Timeline] = {}
        self._first_token: float | None = None
        carrier: dict[str, str] = {}
        propagator.inject(carrier, self._context)
        self.traceparent = carrier["traceparent"]

    def note(self, generation: str, timeline: Timeline) -> None:
        """Keep what the engine says of one of the request's generations; the latest counts."""
        self._timelines[generation] = timeline

    def note_first_token(self) -> None:
        """Note that the first token is on its way to the caller."""
        self._first_token = time.time()

    def end(self, method: str, route: str, status: int, about: Mapping[str, Any]) -> None:
        """End the request's span and make those below it."""
        now = time.time()
        span = self._span
        operation = _OPERATIONS.get(route)
        span.update_name(f"{method} {route}")
        span.set_attributes(
            {
                "http.request.method": method,
                "http.route": route,
                "http.response.status_code": status,
                "polyadapt.request_id": about["request_id"],
            }
        )
        if operation is not None:
            span.update_name(f"{operation} {about.get('model', '')}".rstrip())
            span.set_attributes(
                {"gen_ai.operation.name": operation, "gen_ai.provider.name": "polyadapt"}
            )
        span.set_attributes(
            {
                _ATTRIBUTES[name]: value
                for name, value in about.items()
                if name in _ATTRIBUTES and value is not None
            }
        )
        if (first := about.get("first_token_ms")) is not None:
            span.set_attribute("gen_ai.response.time_to_first_chunk", first / 1000)
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        for generation, timeline in self._timelines.items():
            self._add_below(generation, timeline, now)
        span.end(_ns(now))

    def _add_below(self, generation: str, timeline: Timeline, now: float) -> None:
        """Make the spans of one generation. Whoever ended it before the engine told (a stop string)
        has its first token and its end by the edge's clock.
        """
        ended = timeline.ended or now
        admitted = timeline.admitted or ended
        first_token = timeline.first_token or self._first_token
        self._add("queue", generation, timeline.arrived, admitted)
        for digest, began, landed in timeline.loads:
            self._add(
                "adapter load", generation, began, landed, {"polyadapt.adapter.digest": digest}
            )
        if timeline.admitted is None:
            return
        steps = {"polyadapt.engine.first_step": timeline.first_step}
        self._add("prefill", generation, admitted, first_token or ended, steps)
        if first_token is not None:
            last = {"polyadapt.engine.last_step": timeline.last_step} if timeline.ended else {}
            self._add("decode", generation, first_token, ended, last)

    def _add(
        self,
        name: str,
        generation: str,
        began: float,
        ended: float,
        attributes: Mapping[str, str | int] | None = None,
    ) -> None:
        given = {"polyadapt.generation": generation, **(attributes or {})}
        span = self._tracer.start_span(name, self._context, attributes=given, start_time=_ns(began))
        span.end(_ns(max(began, ended)))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
