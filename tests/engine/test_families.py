"""Every family in one batch: each row equals its oracle, whoever shares the step with it."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from tests.oracle import peft_oracle, tiny
from tests.support.engines import Driver, LogitsRecorder, greedy_request, new_engine, put_blob
from tests.support.family_samples import NAMES, PROBED, ROUTED, make_sample, oracle_logits

from polyadapt.types import AdapterId, Request

ROOM = {
    "max_heavy_adapters": 48,
    "max_num_seqs": 48,
    "max_adapter_bytes": 48 << 20,
    "kv_cache_bytes": 16 << 20,
}
NUM_TOKENS = 4

Zoo = tuple[Path, Path, dict[str, tuple[AdapterId, Path]]]


@pytest.fixture(scope="module")
def zoo(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """(model directory, blob root, name -> (identity, PEFT's directory))."""
    model_dir, root = tiny_model("llama"), tmp_path_factory.mktemp("families")
    made = {name: make_sample(name, model_dir, root / name) for name in NAMES}
    blobs = root / "blobs"
    return model_dir, blobs, {name: (put_blob(blobs, d, name), d) for name, d in made.items()}


def requests_of(zoo: Zoo) -> list[tuple[Request, Path | None]]:
    users = [("base0", None, None), *((n, *pair) for n, pair in zoo[2].items())]
    found = []
    for number, (name, identity, path) in enumerate([*users, ("base1", None, None)]):
        ids = tiny.prompt_ids(5 + 3 * number % 23, seed=number)
        # The tokens whose embeddings some of them replace.
        ids[1:4] = [5, 8, 17]
        request = greedy_request(name, ids, identity, NUM_TOKENS, num_prompt_logprobs=0)
        found.append((request, path))
    return found


def test_every_family_in_one_batch_equals_its_oracle(zoo: Zoo) -> None:
    model_dir, blobs, identified = zoo
    engine = new_engine(model_dir, blobs, max_num_batched_tokens=2048, **ROOM)
    recorder, driver = LogitsRecorder(engine), Driver(engine)
    driver.load(*(identity for identity, _ in identified.values()))
    requests = requests_of(zoo)
    transcripts = driver.run(*(request for request, _ in requests))
    assert max(recorder.adapters_per_step) == len(identified) >= 15, "they were not in one batch"
    assert engine.stats().counters["override_steps"] > 0
    for request, adapter_dir in requests:
        tokens = transcripts[request.id].tokens
        seen = [*request.prompt_ids, *tokens[:-1]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's own, of CUDA extensions and sparse tensors
            oracle = oracle_logits(request.id, model_dir, adapter_dir, seen)
        try:
            peft_oracle.assert_matches(recorder.of(request.id), oracle)
        except AssertionError as error:
            raise AssertionError(f"{request.id}: {error}") from error


ALONE = ["lora", "dora", "ia3", "oft", "road", "ln_tuning", "lora-head", *ROUTED, *PROBED]


@pytest.mark.parametrize("name", ALONE)
def test_a_row_alone_equals_the_row_in_the_batch(name: str, zoo: Zoo) -> None:
    model_dir, blobs, _ = zoo
    requests = [request for request, _ in requests_of(zoo)]
    together = new_engine(model_dir, blobs, max_num_batched_tokens=2048, **ROOM)
    recorder = LogitsRecorder(together)
    Driver(together).run(*requests)
    (request,) = [request for request in requests if request.id == name]
    alone = new_engine(model_dir, blobs, max_num_batched_tokens=2048, **ROOM)
    own = LogitsRecorder(alone)
    Driver(alone).run(request)
    peft_oracle.assert_matches(recorder.of(name), own.of(name))


def test_evicting_and_loading_again_changes_no_bit(zoo: Zoo) -> None:
    model_dir, blobs, identified = zoo
    # Room for a few at a time: every second request evicts somebody.
    engine = new_engine(model_dir, blobs, **(ROOM | {"max_adapter_bytes": 400 << 10}))
    driver = Driver(engine)
    first, second = LogitsRecorder(engine), {}
    names = [n for n in identified if n not in ("lora-head",)]
    for _ in range(2):
        for name in names:
            ids = tiny.prompt_ids(12, seed=3)
            request = greedy_request(name, ids, identified[name][0], 2, num_prompt_logprobs=0)
            driver.run(request)
    assert engine.counters["adapter_evictions"] > len(names)
    for name in names:
        rows = first.of(name)
        second[name] = rows[len(rows) // 2 :]
        assert torch.equal(rows[: len(rows) // 2], second[name]), name
