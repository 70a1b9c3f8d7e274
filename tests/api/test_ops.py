"""Probes, metrics and the server's life."""

from __future__ import annotations

import asyncio
import io
import json
import re
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.api.conftest import Maker, Server, peft_files
from tests.support.fake_engine import FakeEngine

from polyadapt.api.internal import build_internal_app
from polyadapt.api.metrics import Metrics
from polyadapt.app import stop_engine
from polyadapt.tasks.directory import AdapterDirectory, UploadedFile
from polyadapt.types import Residency

pytestmark = pytest.mark.anyio

CHAT = {"model": "fake-base", "messages": [{"role": "user", "content": "hi"}]}


async def samples(server: Server) -> dict[tuple[str, str], float]:
    """Return every sample of /metrics by name and sorted labels."""
    reply = await server.client.get("/metrics")
    assert reply.status_code == 200
    found = {}
    for family in text_string_to_metric_families(reply.text):
        for sample in family.samples:
            found[sample.name, json.dumps(sample.labels, sort_keys=True)] = sample.value
    return found


async def lora_info(server: Server) -> tuple[dict[str, str], float]:
    """Return labels and value of the one series of vllm:lora_requests_info."""
    info = [(labels, value) for (name, labels), value in (await samples(server)).items()
            if name == "vllm:lora_requests_info"]  # fmt: skip
    assert len(info) == 1
    return json.loads(info[0][0]), info[0][1]


async def test_health_is_the_engines_progress(server: Server) -> None:
    assert (await server.client.get("/health")).status_code == 200
    server.engine.is_ready = False
    assert (await server.client.get("/health")).status_code == 200
    server.engine.is_alive = False
    reply = await server.client.get("/health")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_unavailable")


async def test_ready_is_whether_requests_are_taken(server: Server) -> None:
    reply = await server.client.get("/ready")
    assert reply.json() == {"status": "ready", "model": "fake-base"}
    server.engine.is_ready = False
    reply = await server.client.get("/ready")
    assert reply.status_code == 503
    assert int(reply.headers["retry-after"]) > 0
    chat = await server.client.post("/v1/chat/completions", json=CHAT)
    assert (chat.status_code, chat.json()["error"]["code"]) == (503, "engine_unavailable")
    assert int(chat.headers["retry-after"]) > 0


async def test_version_says_what_runs(server: Server) -> None:
    body = (await server.client.get("/version")).json()
    assert (body["model"], body["device"], body["strategy"]) == ("fake-base", "cpu", "fake")
    assert re.fullmatch(r"\d+\.\d+\.\d+", body["version"])


async def test_a_draining_server_finishes_what_runs_and_takes_nothing_new(server: Server) -> None:
    server.engine.gate = asyncio.Semaphore(1)
    running = asyncio.create_task(server.client.post("/v1/chat/completions", json=CHAT))
    while not server.engine.running:
        await asyncio.sleep(0.001)
    drain = asyncio.create_task(server.app.state.services.lifecycle.drain(30.0))
    await asyncio.sleep(0)
    reply = await server.client.get("/ready")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "unavailable")
    refused = await server.client.post("/v1/chat/completions", json=CHAT)
    assert refused.status_code == 503
    assert not drain.done()
    assert (await server.client.get("/health")).status_code == 200
    for _ in range(50):
        server.engine.gate.release()
    assert (await running).status_code == 200
    assert await drain is True


async def test_a_drain_ends_at_its_grace(server: Server) -> None:
    server.engine.gate = asyncio.Semaphore(0)
    running = asyncio.create_task(server.client.post("/v1/chat/completions", json=CHAT))
    while not server.engine.running:
        await asyncio.sleep(0.001)
    assert await server.app.state.services.lifecycle.drain(0.02) is False
    for _ in range(50):
        server.engine.gate.release()
    await running


