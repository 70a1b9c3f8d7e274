"""The metrics of each engine of several: those that are listed, and the truth."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tests.support.fake_engine import FakeEngine

from polyadapt.api.fleet_metrics import FleetCollector
from polyadapt.api.meters import FLEET_METERS, METERS
from polyadapt.engine.fleet import EngineFleet
from polyadapt.types import Residency

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_every_engine_has_its_own_series_of_what_is_listed():
    one, two = FakeEngine(), FakeEngine(num_restarts=2)
    fleet = EngineFleet({"cuda:0": one, "cuda:1": two})
    await fleet.start()
    one.is_ready = False
    two.resident = {"a": Residency("a", "device"), "b": Residency("b", "host")}
    fleet.router.change_load("cuda:1", "a", 30)
    registry = CollectorRegistry()
    registry.register(FleetCollector(fleet))
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    assert {f.name: (f.type, f.documentation) for f in families} == {
        meter.name: (meter.kind, meter.text) for meter in FLEET_METERS.values()
    }
    assert not FLEET_METERS.keys() & METERS.keys()
    found = {
        (family.name.removeprefix("polyadapt_fleet_engine_"), sample.labels["engine"]): sample.value
        for family in families
        for sample in family.samples
        if sample.labels
    }
    assert {key: value for key, value in found.items() if key[1] == "cuda:0"} == {
        ("ready", "cuda:0"): 0,
        ("load_tokens", "cuda:0"): 0,
        ("running", "cuda:0"): 0,
        ("waiting", "cuda:0"): 2,
        ("resident_adapters", "cuda:0"): 0,
        ("restarts", "cuda:0"): 0,
    }
    assert found["ready", "cuda:1"] == 1
    assert found["load_tokens", "cuda:1"] == 30
    assert found["resident_adapters", "cuda:1"] == 1
    assert found["restarts", "cuda:1"] == 2
