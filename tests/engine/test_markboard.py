"""Many users' marks in one batch, each against its own branches written out one by one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.oracle import adapters, peft_oracle, tiny
from tests.oracle.marks import behind, marked, write_mark
from tests.support.engines import Driver, LogitsRecorder, greedy_request, new_engine, put_blob
from torch import nn
from transformers import AutoModelForCausalLM

from polyadapt.models.load import model_digest
from polyadapt.types import AdapterId, AppliedAdapter, Failed, Request, Started

PAGE = 16
NUM_TOKENS = 4
LAYER_0 = "model.layers.0.mlp.down_proj"
ALL_SIGNATURES = [f"{number:05b}" for number in range(32)]


@pytest.fixture(scope="module")
def model_dir(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def base(model_dir: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def directories(model_dir: Path, base: nn.Module, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("marks")
    early = [LAYER_0, *behind(base)]
    forms: dict[str, dict[str, Any]] = {
        "hinge": {},
        "linear": {"gate": "linear", "encoding": "antipodal", "rank": 2},
        "early": {"modules": early, "has_veto": False},
        "first": {"positions": "first_answer", "strength": 1.0},
        "first-early": {"positions": "first_answer", "modules": early, "has_veto": False},
    }
    made = {
        name: write_mark(base, root / name, base_hash=model_digest(model_dir), **form)
        for name, form in forms.items()
    }
    made["task"] = adapters.make_lora(model_dir, root / "task", 4, seed=5)
    return made


@pytest.fixture(scope="module")
def blob_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blobs")


@pytest.fixture(scope="module")
def identities(blob_root: Path, directories: dict[str, Path]) -> dict[str, AdapterId]:
    return {name: put_blob(blob_root, path, name) for name, path in directories.items()}


@pytest.fixture
def start(model_dir, blob_root, identities):
    """A function that makes a driver over a new engine, all adapters loaded."""
    made: list[Driver] = []

    def make(**settings: Any) -> Driver:
        room = {"max_num_seqs": 64, "max_num_batched_tokens": 2048}
        made.append(Driver(new_engine(model_dir, blob_root, **(room | settings))))
        made[-1].load(*identities.values())
        return made[-1]

    yield make
    for driver in made:
        driver.engine.pool.close()


def sign(identity: AdapterId, bits: str) -> AppliedAdapter:
    return AppliedAdapter(identity, options=(("signature", bits),), is_mandatory=True)


def whole(name: str, prompt: list[int], *applied: AppliedAdapter, num: int = NUM_TOKENS) -> Request:
    return replace(greedy_request(name, prompt, None, num, num_prompt_logprobs=0), adapters=applied)


def run(driver: Driver, *requests: Request) -> dict[str, torch.Tensor]:
    recorder = LogitsRecorder(driver.engine)
    driver.run(*requests)
    return {request.id: recorder.of(request.id) for request in requests}


@torch.no_grad()
def expected_of(oracle: nn.Module, driver: Driver, request: Request) -> torch.Tensor:
    made = driver.transcripts[request.id].tokens
    assert len(made) == request.sampling.max_tokens, driver.transcripts[request.id].last
    seen = [*request.prompt_ids, *made[:-1]]
    return oracle(input_ids=torch.tensor([seen])).logits[0]


def with_task(model_dir: Path, directory: Path) -> nn.Module:
    """The base with the task's adapter merged by PEFT."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers for a name that it has changed
        model = PeftModel.from_pretrained(peft_oracle.load_base(model_dir), directory)
    return model.merge_and_unload()


@pytest.mark.parametrize("name", ["hinge", "linear", "early"])
def test_every_signature_beside_task_adapters_and_the_base_in_one_batch(
    name, start, identities, directories, model_dir, base
):
    mark, task = identities[name], AppliedAdapter(identities["task"], 1.0)
    cases: dict[str, tuple[AppliedAdapter, ...]] = {
        f"user-{bits}": (sign(mark, bits),) for bits in ALL_SIGNATURES
    }
    cases |= {f"both-{bits}": (task, sign(mark, bits)) for bits in ALL_SIGNATURES[3::7]}
    cases |= {"task": (task,), "base": ()}
    requests = [
        whole(case, tiny.prompt_ids(3 + i % 9, seed=i), *applied)
        for i, (case, applied) in enumerate(cases.items())
    ]
    driver = start()
    found = run(driver, *requests)
    assert driver.rows_per_step.count(len(requests)) >= NUM_TOKENS - 1, "not in one batch"
    tuned = with_task(model_dir, directories["task"])
    plain = {"user": base, "base": base, "both": tuned, "task": tuned}
    for request in requests:
        kind, _, bits = request.id.partition("-")
        oracle = marked(plain[kind], directories[name], bits) if bits else plain[kind]
        try:
            peft_oracle.assert_matches(found[request.id], expected_of(oracle, driver, request))
        except AssertionError as error:
            raise AssertionError(f"{request.id}: {error}") from error
    # The oracle tells users apart.
    one, other = (
        expected_of(marked(base, directories[name], bits), driver, requests[0])
        for bits in ("00000", "00001")
    )
    assert (one - other).abs().max() > 1e-2 * one.abs().max()


