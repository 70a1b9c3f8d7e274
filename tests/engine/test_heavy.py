"""Adapters that hold dense matrices are limited in a step; the others go on beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.engines import Driver, LogitsRecorder, greedy_request, new_engine, put_blob
from tests.support.family_samples import make_sample

from polyadapt.types import AdapterId

HEAVY = ("c3a", "fourierft", "shira")
LIGHT = ("lora", "ia3", "oft", "lora-norms")


@pytest.fixture(scope="module")
def model_dir(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def stored(model_dir, tmp_path_factory) -> tuple[Path, dict[str, AdapterId]]:
    root = tmp_path_factory.mktemp("heavy")
    return root / "blobs", {
        name: put_blob(root / "blobs", make_sample(name, model_dir, root / name), name)
        for name in (*HEAVY, *LIGHT)
    }


@pytest.mark.parametrize(("limit", "num_together"), [(1, 5), (2, 6), (3, 7)])
def test_so_many_heavy_adapters_share_a_step_and_all_are_answered(
    model_dir, stored, limit, num_together
):
    blobs, made = stored
    requests = [
        greedy_request(name, [5, 8, 17, 30], identity, 4) for name, identity in made.items()
    ]
    engine = new_engine(model_dir, blobs, max_heavy_adapters=limit)
    recorder, driver = LogitsRecorder(engine), Driver(engine)
    driver.load(*made.values())
    tokens = {name: t.tokens for name, t in driver.run(*requests).items()}
    assert max(recorder.adapters_per_step) == num_together
    assert engine.counters["heavy_waits"] == len(HEAVY) - limit
    assert engine.stats().counters["heavy_waits"] == len(HEAVY) - limit
    engine.pool.close()

    alone = new_engine(model_dir, blobs)
    driver = Driver(alone)
    assert tokens == {r.id: driver.run(r)[r.id].tokens for r in requests}
    alone.pool.close()


def test_whoever_waits_for_heavy_ones_takes_no_lease_and_nothing_is_told_of_it(model_dir, stored):
    blobs, made = stored
    driver = Driver(new_engine(model_dir, blobs, max_heavy_adapters=1))
    first, second = HEAVY[:2]
    driver.load(made[first], made[second])
    driver.submit(greedy_request("first", [5, 8, 17], made[first], 12))
    driver.submit(greedy_request("second", [5, 8, 17], made[second], 2))
    for _ in range(3):
        driver.step()
    driver.residencies.clear()
    for _ in range(5):
        driver.step()
    assert driver.engine.counters["heavy_waits"] == 1
    assert made[second].digest not in driver.residencies
    driver.run()
    assert driver.transcripts["second"].tokens
    driver.engine.pool.close()
