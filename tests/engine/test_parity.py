"""Every row of a mixed batch equals PEFT alone, for every dense family; and equals itself alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.oracle import adapters, peft_oracle, tiny
from tests.support.engines import Driver, LogitsRecorder, greedy_request, new_engine, put_blob

from polyadapt.engine import runner as runner_module
from polyadapt.ops import gated_matmul, native
from polyadapt.types import AdapterId, Request

ARCHITECTURES = tiny.ARCHITECTURES
RANKS = (1, 3, 8, 16, 64)
NUM_TOKENS = 6
# Long and short beside each other; the long ones reach past every window.
LENGTHS = (40, 1, 17, 64, 5, 33, 2, 50, 9, 28)


@pytest.fixture(scope="module")
def zoo(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path, dict[str, tuple[AdapterId, Path]]]]:
    """architecture -> (model directory, blob root, name -> (identity, PEFT directory))."""
    made: dict[str, tuple[Path, Path, dict[str, tuple[AdapterId, Path]]]] = {}

    def make(architecture: str) -> tuple[Path, Path, dict[str, tuple[AdapterId, Path]]]:
        if architecture not in made:
            root = tmp_path_factory.mktemp(architecture)
            model_dir = tiny_model(architecture)
            directories = {
                f"rank{rank}": adapters.make_lora(model_dir, root / f"rank{rank}", rank, seed=rank)
                for rank in RANKS
            }
            for make_variant in (
                adapters.rslora,
                adapters.patterns,
                adapters.lora_bias,
                adapters.bias_all,
                adapters.embedding,
                adapters.lm_head,
            ):
                name = make_variant.__name__
                directories[name] = make_variant(model_dir, root / name)
            identified = {
                name: (put_blob(root / "blobs", path, name), path)
                for name, path in directories.items()
            }
            made[architecture] = (model_dir, root / "blobs", identified)
        return made[architecture]

    return make


def _requests(zoo: dict[str, tuple[AdapterId, Path]]) -> list[tuple[Request, Path | None]]:
    """Two base requests and one per adapter, of different lengths, all scored row by row."""
    users: list[tuple[str, AdapterId | None, Path | None]] = [("base0", None, None)]
    users += [(name, identity, path) for name, (identity, path) in zoo.items()]
    users.append(("base1", None, None))
    requests = []
    for number, (name, identity, path) in enumerate(users):
        ids = tiny.prompt_ids(LENGTHS[number % len(LENGTHS)], seed=number)
        request = greedy_request(name, ids, identity, NUM_TOKENS, num_prompt_logprobs=0)
        requests.append((request, path))
    return requests


@pytest.mark.parametrize("max_num_batched_tokens", [1024, 24])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_row_of_a_mixed_batch_equals_peft_alone(architecture, max_num_batched_tokens, zoo):
    model_dir, blob_root, identified = zoo(architecture)
    engine = new_engine(model_dir, blob_root, max_num_batched_tokens=max_num_batched_tokens)
    recorder, driver = LogitsRecorder(engine), Driver(engine)
    driver.load(*(identity for identity, _ in identified.values()))
    requests = _requests(identified)
    transcripts = driver.run(*(request for request, _ in requests))
    if max_num_batched_tokens == 1024:
        assert max(recorder.adapters_per_step) == len(identified), "they were not in one batch"
        assert driver.rows_per_step[-NUM_TOKENS] == sum(len(r.prompt_ids) for r, _ in requests)
    else:
        assert engine.counters["mixed_steps"] > 0, "no prefill chunk ran beside a decode row"
    for request, adapter_dir in requests:
        tokens = transcripts[request.id].tokens
        seen = [*request.prompt_ids, *tokens[:-1]]
        oracle = peft_oracle.logits(model_dir, adapter_dir, seen)
        peft_oracle.assert_matches(recorder.of(request.id), oracle)
        expected, margins = peft_oracle.greedy(
            model_dir, adapter_dir, request.prompt_ids, NUM_TOKENS
        )
        if margins[0] >= peft_oracle.MARGIN_FLOOR:
            peft_oracle.assert_greedy_equal(tokens, expected, margins)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_a_mixed_batch_equals_each_request_alone(architecture, zoo):
    model_dir, blob_root, identified = zoo(architecture)
    requests = [request for request, _ in _requests(identified)]
    together = new_engine(model_dir, blob_root, max_num_batched_tokens=1024)
    recorder = LogitsRecorder(together)
    Driver(together).run(*requests)
    for request in requests:
        alone = new_engine(model_dir, blob_root, max_num_batched_tokens=1024)
        alone_recorder = LogitsRecorder(alone)
        Driver(alone).run(request)
        peft_oracle.assert_matches(recorder.of(request.id), alone_recorder.of(request.id))


def test_scale_zero_equals_the_base_exactly_and_other_scales_are_linear(zoo):
    model_dir, blob_root, identified = zoo("llama")
    identity, _ = identified["rank8"]
    ids = tiny.prompt_ids(12, seed=3)
    full = greedy_request("full", ids, identity, 1)
    applied = full.adapters[0]
    results = {}
    for name, scale in (("zero", 0.0), ("half", 0.5), ("full", 1.0)):
        engine = new_engine(model_dir, blob_root)
        recorder = LogitsRecorder(engine)
        request = replace(full, id=name, adapters=(replace(applied, scale=scale),))
        Driver(engine).run(request)
        results[name] = recorder.of(name)
    engine = new_engine(model_dir, blob_root)
    recorder = LogitsRecorder(engine)
    Driver(engine).run(greedy_request("base", ids, None, 1))
    assert torch.equal(results["zero"], recorder.of("base"))
    assert not torch.allclose(results["half"], results["zero"])
    assert not torch.allclose(results["half"], results["full"])


# --------------------------------------------------------------------------- mutations
def _mutated_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    build = runner_module.Runs
    monkeypatch.setattr(
        runner_module,
        "Runs",
        lambda starts, lengths, slots, scales: build(starts, lengths, slots, 1.02 * scales),
    )


def _mutated_transpose(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = gated_matmul._apply
    monkeypatch.setattr(gated_matmul, "_apply", lambda h, *rest: apply(h, *rest).flip(-1))


def _mutated_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = gated_matmul._segments

    def without_bias(*arguments):
        for segment in segments(*arguments):
            yield replace(segment, parts=0)

    monkeypatch.setattr(gated_matmul, "_segments", without_bias)


@pytest.mark.parametrize(
    ("mutate", "adapter"),
    [
        (_mutated_scale, "rank8"),
        (_mutated_transpose, "rank8"),
        (_mutated_bias, "lora_bias"),
    ],
)
def test_a_mutation_of_the_formula_is_noticed(mutate, adapter, zoo, monkeypatch):
    # The torch form is the one that can be mutated from here.
    monkeypatch.setattr(native, "is_available", lambda: False)
    model_dir, blob_root, identified = zoo("llama")
    identity, path = identified[adapter]
    request = greedy_request("r", tiny.prompt_ids(24, seed=1), identity, 1, num_prompt_logprobs=0)

    def ours() -> torch.Tensor:
        engine = new_engine(model_dir, blob_root)
        recorder = LogitsRecorder(engine)
        Driver(engine).run(request)
        return recorder.of("r")

    oracle = peft_oracle.logits(model_dir, path, request.prompt_ids)
    peft_oracle.assert_matches(ours(), oracle)
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match="logits differ"):
        peft_oracle.assert_matches(ours(), oracle)