async def test_a_leaving_server_is_not_ready_and_still_takes_work(server: Server) -> None:
    lifecycle = server.app.state.services.lifecycle
    now = 100.0
    lifecycle._clock = lambda: now
    notice = asyncio.create_task(lifecycle.give_notice(3600.0))
    await asyncio.sleep(0)
    assert (await server.client.get("/ready")).status_code == 503
    reply = await server.client.post("/v1/chat/completions", json=CHAT)
    assert (reply.status_code, reply.headers["connection"]) == (200, "close")
    now += 3599.0
    assert (await server.client.post("/v1/chat/completions", json=CHAT)).status_code == 200
    now += 1.0
    refused = await server.client.post("/v1/chat/completions", json=CHAT)
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) > 0
    await lifecycle.give_notice(3600.0)  # the first notice is the only one
    notice.cancel()


async def test_the_internal_port_drains_only_by_its_header(make_server: Maker) -> None:
    server = await make_server(drain_notice_s=0.0, api_key="sk-operator")
    services = server.app.state.services
    transport = httpx.ASGITransport(app=build_internal_app(services))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as internal:
        assert "polyadapt_ready 1.0" in (await internal.get("/metrics")).text
        refused = await internal.get("/drain")
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
        assert services.lifecycle.is_open
        assert (await internal.get("/drain", headers={"x-polyadapt-drain": "1"})).json() == {
            "status": "draining",
            "num_requests": 0,
        }
        assert services.lifecycle.is_draining
        assert "polyadapt_ready 0.0" in (await internal.get("/metrics")).text
        assert (await internal.get("/v1/models")).status_code == 404


async def test_the_engine_is_started_and_stopped_once(tmp_path: Path) -> None:
    from contextlib import AsyncExitStack

    engine = FakeEngine()
    async with AsyncExitStack() as stack:
        server = await Maker(tmp_path, stack)(engine)
        assert engine.is_ready
        await stop_engine(server.app.state.services)
    assert engine.num_stops == 1


async def test_requests_and_tokens_are_counted(server: Server) -> None:
    await server.client.post("/v1/chat/completions", json=CHAT)
    await server.client.get("/nowhere/at/all")
    found = await samples(server)
    assert found["polyadapt_generated_tokens_total", "{}"] == len("I am base 0.") + 1
    assert found["polyadapt_prompt_tokens_total", "{}"] == len("user\nhi\n") + 4 + 9
    assert found["polyadapt_time_to_first_token_seconds_count", "{}"] == 1
    routes = {json.loads(labels)["route"] for name, labels in found
              if name == "polyadapt_http_requests_total"}  # fmt: skip
    assert routes == {"/v1/chat/completions", "unknown"}


async def test_the_engines_counters_are_shown(server: Server) -> None:
    server.engine.num_restarts = 4
    found = await samples(server)
    assert found["polyadapt_engine_restarts_total", "{}"] == 4
    assert found["polyadapt_engine_events_total", '{"event": "preemptions"}'] == 3
    assert found["polyadapt_engine_steps_total", "{}"] == 7
    assert found["polyadapt_ready", "{}"] == 1
    assert found["polyadapt_kv_pages_used", "{}"] == 16
    assert found["polyadapt_kv_pages_cached", "{}"] == 8


async def test_what_routed_adapters_chose_is_shown_by_name(server: Server) -> None:
    body = await server.upload("mix", "1")
    server.engine.routing = {body["digest"]: (40.0, 0.75, 0.25), "sha256:gone": (1.0, 1.0)}
    found = await samples(server)
    assert found["polyadapt_adapter_routed_rows", '{"adapter": "mix"}'] == 40
    shares = {
        labels: value
        for (name, labels), value in found.items()
        if name == "polyadapt_adapter_expert_share"
    }
    assert shares == {
        '{"adapter": "mix", "expert": "0"}': 0.75,
        '{"adapter": "mix", "expert": "1"}': 0.25,
    }


async def test_failures_are_counted_by_code(server: Server) -> None:
    server.engine.failure = (1, "numerical_error", "x")
    await server.client.post("/v1/chat/completions", json=CHAT)
    found = await samples(server)
    assert found["polyadapt_failed_generations_total", '{"code": "numerical_error"}'] == 1


