"""The peers, measured in a process of their own: transformers' generate and PEFT's mixed batch.

    python -m bench.peers --model DIR --adapters DIR --cells '[["generate", 32, 0]]'

Both are given what they are best at: one batch of equal lengths without padding, no server, no
streaming, SDPA attention. Each cell prints one JSON line. A cell is (kind, batch, adapters):

    generate   the base model alone
    single     PEFT with one active adapter for every row, not merged
    mixed      PEFT's generate(adapter_names=[...]), row i with adapter i modulo the count
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

# Before transformers is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import peft
import torch
import transformers
from bench.machine import CpuWatch


@dataclass(frozen=True, slots=True)
class PeerResult:
    """One cell: throughput in output tokens a second over the whole call, prefill included."""

    kind: str
    batch: int
    num_adapters: int
    tokens_per_s: float
    wall_s: float
    other_cores: float


def main() -> None:
    """Measure the cells one after the other and print each as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument(
        "--adapters", type=Path, required=True, help="directory of PEFT directories"
    )
    parser.add_argument("--cells", type=json.loads, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    args = parser.parse_args()

    # PEFT 0.21 reads attributes that transformers 5.23 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(args.threads)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    print(json.dumps({"versions": versions}), flush=True)

    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), local_files_only=True
    ).eval()
    # No end of sequence and no padding: every row makes every token.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    names = sorted(path.name for path in args.adapters.iterdir())
    wrapped: peft.PeftModel | None = None
    # The base comes first: it must not carry PEFT's wrappers.
    for kind, batch, count in sorted(args.cells, key=lambda cell: cell[0] != "generate"):
        if kind != "generate":
            wrapped = _with_adapters(wrapped, model, args.adapters, names[:count], args.dtype)
        runner = model if kind == "generate" else wrapped
        assert runner is not None
        options: dict[str, object] = {}
        if kind == "single":
            wrapped.set_adapter(names[0])  # type: ignore[union-attr]
        elif kind == "mixed":
            options["adapter_names"] = [names[row % count] for row in range(batch)]
        rng = random.Random(batch)
        ids = torch.tensor(
            [
                [rng.randrange(64, model.config.vocab_size - 64) for _ in range(args.prompt_tokens)]
                for _ in range(batch)
            ]
        )
        _generate(runner, ids, 4, options)  # warm
        watch = CpuWatch([os.getpid()])
        start = time.perf_counter()
        _generate(runner, ids, args.output_tokens, options)
        wall = time.perf_counter() - start
        rate = batch * args.output_tokens / wall
        result = PeerResult(kind, batch, count, rate, wall, watch.other_cores())
        print(json.dumps(asdict(result)), flush=True)


def _with_adapters(
    wrapped: peft.PeftModel | None,
    model: torch.nn.Module,
    root: Path,
    names: list[str],
    dtype: str,
) -> peft.PeftModel:
    """Load the adapters that are not loaded yet, in the dtype of the base."""
    for name in names:
        path = str(root / name)
        if wrapped is None:
            wrapped = peft.PeftModel.from_pretrained(
                model, path, adapter_name=name, autocast_adapter_dtype=False
            )
        elif name not in wrapped.peft_config:
            wrapped.load_adapter(path, adapter_name=name, autocast_adapter_dtype=False)
    assert wrapped is not None
    return wrapped.to(getattr(torch, dtype)).eval()


def _generate(
    model: torch.nn.Module, ids: torch.Tensor, num_tokens: int, options: dict[str, object]
) -> None:
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            **options,
        )
    assert out.shape[1] == ids.shape[1] + num_tokens, f"made {out.shape[1] - ids.shape[1]} tokens"


if __name__ == "__main__":
    main()
