"""Adapters whose experts a first pass weighs: every row equals a naive computation without a cache,
whoever shares the step with it and whatever happens to the request.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.oracle import adapters, peft_oracle, tiny, xlora_oracle
from tests.support.engines import Driver, LogitsRecorder, greedy_request, new_engine, put_blob

from polyadapt.types import (
    AdapterId,
    AppliedAdapter,
    Embedded,
    Failed,
    Finished,
    Options,
    Request,
    SamplingParams,
    Started,
)

PAGE = 16
PAGE_BYTES = 3 * 2 * 2 * 16 * 4 * PAGE  # layers, k and v, kv heads, dim, float32, tokens a page
# Name -> fields of PEFT's config. The head's rows have a plan of their own.
MADE: dict[str, dict[str, Any]] = {
    "deep": {},
    "other": {"seed": 1, "targets": ["k_proj", "up_proj", "lm_head", "embed_tokens"]},
    "flat": {"seed": 2, "xlora_depth": 1, "layerwise_scalings": False, "ranks": (4, 4)},
    "top": {"seed": 3, "top_k_lora": 2, "enable_softmax_topk": True, "xlora_dropout_p": 0.0},
    "raw": {"seed": 4, "enable_softmax": False, "global_scaling_weight": 0.5, "xlora_depth": 3},
    "resting": {"seed": 5, "scaling_pass_value": None, "softmax_temperature": 0.5},
}


@pytest.fixture(scope="module")
def model_dir(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def blob_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blobs")


@pytest.fixture(scope="module")
def directories(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    made = {
        name: xlora_oracle.make(model_dir, root / name, **config) for name, config in MADE.items()
    }
    made["plain"] = adapters.make_lora(model_dir, root / "plain", 5, seed=1)
    made["dora"] = adapters.make_lora(model_dir, root / "dora", 4, seed=2, use_dora=True)
    return made


@pytest.fixture(scope="module")
def identities(blob_root: Path, directories: dict[str, Path]) -> dict[str, AdapterId]:
    return {name: put_blob(blob_root, path, name) for name, path in directories.items()}


@pytest.fixture(scope="module")
def oracles(model_dir: Path, directories: dict[str, Path]) -> dict[str, xlora_oracle.XLora]:
    return {name: xlora_oracle.load(model_dir, directories[name]) for name in MADE}


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


def ids(number: int, length: int = 20) -> list[int]:
    return tiny.prompt_ids(length, seed=number)


def choosing(request: Request, **options: Any) -> Request:
    """The request with options of its first adapter."""
    chosen: Options = tuple(sorted(options.items()))
    first, *rest = request.adapters
    return replace(request, adapters=(replace(first, options=chosen), *rest))


def scored(name: str, prompt: list[int], adapter: AdapterId | None, num: int = 5) -> Request:
    """A greedy request every one of whose rows has logits."""
    return greedy_request(name, prompt, adapter, num, num_prompt_logprobs=0)


def check_tokens(
    driver: Driver, request: Request, model_dir: Path, oracle: xlora_oracle.XLora
) -> None:
    """Compare greedy tokens with the oracle's likeliest, where those are firm."""
    tokens = driver.transcripts[request.id].tokens
    assert len(tokens) == request.sampling.max_tokens
    seen = [*request.prompt_ids, *tokens[:-1]]
    best = xlora_oracle.logits(model_dir, oracle, seen)[len(request.prompt_ids) - 1 :].topk(2, 1)
    is_firm = best.values[:, 0] - best.values[:, 1] > peft_oracle.MARGIN_FLOOR
    assert is_firm.sum() > 0.8 * len(tokens)
    assert torch.equal(best.indices[is_firm, 0], torch.tensor(tokens)[is_firm]), request.id