def test_users_of_one_batch_are_one_segment(start, identities):
    driver = start()
    seen = []
    load = driver.engine.runner.tokens.load

    def spy(plan):
        seen.append([lane.num_segments for lane in plan.lanes])
        load(plan)

    driver.engine.runner.tokens.load = spy
    driver.run(
        *(
            whole(bits, tiny.prompt_ids(5, seed=i), sign(identities["hinge"], bits))
            for i, bits in enumerate(ALL_SIGNATURES)
        )
    )
    assert seen
    assert all(counts == [1] for counts in seen)


@pytest.mark.parametrize("name", ["hinge", "early", "first"])
def test_exact_mode_gives_every_user_the_bits_of_being_alone(name, start, identities):
    mark, task = identities[name], AppliedAdapter(identities["task"])
    requests = [
        whole(f"{i}", tiny.prompt_ids(4 + 3 * i, seed=i), *applied)
        for i, applied in enumerate(
            [(sign(mark, "01101"),), (sign(mark, "10010"), task), (task,), (),
             (sign(mark, "11111"),)]
        )
    ]  # fmt: skip
    together = run(start(exact=True, max_num_batched_tokens=24), *requests)
    for request in requests:
        (alone,) = run(start(exact=True), request).values()
        assert torch.equal(alone[-NUM_TOKENS:], together[request.id][-NUM_TOKENS:]), request.id


# --------------------------------------------------------------------------- whose signature
@pytest.mark.parametrize("options", [(), (("signature", "01101"),), (("signature", "no"),)])
def test_no_request_chooses_a_signature_or_does_without(options, start, identities):
    applied = AppliedAdapter(identities["hinge"], options=options)
    driver = start()
    driver.run(whole("r", tiny.prompt_ids(5, seed=0), applied))
    last = driver.transcripts["r"].last
    assert isinstance(last, Failed)
    assert last.code == "invalid_request"
    assert "as the server's policy says and never as a request does" in last.message
    assert not driver.transcripts["r"].token_ids


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "has no signature"),
        ((("signature", "0110"),), "5 bits as 5 characters 0 and 1, or in 2 hexadecimal digits"),
        ((("signature", 13),), "5 bits"),
        ((("signature", "2d"),), "5 bits"),  # 101101
    ],
)
def test_a_policy_without_a_whole_signature_serves_nothing_and_shows_none(
    options, words, start, identities
):
    applied = AppliedAdapter(identities["hinge"], options=options, is_mandatory=True)
    driver = start()
    driver.run(whole("r", tiny.prompt_ids(5, seed=0), applied))
    last = driver.transcripts["r"].last
    assert isinstance(last, Failed)
    assert last.code == "policy_conflict"
    assert words in last.message
    assert not any(str(value) in last.message.replace("5 bits as 5", "") for _, value in options)
    assert not driver.transcripts["r"].token_ids


# --------------------------------------------------------------------------- pages
def cached(driver: Driver, request_id: str) -> int:
    (started,) = [e for e in driver.transcripts[request_id].events if isinstance(e, Started)]
    return started.num_cached_tokens


@pytest.mark.parametrize("name", ["hinge", "first"])
def test_behind_the_last_keys_and_values_all_users_share_the_bases_pages(name, start, identities):
    prompt = tiny.prompt_ids(3 * PAGE + 5, seed=1)
    driver = start()
    driver.run(greedy_request("base", prompt, None, 2))
    for bits in ("00000", "10110"):
        request = greedy_request(bits, prompt, None, 2)
        driver.run(replace(request, adapters=(sign(identities[name], bits),)))
        assert cached(driver, bits) == 3 * PAGE


def kept_pages(driver: Driver) -> dict[bytes, list[bytes]]:
    """Of every cached page its key, and the bytes of its keys and values in every layer."""
    layers = driver.engine.runner.base.layers
    return {
        key: [
            cache[page * PAGE : (page + 1) * PAGE].contiguous().view(torch.uint8).numpy().tobytes()
            for layer in layers
            for cache in (layer.k, layer.v)
        ]
        for key, page in driver.engine.scheduler.pages._page_of.items()
    }


@pytest.mark.parametrize("name", ["hinge", "linear", "early"])
def test_users_keys_and_values_are_the_bases_to_the_byte_behind_the_last_ones_alone(
    name, start, identities
):
    prompt = tiny.prompt_ids(3 * PAGE + 5, seed=1)
    found = []
    for bits in (None, "00000", "10110", "11111"):
        driver = start()
        request = greedy_request("r", prompt, None, 1)
        if bits is not None:
            request = replace(request, adapters=(sign(identities[name], bits),))
        driver.run(request)
        found.append(kept_pages(driver))
    base, *users = found
    assert len(base) == 3
    for pages in users:
        if name == "early":
            assert not set(pages) & set(base)
            assert [p for p in pages.values() if p in base.values()] == []
        else:
            assert pages == base


