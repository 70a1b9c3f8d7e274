"""Adapters that run are moved together in the arena, a part between two steps: nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from tests.oracle import adapters, tiny
from tests.support.engines import Driver, greedy_request, new_engine, put_blob

from polyadapt.adapters import pool as pool_module
from polyadapt.engine.output import Call
from polyadapt.types import AdapterId, Finished

RANKS = {"a": 4, "b": 4, "c": 4, "large": 7}
PART = 4 << 10  # bytes; far less than any of them


@pytest.fixture(scope="module")
def model_dir(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def stored(model_dir, tmp_path_factory) -> tuple[Path, dict[str, AdapterId], int]:
    """(blob root, identities, bytes of one component of all modules)."""
    root = tmp_path_factory.mktemp("adapters")
    made = {
        name: put_blob(
            root / "blobs", adapters.make_lora(model_dir, root / name, rank, seed=seed), name
        )
        for seed, (name, rank) in enumerate(RANKS.items())
    }
    engine = new_engine(model_dir, root / "blobs")
    try:
        Driver(engine).load(made["a"])
        return root / "blobs", made, engine.pool.nbytes_used // RANKS["a"]
    finally:
        engine.pool.close()


def test_a_running_adapter_is_moved_in_parts_and_answers_as_if_it_lay_still(
    model_dir, stored, monkeypatch
):
    monkeypatch.setattr(pool_module, "_MOVED_TOGETHER", PART)
    blobs, made, unit = stored
    prompts = [tiny.prompt_ids(12, seed=seed) for seed in range(3)]
    running = greedy_request("running", prompts[0], made["b"], 120)
    beside = greedy_request("beside", prompts[1], made["b"], 40)
    late = greedy_request("late", prompts[2], made["large"], 6)

    alone = new_engine(model_dir, blobs)
    expected = {r.id: Driver(alone).run(r)[r.id].tokens for r in (running, beside, late)}
    alone.pool.close()

    # a, b, c and room for two components behind them: 4 and 6 are free once a and c are gone.
    engine = new_engine(model_dir, blobs, max_adapter_bytes=14 * unit)
    driver = Driver(engine)
    driver.load(made["a"], made["b"], made["c"])
    driver.submit(running)
    for name in "ac":
        driver.call(Call(0, "unload", made[name].digest))
    driver.step()
    # No time for copies between two steps, so that only the least is moved.
    engine._patience_s = lambda: 0.0  # type: ignore[method-assign]
    driver.submit(late)
    moved = [0]
    while not driver.transcripts["late"].events:
        driver.step_or_wait()
        engine.check_integrity()
        moved.append(engine.counters["arena_moved_bytes"])
        if moved[-1] and "beside" not in driver.transcripts:
            driver.submit(beside)
    parts = [after - before for before, after in pairwise(moved)]
    largest = max(parts)
    assert sum(part > 0 for part in parts) > 4, "it was done at once"
    assert largest < 2 * unit, "more than a few cells were moved at once"
    assert moved[-1] == 4 * unit, "b has four components, and nothing moves twice"
    assert not isinstance(driver.transcripts["running"].last, Finished), "b was in use all along"
    assert engine.counters["arena_compactions"] == 1

    driver.run()
    found = {name: driver.transcripts[name].tokens for name in expected}
    assert found == expected
    engine.pool.close()