def check(
    recorder: LogitsRecorder,
    driver: Driver,
    request: Request,
    model_dir: Path,
    oracle: xlora_oracle.XLora,
) -> None:
    """Compare all rows of a scored request, or the last of each step, with the oracle's."""
    seen = [*request.prompt_ids, *driver.transcripts[request.id].tokens[:-1]]
    found = recorder.of(request.id)
    expected = xlora_oracle.logits(model_dir, oracle, seen)[-len(found) :]
    try:
        peft_oracle.assert_matches(found, expected)
    except AssertionError as error:
        raise AssertionError(f"{request.id}: {error}") from error


# --------------------------------------------------------------------------- exactness
@pytest.mark.parametrize("name", MADE)
def test_a_request_equals_the_naive_computation(name, start, identities, oracles, model_dir):
    driver = start()
    recorder = LogitsRecorder(driver.engine)
    request = scored("r", ids(1), identities[name])
    driver.run(request)
    assert driver.transcripts["r"].last == Finished("r")
    check(recorder, driver, request, model_dir, oracles[name])
    assert driver.transcripts["r"].tokens == xlora_oracle.greedy(
        model_dir, oracles[name], ids(1), 5
    )


def test_a_step_is_one_forward_of_scouts_and_mains(start, identities):
    driver = start()
    driver.load(identities["deep"])
    driver.rows_per_step.clear()
    driver.run(greedy_request("r", ids(1, 10), identities["deep"], 3))
    # The prompt twice; then each new token first without and then with the experts.
    assert driver.rows_per_step == [10, 10, 1, 1, 1, 1]


def test_requests_that_are_apart_fill_each_others_steps(start, identities):
    driver = start()
    driver.load(identities["deep"])
    driver.submit(greedy_request("a", ids(1, 10), identities["deep"], 6))
    driver.step()
    driver.step()  # a's second pass
    driver.submit(greedy_request("b", ids(2, 10), identities["deep"], 6))
    driver.rows_per_step.clear()
    driver.run()
    assert driver.rows_per_step[:6] == [11, 11, 2, 2, 2, 2]


@pytest.mark.parametrize("budget", [5, 17])
def test_long_prompts_in_parts_equal_the_naive_computation(
    budget, start, identities, oracles, model_dir
):
    driver = start(max_num_batched_tokens=budget, max_num_seqs=4)
    recorder = LogitsRecorder(driver.engine)
    requests = [scored(name, ids(i, 40 + i), identities[name], 4)
                for i, name in enumerate(["deep", "other"])]  # fmt: skip
    driver.run(*requests)
    assert max(driver.rows_per_step) <= budget
    for request in requests:
        check(recorder, driver, request, model_dir, oracles[request.id])


def test_a_mixed_batch_equals_each_request_alone(
    start, identities, directories, oracles, model_dir
):
    driver = start(max_num_seqs=32, max_num_batched_tokens=2048, max_adapter_bytes=24 << 20)
    recorder = LogitsRecorder(driver.engine)
    driver.load(*identities.values())
    requests = [scored(name, ids(i, 9 + 5 * i), identities[name], 4 + i % 3)
                for i, name in enumerate([*MADE, "plain", "dora"])]  # fmt: skip
    requests.append(scored("base", ids(50), None))
    driver.run(*requests)
    assert max(recorder.adapters_per_step) >= len(MADE)
    for request in requests:
        if request.id in oracles:
            check(recorder, driver, request, model_dir, oracles[request.id])
            continue
        seen = [*request.prompt_ids, *driver.transcripts[request.id].tokens[:-1]]
        expected = peft_oracle.logits(model_dir, directories.get(request.id), seen)
        peft_oracle.assert_matches(recorder.of(request.id), expected)


