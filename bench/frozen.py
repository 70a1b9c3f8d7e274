"""X-LoRA beside plain LoRA of equal stored rank, and how far its frozen weights stray.

    python -m bench.frozen [--model DIR] [--adapter DIR] [--prompts 16] [--tokens 64]

Without --adapter one is made: four experts of rank 4 on all seven linears and a classifier of one
layer, all random, whose weights differ clearly from token to token. Throughput: greedy requests,
eight at a time, in turns with plain LoRA of rank 16 on an engine in this process. Frozen weights:
the same prompts exactly and with `frozen_after` N; how many generated tokens agree until the first
that differs, and by how much the log-probabilities of those that agree differ.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from bench.adapters import make_adapters
from bench.machine import describe
from bench.places import default_model
from safetensors.torch import load_file, save_file

from polyadapt.adapters.registry import FILES
from polyadapt.config import EngineConfig
from polyadapt.engine.build import build_engine
from polyadapt.engine.engine import Engine
from polyadapt.engine.output import Call, Submit
from polyadapt.types import (
    AdapterId,
    AppliedAdapter,
    Failed,
    Options,
    Request,
    SamplingParams,
    Tokens,
)
from polyadapt_store.blobs import BlobStore, list_files
from polyadapt_store.manifest import digest_of, is_read, list_names

NUM_EXPERTS, RANK = 4, 16
TOGETHER = 8
FROZEN_AFTER = (0, 1, 4, 16)
ROUNDS = 3
TARGET = 0.35  # of plain LoRA's throughput


@dataclass
class Answer:
    """What one request got."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Bench:
    """An engine with the adapters in it."""

    def __init__(self, model_dir: Path, adapter: Path | None, scratch: Path, dtype: str) -> None:
        self._vocab = json.loads((model_dir / "config.json").read_text())["vocab_size"]
        plain = make_adapters(model_dir, scratch / "plain", 1, RANK)["bench-000"]
        blobs = BlobStore(scratch / "blobs")
        self.plain = _put(blobs, plain)
        self.weighed = _put(blobs, adapter or make_weighed(model_dir, scratch / "weighed"))
        config = EngineConfig(
            model=str(model_dir), device="cpu", dtype=dtype, prefix_cache=False,
            max_num_seqs=2 * TOGETHER, kv_cache_bytes=512 << 20, max_adapter_bytes=1 << 30,
        )  # fmt: skip
        self.engine: Engine = build_engine(
            config, model_dir, scratch / "blobs", lambda: None, name="base"
        )
        for adapter_id in (self.plain, self.weighed):
            self.engine.execute(Call(0, "load", adapter_id.digest))
        while self.engine.has_work:
            self.engine.step()

    def ask(
        self, adapter: AdapterId, options: Options, num_prompts: int, num_tokens: int
    ) -> tuple[list[Answer], float]:
        """Serve the prompts, TOGETHER at a time; return the answers and tokens a second."""
        sampling = SamplingParams(num_tokens, temperature=0.0, ignore_eos=True, num_logprobs=0)
        answers, seconds = [], 0.0
        for first in range(0, num_prompts, TOGETHER):
            found: dict[str, Answer] = {}
            for number in range(first, min(first + TOGETHER, num_prompts)):
                ids = torch.randint(
                    self._vocab, (24,), generator=torch.Generator().manual_seed(number)
                )
                applied = AppliedAdapter(adapter, options=options)
                request = Request(str(number), tuple(ids.tolist()), sampling, (applied,))
                found[request.id] = Answer()
                self.engine.execute(Submit(request))
            started = time.monotonic()
            while self.engine.has_work:
                for event in self.engine.step().events:
                    assert not isinstance(event, Failed), event
                    if isinstance(event, Tokens):
                        found[event.request_id].token_ids += event.token_ids
                        found[event.request_id].logprobs += [p.logprob for p in event.logprobs]
            seconds += time.monotonic() - started
            answers += found.values()
        return answers, num_prompts * num_tokens / seconds


