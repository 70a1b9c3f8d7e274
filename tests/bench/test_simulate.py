"""The simulated fleet: every request counted once, and what the router is for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from bench.simulate import Service, Setup, draw, simulate

SERVICE = Service(step_s=0.01, row_s=0.0005, prompt_token_s=0.0001, load_s=0.1)
SETUP = Setup(
    num_adapters=500, num_engines=10, num_slots=40, num_rows=8, zipf=1.0, rate=120.0,
    num_requests=4000, num_prompt=20, num_output=20, num_warm=1000, least_bound=80,
)  # fmt: skip


def test_the_same_setup_gives_the_same_outcome_and_counts_every_request():
    outcome = simulate(SETUP, SERVICE)
    assert outcome == simulate(SETUP, SERVICE)
    assert sum(outcome.loads) == pytest.approx(SETUP.num_engines)
    assert sum(n for _, n in outcome.cold_over_time) >= 0
    assert 0 < outcome.hit_rate < 1
    assert outcome != simulate(replace(SETUP, seed=1), SERVICE)


def test_a_single_request_takes_its_load_its_prompt_and_its_steps():
    alone = replace(SETUP, num_requests=1, num_warm=0, num_engines=1)
    outcome = simulate(alone, SERVICE)
    assert outcome.latencies[0] == pytest.approx(0.1 + 20 * 0.0001 + 20 * 0.01)
    assert (outcome.cold_starts, outcome.hit_rate, outcome.copies) == (1, 0.0, 1.0)


def test_homes_find_more_adapters_than_chance_and_are_more_even_than_a_bare_hash():
    home, two, bare = (
        simulate(replace(SETUP, policy=policy), SERVICE) for policy in ("home", "two", "hash")
    )
    assert home.hit_rate > two.hit_rate + 0.1
    assert home.copies < two.copies / 1.4
    assert home.busiest_share < bare.busiest_share / 1.3
    assert home.latencies[2] < bare.latencies[2]


def test_a_hot_adapter_is_spread_over_many_engines():
    hot = simulate(replace(SETUP, zipf=3.0, rate=200.0), SERVICE)
    assert hot.busiest_share < 2.0
    assert hot.hit_rate > 0.95


def test_nothing_is_evicted_while_everything_fits():
    roomy = simulate(replace(SETUP, num_adapters=30, num_requests=6000, num_warm=3000), SERVICE)
    assert roomy.hit_rate > 0.99


def test_lost_engines_are_made_good_by_the_others():
    lossy = simulate(replace(SETUP, lose=0.2), SERVICE)
    whole = simulate(SETUP, SERVICE)
    assert len(lossy.loads) == 8
    assert lossy.cold_starts > whole.cold_starts


def test_the_plots_are_drawn(tmp_path):
    def figures(scale: float):
        return {
            "hit_rate": 0.5 * scale,
            "loads": [scale * i / 50 for i in range(100)],
            "cold_over_time": [(t, 0.1 * scale) for t in range(5)],
        }

    runs = {f"{p} zipf {z}": figures(0.5) for p in ("home", "hash", "two") for z in (0.8, 1.0, 1.2)}
    runs["home zipf 1.0, a tenth of the engines lost"] = figures(0.7)
    draw({"runs": runs}, tmp_path)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == ["simulation-cold.svg", "simulation-hits.svg", "simulation-load.svg"]
    assert all(path.read_text().startswith("<svg") for path in tmp_path.iterdir())