@pytest.mark.parametrize("architecture", ["gemma3", "qwen2", "phi3"])
def test_other_models_equal_the_naive_computation(architecture, tiny_model, tmp_path, start):
    model_dir = tiny_model(architecture)
    targets = {"phi3": ["qkv_proj", "down_proj"]}.get(architecture, ["q_proj", "up_proj"])
    directory = xlora_oracle.make(model_dir, tmp_path / "x", targets=targets)
    adapter = put_blob(tmp_path / "blobs", directory, "x")
    engine = new_engine(model_dir, tmp_path / "blobs")
    driver, recorder = Driver(engine), LogitsRecorder(engine)
    request = scored("r", ids(1), adapter, 3)
    driver.run(request)
    engine.pool.close()
    check(recorder, driver, request, model_dir, xlora_oracle.load(model_dir, directory))


def test_beside_other_adapters_the_first_pass_is_the_base_alone(
    start, identities, directories, oracles, model_dir
):
    scale = 0.5
    uses = (
        AppliedAdapter(identities["plain"], scale),
        AppliedAdapter(identities["deep"]),
        AppliedAdapter(identities["raw"]),
    )
    driver = start()
    recorder = LogitsRecorder(driver.engine)
    request = replace(scored("r", ids(1), None), adapters=uses)
    driver.run(request)
    seen = [*request.prompt_ids, *driver.transcripts["r"].tokens[:-1]]
    second = _with_lora(model_dir, directories["plain"], scale)
    with xlora_oracle.hooked(
        second, oracles["raw"], xlora_oracle.scalings_of(model_dir, oracles["raw"], seen)
    ):
        expected = xlora_oracle.logits(model_dir, oracles["deep"], seen, second)
    peft_oracle.assert_matches(recorder.of("r"), expected)


def test_scale_multiplies_the_experts_and_zero_is_the_base_in_one_pass(
    start, identities, oracles, model_dir
):
    driver = start()
    recorder = LogitsRecorder(driver.engine)
    half = scored("half", ids(1), identities["deep"])
    none = replace(half, id="none", adapters=(AppliedAdapter(identities["deep"], 0.0),))
    half = replace(half, adapters=(AppliedAdapter(identities["deep"], 0.5),))
    driver.run(none)
    assert sum(driver.rows_per_step) == len(ids(1)) + 4, "the base needs no first pass"
    driver.run(half)
    check(recorder, driver, half, model_dir, oracles["deep"].chosen(weight=0.5))
    seen = [*none.prompt_ids, *driver.transcripts["none"].tokens[:-1]]
    peft_oracle.assert_matches(recorder.of("none"), peft_oracle.logits(model_dir, None, seen))


def test_an_exact_engine_gives_the_same_bits_in_any_company(start, identities):
    def bits(*others: Request) -> torch.Tensor:
        driver = start(exact=True)
        recorder = LogitsRecorder(driver.engine)
        driver.load(*identities.values())
        driver.run(scored("r", ids(1), identities["deep"]), *others)
        return recorder.of("r")

    alone = bits()
    company = [scored(name, ids(i, 12 + i), identities[name], 7)
               for i, name in enumerate(["deep", "other", "plain"])]  # fmt: skip
    assert torch.equal(bits(*company), alone)


# --------------------------------------------------------------------------- what may happen to it
def test_a_preempted_request_goes_on_as_if_it_had_not_been(start, identities, oracles, model_dir):
    first = greedy_request("first", ids(1, 30), identities["deep"], 40)
    second = greedy_request("second", ids(2, 30), identities["other"], 40)
    driver = start(kv_cache_bytes=13 * PAGE_BYTES, prefix_cache=False)
    driver.run(first, second)
    assert driver.engine.counters["preemptions"] > 0
    check_tokens(driver, first, model_dir, oracles["deep"])
    check_tokens(driver, second, model_dir, oracles["other"])


@pytest.mark.parametrize("num_steps", [1, 2, 3, 6])
def test_a_cancelled_request_leaves_nothing_behind(num_steps, start, identities):
    driver = start(max_num_batched_tokens=16)
    driver.load(identities["deep"])
    driver.submit(greedy_request("r", ids(1, 40), identities["deep"], 30))
    for _ in range(num_steps):
        driver.step()
    driver.cancel("r")
    driver.step()
    driver.engine.check_integrity()
    assert driver.transcripts["r"].last == Finished("r", is_cancelled=True)
    assert not driver.engine.scheduler.running
    assert driver.engine.scheduler.pages.num_used == 0
    assert driver.engine.pool.num_leases == 0


