"""Speculation on a tiny model: the same answers in fewer steps, whatever ends or disturbs them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.oracle import adapters, tiny
from tests.support.engines import Driver, Transcript, greedy_request, new_engine, put_blob

from polyadapt.types import AdapterId, Failed, Finished, Request, TokenLogprob, Tokens

K = 8
PAGE_BYTES = 2 * 2 * 2 * 16 * 4 * 16  # layers, k and v, kv heads, dim, float32, tokens a page


@pytest.fixture(scope="module")
def model_dir(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def blob_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blobs")


@pytest.fixture(scope="module")
def identities(
    model_dir: Path, blob_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[AdapterId]:
    root = tmp_path_factory.mktemp("adapters")
    return [
        put_blob(blob_root, adapters.make_lora(model_dir, root / f"a{i}", 4, seed=i), f"a{i}")
        for i in range(3)
    ]


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


def repetitive(number: int) -> list[int]:
    return tiny.prompt_ids(5, seed=number) * 5


def guessing(request: Request) -> Request:
    return replace(request, speculative_tokens=K)


def cycling(request: Request, num_tokens: int = 4) -> Request:
    """The request with a bias that keeps its text to a few tokens, so that guesses often hit."""
    bias = tuple((token_id, 60.0) for token_id in tiny.prompt_ids(num_tokens, seed=99))
    return replace(request, sampling=replace(request.sampling, logit_bias=bias))


def logprobs(transcript: Transcript) -> list[TokenLogprob]:
    events = [event for event in transcript.events if isinstance(event, Tokens)]
    return list(itertools.chain.from_iterable(event.logprobs for event in events))


def accepted(driver: Driver) -> int:
    return driver.engine.counters["spec_accepted_tokens"]


def test_answers_are_the_same_with_and_without_in_one_mixed_batch(start, identities):
    """Greedy and seeded sampling, base and adapters, every field that looks at the text so far."""
    options = [
        {},
        {"temperature": 0.8, "seed": 5},
        {"temperature": 0.3, "seed": 6, "top_p": 0.9},
        {"temperature": 1.0, "seed": 7, "top_k": 3, "repetition_penalty": 1.3},
        {"frequency_penalty": 0.5, "presence_penalty": 0.2},
    ]
    requests = []
    for number, (sampling, adapter) in enumerate(
        itertools.product(options, [None, *identities[:2]])
    ):
        request = greedy_request(
            f"r{number}", repetitive(number), adapter, 40, num_logprobs=2, **sampling
        )
        requests.append(cycling(request) if number % 2 else request)
    plain = start().run(*requests)
    driver = start()
    mixed = driver.run(*(guessing(r) if number % 4 else r for number, r in enumerate(requests)))
    for request in requests:
        one, other = plain[request.id], mixed[request.id]
        assert one.tokens == other.tokens, request
        assert len(logprobs(one)) == len(logprobs(other)) == 40
        for a, b in zip(logprobs(one), logprobs(other), strict=True):
            assert a.token_id == b.token_id
            assert b.logprob == pytest.approx(a.logprob, abs=1e-4)
            assert [p for _, p in b.top] == pytest.approx([p for _, p in a.top], abs=1e-4)
    assert accepted(driver) > 40
    assert driver.engine.counters["spec_drafted_tokens"] > accepted(driver)


def test_exact_mode_leaves_not_a_bit_of_difference(start, identities):
    requests = [
        cycling(greedy_request(f"r{i}", repetitive(i), adapter, 40, num_logprobs=2, temperature=t))
        for i, (adapter, t) in enumerate([(None, 0.0), (identities[0], 0.7), (identities[1], 0.0)])
    ]
    plain = start(exact=True).run(*requests)
    driver = start(exact=True, speculative_tokens=K)
    drafted = driver.run(*requests)
    assert accepted(driver) > 0
    for request in requests:
        assert logprobs(drafted[request.id]) == logprobs(plain[request.id])


def test_accepted_tokens_save_steps_and_come_in_one_event(start, identities):
    request = cycling(greedy_request("r", repetitive(0), identities[0], 60, num_logprobs=0), 1)
    plain, driver = start(), start(speculative_tokens=K)
    expected = plain.run(request)["r"].tokens
    transcript = driver.run(request)["r"]
    assert transcript.tokens == expected
    saved = plain.engine.counters["steps"] - driver.engine.counters["steps"]
    assert saved == accepted(driver) > 10
    events = [event for event in transcript.events if isinstance(event, Tokens)]
    assert max(len(event.token_ids) for event in events) > K // 2
    assert all(len(event.logprobs) == len(event.token_ids) for event in events)
    assert driver.engine.counters["generated_tokens"] == 60


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 17, 30])
def test_max_tokens_cut_exactly(start, max_tokens):
    request = cycling(greedy_request("r", repetitive(0), None, max_tokens), 1)
    expected = start().run(request)["r"].tokens
    transcript = start(speculative_tokens=K).run(request)["r"]
    assert transcript.tokens == expected
    assert len(expected) == max_tokens
    reasons = [e.finish_reason for e in transcript.events if isinstance(e, Tokens)]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]


def test_the_context_cuts_exactly_where_positions_end(tiny_model, tmp_path):
    """GPT-2 has an embedding for each position: a draft behind the last one would be an error."""
    request = greedy_request("r", repetitive(0), None, 10_000)
    ended = []
    for num_drafts in (0, K):
        driver = Driver(new_engine(tiny_model("gpt2"), tmp_path, speculative_tokens=num_drafts))
        try:
            ended.append(driver.run(request)["r"].tokens)
        finally:
            driver.engine.pool.close()
    assert ended[0] == ended[1]
    assert len(ended[0]) == tiny.MAX_POSITIONS - 25
    assert accepted(driver) > 0


def test_a_stop_token_inside_an_accepted_run_ends_it_there(start):
    request = cycling(greedy_request("r", repetitive(0), None, 60), 3)
    free = start(speculative_tokens=K).run(request)["r"]
    runs = [event.token_ids for event in free.events if isinstance(event, Tokens)]
    longest = max(runs, key=len)
    assert len(longest) > 3
    stop = longest[1]
    first = free.tokens.index(stop)
    for min_tokens in (0, first + 20):
        sampling = replace(request.sampling, stop_token_ids=(stop,), min_tokens=min_tokens)
        stopped = replace(request, sampling=sampling)
        expected = start().run(stopped)["r"]
        driver = start(speculative_tokens=K)
        found = driver.run(stopped)["r"]
        assert found.tokens == expected.tokens
        assert len(found.tokens) > min_tokens
        assert accepted(driver) > 0 or not min_tokens
        last = [event for event in found.events if isinstance(event, Tokens)][-1]
        assert (last.finish_reason, last.stop_token_id) == ("stop", stop)
        assert last.token_ids[-1] == stop
        assert found.last == Finished("r")


def test_nothing_is_sampled_behind_a_finish_inside_an_accepted_run(start):
    """The end comes where drafts are right on both sides of it."""
    request = cycling(greedy_request("r", repetitive(0), None, 60), 1)
    (constant,) = {token_id for token_id, _ in request.sampling.logit_bias}
    for min_tokens in range(20, 30):
        sampling = replace(
            request.sampling,
            stop_token_ids=(constant,),
            min_tokens=min_tokens,
            logit_bias=((constant, 60.0), (constant + 1, 50.0)),
        )
        stopped = replace(request, sampling=sampling)
        found = start(speculative_tokens=K).run(stopped)["r"]
        assert found.tokens == [constant + 1] * min_tokens + [constant]


def test_preemption_in_between_changes_no_answer(start, identities):
    requests = [
        cycling(
            greedy_request(
                f"r{i}", repetitive(i)[:20], identities[i % 3], 40, temperature=t, seed=i
            )
        )
        for i, t in enumerate([0.0, 0.7] * 3)
    ]
    expected = {r.id: start().run(r)[r.id].tokens for r in requests}
    driver = start(kv_cache_bytes=9 * PAGE_BYTES, max_model_len=60, speculative_tokens=K)
    transcripts = driver.run(*requests)
    assert driver.engine.counters["preemptions"] > 0
    assert accepted(driver) > 0
    assert {r.id: transcripts[r.id].tokens for r in requests} == expected
    assert driver.engine.scheduler.pages.num_used == 0


def test_cancel_in_between_frees_everything(start, identities):
    driver = start(speculative_tokens=K)
    driver.load(identities[0])
    driver.submit(
        greedy_request("gone", repetitive(0), identities[0], 400),
        greedy_request("stays", repetitive(1), identities[0], 30),
    )
    while not accepted(driver):
        driver.step()
    driver.cancel("gone")
    driver.run()
    assert driver.transcripts["gone"].last == Finished("gone", is_cancelled=True)
    assert driver.engine.scheduler.pages.num_used == 0
    alone = start().run(greedy_request("stays", repetitive(1), identities[0], 30))["stays"]
    assert driver.transcripts["stays"].tokens == alone.tokens


def test_n_sequences_guess_each_from_its_own_text(start):
    request = cycling(greedy_request("r", repetitive(2), None, 30, temperature=1.0, seed=9))
    request = replace(request, n=3)
    driver = start(speculative_tokens=K)
    assert driver.run(request)["r"].token_ids == start().run(request)["r"].token_ids
    assert accepted(driver) > 0


def test_prompt_logprobs_come_once_and_unchanged(start):
    request = cycling(greedy_request("r", repetitive(0), None, 30, num_prompt_logprobs=1))
    plain = start().run(request)["r"].events[1]
    driver = start(speculative_tokens=K, max_num_batched_tokens=16)
    events = driver.run(request)["r"].events
    assert accepted(driver) > 0
    assert [p.logprob for p in events[1].logprobs] == pytest.approx(
        [p.logprob for p in plain.logprobs], abs=1e-4
    )
    assert sum(type(event) is type(plain) for event in events) == 1


def test_non_finite_logits_behind_accepted_drafts_come_after_their_tokens(start):
    request = cycling(greedy_request("r", repetitive(0), None, 60), 1)
    expected = start().run(request)["r"].tokens
    driver = start(speculative_tokens=K)
    inner = driver.engine.runner.run

    def poisoned(batch):
        results = inner(batch)
        for rows, logits in zip(batch, results, strict=True):
            if len(rows.drafts) == K:
                with torch.inference_mode():
                    logits[2] = float("nan")
        return results

    driver.engine.runner.run = poisoned
    transcript = driver.run(request)["r"]
    last = transcript.last
    assert isinstance(last, Failed)
    assert last.code == "numerical_error"
    num_tokens = len(transcript.tokens)
    assert transcript.tokens == expected[:num_tokens]
    assert len(transcript.events[-2].token_ids) == 2


def test_a_text_without_repeats_is_decoded_at_its_usual_cost(start):
    request = greedy_request("r", tiny.prompt_ids(40, seed=3), None, 80, temperature=2.0, seed=1)
    plain, driver = start(), start(speculative_tokens=K)
    assert driver.run(request)["r"].tokens == plain.run(request)["r"].tokens
    extra = driver.engine.counters["rows"] - plain.engine.counters["rows"]
    assert extra + accepted(driver) <= driver.engine.counters["spec_drafted_tokens"] <= 8
