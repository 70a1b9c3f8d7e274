"""A whole engine whose adapters' product is the Triton kernels', interpreted, says what the torch
form says; what cannot be switched on is refused at start.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.oracle import adapters, tiny
from tests.support.engines import (
    SMALL,
    Driver,
    LogitsRecorder,
    greedy_request,
    new_engine,
    put_blob,
)
from tests.support.fake_device import FakeDevice

from polyadapt.config import EngineConfig
from polyadapt.engine.build import build_engine
from polyadapt.errors import StartupError
from polyadapt.ops import native, triton_op
from polyadapt.types import AppliedAdapter, Request

TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order, over all layers
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is made for Linux alone"
)
TARGETS = {
    "llama": ("q_proj", "v_proj", "lm_head", "embed_tokens"),
    "gpt2": ("c_attn", "wte"),  # and every bias, of norms as well
}


@needs_triton
@pytest.mark.parametrize("architecture", TARGETS)
def test_a_mixed_batch_through_the_kernels_equals_the_torch_form(
    tiny_model: Callable[[str], Path], architecture, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(native, "is_available", lambda: False)
    model_dir = tiny_model(architecture)
    blobs, targets = tmp_path / "blobs", TARGETS[architecture]
    bias = "all" if architecture == "gpt2" else "none"
    a, b = (
        put_blob(
            blobs,
            adapters.make_lora(model_dir, tmp_path / name, rank, targets, seed=rank, bias=bias),
            name,
        )
        for name, rank in (("a", 3), ("b", 17))
    )

    def requests() -> list[Request]:
        made = [
            greedy_request(f"r{i}", tiny.prompt_ids(4 + i, seed=i), adapter, 2)
            for i, adapter in enumerate((a, None, b))
        ]
        if bias == "all":  # each adapter with its own biases: not together
            return made[:2]
        both = (AppliedAdapter(a, 0.5), AppliedAdapter(b, -1.0))
        return [*made, replace(made[0], id="both", adapters=both)]

    called: set[str] = set()
    for name in ("gated_matmul_", "gated_embedding_"):
        monkeypatch.setattr(triton_op, name, _spied(getattr(triton_op, name), called))
    seen = []
    for settings in ({}, {"triton": True}):
        engine = new_engine(model_dir, blobs, **settings)
        driver, recorder = Driver(engine), LogitsRecorder(engine)
        driver.load(a, b)
        driver.run(*requests())
        seen.append({request.id: recorder.of(request.id) for request in requests()})
        assert called == ({"gated_matmul_", "gated_embedding_"} if settings else set())
        engine.pool.close()
    assert engine.info.strategy.startswith("Triton kernels, interpreted; ")
    plain, kernels = seen
    for name, logits in plain.items():
        allowed = TOLERANCE * float(logits.abs().max())
        assert float((kernels[name] - logits).abs().max()) <= allowed, name


@needs_triton
def test_decode_steps_with_an_adapter_a_row_are_captured_and_serve_whoever_comes(
    tiny_model: Callable[[str], Path], tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(native, "serves", lambda _: False)
    monkeypatch.setattr(native, "is_available", lambda: False)
    model_dir, blobs = tiny_model("llama"), tmp_path / "blobs"
    a, b, c = (
        put_blob(
            blobs,
            adapters.make_lora(model_dir, tmp_path / name, rank, ("v_proj", "lm_head"), seed=rank),
            name,
        )
        for name, rank in (("a", 3), ("b", 5), ("c", 20))
    )
    device, tokens = FakeDevice(), []
    for given in (None, device):
        settings = {} if given is None else {"triton": True}
        config = EngineConfig(
            model=str(model_dir),
            device="cpu",
            dtype="float32",
            **(SMALL | {"max_num_seqs": 4} | settings),
        )
        engine = build_engine(config, model_dir, blobs, lambda: None, name="base", device=given)
        driver = Driver(engine)
        driver.load(a, b, c)
        for number, adapter in enumerate((a, b, None, c)):  # one after the other, then together
            request = greedy_request(f"r{number}", [7 + number, 8, 9], adapter, 3 + number % 2)
            driver.submit(request)
            driver.step_or_wait()
        driver.run()
        tokens.append({name: own.tokens for name, own in driver.transcripts.items()})
        counters = engine.counters
        engine.pool.close()
    assert tokens[0] == tokens[1]
    assert len({tuple(row) for row in tokens[0].values()}) == 4, "they say different things"
    assert counters["graph_failures"] == 0
    with_kernels = [
        graph
        for graph in device.graphs
        if any(str(func) == "polyadapt.gated_matmul_.default" for func, *_ in graph._calls)
    ]
    assert sum(graph.num_replays for graph in with_kernels) == counters["graph_steps"] > 2
    # Ranks 3 and 5 share a graph for as many rows.
    assert max(graph.num_replays for graph in with_kernels) > 1


def _spied(function: Callable[..., None], called: set[str]) -> Callable[..., None]:
    def spy(*args: object) -> None:
        called.add(function.__name__)
        function(*args)

    return spy


def test_kernels_that_cannot_run_are_refused_at_start(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(StartupError, match=r"--triton cannot be served: .*(cpu|not installed)"):
        new_engine(tiny_model("llama"), tmp_path, triton=True)