def test_each_of_n_sequences_has_a_scout_of_its_own(start, identities, oracles, model_dir):
    request = scored("r", ids(1, 2 * PAGE + 3), identities["deep"], 6)
    sampled = replace(request, n=2, sampling=replace(
        request.sampling, temperature=1.0, seed=3, num_prompt_logprobs=None))  # fmt: skip
    driver = start()
    driver.run(sampled)
    found = driver.transcripts["r"].token_ids
    assert found[0] != found[1]
    alone = start()
    for index in (0, 1):  # the tokens of sequence j depend on the seed, j and the logits alone
        alone.run(replace(sampled, id=str(index)))
        assert alone.transcripts[str(index)].token_ids[index] == found[index]
    for tokens in found.values():
        seen = [*request.prompt_ids, *tokens]
        logits = xlora_oracle.logits(model_dir, oracles["deep"], seen)
        steps = logits[len(request.prompt_ids) - 1 : -1].log_softmax(-1)
        chosen = steps[torch.arange(len(tokens)), torch.tensor(tokens)]
        assert float(chosen.min()) > -12, "a token that its logits all but exclude"


def test_a_failure_of_the_forward_ends_the_request_alone(start, identities, monkeypatch):
    driver = start()
    driver.load(identities["deep"], identities["plain"])
    run = driver.engine.runner.run

    def failing(batch: Any) -> Any:
        if any(
            rows.sequence.main is not None and rows.sequence.num_computed > 25 for rows in batch
        ):
            raise RuntimeError("made to fail")
        return run(batch)

    monkeypatch.setattr(driver.engine.runner, "run", failing)
    driver.run(
        greedy_request("bad", ids(1), identities["deep"], 20),
        greedy_request("good", ids(1), identities["plain"], 20),
    )
    assert isinstance(driver.transcripts["bad"].last, Failed)
    assert driver.transcripts["good"].last == Finished("good")
    assert driver.engine.scheduler.pages.num_used == 0


def test_after_numbers_that_are_none_nobody_finds_the_pages_of_either_pass(
    start, identities, monkeypatch
):
    driver = start()
    driver.load(identities["deep"])
    run = driver.engine.runner.run

    def poisoned(batch: Any) -> Any:
        logits = run(batch)
        if logits.hidden is None or not batch[0].sequence.num_computed:
            return logits
        return replace(logits, hidden=torch.full_like(logits.hidden, torch.nan))

    monkeypatch.setattr(driver.engine.runner, "run", poisoned)
    driver.run(greedy_request("r", ids(1, 2 * PAGE + 1), identities["deep"], 5))
    last = driver.transcripts["r"].last
    assert isinstance(last, Failed)
    assert last.code == "numerical_error"
    assert driver.engine.scheduler.pages.num_cached == 0


def test_what_has_no_seat_or_no_room_for_two_is_refused_by_name(start, identities):
    driver = start(max_num_seqs=1)
    driver.run(greedy_request("r", ids(1), identities["deep"], 3))
    last = driver.transcripts["r"].last
    assert isinstance(last, Failed)
    assert "--max-num-seqs is 1" in last.message
    driver = start(kv_cache_bytes=6 * PAGE_BYTES)
    driver.run(greedy_request("r", ids(1, 40), identities["deep"], 30),
               greedy_request("base", ids(1, 40), None, 30))  # fmt: skip
    last = driver.transcripts["r"].last
    assert isinstance(last, Failed)
    assert (last.code, last.param) == ("invalid_request", "max_tokens")
    assert driver.transcripts["base"].last == Finished("base")