def main() -> int:
    """Print both tables; the exit status is 1 when the throughput is below its target."""
    args = _parse()
    with tempfile.TemporaryDirectory(prefix="polyadapt-bench-") as scratch:
        bench = Bench(args.model or default_model(), args.adapter, Path(scratch), args.dtype)
        relative = []
        for _ in range(ROUNDS):
            _, plain = bench.ask(bench.plain, (), TOGETHER, args.tokens)
            _, weighed = bench.ask(bench.weighed, (), TOGETHER, args.tokens)
            relative.append(weighed / plain)
            print(f"plain {plain:.1f} tokens/s, weighed {weighed:.1f}: {relative[-1]:.2f}")
        median = statistics.median(relative)
        print(f"weighed experts have {median:.2f} of plain LoRA's throughput, target {TARGET}\n")
        exact, _ = bench.ask(bench.weighed, (), args.prompts, args.tokens)
        print("| frozen_after | agree to the end | until the first other | logprobs differ by |")
        print("| --- | --- | --- | --- |")
        for num in FROZEN_AFTER:
            frozen, _ = bench.ask(
                bench.weighed, (("frozen_after", num),), args.prompts, args.tokens
            )
            print(_line(num, exact, frozen))
    return int(median < TARGET)


def make_weighed(model_dir: Path, out_dir: Path) -> Path:
    """Write an X-LoRA of random experts and a random classifier in PEFT's form."""
    config = json.loads((model_dir / "config.json").read_text())
    hidden, num_modules = config["hidden_size"], 0
    made = make_adapters(model_dir, out_dir, NUM_EXPERTS, RANK // NUM_EXPERTS)
    for number, directory in enumerate(made.values()):
        expert = directory.rename(out_dir / str(number))
        num_modules = len(load_file(expert / "adapter_model.safetensors")) // 2
    generator = torch.Generator().manual_seed(0)
    name = "base_model.internal_xlora_classifier.layers.0"
    weight = torch.randn(NUM_EXPERTS * num_modules, hidden, generator=generator)
    # The final hidden states of a decoder are a few times larger than one.
    tensors = {f"{name}.weight": weight / math.sqrt(hidden)}
    tensors[f"{name}.bias"] = torch.zeros(len(weight))
    save_file(tensors, out_dir / "adapter_model.safetensors")
    written = {
        "peft_type": "XLORA",
        "hidden_size": hidden,
        "adapters": {str(number): str(number) for number in range(NUM_EXPERTS)},
        "layerwise_scalings": True,
        "xlora_depth": 1,
    }
    (out_dir / "adapter_config.json").write_text(json.dumps(written))
    return out_dir


def _line(num: int, exact: Sequence[Answer], frozen: Sequence[Answer]) -> str:
    lengths, differences = [], []
    for one, other in zip(exact, frozen, strict=True):
        pairs = zip(one.token_ids, other.token_ids, strict=True)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(one.token_ids))
        lengths.append(same)
        # The first tokens are chosen before anything is frozen.
        differences += [abs(one.logprobs[i] - other.logprobs[i]) for i in range(num + 1, same)]
    whole = sum(length == len(a.token_ids) for length, a in zip(lengths, exact, strict=True))
    mean = f"{statistics.mean(differences):.3f}" if differences else "none agree"
    return (
        f"| {num} | {whole} of {len(exact)} | median {statistics.median(lengths):g} of "
        f"{len(exact[0].token_ids)} | {mean} |"
    )


def _put(blobs: BlobStore, directory: Path) -> AdapterId:
    staged = blobs.new_staging()
    for name in sorted(list_names(directory)):
        if is_read(name, FILES):
            (staged / name).parent.mkdir(exist_ok=True)
            (staged / name).write_bytes((directory / name).read_bytes())
    digest = digest_of(list_files(staged))
    blobs.put(staged, digest)
    return AdapterId(directory.name, 1, digest)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="default: smollm2")
    parser.add_argument("--adapter", type=Path, help="an X-LoRA of your own")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32" if describe().dtype == "float32" else "auto")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
