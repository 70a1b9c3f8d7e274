"""What a mark costs a decode step: rows of as many users, beside the same rows unmarked.

    python -m bench.mark_serving [--model DIR] [--rows 32] [--bits 64] [--steps 60]

Two engines live in this process over the same model: one whose rows are the base's, one where
every row has the branches of its own user. They step in turns, so that a pair of steps sees the
machine in one state; the figure is the median over the pairs of the unmarked step's time over the
marked one's. Time is the processor's, not the clock's: with one thread they are the same on a free
core, and others' work on a shared one is not counted. The mark is in the last layer behind its keys
and values (o_proj and down_proj), as it is served by default. Results go to
bench/results/<date>-<machine>/mark-serving.json.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench.machine import CpuWatch, describe
from bench.places import results_folder
from safetensors.torch import save_file

from polyadapt.config import EngineConfig
from polyadapt.engine.build import build_engine
from polyadapt.engine.engine import Engine
from polyadapt.engine.output import Call, Submit
from polyadapt.types import AdapterId, AppliedAdapter, Request, SamplingParams
from polyadapt_store.blobs import BlobStore, list_files
from polyadapt_store.manifest import digest_of

TARGET = 0.95  # of unmarked throughput
WARM_UP = 4  # pairs that are not counted
FORMS: dict[str, dict[str, Any]] = {
    "antipodal, linear": {"encoding": "antipodal", "gate": "linear"},
    "pair, hinge": {"encoding": "pair", "gate": "hinge"},
    "pair, hinge, first answer token only": {
        "encoding": "pair", "gate": "hinge", "positions": "first_answer",
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Line:
    """One form's figures."""

    form: str
    relative: float  # throughput over the unmarked rows': the median of the pairs
    quartiles: tuple[float, float]  # of the pairs
    unmarked_ms: float
    marked_ms: float
    num_pairs: int


def main() -> int:
    """Measure every form; the exit status is 1 when one is below its target."""
    args = _parse()
    machine = describe()
    started = datetime.datetime.now(datetime.UTC)
    watch = CpuWatch([os.getpid()])
    with tempfile.TemporaryDirectory(prefix="polyadapt-bench-") as scratch:
        lines = [
            measure(args.model, Path(scratch), name, form, machine.dtype, args)
            for name, form in FORMS.items()
        ]
    out = results_folder(args.out, started)
    result = {
        "started": started.isoformat(timespec="seconds"),
        "machine": asdict(machine),
        "method": {"rows": args.rows, "bits": args.bits, "threads": args.threads},
        "other_cores": watch.other_cores(),
        "target": TARGET,
        "rows": [asdict(line) for line in lines],
    }
    (out / "mark-serving.json").write_text(json.dumps(result, indent=2) + "\n")
    return 1 if any(line.relative < TARGET for line in lines) else 0


def measure(
    model_dir: Path, scratch: Path, name: str, form: dict[str, Any], dtype: str,
    args: argparse.Namespace,
) -> Line:  # fmt: skip
    """Step two engines in turns, all of whose rows decode, and compare pair by pair."""
    blobs = scratch / name.replace(" ", "-").replace(",", "")
    plain, marked = (_engine(model_dir, blobs, dtype, args.rows, args.threads) for _ in range(2))
    try:
        mark = _write_mark(marked, blobs, args.bits, form)
        marked.execute(Call(0, "load", mark.digest))
        while marked.has_work:
            marked.step()
            time.sleep(1e-3)  # the reader needs the interpreter
        generator = torch.Generator().manual_seed(2)
        for number in range(args.rows):
            bits = torch.randint(0, 2, (args.bits,), generator=generator).tolist()
            options = (("signature", "".join(map(str, bits))),)
            applied = (AppliedAdapter(mark, options=options, is_mandatory=True),)
            _submit(plain, number, (), args.steps)
            _submit(marked, number, applied, args.steps)
        while not (_is_decoding(plain, args.rows) and _is_decoding(marked, args.rows)):
            for engine in (plain, marked):
                if not _is_decoding(engine, args.rows):
                    engine.step()
        pairs = []
        for turn in itertools.count():
            if len(pairs) == args.steps or not (plain.has_work and marked.has_work):
                break
            order = (plain, marked) if turn % 2 else (marked, plain)
            took = {id(engine): _timed(engine) for engine in order}
            if turn >= WARM_UP:
                pairs.append((took[id(plain)], took[id(marked)]))
    finally:
        plain.pool.close()
        marked.pool.close()
    ratios = [unmarked / own for unmarked, own in pairs]
    print(f"{name}: {statistics.median(ratios):.3f} of unmarked", file=sys.stderr, flush=True)
    first, middle, last = statistics.quantiles(ratios, n=4)
    return Line(
        form=name,
        relative=round(middle, 4),
        quartiles=(round(first, 4), round(last, 4)),
        unmarked_ms=round(1e3 * statistics.median(pair[0] for pair in pairs), 2),
        marked_ms=round(1e3 * statistics.median(pair[1] for pair in pairs), 2),
        num_pairs=len(pairs),
    )


