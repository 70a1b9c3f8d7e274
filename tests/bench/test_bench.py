"""The benchmark measures what it says: counts, medians, validity, and adapters that PEFT reads."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from dataclasses import replace

import httpx
import pytest
import torch
from bench.loadgen import Load, run_load
from tests.oracle import peft_oracle, tiny

from bench import adapters, machine, overhead, overhead_edge, overhead_step, report, run, server

LOAD = Load(models=("base",), concurrency=2, num_requests=5, vocab_size=384, num_output_tokens=6)


def endpoint(seen: list[dict], *, num_missing: int = 0, status: int = 200) -> httpx.MockTransport:
    """A completions endpoint that streams as many tokens as were asked for, two per chunk."""

    def reply(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        seen.append(body)
        num_tokens = body["max_tokens"] - (num_missing if len(seen) > 2 else 0)
        chunks = [{"choices": [{"text": "ab"}]} for _ in range(num_tokens // 2)]
        chunks.append({"choices": [], "usage": {"completion_tokens": num_tokens}})
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        return httpx.Response(status, text="".join([*lines, "data: [DONE]\n\n"]))

    return httpx.MockTransport(reply)


def load_result(load: Load, transport: httpx.MockTransport):
    return asyncio.run(run_load("http://test", load, transport=transport))


def test_the_load_is_greedy_of_fixed_length_with_other_prompts_each_time():
    seen: list[dict] = []
    result = load_result(LOAD, endpoint(seen))
    warm, measured = seen[:2], seen[2:]
    assert [body["max_tokens"] for body in warm] == [8, 8]
    assert [body["max_tokens"] for body in measured] == [6] * 5
    assert all(body["temperature"] == 0 and body["ignore_eos"] for body in seen)
    assert len({tuple(body["prompt"]) for body in seen}) == 7
    assert {len(body["prompt"]) for body in seen} == {128}
    assert result.num_requests == 5
    assert result.errors == ()
    assert result.tokens_per_s == pytest.approx(5 * 6 / result.wall_s)


def test_every_worker_keeps_its_own_adapter():
    seen: list[dict] = []
    load = replace(LOAD, models=("a", "b", "c"), concurrency=3, num_requests=3)
    load_result(load, endpoint(seen))
    assert Counter(body["model"] for body in seen[:3]) == Counter("abc")


def test_a_slow_server_ends_the_load_in_time():
    seen: list[dict] = []
    result = load_result(replace(LOAD, stop_after_s=-1.0), endpoint(seen))
    assert len(seen) == LOAD.concurrency  # the warm-up only
    assert result.num_requests == 0


@pytest.mark.parametrize(
    ("fault", "message"),
    [({"num_missing": 2}, "4 output tokens instead of 6"), ({"status": 503}, "503: ")],
)
def test_short_answers_and_refusals_are_errors_and_never_throughput(fault, message):
    result = load_result(LOAD, endpoint([], **fault))
    assert result.tokens_per_s == 0
    assert message in result.errors[0]


def test_steps_are_read_from_the_events_and_never_overstated_from_a_histogram():
    events = (
        'polyadapt_engine_events_total{event="steps_with_0_adapters"} 3.0\n'
        'polyadapt_engine_events_total{event="steps_with_32_adapters"} 9.0\n'
        'polyadapt_engine_events_total{event="preemptions"} 7.0\n'
    )
    assert server.parse_steps(events) == {0: 3, 32: 9}
    histogram = "".join(
        f'polyadapt_step_distinct_adapters_bucket{{le="{le}"}} {count}\n'
        for le, count in [("0.0", 3), ("28.0", 4), ("32.0", 10), ("+Inf", 11)]
    )
    assert server.parse_steps(histogram + events) == {0: 3, 1: 1, 29: 6, 33: 1}
    assert server.parse_steps("") == {}


@pytest.mark.parametrize(
    ("steps", "median"), [({0: 1, 32: 9}, 32), ({1: 5, 32: 5}, 1), ({4: 1}, 4), ({}, 0)]
)
def test_the_median_of_distinct_adapters_is_the_lower_one(steps, median):
    assert run.median_of(Counter(steps)) == median


def test_synthetic_adapters_are_read_whole_by_peft_and_change_the_output(tiny_model, tmp_path):
    model_dir = tiny_model("llama")
    made = adapters.make_adapters(model_dir, tmp_path, 2, rank=4)
    ids = tiny.prompt_ids(20, 3)
    base = peft_oracle.logits(model_dir, None, ids)
    first, second = (peft_oracle.logits(model_dir, path, ids) for path in made.values())
    assert torch.isfinite(first).all()
    for a, b in [(base, first), (base, second), (first, second)]:
        with pytest.raises(AssertionError, match="logits differ by"):
            peft_oracle.assert_matches(a, b)


def test_own_work_is_not_counted_as_other_work():
    watch = machine.CpuWatch([os.getpid(), os.getpid()])
    before = machine.CpuWatch([])
    sum(i * i for i in range(3_000_000))
    ours, everyone = watch.other_cores(), before.other_cores()
    assert ours < everyone


def cell(
    num_adapters: int,
    tokens_per_s: float,
    *,
    run: int = 1,
    is_valid: bool = True,
    other: float = 0.0,
):
    result = load_result(LOAD, endpoint([]))
    return report.Cell(
        num_adapters=num_adapters,
        concurrency=32,
        run=run,
        result=replace(result, tokens_per_s=tokens_per_s),
        median_distinct_adapters=num_adapters,
        num_steps=100,
        is_valid=is_valid,
        other_cores=other,
    )


RESULT = {
    "started": "2026-01-01T00:00:00+00:00",
    "machine": {"cpu": "CPU", "num_cores": 2, "memory_gib": 8, "features": [], "system": "x"},
    "method": dict.fromkeys(
        ["model", "dtype", "threads", "prompt_tokens", "output_tokens", "adapters", "order"], "x"
    ),
    "peer_versions": {},
}


def test_the_table_compares_means_of_both_runs_and_leaves_invalid_cells_out():
    ours = [
        cell(0, 100.0),
        cell(0, 200.0, run=2),
        cell(32, 60.0),
        cell(32, 999.0, run=2, is_valid=False),
    ]
    peers = [
        report.PeerCell("generate", 32, 0, 300.0, 1.0, 0.0),
        report.PeerCell("mixed", 32, 32, 10.0, 1.0, 0.0),
    ]
    page = report.render(RESULT, ours, peers)
    assert "32 distinct adapters to our base, 32 streams | >= 0.4 | 0.40 | reached" in page
    assert "PEFT's mixed batch | >= 5.0 | 6.00 | reached" in page
    assert "transformers' generate, 32 streams | >= 1.0 | 0.50 | missed" in page
    assert "INVALID: not mixed" in page
    assert "doubtful" not in page


def test_figures_of_a_busy_machine_are_called_doubtful():
    peers = [report.PeerCell("generate", 32, 0, 300.0, 1.0, 0.0)]
    page = report.render(RESULT, [cell(0, 400.0, other=0.3)], peers)
    assert "1.33 | reached, doubtful" in page
    assert "0.30!" in page


def test_a_ratio_without_both_sides_is_not_measured():
    page = report.render(RESULT, [cell(0, 100.0)], [])
    assert page.count("not measured") == 3


def test_the_overhead_of_a_step_is_measured_with_an_adapter_per_row():
    timings = overhead_step.measure_step(3, 2)
    phases = [timing.phase for timing in timings]
    assert phases[:3] == ["schedule", "prepare", "schedule + prepare"]
    assert {"advance", "encode", "sample, greedy"} < set(phases)
    assert all(0 < timing.median_us <= timing.p99_us for timing in timings)


def test_the_overhead_of_a_token_is_measured_over_streams_that_say_the_right_text(smollm2_dir):
    costs = overhead_edge.measure_edge(smollm2_dir, 2, 30)
    assert [cost.num_tokens for cost in costs] == [60, 60]
    assert all(cost.edge_us > 0 for cost in costs)
    page = overhead.render([overhead_step.Timing("schedule + prepare", 512.0, 800.0)], costs, 0.1)
    assert "| schedule + prepare | 512 | 800 | 2.00 | 1000 |" in page
