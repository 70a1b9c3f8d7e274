"""Several adapters, ranks and invocations in one batch equal dense sums and PEFT, row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.oracle import adapters, composed, peft_oracle, tiny
from tests.oracle.composed import Part
from tests.support.engines import Driver, LogitsRecorder, greedy_request, new_engine, put_blob

from polyadapt.adapters.adapter import Option, Traits
from polyadapt.types import AdapterId, AppliedAdapter, Failed, Finished, Request, Started

NAMES = ("a", "b", "c", "d")
RANKS = {"a": 3, "b": 8, "c": 4, "d": 16}
# The head as well, whose rows have a plan of their own.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
PAGE = 16
NUM_TOKENS = 5
INVOCATION = (11, 12, 13)


@pytest.fixture(scope="module")
def model_dir(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def blob_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blobs")


@pytest.fixture(scope="module")
def directories(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: adapters.make_lora(model_dir, root / name, RANKS[name], TARGETS, seed=number)
        for number, name in enumerate(NAMES)
    }


@pytest.fixture(scope="module")
def identities(blob_root: Path, directories: dict[str, Path]) -> dict[str, AdapterId]:
    return {name: put_blob(blob_root, path, name) for name, path in directories.items()}


@pytest.fixture
def start(model_dir, blob_root, identities):
    """A function that makes a driver over a new engine; traits stand for those of a family."""
    made: list[Driver] = []

    def make(traits: dict[str, Traits] | None = None, **settings) -> Driver:
        driver = Driver(new_engine(model_dir, blob_root, **settings))
        given = {identities[name].digest: own for name, own in (traits or {}).items()}
        read = driver.engine.pool._read

        def read_with_traits(digest: str):
            packed = read(digest)
            return replace(packed, traits=given.get(digest, packed.traits))

        driver.engine.pool._read = read_with_traits
        made.append(driver)
        return driver

    yield make
    for driver in made:
        driver.engine.pool.close()


def ids(number: int, length: int = 20) -> list[int]:
    """A prompt without any token of the invocation."""
    wanted = [i for i in tiny.prompt_ids(4 * length, seed=number) if i not in INVOCATION]
    return wanted[:length]


def invoking(*at: int, length: int = 40, seed: int = 0) -> list[int]:
    """A prompt with the invocation at these positions."""
    prompt = ids(seed, length)
    for position in at:
        prompt[position : position + len(INVOCATION)] = INVOCATION
    return prompt


def applying(request: Request, *uses: AppliedAdapter) -> Request:
    return replace(request, adapters=uses)


def whole(request_id: str, prompt: list[int], *uses: AppliedAdapter) -> Request:
    """A request whose every row has logits."""
    request = greedy_request(request_id, prompt, None, NUM_TOKENS, num_prompt_logprobs=0)
    return applying(request, *uses)


def sequence_of(driver: Driver, request: Request) -> list[int]:
    """The tokens whose rows were computed."""
    return [*request.prompt_ids, *driver.transcripts[request.id].tokens[:-1]]


def cached(driver: Driver, request_id: str) -> int:
    (started,) = [e for e in driver.transcripts[request_id].events if isinstance(e, Started)]
    return started.num_cached_tokens


# --------------------------------------------------------------------------- sums
MIXTURES: list[dict[str, float]] = [
    {},
    {"a": 1.0},
    {"a": 0.5, "b": 1.0},
    {"c": -0.75, "a": 2.0},
    {"a": 1.0, "b": 0.25, "d": 1.5},
    {"d": 0.3, "c": 1.0, "b": -1.0, "a": 0.6},
    {"a": 1.0, "b": 0.0, "c": 0.4},
    {"b": 1.0},
]


def test_a_mixed_batch_of_compositions_equals_the_sums(start, identities, directories, model_dir):
    driver = start()
    driver.load(*identities.values())
    recorder = LogitsRecorder(driver.engine)
    requests = [
        whole(f"r{i}", ids(i), *(AppliedAdapter(identities[n], s) for n, s in mixture.items()))
        for i, mixture in enumerate(MIXTURES)
    ]
    driver.run(*requests)
    assert max(recorder.adapters_per_step) == 4
    for request, mixture in zip(requests, MIXTURES, strict=True):
        parts = [Part(directories[name], scale) for name, scale in mixture.items()]
        expected = composed.logits(model_dir, parts, sequence_of(driver, request))
        peft_oracle.assert_matches(recorder.of(request.id), expected)


def test_the_order_of_adapters_changes_no_bit_and_is_the_callers_in_the_reply(start, identities):
    uses = [AppliedAdapter(identities[name], 0.3 + i) for i, name in enumerate(NAMES)]
    rows = []
    for number, order in enumerate([uses, uses[::-1], uses[2:] + uses[:2]]):
        driver = start()
        recorder = LogitsRecorder(driver.engine)
        driver.run(whole(f"r{number}", ids(0), *order))
        rows.append(recorder.of(f"r{number}"))
        started = driver.transcripts[f"r{number}"].events[0]
        assert [s.adapter for s in started.served] == [use.adapter for use in order]
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


def test_samples_of_a_composition_share_its_order(start, identities):
    uses = [AppliedAdapter(identities[name], 0.5) for name in ("d", "a")]
    request = replace(whole("r", ids(1), *uses), n=3)
    driver = start(max_num_seqs=1)  # admitted one after the other
    driver.run(request)
    expected = start().run(whole("x", ids(1), *uses))["x"].tokens
    assert [driver.transcripts["r"].token_ids[i] for i in range(3)] == [expected] * 3


@pytest.mark.parametrize("names", ["a", "ab", "dcba"])
def test_scale_zero_is_the_base_to_the_bit(start, identities, names):
    traits = {
        "b": Traits(nested_rank=8),
        "c": Traits(replaced=("lm_head.weight",), is_scalable=False),
        "d": Traits(invocation=INVOCATION),
    }
    driver = start(traits)
    recorder = LogitsRecorder(driver.engine)
    prompt = invoking(3, length=30)
    driver.run(whole("base", prompt))
    ranks = {"b": 3}
    zero = [AppliedAdapter(identities[name], 0.0, ranks.get(name)) for name in names]
    driver.run(whole("zero", prompt, *zero))
    assert torch.equal(recorder.of("zero"), recorder.of("base"))


def test_whoever_replaces_parameters_has_the_first_lane(start, identities):
    driver = start({"d": Traits(replaced=("x",)), "c": Traits(replaced=("y",))})
    uses = [AppliedAdapter(identities[name]) for name in ("b", "d", "a", "c")]
    driver.submit(whole("r", ids(0), *uses))
    while not driver.engine.scheduler.running:
        driver.step_or_wait()
    (sequence,) = driver.engine.scheduler.running
    first, second = sequence.slots[:2]
    by_slot = {slot: entry.digest for slot, entry in driver.engine.pool._by_slot.items()}
    assert {by_slot[first], by_slot[second]} == {identities[n].digest for n in ("c", "d")}
    applied = [use.adapter.digest for use in sequence.group.adapters]
    assert [by_slot[slot] for slot in sequence.slots] == applied
    driver.run()


def test_others_are_added_to_what_a_replacing_adapter_makes_of_the_base(
    start, identities, directories, blob_root, model_dir, tmp_path
):
    dora = [
        adapters.make_lora(model_dir, tmp_path / f"dora{i}", 4, TARGETS[:4], seed=i, use_dora=True)
        for i in range(2)
    ]
    uses = [AppliedAdapter(put_blob(blob_root, path, path.name)) for path in dora]
    plain = [AppliedAdapter(identities["a"], 0.5), AppliedAdapter(identities["b"], -1.0)]
    driver = start()
    recorder = LogitsRecorder(driver.engine)
    requests = [
        whole("one", ids(0), *plain, uses[0]),
        whole("other", ids(1), uses[1], plain[0]),
        whole("pair", ids(2), *uses),
    ]
    driver.run(*requests)
    parts = [Part(directories["a"], 0.5), Part(directories["b"], -1.0)]
    for request, own, replacing in zip(requests, (parts, parts[:1]), dora, strict=False):
        sequence = sequence_of(driver, request)
        expected = composed.logits(model_dir, own, sequence, replacing)
        peft_oracle.assert_matches(recorder.of(request.id), expected)
    assert "k_proj.weight" in driver.transcripts["pair"].last.message


def test_what_cannot_be_served_together_fails_before_a_row_runs(start, identities):
    driver = start({"a": Traits(replaced=("head",)), "b": Traits(replaced=("head", "norm"))})
    pair = [AppliedAdapter(identities[name]) for name in ("a", "b")]
    good = greedy_request("good", ids(1), identities["a"], 3)
    driver.run(replace(whole("bad", ids(0), *pair), n=2), good)
    events = driver.transcripts["bad"].events
    assert [type(event) for event in events] == [Failed]
    assert (events[0].code, events[0].param) == ("invalid_request", "adapters")
    assert all(word in events[0].message for word in ("'a'", "'b'", "head"))
    assert driver.transcripts["good"].last == Finished("good")


# --------------------------------------------------------------------------- nested ranks
def test_four_ranks_of_one_adapter_in_one_batch_equal_truncated_adapters(
    start, identities, directories, model_dir
):
    driver = start({"b": Traits(nested_rank=8), "d": Traits(nested_rank=16)})
    driver.load(*identities.values())
    recorder = LogitsRecorder(driver.engine)
    b, d, a = (identities[name] for name in ("b", "d", "a"))
    cases = [
        [AppliedAdapter(b, 1.0, 1)],
        [AppliedAdapter(b, 1.0, 2)],
        [AppliedAdapter(b, 0.5, 5)],
        [AppliedAdapter(b)],
        [AppliedAdapter(d, 1.0, 7)],
        [AppliedAdapter(b, 1.0, 3), AppliedAdapter(d, -0.5, 12)],
        [AppliedAdapter(a)],
        [],
    ]
    requests = [whole(f"r{i}", ids(i), *uses) for i, uses in enumerate(cases)]
    driver.run(*requests)
    assert max(recorder.adapters_per_step) == 3
    for request, uses in zip(requests, cases, strict=True):
        parts = [Part(directories[use.adapter.name], use.scale, use.rank) for use in uses]
        expected = composed.logits(model_dir, parts, sequence_of(driver, request))
        peft_oracle.assert_matches(recorder.of(request.id), expected)


def test_ranks_share_pages_with_themselves_alone(start, identities):
    driver = start({"b": Traits(nested_rank=8)})
    prompt = ids(0, 2 * PAGE + 3)
    for name, rank in [("full", None), ("two", 2), ("three", 3), ("again", 2), ("eight", 8)]:
        request = greedy_request(name, prompt, None, 2)
        driver.run(applying(request, AppliedAdapter(identities["b"], 1.0, rank)))
    found = [cached(driver, name) for name in ("full", "two", "three", "again", "eight")]
    assert found == [0, 0, 0, 2 * PAGE, 2 * PAGE]


@pytest.mark.parametrize(("name", "rank", "said"), [("b", 9, "2 to 8"), ("a", 2, "not nested")])
def test_a_rank_that_is_not_served_fails_its_request_alone(start, identities, name, rank, said):
    driver = start({"b": Traits(nested_rank=8, min_nested_rank=2)})
    bad = whole("bad", ids(0), AppliedAdapter(identities[name], 1.0, rank))
    driver.run(bad, greedy_request("good", ids(1), identities[name], 3))
    last = driver.transcripts["bad"].last
    assert isinstance(last, Failed)
    assert (last.code, last.param) == ("invalid_request", "adapters[0].rank")
    assert said in last.message
    assert driver.transcripts["good"].last == Finished("good")


# --------------------------------------------------------------------------- options
PARTS = Option("parts", "words", "which", ("x", "y"), ("x", "y"), components=((0, 3), (3, 8)))


def choosing(adapter: AdapterId, *parts: str) -> AppliedAdapter:
    return AppliedAdapter(adapter, options=(("parts", parts),))


def test_parts_of_one_adapter_in_one_batch_are_served_apart_and_none_is_the_base(start, identities):
    b = identities["b"]
    uses = {"all": [choosing(b, "y", "x")], "x": [choosing(b, "x")], "y": [choosing(b, "y")],
            "none": [choosing(b)], "plain": [AppliedAdapter(b)], "base": []}  # fmt: skip
    driver = start({"b": Traits(options=(PARTS,))})
    recorder = LogitsRecorder(driver.engine)
    driver.load(b)
    driver.run(*(whole(name, ids(0), *use) for name, use in uses.items()))
    rows = {name: recorder.of(name)[: len(ids(0))] for name in uses}
    assert torch.equal(rows["all"], rows["plain"])
    assert torch.equal(rows["none"], rows["base"])
    assert not torch.allclose(rows["x"], rows["y"], atol=1e-3)
    assert not torch.allclose(rows["x"], rows["plain"], atol=1e-3)


def test_choices_share_pages_with_their_equals_alone(start, identities):
    driver = start({"b": Traits(options=(PARTS,))})
    prompt, b = ids(0, 2 * PAGE + 3), identities["b"]
    asked = {"plain": AppliedAdapter(b), "x": choosing(b, "x"), "y": choosing(b, "y"),
             "x again": choosing(b, "x"), "both": choosing(b, "y", "x")}  # fmt: skip
    for name, use in asked.items():
        driver.run(applying(greedy_request(name, prompt, None, 2), use))
    found = [cached(driver, name) for name in asked]
    assert found == [0, 0, 0, 2 * PAGE, 2 * PAGE]


@pytest.mark.parametrize(
    ("options", "code", "param"),
    [
        ((("parts", ("x", "z")),), "invalid_request", "adapters[0].options.parts"),
        ((("tempo", 3),), "unsupported_field", "adapters[0].options.tempo"),
    ],
)
def test_an_option_that_is_not_served_fails_its_request_alone(
    start, identities, options, code, param
):
    driver = start({"b": Traits(options=(PARTS,))})
    bad = whole("bad", ids(0), AppliedAdapter(identities["b"], options=options))
    driver.run(bad, greedy_request("good", ids(1), identities["b"], 3))
    last = driver.transcripts["bad"].last
    assert isinstance(last, Failed)
    assert (last.code, last.param) == (code, param)
    assert "parts" in last.message
    assert driver.transcripts["good"].last == Finished("good")


# --------------------------------------------------------------------------- invocation
INVOKED = {"a": Traits(invocation=INVOCATION)}
PROMPTS = {
    "start": invoking(0),
    "middle": invoking(17),
    "end": invoking(37),
    "twice": invoking(5, 25),
    "page": invoking(14),  # over the end of a page
    "absent": ids(3, 40),
}


@pytest.mark.parametrize("num_tokens", [512, 7])
def test_an_invoked_adapter_equals_pefts_own(start, identities, directories, model_dir, num_tokens):
    """In one batch with the base, another adapter and a composition; in one chunk and in many."""
    driver = start(INVOKED, max_num_batched_tokens=num_tokens, max_num_seqs=9)
    driver.load(*identities.values())
    recorder = LogitsRecorder(driver.engine)
    invoked = AppliedAdapter(identities["a"])
    requests = [whole(name, prompt, invoked) for name, prompt in PROMPTS.items()]
    plain = [whole("base", PROMPTS["middle"]), whole("c", ids(5), AppliedAdapter(identities["c"]))]
    driver.run(*requests, *plain)
    for request in requests:
        sequence = sequence_of(driver, request)
        expected = composed.activated_logits(
            model_dir, directories["a"], INVOCATION, sequence, len(request.prompt_ids)
        )
        peft_oracle.assert_matches(recorder.of(request.id), expected)
    ours, base = recorder.of("middle"), recorder.of("base")
    assert torch.allclose(ours[:17], base[:17], atol=1e-5)
    assert not torch.allclose(ours[17], base[17], atol=1e-2)
    for request, names in zip(plain, [[], ["c"]], strict=True):
        parts = [Part(directories[name]) for name in names]
        expected = composed.logits(model_dir, parts, sequence_of(driver, request))
        peft_oracle.assert_matches(recorder.of(request.id), expected)


def test_an_invoked_checkpoint_of_pefts_is_served_as_peft_serves_it(
    start, blob_root, model_dir, tmp_path
):
    directory = adapters.make_lora(
        model_dir, tmp_path / "a", 5, TARGETS, alora_invocation_tokens=list(INVOCATION)
    )
    use = AppliedAdapter(put_blob(blob_root, directory, "checkpoint"))
    driver = start()
    recorder = LogitsRecorder(driver.engine)
    requests = [whole(name, prompt, use) for name, prompt in PROMPTS.items()]
    driver.run(*requests)
    for request in requests:
        sequence = sequence_of(driver, request)
        expected = composed.activated_logits(
            model_dir, directory, INVOCATION, sequence, len(request.prompt_ids)
        )
        peft_oracle.assert_matches(recorder.of(request.id), expected)


def test_an_absent_invocation_is_the_base_to_the_bit(start, identities):
    driver = start(INVOKED)
    recorder = LogitsRecorder(driver.engine)
    driver.run(whole("base", PROMPTS["absent"]))
    driver.run(whole("absent", PROMPTS["absent"], AppliedAdapter(identities["a"], 2.0)))
    assert torch.equal(recorder.of("absent"), recorder.of("base"))


def test_a_composition_with_an_invoked_adapter_is_the_sum_from_there_on(
    start, identities, directories, model_dir
):
    """In positions: before the invocation the other adapter alone."""
    driver = start(INVOKED)
    recorder = LogitsRecorder(driver.engine)
    both = [AppliedAdapter(identities["c"], 0.5), AppliedAdapter(identities["a"])]
    request = whole("both", invoking(0), *both)
    later = whole("later", invoking(17), *both)
    driver.run(request, later)
    parts = [Part(directories["c"], 0.5), Part(directories["a"])]
    expected = composed.logits(model_dir, parts, sequence_of(driver, request))
    peft_oracle.assert_matches(recorder.of("both"), expected)
    alone = composed.logits(model_dir, parts[:1], later.prompt_ids[:17])
    peft_oracle.assert_matches(recorder.of("later")[:17], alone)


def run_one(driver: Driver, name: str, prompt: list[int], use: AppliedAdapter | None) -> int:
    """Run a request; return how much of its prompt it found."""
    request = greedy_request(name, prompt, None, 4)
    driver.run(applying(request, use) if use else request)
    return cached(driver, name)


def test_the_pages_before_an_invocation_are_the_bases_and_those_behind_are_not(start, identities):
    driver = start(INVOKED)
    use = AppliedAdapter(identities["a"])
    prompt = invoking(2 * PAGE + 3, length=4 * PAGE + 2)
    assert run_one(driver, "base", prompt, None) == 0
    assert run_one(driver, "invoked", prompt, use) == 2 * PAGE
    assert run_one(driver, "again", prompt, use) == 4 * PAGE
    half = replace(use, scale=0.5)
    assert run_one(driver, "half", prompt, half) == 2 * PAGE
    assert run_one(driver, "base again", prompt, None) == 4 * PAGE
    for name in ("invoked", "half"):
        alone = start(INVOKED, prefix_cache=False)
        run_one(alone, name, prompt, half if name == "half" else use)
        assert alone.transcripts[name].tokens == driver.transcripts[name].tokens
    assert driver.transcripts["again"].tokens == driver.transcripts["invoked"].tokens
    assert driver.transcripts["base again"].tokens == driver.transcripts["base"].tokens


def test_what_the_invoked_computed_first_serves_the_base(start, identities):
    driver = start(INVOKED)
    prompt = invoking(PAGE + 1, length=3 * PAGE + 2)
    assert run_one(driver, "invoked", prompt, AppliedAdapter(identities["a"])) == 0
    assert run_one(driver, "base", prompt, None) == PAGE
    absent = ids(7, 3 * PAGE + 2)
    assert run_one(driver, "absent", absent, AppliedAdapter(identities["a"])) == 0
    assert run_one(driver, "absent base", absent, None) == 3 * PAGE


def test_equal_tokens_of_a_page_are_not_enough_where_the_invocation_ends_behind_it(
    start, identities
):
    """One prompt is invoked at 3, the other at 15 again: over the end of the first page."""
    early = invoking(3, length=3 * PAGE)
    late = early.copy()
    late[15 : 15 + len(INVOCATION)] = INVOCATION
    early[15] = INVOCATION[0]
    assert early[:PAGE] == late[:PAGE]
    use = AppliedAdapter(identities["a"])
    driver = start(INVOKED)
    assert run_one(driver, "early", early, use) == 0
    assert run_one(driver, "late", late, use) == 0
    alone = start(INVOKED)
    run_one(alone, "late", late, use)
    assert alone.transcripts["late"].tokens == driver.transcripts["late"].tokens


def test_a_replaced_invoked_adapter_finds_only_the_bases_pages(start, identities):
    driver = start(dict.fromkeys(("a", "b"), INVOKED["a"]))
    prompt = invoking(PAGE + 1, length=3 * PAGE + 2)
    old = AppliedAdapter(replace(identities["a"], name="n"))
    new = AppliedAdapter(AdapterId("n", 2, identities["b"].digest))
    assert run_one(driver, "old", prompt, old) == 0
    assert run_one(driver, "new", prompt, new) == PAGE


def test_speculation_and_preemption_leave_an_invoked_answer_as_it_is(start, identities):
    prompt = invoking(5, 21, length=30)
    bias = tuple((token_id, 60.0) for token_id in tiny.prompt_ids(3, seed=99))
    request = greedy_request("r", prompt, None, 30, logit_bias=bias)
    request = applying(request, AppliedAdapter(identities["a"]))
    expected = start(INVOKED, prefix_cache=False).run(request)["r"].tokens
    drafting = start(INVOKED, speculative_tokens=4)
    assert drafting.run(request)["r"].tokens == expected
    assert drafting.engine.counters["spec_accepted_tokens"] > 0
    for has_cache in (False, True):
        driver = start(INVOKED, prefix_cache=has_cache)
        driver.submit(request)
        for _ in range(40):
            driver.step_or_wait()
            if len(driver.transcripts["r"].token_ids.get(0, ())) >= 9:
                break
        (sequence,) = driver.engine.scheduler.running
        driver.engine.scheduler._preempt(sequence)
        driver.run()
        assert driver.transcripts["r"].tokens == expected


def test_exact_mode_gives_gated_rows_the_same_bits_in_any_company(start, identities):
    traits = INVOKED | {"b": Traits(nested_rank=8)}
    request = whole(
        "r", invoking(9), AppliedAdapter(identities["a"]), AppliedAdapter(identities["b"], 1.0, 3)
    )
    others = [
        whole("x", ids(4), AppliedAdapter(identities["b"], 1.0, 2)),
        whole("y", invoking(3), AppliedAdapter(identities["a"])),
        whole("z", ids(5)),
    ]
    rows = []
    for company in ([], others):
        driver = start(traits, exact=True, max_num_batched_tokens=24)
        driver.load(*identities.values())
        recorder = LogitsRecorder(driver.engine)
        driver.run(*company, request)
        rows.append(recorder.of("r"))
    assert torch.equal(*rows)
