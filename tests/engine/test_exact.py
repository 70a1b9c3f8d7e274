"""Exact mode: an answer's bits do not depend on what else is in the batch."""

from __future__ import annotations

import pytest
import torch
from tests.oracle import adapters
from tests.support.engines import Driver, LogitsRecorder, greedy_request, new_engine, put_blob

from polyadapt.ops.native.layer import Step

PROMPTS = [[7 + (31 * i + 5 * j) % 300 for j in range(length)] for i, length in
           enumerate((40, 1, 17, 64, 5, 300, 33, 2))]  # fmt: skip


@pytest.fixture(scope="module")
def served(tiny_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("exact")
    model_dir = tiny_model("qwen3")
    made = [
        put_blob(root / "blobs", adapters.make_lora(model_dir, root / f"r{rank}", rank), f"r{rank}")
        for rank in (3, 16, 64)
    ]
    return model_dir, root / "blobs", made


def _run(served, requests, **settings) -> dict[str, torch.Tensor]:
    """request id -> logits of every row that was sampled from."""
    model_dir, blobs, _ = served
    engine = new_engine(model_dir, blobs, **settings)
    recorder = LogitsRecorder(engine)
    try:
        Driver(engine).run(*requests)
    finally:
        engine.pool.close()
    return {request.id: recorder.of(request.id) for request in requests}


def _requests(served):
    choices = [None, *served[2]]
    return [
        greedy_request(f"r{i}", prompt, choices[i % len(choices)], max_tokens=6)
        for i, prompt in enumerate(PROMPTS)
    ]


def test_logits_have_the_same_bits_alone_and_in_every_mixture(served):
    requests = _requests(served)
    alone: dict[str, torch.Tensor] = {}
    for request in requests:
        alone |= _run(served, [request], exact=True)
    mixtures = {
        "all at once": {},
        "small chunks": {"max_num_batched_tokens": 16},
        "few at a time": {"max_num_seqs": 3},
        "short of pages": {"kv_cache_bytes": 1 << 20},
    }
    for name, settings in mixtures.items():
        for order in (requests, requests[::-1]):
            together = _run(served, order, exact=True, **settings)
            for request in requests:
                found = together[request.id][-6:]
                assert torch.equal(found, alone[request.id][-6:]), (name, request.id)


def test_without_exact_mode_the_same_mixture_differs_somewhere(served):
    """So that the test above is known to see a difference where there is one."""
    requests = _requests(served)
    together = _run(served, requests)
    alone = _run(served, [requests[5]])
    assert not torch.equal(together["r5"], alone["r5"]) or not torch.equal(
        _run(served, [requests[5]], max_num_batched_tokens=16)["r5"], alone["r5"]
    )


def test_exact_and_plain_answers_agree_within_rounding(served):
    requests = _requests(served)
    plain, exact = _run(served, requests), _run(served, requests, exact=True)
    for request in requests:
        largest = exact[request.id].abs().max()
        assert (plain[request.id] - exact[request.id]).abs().max() <= 1e-4 * largest


def test_a_cached_prefix_and_speculation_change_no_bit(served):
    # The text keeps to three tokens, so that guesses often hit.
    bias = tuple((token_id, 60.0) for token_id in (50, 60, 70))
    requests = [
        greedy_request(f"r{i}", PROMPTS[5][:128], served[2][1], max_tokens=24, logit_bias=bias)
        for i in range(2)
    ]
    (plain,) = _run(served, requests[:1], exact=True, prefix_cache=False).values()
    model_dir, blobs, _ = served
    engine = new_engine(model_dir, blobs, exact=True, speculative_tokens=6)
    recorder, driver = LogitsRecorder(engine), Driver(engine)
    # Fusing ran some as well, to prove that they compute the same.
    num_before = engine.stats().counters["native_layer_steps"]
    try:
        for request in requests:
            driver.run(request)
    finally:
        engine.pool.close()
    num_native = engine.stats().counters["native_layer_steps"] - num_before
    assert num_native == engine.counters["steps"], "every row reads the cache by itself"
    assert engine.counters["prefix_hit_tokens"] > 0
    assert engine.counters["spec_accepted_tokens"] > 0
    rows = {tuple(row.tolist()) for row in recorder.of("r1")}
    assert all(tuple(row.tolist()) in rows for row in plain[-24:])


def test_a_native_layer_has_the_bits_of_its_kernels_called_one_by_one(served, monkeypatch):
    requests = _requests(served)
    native = _run(served, requests, exact=True)
    monkeypatch.setattr(Step, "block", lambda *_: None)
    single = _run(served, requests, exact=True)
    for request in requests:
        assert torch.equal(native[request.id], single[request.id]), request.id