async def test_the_gateways_metrics_have_its_names(server: Server) -> None:
    found = await samples(server)
    assert found["vllm:num_requests_waiting", "{}"] == 2
    assert found["vllm:num_requests_running", "{}"] == 0
    assert found["vllm:kv_cache_usage_perc", "{}"] == 0.25
    config = '{"block_size": "16", "num_gpu_blocks": "64"}'
    assert found["vllm:cache_config_info", config] == 1


async def test_the_running_list_is_what_is_on_the_device(server: Server) -> None:
    for name, marker in (("poet", "1"), ("poet", "2"), ("chef", "3"), ("clerk", "4")):
        body = await server.upload(name, marker)
    server.engine.resident[body["digest"]] = Residency(body["digest"], "host", nbytes=1)
    labels, before = await lora_info(server)
    assert labels["running_lora_adapters"] == ""
    for model in ("poet@1", "poet", "chef"):
        await server.client.post("/v1/chat/completions", json={**CHAT, "model": model})
    labels, after = await lora_info(server)
    assert labels["running_lora_adapters"] == "chef,poet,poet@1"
    assert int(labels["max_lora"]) >= 3
    assert after > before
    assert (await lora_info(server)) == (labels, after)
    listed = (await server.client.get("/v1/adapters")).json()["data"]
    on_device = {item["name"] for item in listed if item["residency"]["tier"] == "device"}
    assert on_device == {"poet", "chef"}
    await server.client.delete("/v1/adapters/chef")
    labels, _ = await lora_info(server)
    assert labels["running_lora_adapters"] == "poet,poet@1"


async def test_an_old_version_on_the_device_is_not_what_its_name_stands_for(server: Server) -> None:
    digests = [(await server.upload("poet", marker))["digest"] for marker in "12"]
    await server.client.post("/v1/chat/completions", json={**CHAT, "model": "poet@1"})
    labels, _ = await lora_info(server)
    assert labels["running_lora_adapters"] == "poet@1"
    server.engine.routing = dict.fromkeys(digests, (40.0, 1.0))
    found = await samples(server)
    shown = {labels for name, labels in found if name == "polyadapt_adapter_routed_rows"}
    assert shown == {'{"adapter": "poet"}', '{"adapter": "poet@1"}'}
    await server.client.delete("/v1/adapters/poet@2")
    labels, _ = await lora_info(server)
    assert labels["running_lora_adapters"] == "poet"


async def test_a_name_that_two_tenants_have_is_shown_once(server: Server) -> None:
    directory: AdapterDirectory = server.app.state.services.directory
    digests = []
    for tenant, markers in (("a", "1"), ("b", "23")):  # a's newest is 1, b's is 2
        for marker in markers:
            named = peft_files(marker)
            files = [UploadedFile(name, io.BytesIO(content)) for _, (name, content) in named]
            record, _ = await directory.upload(tenant, "mix", files)
        digests.append(record.digest)
        server.engine.resident[record.digest] = Residency(record.digest, "device", nbytes=1)
    server.engine.routing = {digests[0]: (1.0, 1.0), digests[1]: (40.0, 0.75, 0.25)}
    found = await samples(server)
    routed = {of: value for of, value in found.items() if of[0] == "polyadapt_adapter_routed_rows"}
    assert routed == {("polyadapt_adapter_routed_rows", '{"adapter": "mix"}'): 40}
    labels, _ = await lora_info(server)
    assert labels["running_lora_adapters"] == "mix"


async def test_labels_hold_a_bounded_number_of_names(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = server.app.state.services
    directory: AdapterDirectory = services.directory
    names = {f"a{i:03d}" for i in range(300)}
    monkeypatch.setattr(directory, "names_of", lambda digests: names)
    labels, _ = await lora_info(server)
    assert len(labels["running_lora_adapters"].split(",")) == 256
    assert isinstance(services.metrics, Metrics)


async def test_odd_methods_make_no_new_label(server: Server) -> None:
    for i in range(5):
        await server.client.request(f"X{i}", "/health")
    methods = {json.loads(labels)["method"] for name, labels in await samples(server)
               if name == "polyadapt_http_requests_total"}  # fmt: skip
    assert methods == {"other"}
