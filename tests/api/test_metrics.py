"""What a scrape shows: its list is complete, its values are those of what was served."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.api.conftest import Maker, Server
from tests.support.fake_engine import FakeEngine, make_info

from polyadapt.api.meters import METERS, SECTIONS
from polyadapt.api.metrics import Metrics, num_fitting
from polyadapt.api.watch import GenerationWatch
from polyadapt.distribution import LOAD_SECONDS, Distribution
from polyadapt.errors import NumericalError
from polyadapt.tasks.sequence_text import TextDelta
from polyadapt.tasks.text import Accepted, Completed, Queued
from polyadapt.types import AdapterId, EngineStats, Residency, ServedAdapter

pytestmark = pytest.mark.anyio

CHAT = {"model": "fake-base", "messages": [{"role": "user", "content": "hi"}]}


async def scrape(server: Server) -> dict[str, float]:
    """Return every sample by its name with its labels."""
    reply = await server.client.get("/metrics")
    assert reply.status_code == 200
    found = {}
    for family in text_string_to_metric_families(reply.text):
        for sample in family.samples:
            labels = json.dumps(sample.labels, sort_keys=True) if sample.labels else ""
            found[sample.name + labels] = sample.value
    return found


def metrics_of(server: Server) -> Metrics:
    found = server.app.state.services.metrics
    assert isinstance(found, Metrics)
    return found


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Lease:
    """As much of a lease as an Accepted event needs."""


def accepted(num_tokens: int) -> Accepted:
    return Accepted(Lease(), (tuple(range(num_tokens)),), (None,))  # type: ignore[arg-type]


def served(name: str, tier: str = "device", *, is_mandatory: bool = False) -> ServedAdapter:
    adapter = AdapterId(name, 1, f"sha256:{name}")
    return ServedAdapter(adapter, tier, 1.0, is_mandatory=is_mandatory)  # type: ignore[arg-type]


async def test_a_scrape_shows_what_is_on_the_list_and_nothing_else(server: Server) -> None:
    await server.upload("poet")
    for model in ("poet", "auto"):
        await server.client.post("/v1/chat/completions", json={**CHAT, "model": model})
    text = (await server.client.get("/metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    shown = {name for name in families if not name.endswith("_created")}
    assert shown == set(METERS)
    kinds = {"counter": "counter", "gauge": "gauge", "histogram": "histogram"}
    for name, meter in METERS.items():
        family = families[name]
        assert (family.type, family.documentation) == (kinds[meter.kind], meter.text)
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(meter.labels), sample
    assert sum(map(len, SECTIONS.values())) == len(METERS), "a metric is listed twice"


async def test_the_times_of_a_generation_are_those_that_its_caller_saw(server: Server) -> None:
    clock, metrics = Clock(), metrics_of(server)
    watch = GenerationWatch(metrics, clock=clock)
    with watch as see:
        clock.now += 0.2
        see(accepted(7))
        clock.now += 0.3
        see(Queued((served("poet", "store"), served("mark", is_mandatory=True))))
        clock.now += 0.5
        see(TextDelta(0, "a", (1,)))
        clock.now += 0.02
        see(TextDelta(0, "bcd", (2, 3)))  # two tokens at once share the time
        clock.now += 0.03
        see(TextDelta(1, "x", (4,)))  # another sequence's first: no gap
        clock.now += 0.05
        see(TextDelta(0, "", (), finish_reason="stop"))
        see(Completed(7, 4, 3))
    found = await scrape(server)
    assert found["polyadapt_queue_seconds_sum"] == pytest.approx(0.3)
    assert found["polyadapt_time_to_first_token_seconds_sum"] == pytest.approx(1.0)
    assert found["polyadapt_time_to_first_token_seconds_count"] == 1
    assert found["polyadapt_inter_token_seconds_count"] == 2
    assert found["polyadapt_inter_token_seconds_sum"] == pytest.approx(0.02)
    assert found['polyadapt_inter_token_seconds_bucket{"le": "0.01"}'] == 2
    assert found['polyadapt_inter_token_seconds_bucket{"le": "0.0075"}'] == 0
    assert found["polyadapt_generation_seconds_sum"] == pytest.approx(1.1)
    assert found["polyadapt_prompt_tokens_total"] == 7
    assert found["polyadapt_generated_tokens_total"] == 4
    assert found['polyadapt_adapter_uses_total{"tier": "store"}'] == 1
    assert found['polyadapt_adapter_uses_total{"tier": "device"}'] == 1
    assert found['polyadapt_adapter_requests_total{"adapter": "poet"}'] == 1
    assert found['polyadapt_adapter_generated_tokens_total{"adapter": "mark"}'] == 4
    assert found["polyadapt_mandatory_generations_total"] == 1
    assert found["polyadapt_mandatory_tokens_total"] == 4
    assert watch.num_cached_tokens == 3


async def test_a_failed_generation_has_no_duration_and_a_sample_is_counted_by_its_run(
    server: Server,
) -> None:
    for is_sample in (False, True):
        watch = GenerationWatch(metrics_of(server), is_sample=is_sample)
        watch.__enter__()(accepted(2))
        watch.__exit__(NumericalError, NumericalError("no"), None)
    found = await scrape(server)
    assert found['polyadapt_failed_generations_total{"code": "numerical_error"}'] == 1
    assert found["polyadapt_generation_seconds_count"] == 0


async def test_real_requests_are_watched(server: Server) -> None:
    await server.upload("poet")
    for body in (CHAT, {**CHAT, "model": "poet"}, {**CHAT, "model": "poet", "stream": True}):
        await server.client.post("/v1/chat/completions", json=body)
    found = await scrape(server)
    assert found["polyadapt_generation_seconds_count"] == 3
    assert found["polyadapt_queue_seconds_count"] == 3
    assert found['polyadapt_adapter_requests_total{"adapter": "poet"}'] == 2
    per_answer = len("I am poet 0.") + 1
    tokens = found['polyadapt_adapter_generated_tokens_total{"adapter": "poet"}']
    assert tokens == 2 * per_answer
    assert found["polyadapt_inter_token_seconds_count"] >= 2 * (per_answer - 1)


async def test_residency_is_shown_by_tier(server: Server) -> None:
    for name, tier, nbytes in (("a", "device", 10), ("b", "device", 20), ("c", "host", 5)):
        digest = f"sha256:{name}"
        server.engine.resident[digest] = Residency(
            digest, tier, nbytes=nbytes, is_pinned=name == "a", num_leases=int(name == "b")
        )  # type: ignore[arg-type]
    found = await scrape(server)
    assert found['polyadapt_adapters{"tier": "device"}'] == 2
    assert found['polyadapt_adapters{"tier": "host"}'] == 1
    assert found['polyadapt_adapters{"tier": "store"}'] == 0
    assert found['polyadapt_adapter_tier_bytes{"tier": "device"}'] == 30
    assert found["polyadapt_adapters_pinned"] == 1
    assert found["polyadapt_adapters_leased"] == 1


async def test_the_engines_histograms_are_cumulative(make_server: Maker) -> None:
    taken = Distribution(LOAD_SECONDS)
    taken.observe(0.003)
    taken.observe(0.2)
    stats = EngineStats(
        num_steps=6,
        counters={"rows": 40, "adapter_evictions": 5, "host_evictions": 2, "padded_rows": 3},
        steps_by_rows={1: 4, 4: 1, 5: 1},  # four of 1 row, one of 8 to 15, one of 16 to 31
        load_seconds={"read": taken.snapshot()},
    )
    engine = FakeEngine()
    engine.stats = lambda: stats  # type: ignore[method-assign]
    found = await scrape(await make_server(engine))
    assert found['polyadapt_step_rows_bucket{"le": "1.0"}'] == 4
    assert found['polyadapt_step_rows_bucket{"le": "7.0"}'] == 4
    assert found['polyadapt_step_rows_bucket{"le": "15.0"}'] == 5
    assert found['polyadapt_step_rows_bucket{"le": "+Inf"}'] == 6
    assert found["polyadapt_step_rows_sum"] == found["polyadapt_rows_total"] == 40
    assert found["polyadapt_padded_rows_total"] == 3
    stage = 'polyadapt_adapter_load_seconds_bucket{"le": "%s", "stage": "read"}'
    assert [found[stage % bound] for bound in ("0.0025", "0.005", "0.25", "+Inf")] == [0, 1, 2, 2]
    assert found['polyadapt_adapter_load_seconds_sum{"stage": "read"}'] == pytest.approx(0.203)
    assert found['polyadapt_adapter_evictions_total{"tier": "device"}'] == 5
    assert found['polyadapt_adapter_evictions_total{"tier": "host"}'] == 2


def on_device(*sizes: int) -> list[Residency]:
    return [Residency(f"sha256:{i}", "device", nbytes=size) for i, size in enumerate(sizes)]


async def test_how_many_adapters_fit_is_those_there_and_how_many_of_median_size_still_do() -> None:
    info = replace(make_info(), adapter_bytes=1000)
    there = on_device(10, 10, 400)
    assert num_fitting(there, 420, info) == 3 + 58
    assert num_fitting(there, 1000, info) == 3
    assert num_fitting(there, 995, info) == 3
    # What is under way takes bytes and is not there yet.
    assert num_fitting([*there, Residency("x", "host", nbytes=500)], 920, info) == 3 + 8
    assert num_fitting([Residency("x", "host", nbytes=250)], 0, info) == 4
    assert num_fitting([], 0, info) == info.max_num_seqs
    assert num_fitting(there, 420, replace(info, max_adapters=5)) == 5


async def test_prometheus_own_tool_finds_nothing_to_complain_of(server: Server) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian and Ubuntu: apt install prometheus)")
    await server.upload("poet")
    await server.client.post("/v1/chat/completions", json={**CHAT, "model": "poet"})
    text = (await server.client.get("/metrics")).text
    done = await asyncio.to_thread(
        subprocess.run, [promtool, "check", "metrics"], input=text, capture_output=True,
        text=True, timeout=30, check=False,
    )  # fmt: skip
    # The gateway's protocol gives names that break the tool's rules; ours may not.
    complaints = [
        line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("vllm:")
    ]
    assert not complaints
    assert done.returncode in (0, 3), done.stderr


async def test_recording_a_token_and_a_scrape_take_little_time(server: Server) -> None:
    """Bounds ten times above what was measured; docs/observability.md gives the figures."""
    metrics = metrics_of(server)
    delta = TextDelta(0, "a", (1,))
    with GenerationWatch(metrics) as see:
        see(delta)
        began = time.thread_time()
        for _ in range(10_000):
            see(delta)
        per_token = (time.thread_time() - began) / 10_000
    assert per_token < 20e-6
    for i in range(2000):
        digest = f"sha256:{i:064d}"
        server.engine.resident[digest] = Residency(digest, "device", nbytes=i)
        server.app.state.services.directory._live[digest] = {AdapterId(f"a{i}", 1, digest)}
    began = time.thread_time()
    metrics.render()
    assert time.thread_time() - began < 0.5