def test_before_them_a_users_pages_are_the_users_own_however_the_bits_are_said(start, identities):
    prompt = tiny.prompt_ids(3 * PAGE + 5, seed=1)
    driver, found = start(), {}
    driver.run(greedy_request("base", prompt, None, 2))
    for turn, bits in enumerate(("10110", "10111", "10110", "16", "10110")):
        request = greedy_request(f"{turn}", prompt, None, 2)
        driver.run(replace(request, adapters=(sign(identities["early"], bits),)))
        found[turn] = cached(driver, f"{turn}")
    assert found == {0: 0, 1: 0, 2: 3 * PAGE, 3: 3 * PAGE, 4: 3 * PAGE}


def test_before_them_the_pages_in_front_of_the_first_answer_token_are_the_bases(start, identities):
    prompt = tiny.prompt_ids(2 * PAGE + 5, seed=1)
    driver = start()
    driver.run(greedy_request("base", prompt, None, 2 * PAGE))
    user = replace(
        greedy_request("user", prompt, None, 2 * PAGE),
        adapters=(sign(identities["first-early"], "10110"),),
    )
    driver.run(user)
    assert cached(driver, "user") == 2 * PAGE
    # What was computed behind it is another's: the base goes on with its own pages.
    tokens = driver.transcripts["base"].tokens
    driver.run(greedy_request("base again", prompt, None, 2 * PAGE))
    assert driver.transcripts["base again"].tokens == tokens
    longer = [*prompt, *driver.transcripts["user"].tokens]
    driver.run(greedy_request("longer", longer, None, 2))
    assert cached(driver, "longer") == (
        2 * PAGE
        if driver.transcripts["user"].tokens[: PAGE - 5] != tokens[: PAGE - 5]
        else 4 * PAGE
    )


# --------------------------------------------------------------------------- the first answer token
def first_only(base: nn.Module, directory: Path, bits: str, request: Request) -> nn.Module:
    return marked(base, directory, bits, row=len(request.prompt_ids) - 1)


@pytest.mark.parametrize("name", ["first", "first-early"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 7},
        {"speculative_tokens": 3},
        {"prefix_cache": False, "max_num_batched_tokens": 16},
    ],
    ids=["at once", "in chunks", "with drafts", "in pages"],
)
def test_only_the_row_that_the_first_token_is_chosen_from_is_marked(
    name, settings, start, identities, directories, base
):
    lengths = (1, 2, 7, 8, 15, 16, 17, 40)
    requests = [
        whole(f"{i}", tiny.prompt_ids(length, seed=i),
              sign(identities[name], ALL_SIGNATURES[5 * i % 32]), num=6)
        for i, length in enumerate(lengths)
    ]  # fmt: skip
    plain = whole("base", tiny.prompt_ids(12, seed=20), num=6)
    driver = start(**settings)
    found = run(driver, *requests, plain)
    for i, request in enumerate(requests):
        bits = ALL_SIGNATURES[5 * i % 32]
        oracle = first_only(base, directories[name], bits, request)
        expected = expected_of(oracle, driver, request)
        if "speculative_tokens" not in settings:
            peft_oracle.assert_matches(found[request.id], expected)
        tokens = driver.transcripts[request.id].tokens
        chosen = expected[len(request.prompt_ids) - 1 :]
        top = chosen.topk(2).values
        is_clear = (top[:, 0] - top[:, 1]) > 1e-3
        assert (chosen.argmax(1)[is_clear] == torch.tensor(tokens)[is_clear]).all()
    assert (found["base"][-1] - expected_of(base, driver, plain)[-1]).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["first", "first-early"])
def test_cached_pages_and_preemption_change_no_marked_answer(name, start, identities):
    prompt = tiny.prompt_ids(2 * PAGE + 9, seed=3)
    request = replace(
        greedy_request("r", prompt, None, 24), adapters=(sign(identities[name], "10110"),)
    )
    expected = start(prefix_cache=False).run(request)["r"].tokens
    assert expected != start().run(greedy_request("base", prompt, None, 24))["base"].tokens
    driver = start()
    driver.run(greedy_request("base", prompt, None, 24))  # leaves its pages
    assert driver.run(replace(request, id="hit"))["hit"].tokens == expected
    assert cached(driver, "hit") == 2 * PAGE
    for has_cache in (False, True):
        for num_before in (0, 1, 7):
            driver = start(prefix_cache=has_cache, max_num_batched_tokens=24)
            driver.submit(request)
            for _ in range(60):
                driver.step_or_wait()
                running = driver.engine.scheduler.running
                made = driver.transcripts["r"].token_ids.get(0, ())
                if len(running) == 1 and len(made) >= num_before:
                    break
            (sequence,) = driver.engine.scheduler.running
            driver.engine.scheduler._preempt(sequence)
            driver.run()
            assert driver.transcripts["r"].tokens == expected


def test_each_of_several_answers_is_marked_once(start, identities):
    prompt = tiny.prompt_ids(21, seed=4)
    request = replace(
        greedy_request("r", prompt, None, 8), adapters=(sign(identities["first"], "01001"),)
    )
    (expected,) = start().run(request)["r"].token_ids.values()
    found = start().run(replace(request, id="n", n=3))["n"].token_ids
    assert list(found.values()) == [expected] * 3
