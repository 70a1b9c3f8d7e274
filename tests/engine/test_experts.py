"""Adapters of routed experts beside ordinary ones and the base in one batch: each equals PEFT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tests.oracle import adapters, peft_oracle, tiny
from tests.support.engines import Driver, LogitsRecorder, greedy_request, new_engine, put_blob

from polyadapt.engine.engine import Engine
from polyadapt.models.experts import AdaptedExperts
from polyadapt.ops import experts as experts_op
from polyadapt.types import AdapterId, Request

ARCHITECTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
NUM_TOKENS = 5
LENGTHS = (31, 3, 18, 1, 26, 9)


@dataclass(frozen=True, slots=True)
class Zoo:
    """A model and adapters of it: name -> (identity, PEFT directory)."""

    model_dir: Path
    blob_root: Path
    adapters: dict[str, tuple[AdapterId, Path]]

    def requests(self) -> list[tuple[Request, Path | None]]:
        """The base twice and every adapter, of different lengths, all scored row by row."""
        users: list[tuple[str, AdapterId | None, Path | None]] = [("base0", None, None)]
        users += [(name, identity, path) for name, (identity, path) in self.adapters.items()]
        users.append(("base1", None, None))
        return [
            (
                greedy_request(
                    name,
                    tiny.prompt_ids(LENGTHS[number % len(LENGTHS)], seed=number),
                    identity,
                    NUM_TOKENS,
                    num_prompt_logprobs=0,
                ),
                path,
            )
            for number, (name, identity, path) in enumerate(users)
        ]


@pytest.fixture(scope="module")
def zoo(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Zoo]:
    made: dict[str, Zoo] = {}

    def make(architecture: str) -> Zoo:
        if architecture not in made:
            root, model_dir = tmp_path_factory.mktemp(architecture), tiny_model(architecture)
            gate_up, down = adapters.EXPERTS
            directories = {
                "experts0": adapters.experts(model_dir, root / "experts0", 1),
                "experts1": adapters.experts(model_dir, root / "experts1", 2),
                "gate_up": adapters.experts(model_dir, root / "gate_up", 3, [gate_up]),
                "down": adapters.experts(model_dir, root / "down", 4, [down]),
                "attention": adapters.make_lora(model_dir, root / "attention", 8, seed=5),
            }
            blobs = root / "blobs"
            named = {n: (put_blob(blobs, path, n), path) for n, path in directories.items()}
            made[architecture] = Zoo(model_dir, blobs, named)
        return made[architecture]

    return make


@pytest.mark.parametrize("max_num_batched_tokens", [1024, 16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_row_of_a_mixed_batch_equals_peft_alone(architecture, max_num_batched_tokens, zoo):
    given = zoo(architecture)
    engine = new_engine(
        given.model_dir, given.blob_root, max_num_batched_tokens=max_num_batched_tokens
    )
    recorder, driver = LogitsRecorder(engine), Driver(engine)
    driver.load(*(identity for identity, _ in given.adapters.values()))
    requests = given.requests()
    transcripts = driver.run(*(request for request, _ in requests))
    if max_num_batched_tokens == 1024:
        assert max(recorder.adapters_per_step) == len(given.adapters), "not in one batch"
    else:
        assert engine.counters["mixed_steps"] > 0, "no prefill chunk ran beside a decode row"
    for request, adapter_dir in requests:
        tokens = transcripts[request.id].tokens
        seen = [*request.prompt_ids, *tokens[:-1]]
        oracle = peft_oracle.logits(given.model_dir, adapter_dir, seen)
        peft_oracle.assert_matches(recorder.of(request.id), oracle)


def _run_together(engine: Engine, *requests: Request) -> None:
    """Run them in the same steps whenever: bits follow the batch, and loads take what they take."""
    driver = Driver(engine)
    driver.load(*{applied.adapter for request in requests for applied in request.adapters})
    driver.run(*requests)


def _logits(given: Zoo, *requests: Request) -> dict[str, torch.Tensor]:
    engine = new_engine(given.model_dir, given.blob_root)
    recorder = LogitsRecorder(engine)
    _run_together(engine, *requests)
    return {request.id: recorder.of(request.id) for request in requests}


def test_scale_zero_equals_the_base_exactly_and_a_scale_scales(zoo):
    given = zoo("mixtral")
    full = greedy_request("full", tiny.prompt_ids(12, 3), given.adapters["experts0"][0], 1)
    base = replace(full, id="base", adapters=())
    found = {
        scale: _logits(given, replace(full, adapters=(replace(full.adapters[0], scale=scale),)))
        for scale in (0.0, 0.5, 1.0)
    }
    plain = _logits(given, base)["base"]
    assert torch.equal(found[0.0]["full"], plain)
    assert not torch.allclose(found[0.5]["full"], plain)
    assert not torch.allclose(found[0.5]["full"], found[1.0]["full"])


def test_ordinary_adapters_leave_the_experts_to_the_base(zoo, monkeypatch):
    given = zoo("qwen3_moe")
    requests = [r for r, _ in given.requests() if r.id in ("attention", "base0", "base1")]
    expected = _logits(given, *requests)

    def refuse(*_):
        raise AssertionError("nobody's experts are adapted")

    engine = new_engine(given.model_dir, given.blob_root)  # which is proved with by_expert
    monkeypatch.setattr(AdaptedExperts, "by_expert", refuse)
    recorder = LogitsRecorder(engine)
    _run_together(engine, *requests)
    for request in requests:
        assert torch.equal(recorder.of(request.id), expected[request.id])


@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_a_mutation_of_the_formula_is_noticed(name, zoo, monkeypatch):
    given = zoo("mixtral")
    identity, path = given.adapters[name]
    request = greedy_request("r", tiny.prompt_ids(20, 1), identity, 1, num_prompt_logprobs=0)
    oracle = peft_oracle.logits(given.model_dir, path, request.prompt_ids)
    peft_oracle.assert_matches(_logits(given, request)["r"], oracle)
    groups_of = experts_op._groups_of
    monkeypatch.setattr(
        experts_op,
        "_groups_of",
        lambda *a: [replace(g, expert=(g.expert + 1) % 4) for g in groups_of(*a)],
    )
    with pytest.raises(AssertionError, match="logits differ"):
        peft_oracle.assert_matches(_logits(given, request)["r"], oracle)