# --------------------------------------------------------------------------- the prefix cache
def cached(driver: Driver, request_id: str) -> int:
    (started,) = [e for e in driver.transcripts[request_id].events if isinstance(e, Started)]
    return started.num_cached_tokens


def test_both_passes_find_their_pages_and_the_answer_is_the_same(
    start, identities, oracles, model_dir
):
    prompt = ids(1, 3 * PAGE + 5)
    driver = start()
    driver.run(greedy_request("first", prompt, identities["deep"], 6))
    driver.rows_per_step.clear()
    second = greedy_request("second", prompt, identities["deep"], 6)
    driver.run(second)
    assert (cached(driver, "first"), cached(driver, "second")) == (0, 3 * PAGE)
    assert driver.rows_per_step[:2] == [5, 5], "both skipped what was there"
    assert driver.transcripts["first"].tokens == driver.transcripts["second"].tokens
    check_tokens(driver, second, model_dir, oracles["deep"])


def test_the_first_pass_shares_pages_with_the_base_both_ways(start, identities):
    prompt = ids(1, 3 * PAGE + 5)
    driver = start()
    driver.load(identities["deep"])
    driver.run(greedy_request("base", prompt, None, 1))
    driver.rows_per_step.clear()
    # Its own pages are not there, and what weighs its experts is made of every token.
    driver.run(greedy_request("x", prompt, identities["deep"], 1))
    assert driver.rows_per_step == [len(prompt), len(prompt)]
    assert cached(driver, "x") == 0
    assert driver.engine.scheduler.pages.num_cached == 6, "the base's pages are there once"
    driver.run(greedy_request("base again", prompt, None, 1))
    assert cached(driver, "base again") == 3 * PAGE


def test_a_scout_without_pages_runs_what_its_main_has_found(start, identities, oracles, model_dir):
    prompt = ids(1, 3 * PAGE + 5)
    driver = start()
    recorder = LogitsRecorder(driver.engine)
    driver.run(greedy_request("first", prompt, identities["deep"], 4))
    pages = driver.engine.scheduler.pages
    keys = driver.engine.scheduler.page_keys
    parent = keys.root((), ())
    for start_at in range(0, 3 * PAGE, PAGE):  # the base's pages are taken by somebody
        parent = keys.page(parent, prompt[start_at : start_at + PAGE])
        page = pages.find(parent)
        del pages._page_of[pages._key_of.pop(page)], pages._cached[page]
        pages._free.append(page)
    driver.rows_per_step.clear()
    driver.run(greedy_request("second", prompt, identities["deep"], 4))
    assert driver.rows_per_step[:2] == [len(prompt), 5]
    assert cached(driver, "second") == 3 * PAGE
    seen = [*prompt, *driver.transcripts["second"].tokens[:-1]]
    expected = xlora_oracle.logits(model_dir, oracles["deep"], seen)[-4:]
    peft_oracle.assert_matches(recorder.of("second"), expected)


