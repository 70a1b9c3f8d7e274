"""What a decode step costs beside its forward: a real engine whose model is a stub.

256 rows of 256 resident adapters; scheduler, plans, page tables, sampling and events are the
server's own, and the forward returns logits that were made before.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench.adapters import make_adapters

from polyadapt.config import EngineConfig
from polyadapt.engine import engine as engine_module
from polyadapt.engine import wire
from polyadapt.engine.build import build_engine
from polyadapt.engine.engine import Engine
from polyadapt.engine.output import Call, Submit
from polyadapt.engine.worker import spare_collections
from polyadapt.types import AdapterId, AppliedAdapter, Request, SamplingParams
from polyadapt_store.blobs import BlobStore, list_files
from polyadapt_store.manifest import digest_of

VOCAB_SIZE = 49152
NUM_PROMPT = 200
NUM_LIKELY = 100
# Steps that nobody times: buffers grow and caches fill.
NUM_WARM = 10

SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "temperature 0.8": {"temperature": 0.8},
    "temperature 0.8, top_p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "temperature 0.8, top_k 50": {"temperature": 0.8, "top_k": 50},
}


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one phase of a step, over all rows."""

    phase: str
    median_us: float
    p99_us: float


@dataclass(frozen=True, slots=True)
class Stub:
    """Stands in for the model: every row has the logits of one table, whatever it was given."""

    table: torch.Tensor  # [rows, vocabulary]

    def __call__(self, *, logits_to_keep: torch.Tensor, **_: object) -> Any:
        return _Output(self.table[None, : len(logits_to_keep)])


@dataclass(frozen=True, slots=True)
class _Output:
    logits: torch.Tensor


class Clock:
    """Adds up the CPU seconds of this thread that wrapped functions take, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.thread_time() - began
                self.seconds[name] = self.seconds.get(name, 0.0) + spent

        return call

    def take(self) -> dict[str, float]:
        """Return what was added since the last call."""
        seconds, self.seconds = self.seconds, {}
        return seconds


def measure_step(num_rows: int, num_steps: int) -> list[Timing]:
    """Time `num_steps` decode steps of num_rows rows for every kind of sampling."""
    with tempfile.TemporaryDirectory(prefix="polyadapt-bench-") as scratch:
        root = Path(scratch)
        model_dir = tiny_model(root / "model")
        adapters = _blobs(make_adapters(model_dir, root / "made", num_rows, rank=1), root / "blobs")
        timings: list[Timing] = []
        for name, sampling in SAMPLINGS.items():
            with _running(model_dir, root / "blobs", adapters, sampling, num_steps) as engine:
                # Scheduling and the rest are told from the first kind: fewer steps do for others.
                count = max(1, num_steps // 4) if timings else num_steps
                found = _time_steps(engine, num_rows, count)
            if not timings:
                timings += [_timing(phase, found[phase]) for phase in ("schedule", "prepare")]
                both = np.add(found["schedule"], found["prepare"]).tolist()
                timings.append(_timing("schedule + prepare", both))
            timings.append(_timing(f"sample, {name}", found["sample"]))
            if len(timings) == 4:
                timings += [_timing(phase, found[phase]) for phase in ("advance", "encode")]
        return timings


def tiny_model(directory: Path) -> Path:
    """Write a Llama of one narrow layer with the default model's vocabulary; return `directory`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def _blobs(directories: dict[str, Path], root: Path) -> list[AdapterId]:
    blobs = BlobStore(root)
    found = []
    for name, directory in directories.items():
        staged = blobs.new_staging()
        for file in directory.iterdir():
            shutil.copy(file, staged / file.name)
        digest = digest_of(list_files(staged))
        blobs.put(staged, digest)
        found.append(AdapterId(name, 1, digest))
    return found


@contextmanager
def _running(
    model_dir: Path,
    blob_root: Path,
    adapters: list[AdapterId],
    sampling: dict[str, Any],
    num_steps: int,
) -> Iterator[Engine]:
    """Yield an engine in which one row of every adapter decodes."""
    num_rows = len(adapters)
    config = EngineConfig(
        model=str(model_dir), device="cpu", dtype="float32", num_threads=1, max_num_seqs=num_rows,
        max_num_batched_tokens=num_rows * NUM_PROMPT, kv_cache_bytes=256 << 20,
        max_adapter_bytes=16 << 20,
    )  # fmt: skip
    engine = build_engine(config, model_dir, blob_root, lambda: None, name="base")
    try:
        for number, adapter in enumerate(adapters):
            engine.execute(Call(number, "load", adapter.digest))
        while engine.has_work:
            engine.step()
        # A plain object: how often the model is called does not depend on what it is.
        # As peaked as a language model's: some tokens hold nearly all of the mass.
        table = torch.randn(num_rows, VOCAB_SIZE) * 2
        table[:, torch.randint(0, VOCAB_SIZE, (NUM_LIKELY,))] += 8
        engine.runner.forward.base = replace(engine.runner.base, module=Stub(table))  # type: ignore[arg-type]
        params = SamplingParams(
            max_tokens=2 * (num_steps + NUM_WARM) + 2, ignore_eos=True, **sampling
        )
        for number, adapter in enumerate(adapters):
            prompt = tuple(range(3, 3 + NUM_PROMPT))
            seeded = replace(params, seed=number)
            applied = (AppliedAdapter(adapter),)
            engine.execute(Submit(Request(f"r{number}", prompt, seeded, applied)))
        spare_collections()
        engine.step()
        assert len(engine.scheduler.running) == num_rows, "every row decodes from the next step on"
        yield engine
    finally:
        engine.pool.close()


def _time_steps(engine: Engine, num_rows: int, num_steps: int) -> dict[str, list[float]]:
    """Return CPU seconds by phase, step by step; `advance` is what follows but sampling."""
    clock = Clock()
    scheduler, runner, base = engine.scheduler, engine.runner, engine.runner.forward.base
    originals = scheduler.schedule, runner.run, base.module, engine_module.sample_rows
    scheduler.schedule = clock.timed("schedule", scheduler.schedule)  # type: ignore[method-assign]
    runner.run = clock.timed("run", runner.run)  # type: ignore[method-assign]
    base.module = clock.timed("module", base.module)  # type: ignore[assignment]
    engine_module.sample_rows = clock.timed("sample", originals[3])
    found: dict[str, list[float]] = {}
    try:
        for number in range(num_steps + NUM_WARM):
            clock.take()
            began = time.thread_time()
            output = engine.step()
            whole = time.thread_time() - began
            assert output.num_rows == num_rows
            assert len(output.events) == num_rows, "every row has a token"
            spent = clock.take()
            began = time.thread_time()
            wire.encode_output(output)
            encode = time.thread_time() - began
            if number < NUM_WARM:
                continue
            phases = {
                "schedule": spent["schedule"],
                "prepare": spent["run"] - spent["module"],
                "sample": spent["sample"],
                "advance": whole - spent["schedule"] - spent["run"] - spent["sample"],
                "encode": encode,
            }
            for phase, seconds in phases.items():
                found.setdefault(phase, []).append(seconds)
    finally:
        scheduler.schedule, runner.run, base.module = originals[:3]  # type: ignore[method-assign]
        engine_module.sample_rows = originals[3]
    return found


def _timing(phase: str, seconds: list[float]) -> Timing:
    micros = np.asarray(seconds) * 1e6
    return Timing(
        phase, round(float(np.median(micros)), 1), round(float(np.quantile(micros, 0.99)), 1)
    )
