"""The scrape as the Gateway API Inference Extension's endpoint picker reads it, under churn.

The reader here is written from the model server protocol's text (kubernetes-sigs/
gateway-api-inference-extension, docs/proposals/003-model-server-protocol) and shares no code with
the server. What it believes is held against what replies say of where their adapter was found.
"""

from __future__ import annotations

import random
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.api.conftest import Maker, Server
from tests.oracle import adapters
from tests.support.fake_engine import BASE_DIGEST

from polyadapt.config import EngineConfig
from polyadapt.engine.build import build_engine
from polyadapt.engine.engine import Engine
from polyadapt.engine.in_process import InProcessEngine

pytestmark = pytest.mark.anyio

NAMES = [f"a{i}" for i in range(8)]
_SERIES = re.compile(r"^vllm:lora_requests_info\{(.*)\} (\S+)$")
_LABEL = re.compile(r'([a-z_]+)="((?:[^"\\]|\\.)*)"')


@dataclass
class Endpoint:
    """One server as the picker knows it."""

    max_lora: int
    running: set[str]
    waiting: set[str]
    updated: float


def read(text: str) -> Endpoint:
    """The picker's extractor: of all series the one with the largest value."""
    series = [match for line in text.splitlines() if (match := _SERIES.match(line))]
    assert len(series) == 1, "the protocol allows several; this server promises one"
    newest = max(series, key=lambda match: float(match.group(2)))
    labels = dict(_LABEL.findall(newest.group(1)))
    assert set(labels) == {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}
    listed = {
        name: {part for part in labels[name].split(",") if part}
        for name in ("running_lora_adapters", "waiting_lora_adapters")
    }
    return Endpoint(
        int(labels["max_lora"]),
        listed["running_lora_adapters"],
        listed["waiting_lora_adapters"],
        float(newest.group(2)),
    )


def score(endpoint: Endpoint, adapter: str) -> float:
    """The picker's affinity scorer."""
    if adapter in endpoint.running:
        return 1.0
    if len(endpoint.running) + len(endpoint.waiting) < endpoint.max_lora:
        return 0.8
    return 0.6 if adapter in endpoint.waiting else 0.0


@pytest.fixture
async def crowded(
    make_server: Maker, tiny_model: Callable[[str], Path], tmp_path: Path
) -> AsyncIterator[Server]:
    """A server with eight adapters and room on the device for three."""
    model_dir = tiny_model("llama")
    sources = [
        adapters.make_lora(model_dir, tmp_path / name, 4, seed=i) for i, name in enumerate(NAMES)
    ]
    weights = load_file(sources[0] / "adapter_model.safetensors")
    nbytes = sum(4 * tensor.numel() for tensor in weights.values())  # float32 on the device
    config = EngineConfig(
        model=str(model_dir), device="cpu", dtype="float32", num_threads=1, max_num_seqs=4,
        kv_cache_bytes=8 << 20, max_adapter_bytes=int(3.5 * nbytes),
    )  # fmt: skip
    blobs = make_server.root / "home0" / "store"

    def build(wake: Callable[[], None]) -> Engine:
        engine = build_engine(config, model_dir, blobs, wake, name="fake-base")
        # The validator of these tests says that uploads are for this one.
        engine.info = replace(engine.info, base=replace(engine.info.base, digest=BASE_DIGEST))
        return engine

    server = await make_server(InProcessEngine(build))  # type: ignore[arg-type]
    for name, source in zip(NAMES, sources, strict=True):
        files = [("files", (file.name, file.read_bytes())) for file in sorted(source.iterdir())]
        reply = await server.client.post("/v1/adapters", data={"name": name}, files=files)
        assert reply.status_code == 201, reply.text
    return server


async def scrape(server: Server) -> Endpoint:
    return read((await server.client.get("/metrics")).text)


async def ask(server: Server, model: str) -> str:
    """Return where the reply says that its adapter was found."""
    body = {"model": model, "prompt": [5, 6, 7], "max_tokens": 2, "ignore_eos": True}
    reply = await server.client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    (adapter,) = reply.json()["adapters"]
    return str(adapter["tier"])


async def test_what_the_picker_believes_is_where_adapters_are_found(crowded: Server) -> None:
    draw = random.Random(7)
    tiers = []
    latest = 0.0
    for _ in range(60):
        endpoint = await scrape(crowded)
        assert endpoint.updated >= latest
        latest = endpoint.updated
        assert len(endpoint.running) <= 3
        assert endpoint.max_lora == 3 or not endpoint.running
        name = draw.choice(NAMES)
        tier = await ask(crowded, name)
        assert (tier == "device") == (score(endpoint, name) == 1.0), (name, tier, endpoint)
        tiers.append(tier)
        assert name in (await scrape(crowded)).running
    assert {"device", "store"} <= set(tiers), "nothing was evicted, or nothing found again"
    listed = (await crowded.client.get("/v1/adapters")).json()["data"]
    there = {item["name"] for item in listed if item["residency"]["tier"] == "device"}
    assert there == (await scrape(crowded)).running


async def test_a_full_server_scores_nothing_for_an_adapter_that_is_elsewhere(
    crowded: Server,
) -> None:
    empty = await scrape(crowded)
    assert score(empty, "a0") == 0.8
    for name in NAMES[:3]:
        await ask(crowded, name)
    full = await scrape(crowded)
    assert [score(full, name) for name in NAMES[:4]] == [1.0, 1.0, 1.0, 0.0]
    await crowded.client.post("/v1/adapters/a0/unload")
    freed = await scrape(crowded)
    assert (score(freed, "a0"), score(freed, "a3")) == (0.8, 0.8)
    assert freed.max_lora == 3


async def test_the_counters_agree_with_what_was_loaded(crowded: Server) -> None:
    for name in (*NAMES[:4], "a0"):
        await ask(crowded, name)
    text = (await crowded.client.get("/metrics")).text

    def value(sample: str) -> float:
        (line,) = [line for line in text.splitlines() if line.startswith(f"{sample} ")]
        return float(line.rpartition(" ")[2])

    assert value('polyadapt_adapter_uses_total{tier="device"}') == 0
    assert value("polyadapt_adapter_loads_total") == 5
    assert value('polyadapt_adapter_evictions_total{tier="device"}') == 2
    for stage, count in (
        ("copy", 5),
        ("read", 9),
        ("pack", 8),
    ):  # a0 is read twice, the second time packed
        sample = f'polyadapt_adapter_load_seconds_count{{stage="{stage}"}}'
        assert value(sample) == count, stage
    assert value("polyadapt_step_rows_sum") == value("polyadapt_rows_total")
    assert value("polyadapt_step_rows_count") == value("polyadapt_engine_steps_total") > 0