def test_evicted_and_loaded_again_it_gives_the_same_bits(start, identities):
    # Room for one of them at a time; the second reading is from the packed form.
    driver = start(max_adapter_bytes=220 << 10, prefix_cache=False)
    recorder = LogitsRecorder(driver.engine)
    for _ in range(2):
        for name in ("deep", "flat", "top"):
            driver.run(scored(name, ids(1), identities[name], 3))
    # Which of two goes for a third is decided by what loading them took.
    assert driver.engine.counters["adapter_evictions"] >= 3
    for name in ("deep", "flat", "top"):
        rows = recorder.of(name)
        assert torch.equal(rows[: len(rows) // 2], rows[len(rows) // 2 :]), name


# --------------------------------------------------------------------------- what a request chooses
@pytest.mark.parametrize("name", ["deep", "top", "raw"])
def test_options_are_what_the_original_lets_be_set(name, start, identities, oracles, model_dir):
    driver = start()
    recorder = LogitsRecorder(driver.engine)
    weight = "global_scaling_weight"
    asked = {"one": {"top_k": 1}, "two": {"top_k": 2}, "all": {"top_k": 3},
             "strong": {weight: 1.5}, "none": {weight: 0.0}}  # fmt: skip
    meant = {"one": {"top_k": 1}, "two": {"top_k": 2}, "all": {"top_k": None},
             "strong": {"weight": 1.5}, "none": {"weight": 0.0}}  # fmt: skip
    requests = [choosing(scored(key, ids(1), identities[name]), **options)
                for key, options in asked.items()]  # fmt: skip
    driver.run(*requests)
    for request in requests:
        oracle = oracles[name].chosen(**meant[request.id])
        check(recorder, driver, request, model_dir, oracle)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("deep", {"top_k": 4}, "a whole number from 1 to 3"),
        ("deep", {"top_k": 0}, "a whole number from 1 to 3"),
        ("deep", {"frozen_after": -1}, "a whole number from 0"),
        ("deep", {"temperature": 2.0}, "'top_k', 'global_scaling_weight', 'frozen_after'"),
        ("resting", {"top_k": 1}, "'global_scaling_weight', 'frozen_after'"),
        ("plain", {"top_k": 1}, "it has none"),
    ],
)
def test_what_an_adapter_does_not_offer_is_refused(name, options, words, start, identities):
    driver = start()
    driver.run(choosing(greedy_request("r", ids(1), identities[name], 2), **options))
    last = driver.transcripts["r"].last
    assert isinstance(last, Failed)
    assert words in last.message


def test_adapters_that_act_in_different_first_passes_are_not_served_together(start, identities):
    uses = (AppliedAdapter(identities["resting"]), AppliedAdapter(identities["deep"]))
    driver = start()
    driver.run(replace(greedy_request("r", ids(1), None, 2), adapters=uses))
    last = driver.transcripts["r"].last
    assert isinstance(last, Failed)
    assert "'resting' acts itself" in last.message


def test_choices_share_pages_with_their_equals_alone(start, identities):
    driver, prompt = start(), ids(1, 2 * PAGE + 3)
    asked: dict[str, dict[str, Any]] = {
        "plain": {}, "one": {"top_k": 1}, "weak": {"global_scaling_weight": 0.5},
        "one again": {"top_k": 1}, "as it is": {"top_k": 3, "global_scaling_weight": 1.0},
        "frozen": {"frozen_after": 0},
    }  # fmt: skip
    for name, options in asked.items():
        driver.run(choosing(greedy_request(name, prompt, identities["deep"], 2), **options))
    found = [cached(driver, name) for name in asked]
    assert found == [0, 0, 0, 2 * PAGE, 2 * PAGE, 2 * PAGE], "a prompt's weights are never frozen"


# --------------------------------------------------------------------------- frozen weights
@pytest.mark.parametrize("num_exact", [0, 3, 20])
def test_frozen_weights_are_those_of_the_last_exact_token(
    num_exact, start, identities, oracles, model_dir
):
    prompt = ids(1)
    driver = start()
    recorder = LogitsRecorder(driver.engine)
    request = choosing(greedy_request("r", prompt, identities["deep"], 10), frozen_after=num_exact)
    driver.run(request)
    oracle = oracles["deep"].chosen(frozen_from=len(prompt) + num_exact)
    check(recorder, driver, request, model_dir, oracle)
    (started,) = [e for e in driver.transcripts["r"].events if isinstance(e, Started)]
    assert [served.is_approximate for served in started.served] == [True]
    # Behind them one row a token.
    assert sum(driver.rows_per_step) == 2 * len(prompt) + 9 + min(num_exact, 9)


def test_exact_and_frozen_requests_say_which_they_are(start, identities):
    driver = start()
    driver.run(greedy_request("r", ids(1), identities["deep"], 2))
    (started,) = [e for e in driver.transcripts["r"].events if isinstance(e, Started)]
    assert [served.is_approximate for served in started.served] == [False]


