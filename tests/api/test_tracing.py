"""Spans of requests: what is below what, what they say, and that they cross to the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tests.api.conftest import Maker, Server
from tests.oracle import adapters
from tests.support.engines import SMALL, put_blob
from tests.support.fake_engine import FakeEngine
from tests.support.otlp import otlp_receiver

from polyadapt.api.tracing import Tracing, open_tracing
from polyadapt.config import EngineConfig
from polyadapt.engine.build import build_engine
from polyadapt.engine.in_process import InProcessEngine
from polyadapt.types import (
    AppliedAdapter,
    Event,
    Failed,
    Finished,
    Request,
    SamplingParams,
    Started,
    Timeline,
)

pytestmark = pytest.mark.anyio

CHAT = {"model": "poet", "messages": [{"role": "user", "content": "hi"}]}
TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"


class TimedEngine(FakeEngine):
    """A fake engine that tells a traced request's times as ours does."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Request] = []

    async def submit(self, request: Request) -> Any:
        self.seen.append(request)
        told = Timeline(100.0, 102.0, first_step=7, loads=(("sha256:x", 100.5, 101.5),))
        async for event in super().submit(request):
            yield event if request.traceparent is None else _timed(event, told)


def _timed(event: Event, told: Timeline) -> Event:
    if isinstance(event, Started):
        return Started(event.request_id, event.served, event.num_cached_tokens, told)
    whole = Timeline(100.0, 102.0, 102.5, 104.0, 7, 20, told.loads)
    if isinstance(event, Finished):
        return Finished(event.request_id, event.is_cancelled, whole)
    if isinstance(event, Failed):
        ended = Timeline(100.0, ended=103.0, last_step=9)
        return Failed(event.request_id, event.code, event.message, event.param, ended)
    return event


class Traced:
    """A server whose spans are at hand."""

    def __init__(self, server: Server, engine: TimedEngine, spans: InMemorySpanExporter) -> None:
        self.client, self.engine, self._spans = server.client, engine, spans

    async def spans(self, **body: Any) -> dict[str, ReadableSpan]:
        """Ask for a chat with a parent and return the spans of it by name."""
        self._spans.clear()
        await self.client.post(
            "/v1/chat/completions", json=CHAT | body, headers={"traceparent": PARENT}
        )
        found = self._spans.get_finished_spans()
        assert len({span.name for span in found}) == len(found)
        return {span.name: span for span in found}

    @property
    def finished(self) -> tuple[ReadableSpan, ...]:
        return self._spans.get_finished_spans()


@pytest.fixture
async def make_traced(make_server: Maker) -> Callable[..., Any]:
    async def make(ratio: float = 1.0) -> Traced:
        engine, spans = TimedEngine(), InMemorySpanExporter()
        tracing = Tracing(SimpleSpanProcessor(spans), ratio=ratio)
        server = await make_server(engine, tracing=tracing)
        await server.upload("poet")
        spans.clear()
        return Traced(server, engine, spans)

    return make


@pytest.fixture
async def traced(make_traced: Callable[..., Any]) -> Traced:
    found: Traced = await make_traced()
    return found


def seconds(span: ReadableSpan) -> tuple[float, float]:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time / 1e9, span.end_time / 1e9


async def test_the_callers_trace_goes_on_through_the_request_to_the_engine(traced: Traced) -> None:
    spans = await traced.spans()
    assert set(spans) == {"chat poet", "queue", "adapter load", "prefill", "decode"}
    top = spans.pop("chat poet")
    assert f"{top.context.trace_id:032x}" == TRACE_ID
    assert top.parent is not None
    assert f"{top.parent.span_id:016x}" == PARENT_ID
    for span in spans.values():
        assert span.parent is not None
        assert span.parent.span_id == top.context.span_id
    (request,) = traced.engine.seen
    assert request.traceparent == f"00-{TRACE_ID}-{top.context.span_id:016x}-01"
    assert seconds(spans["queue"]) == (100.0, 102.0)
    assert seconds(spans["adapter load"]) == (100.5, 101.5)
    assert seconds(spans["prefill"]) == (102.0, 102.5)
    assert seconds(spans["decode"]) == (102.5, 104.0)
    assert spans["prefill"].attributes["polyadapt.engine.first_step"] == 7
    assert spans["decode"].attributes["polyadapt.engine.last_step"] == 20