def _timed(engine: Engine) -> float:
    began = time.process_time()
    engine.step()
    return time.process_time() - began


def _is_decoding(engine: Engine, num_rows: int) -> bool:
    running = engine.scheduler.running
    return len(running) == num_rows and all(
        sequence.num_computed >= sequence.num_prompt for sequence in running
    )


def _submit(
    engine: Engine, number: int, applied: tuple[AppliedAdapter, ...], num_steps: int
) -> None:
    # More tokens than steps: nobody ends while others are measured.
    params = SamplingParams(max_tokens=num_steps + 64, temperature=0.0, ignore_eos=True)
    engine.execute(Submit(Request(f"r{number}", tuple(range(3, 35)), params, applied)))


def _engine(model_dir: Path, blobs: Path, dtype: str, num_rows: int, threads: int) -> Engine:
    config = EngineConfig(
        model=str(model_dir), device="cpu", dtype=dtype, num_threads=threads,
        max_num_seqs=num_rows, kv_cache_bytes=512 << 20, max_adapter_bytes=64 << 20,
        prefix_cache=False,
    )  # fmt: skip
    return build_engine(config, model_dir, blobs, lambda: None, name="base")


def _write_mark(engine: Engine, root: Path, num_bits: int, form: dict[str, Any]) -> AdapterId:
    """Small random branches behind the last keys and values, as a blob."""
    base = engine.info.base
    last = max(int(site.path.split(".")[2]) for site in base.sites if ".layers." in site.path)
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for site in base.sites:
        if site.path not in (
            f"model.layers.{last}.self_attn.o_proj", f"model.layers.{last}.mlp.down_proj"
        ):  # fmt: skip
            continue
        shape = (num_bits, site.out_features, 1)
        if form["encoding"] == "pair":
            shape = (2, *shape)
        tensors[f"{site.path}.mark_A"] = 0.01 * torch.randn(
            num_bits, 1, site.in_features, generator=generator
        )
        tensors[f"{site.path}.mark_B"] = 0.01 * torch.randn(shape, generator=generator)
        if form["gate"] == "hinge":
            tensors[f"{site.path}.mark_tau"] = torch.full((num_bits, 1), 0.05)
    paths = sorted({key.rpartition(".")[0] for key in tensors})
    assert len(paths) == 2, "the model is not Llama-like"
    config = {
        "peft_type": "MARKBOARD", "format_version": 1, "mark_id": "0" * 16, "n_bits": num_bits,
        "rank_per_bit": 1, "task": "lm", "obfuscation": None, "base_model_hash": base.digest,
        "target_modules": paths, **form,
    }  # fmt: skip
    blobs = BlobStore(root)
    staged = blobs.new_staging()
    save_file(tensors, staged / "adapter_model.safetensors")
    (staged / "adapter_config.json").write_text(json.dumps(config))
    digest = digest_of(list_files(staged))
    blobs.put(staged, digest)
    return AdapterId("mark", 1, digest)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a Llama-like transformers directory")
    parser.add_argument("--rows", type=int, default=32, help="rows, each of its own user")
    parser.add_argument("--bits", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60, help="pairs of steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="instead of bench/results/<date>-<machine>")
    args = parser.parse_args()
    if args.model is None:
        from polyadapt.config import default_home
        from polyadapt.models.fetch import fetch_model

        args.model = fetch_model("smollm2", default_home(os.environ))
    return args


if __name__ == "__main__":
    sys.exit(main())
