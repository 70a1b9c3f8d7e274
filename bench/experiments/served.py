"""The same questions to our engine: rows with their adapters in one mixed batch, in this process.

Scores come out as log-probabilities over the whole vocabulary, so that they compare with what the
training code computes for the same rows.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench.experiments import training
from bench.experiments.data import Batch, repeated
from bench.experiments.report import Claim

from polyadapt.config import EngineConfig
from polyadapt.engine.build import build_engine
from polyadapt.engine.output import Call, Submit
from polyadapt.types import (
    AdapterId,
    AppliedAdapter,
    Event,
    Failed,
    PromptScored,
    Request,
    SamplingParams,
    TokenLogprob,
    Tokens,
)
from polyadapt_store.blobs import BlobStore, list_files
from polyadapt_store.manifest import digest_of

Adapters = tuple[AppliedAdapter, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One arm on the same rows, computed by the training code and by the engine."""

    difference: float  # the largest of any log-probability
    offline: float  # accuracy of answer tokens
    served: float


class Served(AbstractContextManager["Served"]):
    """An engine in float32 over one model directory, and the adapters that were given to it.

    exact: a row's bits do not depend on what else is in the batch.
    """

    def __init__(self, model_dir: Path, scratch: Path, *, exact: bool = False) -> None:
        self._blobs = BlobStore(scratch / "blobs")
        self._ids = itertools.count()
        config = EngineConfig(
            model=str(model_dir), device="cpu", dtype="float32", max_num_seqs=64,
            num_threads=torch.get_num_threads(), kv_cache_bytes=64 << 20,
            max_adapter_bytes=64 << 20, prefix_cache=False, exact=exact,
        )  # fmt: skip
        self.engine = build_engine(config, model_dir, scratch / "blobs", lambda: None, name="tiny")
        self.vocab_size = self.engine.info.base.vocab_size

    def __exit__(self, *_: object) -> None:
        self.engine.pool.close()

    def add(self, directory: Path, **applied: Any) -> AppliedAdapter:
        """Store an adapter's directory and bring it to the device; raises RuntimeError if it is
        refused. `applied` is how it is used: scale, rank.
        """
        staged = self._blobs.new_staging()
        shutil.copytree(directory, staged, dirs_exist_ok=True)
        digest = digest_of(list_files(staged))
        self._blobs.put(staged, digest)
        self.engine.execute(Call(next(self._ids), "load", digest))
        while self.engine.has_work:
            for reply in self.engine.step().replies:
                if reply.error_code is not None:
                    problems = "; ".join(message for _, message, _ in reply.problems)
                    raise RuntimeError(f"{directory.name}: {reply.error_message} {problems}")
            time.sleep(1e-3)  # the reader needs the interpreter
        return AppliedAdapter(AdapterId(directory.name, 1, digest), **applied)

    def log_probabilities(self, batch: Batch, adapters: Sequence[Adapters]) -> torch.Tensor:
        """float32 [rows, length - 1, vocabulary], as training.log_probabilities, row i under
        adapters[i]; all rows are submitted at once.
        """
        params = SamplingParams(
            max_tokens=1, temperature=0.0, ignore_eos=True, num_prompt_logprobs=self.vocab_size
        )
        prompts = batch.ids.tolist()
        events = self._run([(p, a, params, 1) for p, a in zip(prompts, adapters, strict=True)])
        table = torch.empty(len(prompts), batch.ids.shape[1] - 1, self.vocab_size)
        for row, own in enumerate(events):
            (scored,) = (event for event in own if isinstance(event, PromptScored))
            for position, logprob in enumerate(scored.logprobs):
                _fill(table[row, position], logprob)
        return table

    def tables(self, batch: Batch, arms: Mapping[str, Adapters]) -> dict[str, torch.Tensor]:
        """The same for every arm's adapters, all of them in one mixed batch."""
        adapters = [own for own in arms.values() for _ in range(len(batch.ids))]
        table = self.log_probabilities(repeated(batch, len(arms)), adapters)
        return dict(zip(arms, table.split(len(batch.ids)), strict=True))

    def routing(self, batch: Batch, adapters: Adapters) -> dict[str, torch.Tensor]:
        """Module's path -> what every token of the rows weighed its experts with, float [tokens,
        experts], the tokens in no promised order; 0: not chosen. It is asked of the engine as
        `polyadapt inspect --routing` does.
        """
        seen: dict[int, list[torch.Tensor]] = {}
        tokens = self.engine.runner.tokens

        def note(site_id: int, slot: int, weights: torch.Tensor) -> None:
            seen.setdefault(site_id, []).append(weights.float().clone())

        tokens.observer = note
        try:
            self.log_probabilities(batch, [adapters] * len(batch.ids))
        finally:
            tokens.observer = None
        sites = self.engine.info.base.sites
        return {sites[site_id].path: torch.cat(parts) for site_id, parts in sorted(seen.items())}

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        adapters: Sequence[Adapters],
        params: Sequence[SamplingParams],
        num_samples: int,
    ) -> list[list[list[int]]]:
        """num_samples continuations of every prompt, with their end token where they have one."""
        asked = [
            (prompt, own, sampling, num_samples)
            for prompt, own, sampling in zip(prompts, adapters, params, strict=True)
        ]
        found = []
        for own in self._run(asked):
            samples: list[list[int]] = [[] for _ in range(num_samples)]
            for event in own:
                if isinstance(event, Tokens):
                    samples[event.index] += event.token_ids
            found.append(samples)
        return found

    def _run(
        self, asked: Sequence[tuple[Sequence[int], Adapters, SamplingParams, int]]
    ) -> list[list[Event]]:
        """Submit everything, step until nothing is left; the events of each, in order."""
        events: dict[str, list[Event]] = {}
        for prompt, adapters, params, num_samples in asked:
            name = f"r{next(self._ids)}"
            events[name] = []
            request = Request(name, tuple(prompt), params, adapters, n=num_samples)
            self.engine.execute(Submit(request))
        while self.engine.has_work:
            for event in self.engine.step().events:
                if isinstance(event, Failed):
                    raise RuntimeError(f"a request failed: {event.code}: {event.message}")
                events[event.request_id].append(event)
        return list(events.values())


