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
from tests.support.engines import Driver, LogitsRecorder, greedy_request, new_engine, put_blob

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


def _spied(function: Callable[..., None], called: set[str]) -> Callable[..., None]:
    def spy(*args: object) -> None:
        called.add(function.__name__)
        function(*args)

    return spy


def test_kernels_that_cannot_run_are_refused_at_start(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(StartupError, match=r"--triton cannot be served: .*(cpu|not installed)"):
        new_engine(tiny_model("llama"), tmp_path, triton=True)
