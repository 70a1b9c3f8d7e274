"""Adapters whose experts are chosen by each row, served by the engine: whoever shares the step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.oracle import peft_oracle, routed, tiny
from tests.support.engines import Driver, LogitsRecorder, greedy_request, new_engine, put_blob
from tests.support.family_samples import ROUTED, make_sample

from polyadapt.ops import native
from polyadapt.types import AdapterId, AppliedAdapter, Request, SamplingParams

ROOM = {"max_num_seqs": 48, "max_adapter_bytes": 16 << 20, "kv_cache_bytes": 16 << 20}
NUM_TOKENS = 4

Zoo = tuple[Path, Path, dict[str, tuple[AdapterId, Path]]]


@pytest.fixture(scope="module")
def zoo(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """(model directory, blob root, name -> (identity, directory))."""
    model_dir, root = tiny_model("llama"), tmp_path_factory.mktemp("routed")
    made = {name: make_sample(name, model_dir, root / name) for name in (*ROUTED, "lora", "dora")}
    blobs = root / "blobs"
    return model_dir, blobs, {name: (put_blob(blobs, d, name), d) for name, d in made.items()}


def request_of(zoo: Zoo, request_id: str, name: str | None, length: int, seed: int) -> Request:
    identity = None if name is None else zoo[2][name][0]
    ids = tiny.prompt_ids(length, seed=seed)
    return greedy_request(request_id, ids, identity, NUM_TOKENS, num_prompt_logprobs=0)


def served(zoo: Zoo, requests: list[Request], **settings: Any) -> dict[str, torch.Tensor]:
    """Every request's logits, all of them in one engine."""
    engine = new_engine(zoo[0], zoo[1], **(ROOM | {"max_num_batched_tokens": 2048} | settings))
    recorder, driver = LogitsRecorder(engine), Driver(engine)
    driver.load(*(identity for identity, _ in zoo[2].values()))
    driver.run(*requests)
    return {request.id: recorder.of(request.id) for request in requests}


def crowd(zoo: Zoo) -> list[Request]:
    """Two requests of every adapter and of the base, of many lengths."""
    names = [None, *zoo[2]]
    return [
        request_of(
            zoo, f"{name}-{turn}", name, 1 + (7 * number + 5 * turn) % 29, number + 40 * turn
        )
        for turn in range(2)
        for number, name in enumerate(names)
    ]


@pytest.mark.parametrize("order", ["backwards", "shuffled"])
def test_the_order_of_a_batch_changes_nothing(order, zoo):
    requests = crowd(zoo)
    expected = served(zoo, requests)
    other = (
        requests[::-1] if order == "backwards" else requests[1::3] + requests[::3] + requests[2::3]
    )
    found = served(zoo, other)
    for request in requests:
        peft_oracle.assert_matches(found[request.id], expected[request.id])


@pytest.mark.parametrize("name", ROUTED)
def test_a_crowd_changes_no_row(name, zoo):
    requests = crowd(zoo)
    (own,) = [request for request in requests if request.id == f"{name}-1"]
    alone, together = served(zoo, [own])[own.id], served(zoo, requests)[own.id]
    peft_oracle.assert_matches(together, alone)


@pytest.mark.parametrize("name", ROUTED)
def test_rows_are_the_same_bit_for_bit_in_exact_mode(name, zoo):
    own = request_of(zoo, "own", name, 11, 3)
    others = [request_of(zoo, f"other {n}", other, 3 + n, n) for n, other in enumerate(ROUTED)]
    alone = served(zoo, [own], exact=True)["own"]
    together = served(zoo, [*others[:3], own, *others[3:]], exact=True)["own"]
    assert torch.equal(alone, together)


@pytest.mark.parametrize("name", ROUTED)
def test_a_prompt_in_pieces_is_the_same(name, zoo):
    own = request_of(zoo, "own", name, 27, 5)
    whole = served(zoo, [own])["own"]
    pieces = served(zoo, [own], max_num_batched_tokens=5)["own"]
    peft_oracle.assert_matches(pieces, whole)


def test_without_the_kernel_a_crowd_gets_the_same(zoo, monkeypatch):
    requests = crowd(zoo)
    expected = served(zoo, requests)
    monkeypatch.setattr(native, "is_available", lambda: False)
    found = served(zoo, requests)
    for request in requests:
        peft_oracle.assert_matches(found[request.id], expected[request.id])


def logits_beside_oracle(
    zoo: Zoo, adapters: tuple[AppliedAdapter, ...], expected: Callable[[list[int]], torch.Tensor]
) -> None:
    model_dir, blobs, _ = zoo
    ids = tiny.prompt_ids(13, seed=8)
    sampling = SamplingParams(
        max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, num_prompt_logprobs=0
    )
    engine = new_engine(model_dir, blobs, **ROOM)
    recorder, driver = LogitsRecorder(engine), Driver(engine)
    tokens = driver.run(Request("own", tuple(ids), sampling, adapters))["own"].tokens
    peft_oracle.assert_matches(recorder.of("own"), expected([*ids, *tokens[:-1]]))


@pytest.mark.parametrize("scale", [0.5, -0.75])
@pytest.mark.parametrize("name", [name for name in ROUTED if not name.startswith("mixlora")])
def test_a_scale_acts_behind_the_choice(name, scale, zoo):
    model_dir, _, identified = zoo  # experts of a whole MLP are not linear in one, and refused
    identity, directory = identified[name]
    logits_beside_oracle(
        zoo,
        (AppliedAdapter(identity, scale=scale),),
        lambda ids: routed.logits(model_dir, directory, ids, scale=scale),
    )


@pytest.mark.parametrize("pair", [("smora", "mola"), ("loramoe", "lora"), ("dora", "arrow")])
def test_two_in_one_request_are_their_sum(pair, zoo):
    model_dir, _, identified = zoo

    def expected(ids: list[int]) -> torch.Tensor:
        model: Any = peft_oracle.load_base(model_dir)
        for name in sorted(pair, key=ROUTED.__contains__):  # PEFT's is merged first
            directory = identified[name][1]
            if name in ROUTED:
                model = routed.routed(model, directory)
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # as in peft_oracle.py
                    model = PeftModel.from_pretrained(model, directory).merge_and_unload()
        with torch.inference_mode():
            return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]

    adapters = tuple(AppliedAdapter(identified[name][0]) for name in pair)
    logits_beside_oracle(zoo, adapters, expected)
