"""Requests of kind embed: the mean of the final hidden states, whatever else a step computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.oracle import adapters, peft_oracle, tiny
from tests.support.engines import Driver, greedy_request, new_engine, put_blob

from polyadapt.engine.pooling import add_rows, mean_of
from polyadapt.types import (
    AdapterId,
    AppliedAdapter,
    Embedded,
    Failed,
    Finished,
    Request,
    SamplingParams,
    Started,
)

PAGE = 16


@pytest.fixture(scope="module")
def model_dir(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def blob_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blobs")


@pytest.fixture(scope="module")
def lora(
    model_dir: Path, blob_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, AdapterId]:
    directory = adapters.make_lora(model_dir, tmp_path_factory.mktemp("adapters") / "a", 4)
    return directory, put_blob(blob_root, directory, "a")


@pytest.fixture
def start(model_dir, blob_root):
    """A function that makes a driver over a new engine; its loader thread ends with the test."""
    made: list[Driver] = []

    def make(**settings) -> Driver:
        made.append(Driver(new_engine(model_dir, blob_root, **settings)))
        return made[-1]

    yield make
    for driver in made:
        driver.engine.pool.close()


def ids(number: int, length: int = 3 * PAGE + 5) -> list[int]:
    return tiny.prompt_ids(length, seed=number)


def embed_request(request_id: str, prompt_ids: list[int], *used: AppliedAdapter) -> Request:
    sampling = SamplingParams(max_tokens=0)
    return Request(request_id, tuple(prompt_ids), sampling, used, kind="embed")


def vector(driver: Driver, request_id: str) -> torch.Tensor:
    (found,) = [e for e in driver.transcripts[request_id].events if isinstance(e, Embedded)]
    return torch.tensor(found.vector, dtype=torch.float32)


def cached(driver: Driver, request_id: str) -> int:
    (started,) = [e for e in driver.transcripts[request_id].events if isinstance(e, Started)]
    return started.num_cached_tokens


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "qwen3"])
def test_an_embedding_is_the_mean_of_what_the_head_is_given(architecture, tiny_model, tmp_path):
    model_dir = tiny_model(architecture)
    driver = Driver(new_engine(model_dir, tmp_path, max_num_batched_tokens=32))
    lengths = (1, 2, PAGE, 40, 100)
    driver.run(*(embed_request(f"r{n}", ids(n, n)) for n in lengths))
    for n in lengths:
        peft_oracle.assert_matches(
            vector(driver, f"r{n}"), peft_oracle.mean_hidden(model_dir, None, ids(n, n))
        )
    driver.engine.pool.close()


def test_the_events_are_a_start_the_vector_and_the_end(start):
    driver = start()
    driver.run(embed_request("r", ids(0)))
    events = driver.transcripts["r"].events
    assert [type(event) for event in events] == [Started, Embedded, Finished]
    assert events[1].num_tokens == len(ids(0))
    counters = driver.engine.counters
    assert (counters["embedded_prompts"], counters["embedded_tokens"]) == (1, len(ids(0)))
    assert counters["generated_tokens"] == 0


def test_adapters_change_it_as_they_change_the_model(start, model_dir, lora):
    directory, identity = lora
    driver = start()
    driver.run(
        embed_request("with", ids(0), AppliedAdapter(identity)),
        embed_request("zero", ids(0), AppliedAdapter(identity, 0.0)),
        embed_request("base", ids(0)),
    )
    expected = peft_oracle.mean_hidden(model_dir, directory, ids(0))
    peft_oracle.assert_matches(vector(driver, "with"), expected)
    base = peft_oracle.mean_hidden(model_dir, None, ids(0))
    assert (base - expected).abs().max() > 0.01 * base.abs().max()
    for name in ("zero", "base"):
        peft_oracle.assert_matches(vector(driver, name), base)


def test_chunks_neighbours_and_preemption_change_nothing(start, model_dir, lora):
    _, identity = lora
    prompts = {f"e{n}": ids(n, n) for n in (1, 7, PAGE, 33, 90, 150)}
    expected = {n: peft_oracle.mean_hidden(model_dir, None, p) for n, p in prompts.items()}
    texts = [
        greedy_request(f"t{n}", ids(50 + n, 30), identity if n % 2 else None, 60) for n in range(4)
    ]
    embeds = [embed_request(name, prompt) for name, prompt in prompts.items()]
    pairs = zip(embeds, texts, strict=False)
    mixed = [request for pair in pairs for request in pair] + embeds[len(texts) :]
    # Pages for 208 tokens: the texts outgrow them.
    short = {"kv_cache_bytes": 13 * 3 * 2 * 2 * 16 * 4 * PAGE, "max_model_len": 200}
    short |= {"max_num_batched_tokens": 24, "max_num_seqs": 12}
    for settings in ({}, {"max_num_batched_tokens": 8, "max_num_seqs": 8}, short):
        driver = start(**settings)
        driver.run(*mixed)
        for name, vector_of in expected.items():
            peft_oracle.assert_matches(vector(driver, name), vector_of)
        assert (driver.engine.counters["preemptions"] > 0) == (settings is short)
        plain = start()
        for text in texts:
            assert driver.transcripts[text.id].tokens == plain.run(text)[text.id].tokens


def test_a_preempted_embedding_starts_over(start, model_dir):
    driver = start(max_num_batched_tokens=16, max_num_seqs=4)
    driver.submit(embed_request("r", ids(0)))
    driver.step()
    (sequence,) = driver.engine.scheduler.running
    assert 0 < sequence.num_computed < len(ids(0))
    driver.engine.scheduler._preempt(sequence)
    while driver.engine.has_work:
        driver.step()
    peft_oracle.assert_matches(
        vector(driver, "r"), peft_oracle.mean_hidden(model_dir, None, ids(0))
    )


def test_it_reads_no_cached_page_and_leaves_its_own_to_others(start, model_dir):
    driver = start()
    driver.run(greedy_request("text", ids(0), None, 2))
    driver.run(embed_request("embed", ids(0)))
    assert cached(driver, "embed") == 0
    peft_oracle.assert_matches(
        vector(driver, "embed"), peft_oracle.mean_hidden(model_dir, None, ids(0))
    )
    driver.run(embed_request("other", ids(1)))
    driver.run(greedy_request("after", ids(1), None, 2))
    assert cached(driver, "after") == 3 * PAGE
    assert driver.transcripts["after"].tokens == start().run(
        greedy_request("after", ids(1), None, 2)
    )["after"].tokens  # fmt: skip
    # What looks nothing up is no query that missed.
    assert driver.engine.counters["prefix_query_tokens"] == 2 * len(ids(0))


def test_a_prompt_may_fill_the_context(start):
    driver = start(max_model_len=64)
    driver.run(embed_request("r", ids(0, 64)))
    assert driver.transcripts["r"].last == Finished("r")


def test_exact_mode_gives_the_same_bits_in_every_batch(tiny_model, tmp_path):
    model_dir = tiny_model("qwen3")
    requests = [embed_request(f"e{n}", ids(n, n)) for n in (1, 5, 33, 64, 150)]
    texts = [greedy_request(f"t{n}", ids(n, 20), None, 9) for n in range(3)]
    alone: dict[str, tuple[float, ...]] = {}
    for settings in ({}, {"max_num_batched_tokens": 16}, {"max_num_seqs": 2}):
        driver = Driver(new_engine(model_dir, tmp_path, exact=True, **settings))
        if alone:
            driver.run(*texts, *requests)
        else:
            for request in requests:
                driver.run(request)
        for request in requests:
            (found,) = [e for e in driver.transcripts[request.id].events if type(e) is Embedded]
            assert alone.setdefault(request.id, found.vector) == found.vector, settings
        driver.engine.pool.close()


def test_hidden_states_that_are_not_finite_fail_their_request_alone(start):
    driver = start()
    inner = driver.engine.runner.run

    def poisoned(batch):
        results = inner(batch)
        start = 0
        for rows in batch:
            if rows.sequence.group.request.id == "bad":
                hidden = results.hidden.clone()
                hidden[start] = float("nan")
                results = replace(results, hidden=hidden)
            start += rows.num_tokens
        return results

    driver.engine.runner.run = poisoned
    driver.run(embed_request("bad", ids(0)), embed_request("good", ids(1)))
    last = driver.transcripts["bad"].last
    assert isinstance(last, Failed)
    assert last.code == "numerical_error"
    assert driver.transcripts["good"].last == Finished("good")
    driver.engine.runner.run = inner
    driver.run(greedy_request("next", ids(0), None, 2))
    assert cached(driver, "next") == 0, "what made them so may lie in its pages"


def test_a_step_that_fails_for_a_neighbour_pools_nothing_twice(start, model_dir, monkeypatch):
    driver = start(max_num_batched_tokens=16, max_num_seqs=4)
    run = driver.engine.runner.run

    def poisoned(batch):
        if any(rows.sequence.group.request.id == "bad" for rows in batch):
            raise RuntimeError("injected")
        return run(batch)

    monkeypatch.setattr(driver.engine.runner, "run", poisoned)
    driver.run(embed_request("good", ids(0)), greedy_request("bad", ids(1), None, 5))
    assert driver.engine.counters["isolated_steps"] > 0
    assert isinstance(driver.transcripts["bad"].last, Failed)
    peft_oracle.assert_matches(
        vector(driver, "good"), peft_oracle.mean_hidden(model_dir, None, ids(0))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_have_the_same_bits_wherever_chunks_end(dtype):
    rows = (torch.randn(700, 33) * 100).to(dtype)
    whole = add_rows(None, rows)
    for size in (1, 7, 256):
        total = None
        for start in range(0, len(rows), size):
            total = add_rows(total, rows[start : start + size])
        assert np.array_equal(total, whole)
    assert np.allclose(whole, rows.double().sum(0).numpy())
    mean = mean_of(whole, len(rows))
    assert mean is not None
    assert np.array_equal(np.array(mean, np.float32), (whole / 700).astype(np.float32))
    whole[3] = np.inf
    assert mean_of(whole, 700) is None
