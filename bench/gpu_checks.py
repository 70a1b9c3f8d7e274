"""Whether a device computes what the CPU does, before anything is timed on it.

A toy Llama with adapters of several ranks in one batch, in float32 token by token and in both
dtypes over the log-probabilities of prompts, beside each request alone on the CPU.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from bench.adapters import make_adapters
from bench.gpu_engine import Driver
from bench.gpu_model import TINY

from polyadapt.types import (
    AdapterId,
    AppliedAdapter,
    PromptScored,
    Request,
    SamplingParams,
    Tokens,
)
from polyadapt_store.blobs import BlobStore, list_files
from polyadapt_store.manifest import digest_of

RANKS = (1, 4, 16)
LENGTHS = (3, 9, 17, 33, 5, 40)
NUM_TOKENS = 8
# Of a log-probability: float32 sums in another order, and bfloat16 besides beside float32.
LIMITS = {"float32": 1e-3, "bfloat16": 5e-2}

# A driver of a new engine: whether on the device, dtype, whether with graphs.
NewDriver = Callable[[bool, str, bool], Driver]


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison: `value` must not exceed `limit`."""

    name: str
    value: float
    limit: float

    @property
    def is_met(self) -> bool:
        """Whether it holds; not if there is no number."""
        return self.value <= self.limit


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request got."""

    tokens: tuple[int, ...]
    scores: tuple[float, ...]  # log-probabilities of its prompt's tokens


def run_checks(
    new_driver: NewDriver, adapters: Sequence[AdapterId], has_graphs: bool
) -> list[Check]:
    """Return every comparison; it is the caller's to say what a missed one means."""
    requests = list_requests(adapters)
    alone = _answers(new_driver(False, "float32", True), [[request] for request in requests])
    checks = []
    for dtype, limit in LIMITS.items():
        mixed = _answers(new_driver(True, dtype, True), [requests])
        worst = max(_distance(mixed[name].scores, alone[name].scores) for name in alone)
        checks.append(Check(f"{dtype}: prompts' log-probabilities, mixed batch", worst, limit))
        if dtype == "float32":
            checks.append(_same_tokens("float32: mixed batch beside the CPU alone", mixed, alone))
            if has_graphs:
                eager = _answers(new_driver(True, dtype, False), [requests])
                checks.append(_same_tokens("float32: with graphs beside without", mixed, eager))
    return checks


def list_requests(adapters: Sequence[AdapterId]) -> list[Request]:
    """Of the base and of every adapter in turn, prompts of several lengths."""
    rng = random.Random(0)
    params = SamplingParams(
        max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, num_prompt_logprobs=0
    )
    served = [None, *adapters]
    requests = []
    for number, length in enumerate(LENGTHS):
        prompt = tuple(rng.randrange(3, TINY.vocab) for _ in range(length))
        adapter = served[number % len(served)]
        applied = () if adapter is None else (AppliedAdapter(adapter),)
        requests.append(Request(f"check-{number}", prompt, params, applied))
    return requests


def store_adapters(scratch: Path) -> list[AdapterId]:
    """Put adapters of RANKS for the toy into the store at scratch / "blobs"."""
    made = make_adapters(TINY.write(scratch / "model"), scratch / "made", len(RANKS), RANKS)
    return [put_blob(scratch / "blobs", name, directory) for name, directory in made.items()]


def put_blob(root: Path, name: str, directory: Path) -> AdapterId:
    """Store an adapter's directory; return what it is called there."""
    blobs = BlobStore(root)
    staged = blobs.new_staging()
    for file in directory.iterdir():
        shutil.copy(file, staged / file.name)
    digest = digest_of(list_files(staged))
    blobs.put(staged, digest)
    return AdapterId(name, 1, digest)


@torch.inference_mode()
def _answers(driver: Driver, batches: Sequence[Sequence[Request]]) -> dict[str, Answer]:
    """Serve batch after batch; the driver is closed."""
    found: dict[str, Answer] = {}
    try:
        driver.load(list({a.adapter for batch in batches for r in batch for a in r.adapters}))
        for batch in batches:
            events = driver.complete(batch)
            for request in batch:
                own = [event for event in events if event.request_id == request.id]
                tokens = [t for e in own if isinstance(e, Tokens) for t in e.token_ids]
                scores = [s.logprob for e in own if isinstance(e, PromptScored) for s in e.logprobs]
                found[request.id] = Answer(tuple(tokens), tuple(scores))
    finally:
        driver.close()
    return found


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    if not a or len(a) != len(b):
        return float("inf")
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def _same_tokens(name: str, a: dict[str, Answer], b: dict[str, Answer]) -> Check:
    """How many of the tokens differ."""
    pairs = [
        (x, y)
        for request_id in a
        for x, y in zip(a[request_id].tokens, b[request_id].tokens, strict=True)
    ]
    return Check(f"{name}: tokens that differ", float(sum(x != y for x, y in pairs)), 0.0)
