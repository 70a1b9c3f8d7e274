"""An engine that keeps a step in flight answers token for token as one that does not.

The device is a fake whose tokens cannot be read before their copy has arrived; whatever is read too
early is no token at all.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.fake_device import LateCopies, LateMark, overlapping
from tests.oracle import adapters, tiny, xlora_oracle
from tests.support.engines import (
    SMALL,
    Driver,
    Transcript,
    greedy_request,
    new_engine,
    put_blob,
)
from tests.support.fake_device import FakeDevice

from polyadapt.config import EngineConfig
from polyadapt.engine.build import build_engine
from polyadapt.engine.device_tokens import DeviceTokens
from polyadapt.engine.overlap import REASONS
from polyadapt.engine.request import SequenceState
from polyadapt.ops import native
from polyadapt.ops.device import CopyStream, Mark
from polyadapt.types import (
    AdapterId,
    AppliedAdapter,
    Embedded,
    Failed,
    Finished,
    MarkSettings,
    PromptScored,
    Request,
    SamplingParams,
    Started,
    TextMark,
    Tokens,
)

PAGE = 16
PAGE_BYTES = 3 * 2 * 2 * 16 * 4 * PAGE  # layers, k and v, kv heads, dim, float32, tokens a page


@pytest.fixture(scope="module")
def model_dir(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def blob_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blobs")


@pytest.fixture(scope="module")
def identities(
    model_dir: Path, blob_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, AdapterId]:
    root = tmp_path_factory.mktemp("adapters")
    made = {f"a{i}": adapters.make_lora(model_dir, root / f"a{i}", 4, seed=i) for i in range(4)}
    made["probed"] = xlora_oracle.make(model_dir, root / "probed")
    return {name: put_blob(blob_root, path, name) for name, path in made.items()}


class Checked(Driver):
    """Checks after every step that books agree and that whoever is in flight keeps what it has."""

    def step(self) -> None:
        super().step()
        self.engine.check_integrity()
        flight = self.engine._overlap._flight if self.engine._overlap else None
        for rows in flight.batch if flight else ():
            sequence = rows.sequence
            num_held = len(sequence.pages) * PAGE
            assert sequence.pages, "its pages were given back in flight"
            assert num_held >= sequence.num_computed, "a page was given back in flight"
            assert len(sequence.slots) == len(sequence.lanes), "a lease was given back in flight"


@pytest.fixture
def start(model_dir, blob_root):
    """A function that makes a driver over a new engine, overlapping unless it says otherwise."""
    made: list[Driver] = []

    def make(*, is_overlapping: bool = True, latency: int = 3, **settings: Any) -> Checked:
        engine = new_engine(model_dir, blob_root, **settings)
        made.append(Checked(overlapping(engine, latency) if is_overlapping else engine))
        return made[-1]

    yield make
    for driver in made:
        driver.engine.pool.close()


def ids(number: int, length: int = 12) -> list[int]:
    return tiny.prompt_ids(length, seed=number)


def story(transcript: Transcript) -> dict[str, Any]:
    """What a caller gets, however it is cut into events; logprobs apart."""
    told: dict[str, Any] = {"tokens": transcript.token_ids}
    for event in transcript.events:
        if isinstance(event, Tokens) and event.finish_reason is not None:
            told[f"end {event.index}"] = (event.finish_reason, event.stop_token_id)
        if isinstance(event, Finished | Failed):
            assert "last" not in told, "a request ended twice"
            told["last"] = event
    return told


def numbers(transcript: Transcript) -> dict[str, Any]:
    """Its logprobs and its embedding."""
    found: dict[str, Any] = {}
    for event in transcript.events:
        if isinstance(event, Embedded):
            found["vector"] = np.array(event.vector)
        if isinstance(event, Tokens | PromptScored):
            key = f"{type(event).__name__} {event.index}"
            found.setdefault(key, []).extend(event.logprobs)
    return found


def assert_same(found: Transcript, expected: Transcript) -> None:
    assert story(found) == story(expected)
    other = numbers(expected)
    mine = numbers(found)
    assert mine.keys() == other.keys()
    for key, values in mine.items():
        if key == "vector":
            assert np.allclose(values, other[key], atol=1e-5)
            continue
        assert len(values) == len(other[key])
        for a, b in zip(values, other[key], strict=True):
            assert (a.token_id, [i for i, _ in a.top]) == (b.token_id, [i for i, _ in b.top])
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
            assert [v for _, v in a.top] == pytest.approx([v for _, v in b.top], abs=1e-4)


# --------------------------------------------------------------------------- the main test
def workload(
    rng: random.Random, identities: dict[str, AdapterId], *, is_special: bool
) -> dict[str, tuple[int, Request]]:
    """Requests of all kinds and the step at which each arrives; is_special: also such as need the
    host to know every token.
    """
    made: dict[str, tuple[int, Request]] = {}
    stems = [ids(100 + i, 40) for i in range(3)]
    for number in range(rng.randrange(8, 20)):
        name = f"r{number}"
        prompt = ids(number, rng.randrange(1, 40))
        if rng.random() < 0.4:  # a beginning that others have as well
            prompt = rng.choice(stems)[: rng.randrange(17, 41)] + prompt[:9]
        options: dict[str, Any] = {"seed": number}
        if rng.random() < 0.6:
            options |= {"temperature": rng.choice([0.3, 1.0, 1.7])}
            options |= rng.choice([{}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.1}])
        if rng.random() < 0.3:
            options["num_logprobs"] = rng.randrange(4)
        if rng.random() < 0.3:
            options["logit_bias"] = ((7, 4.0), (9, -3.0))
        if rng.random() < 0.2:
            options |= {"min_tokens": rng.randrange(1, 12), "ignore_eos": False}
        if rng.random() < 0.15:
            options |= rng.choice([{"presence_penalty": 1.0}, {"repetition_penalty": 1.3}])
        kind = rng.choice(("", "", "", "scored", "probed", "guessing", "embed"))
        kind = kind if is_special else ""
        if kind == "scored":
            options["num_prompt_logprobs"] = 2
        chosen = rng.sample(["a0", "a1", "a2", "a3"], rng.choice([0, 0, 1, 1, 1, 2]))
        if kind == "probed":
            chosen = ["probed"]
        request = replace(
            greedy_request(name, prompt, None, rng.randrange(1, 8 if kind else 30), **options),
            adapters=tuple(AppliedAdapter(identities[adapter]) for adapter in chosen),
            n=rng.choice([1, 1, 1, 2, 3]),
            priority=rng.choice([0, 0, 0, 1, -1]),
        )
        if kind == "guessing":
            request = replace(request, speculative_tokens=4)
        if kind == "embed":
            request = Request(
                name, tuple(prompt), SamplingParams(1), request.adapters, kind="embed"
            )
        made[name] = (rng.randrange(30), request)
    return made


def play(
    driver: Checked, requests: dict[str, tuple[int, Request]], cancels: dict[str, int] | None = None
) -> dict[str, Transcript]:
    """Submit each request and cancel some at their steps; run until all have ended."""
    for step in range(3000):
        for start_step, request in requests.values():
            if start_step == step:
                driver.submit(request)
        for name, cancel_step in (cancels or {}).items():
            if cancel_step == step:
                driver.cancel(name)
        if step > 60 and not driver.engine.has_work:
            break
        driver.step_or_wait()
    assert not driver.engine.has_work
    pages = driver.engine.scheduler.pages
    assert pages.num_used == 0
    assert driver.engine.pool.num_leases == 0
    return {name: driver.transcripts[name] for name in requests}


def with_stops(
    rng: random.Random,
    requests: dict[str, tuple[int, Request]],
    transcripts: dict[str, Transcript],
) -> dict[str, tuple[int, Request]]:
    """Half of the requests with a stop token that they are known to come across."""
    stopped = dict(requests)
    for name, (step, request) in requests.items():
        tokens = transcripts[name].token_ids.get(0, [])
        if tokens and request.kind == "text" and rng.random() < 0.5:
            sampling = replace(request.sampling, stop_token_ids=(rng.choice(tokens),))
            stopped[name] = (step, replace(request, sampling=sampling))
    return stopped


SETTINGS: list[dict[str, Any]] = [
    {},
    {"max_num_batched_tokens": 24, "max_num_seqs": 6},
    {"kv_cache_bytes": 9 * PAGE_BYTES, "max_model_len": 90},
    {"kv_cache_bytes": 12 * PAGE_BYTES, "max_model_len": 90, "max_num_batched_tokens": 20},
    {"max_adapter_bytes": 200_000},
    {"prefix_cache": False, "max_num_seqs": 4},
]


@pytest.mark.parametrize("seed", range(6))
def test_streams_are_those_of_an_engine_that_waits(seed, start, identities):
    """In exact mode no neighbour changes a bit, so that every token must be the same."""
    rng, is_special = random.Random(seed), seed % 2 == 1
    settings = {"exact": True} | SETTINGS[seed % len(SETTINGS)]
    requests = workload(rng, identities, is_special=is_special)
    plain = play(start(is_overlapping=False, **settings), requests)
    requests = with_stops(rng, requests, plain)
    expected = play(start(is_overlapping=False, **settings), requests)
    driver = start(latency=rng.randrange(5), **settings)
    found = play(driver, requests)
    for name in requests:
        assert_same(found[name], expected[name])
    assert driver.engine.counters["overlapped_steps"] > 2
    # Whoever is cancelled got a part of its answer, and changes nobody else's.
    cancels = {name: rng.randrange(60) for name in requests if rng.random() < 0.4}
    cut = play(start(latency=rng.randrange(5), **settings), requests, cancels)
    for name in requests:
        if cut[name].last == Finished(name, is_cancelled=True):
            assert name in cancels
            for index, tokens in cut[name].token_ids.items():
                assert tokens == expected[name].token_ids[index][: len(tokens)]
            assert "last" in story(cut[name])
        else:
            assert_same(cut[name], expected[name])


# --------------------------------------------------------------------------- one thing each
def test_a_cpu_has_no_step_in_flight(start):
    driver = start(is_overlapping=False)
    driver.run(greedy_request("r", ids(0), None, 3))
    assert "overlapped_steps" not in driver.engine.counters


def test_a_steps_tokens_are_read_when_the_next_one_is_enqueued(start, monkeypatch):
    driver = start()
    log: list[str] = []
    run, read = driver.engine.runner.run, DeviceTokens.read

    def logged_run(batch, previous=None):
        log.append("run")
        return run(batch, previous)

    def logged_read(self):
        log.append("read")
        return read(self)

    monkeypatch.setattr(driver.engine.runner, "run", logged_run)
    monkeypatch.setattr(DeviceTokens, "read", logged_read)
    driver.run(greedy_request("r", ids(0), None, 4))
    assert log == ["run", "run", "read", "run", "read", "run", "read", "read"]
    # The last token is known to be the last before it is known: no row is run for nothing.
    assert [num for num in driver.rows_per_step if num] == [12, 1, 1, 1]
    assert driver.engine.counters["overlapped_steps"] == 3


def test_a_row_behind_a_stop_token_is_dropped_and_holds_what_it_has_until_then(start, identities):
    request = greedy_request("r", ids(0), identities["a0"], 9)
    tokens = start().run(request)["r"].tokens
    assert tokens.index(tokens[3]) == 3
    stopping = replace(request, sampling=replace(request.sampling, stop_token_ids=(tokens[3],)))
    driver = start()
    driver.load(identities["a0"])
    driver.submit(stopping)
    held = []
    while driver.engine.has_work:
        driver.step()
        stats = driver.engine.stats()
        is_over = driver.transcripts["r"].events[-1:] == [Finished("r")]
        held.append((is_over, stats.num_used_pages, driver.engine.pool.num_leases))
    assert driver.transcripts["r"].tokens == tokens[:4]
    # Told as soon as it is known, freed as soon as the row behind it was computed.
    assert held[-2:] == [(True, 1, 1), (True, 0, 0)]


def test_a_cancelled_request_is_freed_when_its_step_is_read(start, identities):
    driver = start()
    driver.load(identities["a0"])
    driver.submit(greedy_request("gone", ids(0, 40), identities["a0"], 400))
    driver.submit(greedy_request("stays", ids(1), None, 12))
    for _ in range(3):
        driver.step()
    (gone,) = [s for s in driver.engine.scheduler.running if s.slots]
    driver.cancel("gone")
    assert gone.state is SequenceState.DONE
    assert gone.pages
    assert driver.engine.pool.num_leases == 1
    driver.engine.check_integrity()
    driver.step()
    assert not gone.pages
    assert driver.engine.pool.num_leases == 0
    assert driver.transcripts["gone"].last == Finished("gone", is_cancelled=True)
    driver.run()
    assert len(driver.transcripts["stays"].tokens) == 12


def test_cancelling_everything_leaves_no_step_in_flight(start):
    driver = start()
    driver.submit(greedy_request("r", ids(0), None, 50))
    for _ in range(3):
        driver.step()
    driver.cancel("r")
    assert driver.engine.has_work, "its last step is not read yet"
    driver.step()
    assert not driver.engine.has_work
    assert driver.engine.scheduler.pages.num_used == 0


def special(reason: str, identities: dict[str, AdapterId]) -> Request:
    """A request because of which tokens in flight have to be read."""
    if reason == "drafts":
        return replace(greedy_request("s", ids(5, 5) * 4, None, 8), speculative_tokens=4)
    if reason == "penalties":
        return greedy_request("s", ids(5), None, 8, presence_penalty=0.5)
    if reason == "watermark":
        mark = TextMark(MarkSettings("kgw", 2), (1, 2))
        return replace(greedy_request("s", ids(5), None, 8), text_mark=mark)
    if reason == "first_pass":
        return greedy_request("s", ids(5), identities["probed"], 8)
    if reason == "embedding":
        return Request("s", tuple(ids(5)), SamplingParams(1), kind="embed")
    return greedy_request("s", ids(5), None, 8, num_prompt_logprobs=1)


@pytest.mark.parametrize("reason", [r for r in REASONS if r not in ("preemption", "failure")])
def test_what_the_host_has_to_know_is_read_first_and_counted(reason, start, identities):
    driver, plain = start(), start(is_overlapping=False)
    requests = [greedy_request("r", ids(1), None, 30), special(reason, identities)]
    for each in (driver, plain):
        each.load(identities["probed"])
        each.submit(requests[0])
        for _ in range(3):
            each.step()
        each.submit(requests[1])
        each.run()
    counters = driver.engine.counters
    assert {r for r in REASONS if counters[f"drained_by_{r}"]} == {reason}
    assert counters["overlapped_steps"] > 10
    for request in requests:
        assert_same(driver.transcripts[request.id], plain.transcripts[request.id])


def test_preemption_reads_the_step_in_flight_first(start):
    requests = [
        greedy_request(f"r{i}", ids(i, 20), None, 40, temperature=0.7, seed=i) for i in range(6)
    ]
    settings = {"kv_cache_bytes": 9 * PAGE_BYTES, "max_model_len": 60, "exact": True}
    expected = start(is_overlapping=False, **settings).run(*requests)
    driver = start(**settings)
    found = driver.run(*requests)
    counters = driver.engine.counters
    assert counters["preemptions"] > 0
    assert counters["drained_by_preemption"] > 0
    for request in requests:
        assert_same(found[request.id], expected[request.id])


@pytest.mark.parametrize("fault", ["forward", "sampling"])
def test_a_fault_fails_its_request_alone(fault, start, monkeypatch):
    requests = [greedy_request(f"r{i}", ids(i), None, 8) for i in range(4)]
    expected = start(is_overlapping=False).run(*requests)
    driver = start()
    engine = driver.engine
    run, sample = engine.runner.run, engine._overlap._sampler.sample

    def is_faulty(sequence) -> bool:
        return sequence.group.request.id == "r2" and sequence.num_output == 3

    def poisoned_run(batch, previous=None):
        if fault == "forward" and any(is_faulty(rows.sequence) for rows in batch):
            raise RuntimeError("injected")
        return run(batch, previous)

    def poisoned_sample(logits, sequences, ends):
        if fault == "sampling" and any(map(is_faulty, sequences)):
            raise IndexError("injected")
        return sample(logits, sequences, ends)

    monkeypatch.setattr(engine.runner, "run", poisoned_run)
    monkeypatch.setattr(engine._overlap._sampler, "sample", poisoned_sample)
    found = driver.run(*requests)
    assert engine.counters["drained_by_failure"] == 1
    for name in ("r0", "r1", "r3"):
        assert_same(found[name], expected[name])
    if fault == "forward":
        assert isinstance(found["r2"].last, Failed)
        assert found["r2"].tokens == expected["r2"].tokens[:3]
    else:  # the form on the host can do without
        assert_same(found["r2"], expected["r2"])


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_a_page_with_a_row_that_is_not_finite_is_found_by_nobody(start, monkeypatch, is_cancelled):
    """Not even by a request that is admitted while that row is in flight, nor if nobody is told."""
    prompt = ids(0, 2 * PAGE - 3)
    request = greedy_request("bad", prompt, None, 20)
    tokens = start(is_overlapping=False).run(request)["bad"].tokens
    driver = start()
    run = driver.engine.runner.run
    is_poisoned = False

    def poisoned(batch, previous=None):
        nonlocal is_poisoned
        results = run(batch, previous)
        for rows, logits in zip(batch, results, strict=True):
            sequence = rows.sequence
            fills_page = sequence.num_computed == 2 * PAGE - 1
            if fills_page and sequence.group.request.id == "bad":
                is_poisoned = True
                with torch.inference_mode():
                    logits[:, 0] = float("nan")
        return results

    monkeypatch.setattr(driver.engine.runner, "run", poisoned)
    driver.submit(request, greedy_request("other", ids(1), None, 40))
    while not is_poisoned:
        driver.step()
    assert not isinstance(driver.transcripts["bad"].last, Failed), "it is in flight"
    again = greedy_request("again", [*prompt, *tokens[:3], *ids(3, 9)], None, 4)
    if is_cancelled:
        driver.cancel("bad")
        driver.step()
    driver.run(again)
    if not is_cancelled:
        failed = driver.transcripts["bad"].last
        assert isinstance(failed, Failed)
        assert failed.code == "numerical_error"
    assert driver.transcripts["bad"].tokens == tokens[:3]
    started = driver.transcripts["again"].events[0]
    assert isinstance(started, Started)
    assert started.num_cached_tokens == PAGE
    assert_same(driver.transcripts["again"], start(is_overlapping=False).run(again)["again"])
    assert len(driver.transcripts["other"].tokens) == 40


def test_full_pages_are_found_by_others_once_they_are_read(start):
    driver = start()
    prompt = ids(0, 3 * PAGE + 5)
    driver.run(greedy_request("first", prompt, None, 4))
    again = driver.run(greedy_request("again", prompt, None, 4))["again"]
    assert again.events[0].num_cached_tokens == 3 * PAGE


def test_a_text_ends_where_the_model_does(start):
    settings = {"max_model_len": 40}
    request = greedy_request("r", ids(0, 30), None, 100)
    expected = start(is_overlapping=False, **settings).run(request)["r"]
    driver = start(**settings)
    assert_same(driver.run(request)["r"], expected)
    assert len(expected.tokens) == 10
    assert sum(driver.rows_per_step) == 39


class LateGraphs(FakeDevice):
    """Records graphs, and tells late."""

    def copy_stream(self) -> CopyStream:
        return LateCopies(3)

    def mark(self) -> Mark:
        return LateMark(3)


def test_captured_steps_go_on_with_tokens_that_only_the_device_knows(
    start, model_dir, blob_root, identities, monkeypatch
):
    requests = [greedy_request(f"r{i}", ids(i), None, 8 + 3 * i) for i in range(3)]
    requests.append(greedy_request("scored", ids(7), None, 16, num_logprobs=2))
    requests.append(greedy_request("adapted", ids(8), identities["a0"], 3))
    expected = start(is_overlapping=False).run(*requests)
    monkeypatch.setattr(native, "serves", lambda _: False)
    monkeypatch.setattr(native, "is_available", lambda: False)
    config = EngineConfig(model=str(model_dir), device="cpu", dtype="float32", **SMALL)
    device = LateGraphs()
    engine = build_engine(config, model_dir, blob_root, lambda: None, name="base", device=device)
    try:
        found = Driver(engine).run(*requests)
    finally:
        engine.pool.close()
    for request in requests:
        assert_same(found[request.id], expected[request.id])
    assert engine.counters["overlapped_steps"] > 8
    assert engine.counters["graph_steps"] > 8
    assert sum(graph.num_replays for graph in device.graphs) >= engine.counters["graph_steps"]
