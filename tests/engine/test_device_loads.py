"""An engine whose adapters are copied to an asynchronous device beside its steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.engines import Driver, greedy_request, new_engine, put_blob
from tests.support.fake_streams import FakeDevice
from tests.support.family_samples import make_sample

from polyadapt.adapters import transfers as transfers_module
from polyadapt.adapters.pool import AdapterPool
from polyadapt.engine import build as build_module
from polyadapt.types import AdapterId


@pytest.fixture(scope="module")
def model_dir(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def stored(model_dir, tmp_path_factory) -> tuple[Path, dict[str, AdapterId]]:
    root = tmp_path_factory.mktemp("device-loads")
    return root / "blobs", {
        name: put_blob(root / "blobs", make_sample(name, model_dir, root / name), name)
        for name in ("lora", "ia3", "oft")
    }


def on_device(monkeypatch: pytest.MonkeyPatch, device: FakeDevice) -> None:
    """Have the next engine's adapters copied by the device's streams; its steps are the host's."""

    def new_pool(**options: Any) -> AdapterPool:
        return AdapterPool(**(options | {"device": device}))

    monkeypatch.setattr(build_module, "AdapterPool", new_pool)


def test_streams_go_on_while_adapters_come_in_parts_and_all_are_answered_alike(
    model_dir, stored, monkeypatch
):
    blobs, made = stored
    base = greedy_request("base", [3, 5, 7], None, 150)
    others = [greedy_request(name, [5, 8, 17, 30], made[name], 6) for name in made]
    plain = Driver(new_engine(model_dir, blobs))
    expected = {r.id: plain.run(r)[r.id].tokens for r in (base, *others)}
    plain.engine.pool.close()

    device = FakeDevice()
    on_device(monkeypatch, device)
    monkeypatch.setattr(transfers_module, "_UNDER_WAY_NBYTES", 2000)
    engine = new_engine(model_dir, blobs, host_adapter_bytes=1 << 20)
    driver = Driver(engine)
    driver.submit(base)
    driver.step()
    driver.submit(*others)
    for _ in range(2000):
        if not engine.has_work:
            break
        num_waits, is_serving = device.num_waits, bool(engine.scheduler.running)
        driver.step()
        assert not is_serving or device.num_waits == num_waits, "a step waited for a copy"
        assert not is_serving or driver.rows_per_step[-1], "and nobody stood still"
        for choice in range(4):
            device.run_one(choice)
        engine.check_integrity()
    assert not engine.has_work, "still busy"
    assert {name: t.tokens for name, t in driver.transcripts.items()} == expected
    assert engine.counters["adapter_loads_overlapped"] == len(made)
    assert engine.counters["adapter_loads_waited"] == 0
    engine.pool.close()
    device.run_all()


def test_where_nobody_is_served_a_cold_adapter_is_waited_for(model_dir, stored, monkeypatch):
    blobs, made = stored
    device = FakeDevice()
    on_device(monkeypatch, device)
    driver = Driver(new_engine(model_dir, blobs, host_adapter_bytes=1 << 20))
    driver.run(greedy_request("cold", [5, 8, 17], made["lora"], 4))
    assert driver.engine.counters["adapter_loads_waited"] == 1
    driver.engine.pool.close()
