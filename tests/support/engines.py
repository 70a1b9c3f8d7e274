"""Drive an engine by hand, step by step, without event loops."""

from __future__ import annotations

import shutil
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from polyadapt.adapters.registry import FILES
from polyadapt.config import EngineConfig
from polyadapt.engine.build import build_engine
from polyadapt.engine.engine import Engine
from polyadapt.engine.output import Call, Cancel, Reply, Submit
from polyadapt.types import (
    AdapterId,
    AppliedAdapter,
    Event,
    Failed,
    Finished,
    Request,
    Residency,
    SamplingParams,
    Tokens,
)
from polyadapt_store.blobs import BlobStore, list_files
from polyadapt_store.manifest import digest_of, is_read, list_names

# Small memories: the tests' models are tiny and several engines live at once.
SMALL = {"kv_cache_bytes": 8 << 20, "max_adapter_bytes": 8 << 20, "max_num_seqs": 16}


def put_blob(blob_root: Path, adapter_dir: Path, name: str) -> AdapterId:
    """Store an adapter's directory as a blob and return its identity."""
    blobs = BlobStore(blob_root)
    staged = blobs.new_staging()
    for file in sorted(list_names(adapter_dir)):
        if is_read(file, FILES):
            (staged / file).parent.mkdir(exist_ok=True)
            shutil.copy(adapter_dir / file, staged / file)
    digest = digest_of(list_files(staged))
    blobs.put(staged, digest)
    return AdapterId(name, 1, digest)


def new_engine(model_dir: Path, blob_root: Path, **settings: Any) -> Engine:
    """An engine in this thread, in float32 on the CPU."""
    config = EngineConfig(model=str(model_dir), device="cpu", dtype="float32", **(SMALL | settings))
    return build_engine(config, model_dir, blob_root, lambda: None, name="base")


def greedy_request(
    request_id: str,
    prompt_ids: list[int],
    adapter: AdapterId | None = None,
    max_tokens: int = 8,
    **options: Any,
) -> Request:
    """A greedy request that runs to max_tokens whatever it says; options override its sampling."""
    defaults: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "seed": 0}
    sampling = SamplingParams(max_tokens=max_tokens, **(defaults | options))
    adapters = (AppliedAdapter(adapter),) if adapter else ()
    return Request(request_id, tuple(prompt_ids), sampling, adapters)


@dataclass
class Transcript:
    """Everything that one request got back."""

    token_ids: dict[int, list[int]] = field(default_factory=dict)  # by sequence index
    events: list[Event] = field(default_factory=list)

    @property
    def last(self) -> Event:
        return self.events[-1]

    @property
    def tokens(self) -> list[int]:
        return self.token_ids[0]


class Driver:
    """Submits to an engine and steps it until everything has ended."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.transcripts: dict[str, Transcript] = {}
        self.replies: list[Reply] = []
        self.rows_per_step: list[int] = []
        self.residencies: dict[str, Residency] = {}

    def submit(self, *requests: Request) -> None:
        for request in requests:
            self.transcripts[request.id] = Transcript()
            self.engine.execute(Submit(request))

    def cancel(self, request_id: str) -> None:
        self.engine.execute(Cancel(request_id))

    def call(self, call: Call) -> None:
        self.engine.execute(call)

    def step(self) -> None:
        output = self.engine.step()
        self.replies += output.replies
        self.rows_per_step.append(output.num_rows)
        self.residencies |= {r.digest: r for r in output.residencies}
        for digest in output.gone:
            self.residencies.pop(digest, None)
        for event in output.events:
            transcript = self.transcripts[event.request_id]
            transcript.events.append(event)
            if isinstance(event, Tokens):
                transcript.token_ids.setdefault(event.index, []).extend(event.token_ids)

    def step_or_wait(self) -> None:
        """Step; when nothing could be computed, wait for a load as the engine's loop does."""
        self.step()
        if self.rows_per_step[-1] == 0:
            wait(self.engine.pool._jobs, timeout=10, return_when=FIRST_COMPLETED)

    def run(self, *requests: Request, max_steps: int = 20_000) -> dict[str, Transcript]:
        """Submit, step until nothing is left, and check the book-keeping."""
        self.submit(*requests)
        for _ in range(max_steps):
            if not self.engine.has_work:
                break
            self.step_or_wait()
        assert not self.engine.has_work, f"still busy after {max_steps} steps"
        self.engine.check_integrity()
        for request in requests:
            events = self.transcripts[request.id].events
            ends = [event for event in events if isinstance(event, Finished | Failed)]
            assert len(ends) == 1, f"{request.id} ended {len(ends)} times"
        return {request.id: self.transcripts[request.id] for request in requests}

    def load(self, *adapters: AdapterId) -> None:
        """Bring the adapters to the device, so that the next requests are admitted together."""
        for number, adapter in enumerate(adapters):
            self.call(Call(number, "load", adapter.digest))
        while self.engine.has_work:
            self.step_or_wait()


class LogitsRecorder:
    """Keeps every row's logits by request, as the runner returned them: [rows seen, vocabulary]."""

    def __init__(self, engine: Engine) -> None:
        self.logits: dict[str, list[torch.Tensor]] = {}
        self.adapters_per_step: list[int] = []
        self._run = engine.runner.run
        engine.runner.run = self  # type: ignore[method-assign,assignment]

    def __call__(self, batch: Any) -> list[torch.Tensor]:
        results = self._run(batch)
        self.adapters_per_step.append(len({s for rows in batch for s in rows.sequence.slots}))
        for rows, logits in zip(batch, results, strict=True):
            request_id = rows.sequence.group.request.id
            self.logits.setdefault(request_id, []).append(logits.clone())
        return results

    def of(self, request_id: str) -> torch.Tensor:
        return torch.cat(self.logits[request_id])
