"""The prefix cache on a tiny model: what is shared, what never is, and that no answer changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.oracle import adapters, peft_oracle, tiny
from tests.support.engines import Driver, LogitsRecorder, greedy_request, new_engine, put_blob

from polyadapt.engine.output import Call
from polyadapt.types import AdapterId, AppliedAdapter, Failed, Finished, Request, Started

# Sites of the last of llama's three layers, behind its keys and values.
LAST = r"model\.layers\.2\.(self_attn\.(q|o)_proj|mlp\.(gate|up|down)_proj)"
PAGE = 16
PAGE_BYTES = 3 * 2 * 2 * 16 * 4 * PAGE  # layers, k and v, kv heads, dim, float32, tokens a page


@pytest.fixture(scope="module")
def model_dir(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def blob_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blobs")


@pytest.fixture(scope="module")
def directories(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    targets = {"one": None, "two": None, "last": LAST, "key": r"model\.layers\.2\..*k_proj"}
    return {
        name: adapters.make_lora(model_dir, root / name, 4, target, seed=number)
        for number, (name, target) in enumerate(targets.items())
    }


@pytest.fixture(scope="module")
def identities(blob_root: Path, directories: dict[str, Path]) -> dict[str, AdapterId]:
    return {name: put_blob(blob_root, path, name) for name, path in directories.items()}


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


def cached(driver: Driver, request_id: str) -> int:
    """How many tokens the request says it found."""
    (started,) = [e for e in driver.transcripts[request_id].events if isinstance(e, Started)]
    return started.num_cached_tokens


def renamed(request: Request, name: str) -> Request:
    return replace(request, id=name)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_the_second_answer_equals_the_first_with_its_prefix_found(
    architecture, tiny_model, tmp_path
):
    """Gemma 3 has layers with a window that is shorter than the prompt."""
    model_dir = tiny_model(architecture)
    identity = put_blob(tmp_path, adapters.make_lora(model_dir, tmp_path / "a", 4), "a")
    request = greedy_request("first", ids(0), identity, 6, num_logprobs=0)
    plain = Driver(new_engine(model_dir, tmp_path, prefix_cache=False))
    expected = LogitsRecorder(plain.engine)
    plain.run(request)
    plain.run(renamed(request, "again"))
    assert cached(plain, "again") == 0
    assert plain.engine.stats().num_cached_pages == 0

    driver = Driver(new_engine(model_dir, tmp_path))
    recorder = LogitsRecorder(driver.engine)
    driver.run(request)
    driver.run(renamed(request, "again"))
    assert cached(driver, "first") == 0
    assert cached(driver, "again") == 3 * PAGE
    assert driver.engine.counters["prefix_hit_tokens"] == 3 * PAGE
    assert driver.engine.counters["prefix_query_tokens"] == 2 * len(ids(0))
    assert driver.engine.stats().num_cached_pages >= 3
    assert torch.equal(recorder.of("first"), expected.of("first"))
    peft_oracle.assert_matches(recorder.of("again"), expected.of("again"))
    for made in (plain, driver):
        made.engine.pool.close()


def test_a_prompt_of_full_pages_runs_its_last_page_again(start):
    driver = start()
    request = greedy_request("first", ids(0, 2 * PAGE), None, 4)
    driver.run(request)
    driver.run(renamed(request, "again"))
    assert cached(driver, "again") == PAGE
    assert driver.transcripts["again"].tokens == driver.transcripts["first"].tokens


def test_a_conversation_finds_what_was_generated(start):
    driver = start()
    first = greedy_request("first", ids(0, 20), None, 40)
    seen = [*first.prompt_ids, *driver.run(first)["first"].tokens, *ids(1, 5)]
    turn = greedy_request("turn", seen, None, 4)
    driver.run(turn)
    assert cached(driver, "turn") == 3 * PAGE
    assert driver.transcripts["turn"].tokens == start().run(turn)["turn"].tokens


def test_adapters_share_with_nobody_but_themselves(start, identities):
    driver = start()
    for name in ("one", "two"):
        driver.run(greedy_request(name, ids(0), identities[name], 2))
    driver.run(greedy_request("base", ids(0), None, 2))
    half = AppliedAdapter(identities["one"], 0.5)
    driver.run(replace(greedy_request("half", ids(0), None, 2), adapters=(half,)))
    assert [cached(driver, r) for r in ("one", "two", "base", "half")] == [0, 0, 0, 0]
    driver.run(greedy_request("one again", ids(0), identities["one"], 2))
    assert cached(driver, "one again") == 3 * PAGE


def test_a_composition_is_neither_of_its_adapters(start, identities):
    driver = start()
    pair = tuple(AppliedAdapter(identities[name]) for name in ("one", "two"))
    both = replace(greedy_request("both", ids(0), None, 2), adapters=pair)
    driver.run(greedy_request("one", ids(0), identities["one"], 2))
    driver.run(both)
    driver.run(renamed(both, "again"))
    driver.run(greedy_request("two", ids(0), identities["two"], 2))
    assert [cached(driver, r) for r in ("both", "again", "two")] == [0, 3 * PAGE, 0]


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_an_adapter_behind_the_last_keys_and_values_shares_with_the_base(
    start, identities, directories, model_dir, scale
):
    driver = start()
    recorder = LogitsRecorder(driver.engine)
    driver.run(greedy_request("base", ids(0), None, 2))
    applied = (AppliedAdapter(identities["last"], scale),)
    request = replace(greedy_request("last", ids(0), None, 5), adapters=applied)
    driver.run(request)
    assert cached(driver, "last") == 3 * PAGE
    alone = start(prefix_cache=False)
    expected = LogitsRecorder(alone.engine)
    alone.run(request)
    peft_oracle.assert_matches(recorder.of("last"), expected.of("last"))
    assert not torch.allclose(recorder.of("last")[0], recorder.of("base")[0], atol=1e-2)
    if scale == 1.0:
        oracle = peft_oracle.logits(model_dir, directories["last"], ids(0))[-1]
        peft_oracle.assert_matches(recorder.of("last")[0], oracle)
    driver.run(greedy_request("key", ids(0), identities["key"], 2))
    assert cached(driver, "key") == 0, "it changes the last layer's keys"


def test_a_name_that_means_another_adapter_now_finds_nothing(start, identities):
    driver = start()
    driver.run(greedy_request("old", ids(0), replace(identities["one"], name="n"), 2))
    replaced = AdapterId("n", 2, identities["two"].digest)
    driver.run(greedy_request("new", ids(0), replaced, 2))
    assert cached(driver, "new") == 0
    assert driver.transcripts["new"].tokens == (
        start().run(greedy_request("x", ids(0), identities["two"], 2))["x"].tokens
    )
    back = AdapterId("renamed", 9, identities["one"].digest)
    driver.run(greedy_request("back", ids(0), back, 2))
    assert cached(driver, "back") == 3 * PAGE


def test_an_adapter_that_was_unloaded_and_came_back_finds_its_pages(start, identities):
    driver = start()
    request = greedy_request("first", ids(0), identities["one"], 3)
    driver.run(request)
    driver.call(Call(1, "unload", identities["one"].digest))
    driver.run()
    assert driver.engine.pool.nbytes_used == 0
    driver.run(renamed(request, "again"))
    assert cached(driver, "again") == 3 * PAGE
    assert driver.transcripts["again"].tokens == driver.transcripts["first"].tokens


def test_salts_part_the_cache(start):
    driver = start()
    request = greedy_request("a", ids(0), None, 2)
    for name, salt in (("a", ("t",)), ("b", ("u",)), ("c", ("t", "s")), ("d", ("t",))):
        driver.run(replace(request, id=name, cache_salt=salt))
    assert [cached(driver, name) for name in "abcd"] == [0, 0, 0, 3 * PAGE]


def test_the_samples_of_one_prompt_find_what_the_first_computed(start):
    request = greedy_request("r", ids(2), None, 6, temperature=1.0, seed=9)
    request = replace(request, n=3)
    alone = start(prefix_cache=False).run(request)["r"].token_ids
    driver = start(max_num_seqs=1)
    assert driver.run(request)["r"].token_ids == alone
    assert driver.engine.counters["prefix_hit_tokens"] == 2 * 3 * PAGE
    assert cached(driver, "r") == 0


def test_scored_prompts_run_whole_and_score_the_same(start):
    driver = start()
    request = greedy_request("first", ids(0), None, 2, num_prompt_logprobs=0)
    driver.run(request)
    driver.run(renamed(request, "again"))
    assert cached(driver, "again") == 0
    first, again = (driver.transcripts[name].events[1].logprobs for name in ("first", "again"))
    assert first == again


def test_eviction_under_pressure_changes_no_answer(start, identities):
    requests = [
        greedy_request(f"r{i}", ids(i % 4, 40 + i % 3), identities["one"] if i % 2 else None, 12)
        for i in range(12)
    ]
    expected = {r.id: start(prefix_cache=False).run(r)[r.id].tokens for r in requests[:4]}
    driver = start(kv_cache_bytes=11 * PAGE_BYTES, max_model_len=64)
    driver.run(*requests)
    stats = driver.engine.stats()
    assert 0 < stats.num_cached_pages <= stats.num_pages == 11
    assert stats.num_used_pages == 0
    assert stats.counters["prefix_hit_tokens"] > 0
    for name, tokens in expected.items():
        assert driver.transcripts[name].tokens == tokens


def test_a_preempted_sequence_goes_on_from_its_pages(start):
    request = greedy_request("r", ids(3, 40), None, 30)
    expected = start(prefix_cache=False).run(request)["r"].tokens
    driver = start()
    driver.submit(request)
    for _ in range(12):
        driver.step()
    (sequence,) = driver.engine.scheduler.running
    driver.engine.scheduler._preempt(sequence)
    before = driver.engine.counters["rows"]
    driver.step()
    assert driver.engine.counters["rows"] - before == (40 + 11) % PAGE + 1
    driver.run()
    assert driver.transcripts["r"].tokens == expected


def test_a_request_cancelled_midway_leaves_only_what_it_had_computed(start):
    driver = start(max_num_batched_tokens=20)
    driver.submit(greedy_request("gone", ids(0), None, 5))
    driver.step()
    driver.cancel("gone")
    driver.step()
    driver.engine.check_integrity()
    request = greedy_request("next", ids(0), None, 5)
    driver.run(request)
    assert cached(driver, "next") == PAGE
    assert driver.transcripts["next"].tokens == start().run(request)["next"].tokens


def test_a_forward_that_fails_leaves_nothing_of_its_step(start, monkeypatch):
    driver = start(max_num_batched_tokens=2 * PAGE)
    run = driver.engine.runner.run
    num_calls = 0

    def fails_from_the_second_step_on(batch):
        nonlocal num_calls
        num_calls += 1
        results = run(batch)  # its keys and values are written, and must not be trusted
        if num_calls > 1:
            raise RuntimeError("injected")
        return results

    with monkeypatch.context() as patch:
        patch.setattr(driver.engine.runner, "run", fails_from_the_second_step_on)
        driver.run(greedy_request("broken", ids(0), None, 5))
    assert isinstance(driver.transcripts["broken"].last, Failed)
    assert driver.engine.counters["isolated_steps"] == 1
    driver.run(greedy_request("next", ids(0), None, 5))
    assert cached(driver, "next") == 2 * PAGE


def test_the_pages_behind_non_finite_logits_are_found_by_nobody(start):
    driver = start()
    inner = driver.engine.runner.run

    def poisoned(batch):
        results = inner(batch)
        for rows, logits in zip(batch, results, strict=True):
            if rows.sequence.group.request.id == "bad":
                with torch.inference_mode():
                    logits[:, 0] = float("nan")
        return results

    driver.engine.runner.run = poisoned
    driver.run(greedy_request("bad", ids(0), None, 5), greedy_request("good", ids(1), None, 5))
    assert isinstance(driver.transcripts["bad"].last, Failed)
    driver.run(greedy_request("next", ids(0), None, 5), greedy_request("again", ids(1), None, 5))
    assert driver.transcripts["next"].last == Finished("next")
    assert [cached(driver, name) for name in ("next", "again")] == [0, 3 * PAGE]