@pytest.mark.parametrize("name", ["deep", "resting"])
def test_an_embedding_is_of_the_second_pass(name, start, identities, oracles, model_dir):
    """Beside another request, in parts, and with what an earlier one left in the cache."""
    driver = start(max_num_batched_tokens=24, max_num_seqs=8)
    prompt = ids(1, 2 * PAGE + 5)
    driver.run(greedy_request("before", prompt, identities[name], 2))
    used = (AppliedAdapter(identities[name]),)
    driver.run(
        Request("r", tuple(prompt), SamplingParams(max_tokens=0), used, kind="embed"),
        greedy_request("beside", ids(2), identities["plain"], 5),
    )
    events = driver.transcripts["r"].events
    assert [type(event) for event in events] == [Started, Embedded, Finished]
    found = torch.tensor(events[1].vector, dtype=torch.float32)
    expected = xlora_oracle.mean_hidden(model_dir, oracles[name], prompt)
    peft_oracle.assert_matches(found, expected)
    base = peft_oracle.mean_hidden(model_dir, None, prompt)
    assert (base - expected).abs().max() > 0.01 * base.abs().max()


def test_a_frozen_request_finds_no_page_of_another_moment(start, identities, oracles, model_dir):
    """The same tokens, frozen at different positions: the pages behind those differ."""
    driver = start()
    recorder = LogitsRecorder(driver.engine)
    prompt = ids(1, PAGE)
    first = choosing(greedy_request("a", prompt, identities["deep"], 3 * PAGE), frozen_after=2)
    driver.run(first)
    longer = [*prompt, *driver.transcripts["a"].tokens[: 2 * PAGE + 1]]
    second = choosing(greedy_request("b", longer, identities["deep"], 3), frozen_after=2)
    driver.run(second)
    assert cached(driver, "b") == PAGE
    oracle = oracles["deep"].chosen(frozen_from=len(longer) + 2)
    check(recorder, driver, second, model_dir, oracle)
    driver.run(replace(first, id="c"))
    assert driver.transcripts["c"].tokens == driver.transcripts["a"].tokens


def test_the_last_exact_weights_are_made_again_where_all_pages_are_found(
    start, identities, oracles, model_dir
):
    """The first pass ends with a page, which is there when the request comes back."""
    driver = start()
    request = choosing(
        greedy_request("r", ids(1, 2 * PAGE - 3), identities["deep"], 30), frozen_after=3
    )
    driver.submit(request)
    for _ in range(32):
        driver.step_or_wait()
    scheduler = driver.engine.scheduler
    (leader,) = scheduler.running
    assert leader.num_computed > 3 * PAGE
    scheduler._preempt(leader)
    driver.rows_per_step.clear()
    driver.run()
    assert driver.rows_per_step[0] == PAGE, "no cached page of the first pass holds its last token"
    check_tokens(driver, request, model_dir, oracles["deep"].chosen(frozen_from=2 * PAGE))


def test_a_frozen_request_is_preempted_and_goes_on(start, identities, oracles, model_dir):
    # Room for the short first passes, and not for both requests to their end.
    driver = start(kv_cache_bytes=9 * PAGE_BYTES)
    requests = [
        choosing(greedy_request(name, ids(i, 20), identities["deep"], 50), frozen_after=3)
        for i, name in enumerate("ab")
    ]
    driver.run(*requests)
    assert driver.engine.counters["preemptions"] > 0
    for request in requests:
        check_tokens(driver, request, model_dir, oracles["deep"].chosen(frozen_from=23))


def _with_lora(model_dir: Path, directory: Path, scale: float) -> torch.nn.Module:
    """The model with a part of a LoRA in its weights."""
    base = peft_oracle.load_base(model_dir)
    merged = copy.deepcopy(peft_oracle._model(model_dir, directory)).merge_and_unload()
    with torch.no_grad():
        for own, other in zip(base.parameters(), merged.parameters(), strict=True):
            own.lerp_(other, scale)
    return base