async def test_the_requests_span_says_what_the_conventions_name(traced: Traced) -> None:
    attributes = dict((await traced.spans())["chat poet"].attributes or {})
    assert attributes.pop("gen_ai.response.time_to_first_chunk") >= 0
    assert attributes.pop("polyadapt.request_id").startswith("req-")
    assert attributes.pop("gen_ai.usage.input_tokens") > 0
    assert attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "polyadapt",
        "gen_ai.request.model": "poet",
        "gen_ai.usage.output_tokens": len("I am poet 0.") + 1,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "polyadapt.adapters": ("poet@1",),
    }


async def test_a_stream_and_a_stop_string_are_traced_to_their_end(traced: Traced) -> None:
    assert "decode" in await traced.spans(stream=True)
    cut = await traced.spans(stop=["am"])
    assert "polyadapt.engine.last_step" not in (cut["decode"].attributes or {})
    assert seconds(cut["decode"])[1] >= seconds(cut["decode"])[0] > 1e9, "by the edge's clock"


async def test_a_failure_marks_the_request_and_has_its_queue(traced: Traced) -> None:
    traced.engine.failure = (0, "numerical_error", "x")
    spans = await traced.spans()
    assert set(spans) == {"chat poet", "queue"}
    assert spans["chat poet"].status.is_ok is False
    assert seconds(spans["queue"]) == (100.0, 103.0)


async def test_who_is_not_sampled_has_no_spans_and_asks_the_engine_for_nothing(
    make_traced: Callable[..., Any],
) -> None:
    traced = await make_traced(0.0)
    reply = await traced.client.post("/v1/chat/completions", json=CHAT)
    assert reply.status_code == 200
    assert traced.finished == ()
    assert [request.traceparent for request in traced.engine.seen] == [None]
    not_sampled = {"traceparent": PARENT[:-2] + "00"}
    traced = await make_traced(1.0)
    await traced.client.post("/v1/chat/completions", json=CHAT, headers=not_sampled)
    assert traced.finished == ()


async def test_probes_and_what_is_not_found_make_no_names_of_spans(traced: Traced) -> None:
    for path in ("/health", "/ready", "/metrics", "/nowhere/a", "/nowhere/b"):
        await traced.client.get(path)
    assert [span.name for span in traced.finished] == ["GET unknown"] * 2


async def test_the_engine_tells_a_traced_requests_times(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model_dir = tiny_model("llama")
    config = EngineConfig(model=str(model_dir), device="cpu", dtype="float32", **SMALL)  # type: ignore[arg-type]
    adapter = put_blob(tmp_path, adapters.make_lora(model_dir, tmp_path / "a", 4), "a")
    engine = InProcessEngine(lambda wake: build_engine(config, model_dir, tmp_path, wake, name="m"))
    await engine.start()

    async def times(traceparent: str | None) -> list[Timeline | None]:
        request = Request(
            "r", (5, 6, 7), SamplingParams(3, ignore_eos=True), (AppliedAdapter(adapter),),
            traceparent=traceparent,
        )  # fmt: skip
        return [
            event.timeline
            async for event in engine.submit(request)
            if isinstance(event, Started | Finished)
        ]

    try:
        assert await times(None) == [None, None]
        await engine.unload_adapter(adapter.digest)
        begun, ended = await times(PARENT)
        assert begun is not None
        assert ended is not None
        ((digest, began, landed),) = ended.loads
        assert digest == adapter.digest
        assert ended.arrived <= began + 0.01  # two clocks, put beside each other
        assert began < landed <= ended.admitted + 0.01
        assert begun.admitted == ended.admitted < ended.first_token < ended.ended
        assert ended.ended - ended.arrived < 60
        assert ended.last_step - ended.first_step == 2, "three tokens are three steps"
        _, warm = await times(PARENT)
        assert warm is not None
        assert warm.loads == ()
    finally:
        await engine.stop()


async def test_spans_are_sent_to_an_otlp_receiver(make_server: Maker) -> None:
    with otlp_receiver() as received:
        tracing = open_tracing(received.url, 1.0)
        server = await make_server(TimedEngine(), tracing=tracing)
        await server.client.post("/v1/chat/completions", json={**CHAT, "model": "fake-base"})
        tracing.close()
    names = sorted(span.name for span in received.spans)
    assert names == ["adapter load", "chat fake-base", "decode", "prefill", "queue"]
    resource = received.messages[0].resource_spans[0].resource
    service = {item.key: item.value.string_value for item in resource.attributes}
    assert service["service.name"] == "polyadapt"