def compare(
    served: Served, batch: Batch, arms: Mapping[str, tuple[Adapters, torch.Tensor]]
) -> dict[str, Comparison]:
    """Serve the batch once for every arm, all arms in one mixed batch; an arm is its adapters and
    what the training code computed [rows, length - 1, vocabulary].
    """
    tables = served.tables(batch, {name: adapters for name, (adapters, _) in arms.items()})
    return {name: comparison(tables[name], own, batch) for name, (_, own) in arms.items()}


def comparison(given: torch.Tensor, offline: torch.Tensor, batch: Batch) -> Comparison:
    """Of log-probabilities [rows, length - 1, vocabulary]."""
    return Comparison(
        float((given - offline).abs().max()),
        training.score(offline, batch).accuracy,
        training.score(given, batch).accuracy,
    )


def parity(comparisons: Mapping[str, Comparison]) -> Claim:
    """The claim that the engine computes what the training code does."""
    worst = max(own.difference for own in comparisons.values())
    shown = ", ".join(
        f"{name} {own.difference:.1e} (accuracy {own.served:.4f}, offline {own.offline:.4f})"
        for name, own in comparisons.items()
    )
    return Claim(
        "served log-probabilities equal the training code's to 1e-3, all arms in one batch",
        shown,
        worst <= 1e-3,
    )


def _fill(row: torch.Tensor, scored: TokenLogprob) -> None:
    """Write the log-probabilities of the whole vocabulary into row [vocabulary]."""
    ids, values = zip(*scored.top, strict=True)
    row[list(ids)] = torch.tensor(values)
