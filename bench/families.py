"""What each family costs a decode step beside plain LoRA of equal stored rank: a row per family.

    python -m bench.families [--model DIR] [--rows 8] [--steps 12]

One checkpoint per family is made for the default model, by PEFT where it has the family; as many
copies as there are rows are loaded, so that every row has an adapter of its own. Short blocks of
decode steps of an engine in this process alternate between plain LoRA and the family, ROUNDS times,
since a machine's speed drifts. A family's figure is the median over the rounds of LoRA's median
step over its own. Results go to bench/results/<date>-<machine>/families.json.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from bench.machine import CpuWatch, describe
from bench.mixtures import write_experts, write_probed, write_ranks
from bench.places import default_model, results_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from polyadapt.config import EngineConfig
from polyadapt.engine.build import build_engine
from polyadapt.engine.engine import Engine
from polyadapt.engine.output import Call, Submit
from polyadapt.types import AdapterId, AppliedAdapter, Finished, Request, SamplingParams, Tokens
from polyadapt_store.blobs import BlobStore, list_files
from polyadapt_store.manifest import digest_of

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROUNDS = 7
RANK = 16  # components that the device holds per module, unless a family cannot
TARGET = 0.95  # of plain LoRA's throughput, for families that are low rank once loaded
TARGETS = {
    "smora (8 of 16)": 0.8,
    "mixlora (8 experts, top 2)": 0.4,
    "xlora (4 experts)": 0.35,
}  # of those that are not

Write = Callable[[Any, Path], None]  # base, directory
Make = Callable[[], peft.PeftConfig | Write]
# name -> (how PEFT makes it, or what writes its files, whether it is low rank once loaded)
FAMILIES: dict[str, tuple[Make, bool]] = {
    "lora, rank-stabilised": (
        lambda: peft.LoraConfig(r=RANK, use_rslora=True, target_modules=LINEARS),
        True,
    ),
    "dora": (lambda: peft.LoraConfig(r=RANK, use_dora=True, target_modules=LINEARS), True),
    "adalora": (
        lambda: peft.AdaLoraConfig(
            init_r=RANK, target_r=RANK, total_step=10, target_modules=LINEARS
        ),
        True,
    ),
    "vera": (lambda: peft.VeraConfig(r=RANK, target_modules=LINEARS), True),
    "miss": (lambda: peft.MissConfig(r=RANK, target_modules=LINEARS), True),
    "hra": (lambda: peft.HRAConfig(r=RANK, target_modules=LINEARS), True),
    "delora": (lambda: peft.DeloraConfig(r=RANK, target_modules=LINEARS), True),
    "gralora": (lambda: peft.GraloraConfig(r=RANK // 2, gralora_k=2, target_modules=LINEARS), True),
    "loha": (lambda: peft.LoHaConfig(r=4, target_modules=LINEARS), True),
    "vblora": (
        lambda: peft.VBLoRAConfig(r=RANK, num_vectors=64, vector_length=64, target_modules=LINEARS),
        True,
    ),
    "ia3": (
        lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        False,
    ),
    "oft": (lambda: peft.OFTConfig(oft_block_size=32, target_modules=LINEARS), False),
    "road": (lambda: peft.RoadConfig(target_modules=LINEARS), False),
    "ln_tuning": (
        lambda: peft.LNTuningConfig(
            target_modules=["input_layernorm", "post_attention_layernorm", "norm"]
        ),
        False,
    ),
    "lokr": (lambda: peft.LoKrConfig(r=8, target_modules=["q_proj", "v_proj"]), False),
    "c3a": (lambda: peft.C3AConfig(block_size=64, target_modules=["q_proj", "v_proj"]), False),
    "fourierft": (
        lambda: peft.FourierFTConfig(n_frequency=500, target_modules=["q_proj", "v_proj"]),
        False,
    ),
    # Rank 16 at attention, and in the MLP rank 2 for each of eight experts.
    "mixlora (8 experts, top 2)": (lambda: write_experts, False),
    "smora (8 of 16)": (lambda: write_ranks, False),
    # A token is a row of the scout's step and then one of the main's.
    "xlora (4 experts)": (lambda: write_probed, False),
}


@dataclass(frozen=True, slots=True)
class Line:
    """One family's figures."""

    family: str
    is_low_rank: bool
    relative: float | None  # throughput over plain LoRA's; None: it could not be measured
    step_ms: float | None
    nbytes: int  # device bytes of one adapter
    note: str = ""

    @property
    def target(self) -> float | None:
        """Of plain LoRA's throughput; None: there is none."""
        return TARGETS.get(self.family, TARGET if self.is_low_rank else None)

    @property
    def is_missed(self) -> bool:
        """Whether there is a target that was not reached."""
        return self.target is not None and (self.relative is None or self.relative < self.target)


def main() -> int:
    """Measure every family; the exit status is 1 when one is below its target."""
    args = _parse()
    machine = describe()
    started = datetime.datetime.now(datetime.UTC)
    with tempfile.TemporaryDirectory(prefix="polyadapt-bench-") as scratch:
        bench = Bench(args.model or default_model(), Path(scratch), machine.dtype, args)
        watch = CpuWatch([os.getpid()])
        lines = bench.run(args.families or list(FAMILIES))
        other = watch.other_cores()
    print(render(lines))
    out = results_folder(args.out, started)
    result = {
        "started": started.isoformat(timespec="seconds"),
        "machine": asdict(machine),
        "method": {
            "rows": args.rows,
            "steps": args.steps,
            "rounds": ROUNDS,
            "rank": RANK,
            "linears": LINEARS,
        },
        "other_cores": other,
        "families": [asdict(line) for line in lines],
    }
    (out / "families.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"saved under {out}; {other} other cores")
    return 1 if any(line.is_missed for line in lines) else 0


def render(lines: list[Line]) -> str:
    """Return the lines as a table."""
    rows = [
        "| family | of plain LoRA's throughput | step, ms | MiB an adapter |",
        "|---|---|---|---|",
    ]
    for line in lines:
        if line.relative is None:
            rows.append(f"| {line.family} | {line.note} | - | - |")
            continue
        rows.append(
            f"| {line.family} | {line.relative:.2f}{' **missed**' if line.is_missed else ''} "
            f"| {line.step_ms:.1f} | {line.nbytes / (1 << 20):.1f} |"
        )
    return "\n".join(rows)


class Bench:
    """The model, PEFT's checkpoints as blobs, and an engine in this process."""

    def __init__(
        self, model_dir: Path, scratch: Path, dtype: str, args: argparse.Namespace
    ) -> None:
        self.model_dir = model_dir
        self.scratch = scratch
        self.dtype = dtype
        self.num_rows, self.num_steps = args.rows, args.steps
        self.threads = args.threads
        self._blobs = BlobStore(scratch / "blobs")
        self._ids = itertools.count()

    def run(self, names: list[str]) -> list[Line]:
        """Measure the families between blocks of plain LoRA."""
        base = AutoModelForCausalLM.from_pretrained(self.model_dir, dtype=torch.float32)
        plain = self._copies(base, peft.LoraConfig(r=RANK, target_modules=LINEARS), "plain")
        made: dict[str, list[AdapterId] | str] = {}
        for name in names:
            try:
                made[name] = self._copies(base, FAMILIES[name][0](), name)
            except Exception as error:  # PEFT's own refusal is the row's note
                made[name] = f"PEFT: {error}"
        del base
        lines = []
        with self._engine() as engine:
            self._load(engine, plain)
            for name in names:
                adapters, is_low_rank = made[name], FAMILIES[name][1]
                if isinstance(adapters, str):
                    lines.append(Line(name, is_low_rank, None, None, 0, adapters))
                    continue
                try:
                    nbytes = self._load(engine, adapters)
                except RuntimeError as error:
                    lines.append(Line(name, is_low_rank, None, None, 0, str(error)))
                    continue
                ratios, steps = [], []
                for _ in range(ROUNDS):
                    reference, own = self._step_s(engine, plain), self._step_s(engine, adapters)
                    ratios.append(reference / own)
                    steps.append(own)
                relative, step_s = statistics.median(ratios), statistics.median(steps)
                line = Line(name, is_low_rank, round(relative, 3), round(step_s * 1e3, 2), nbytes)
                lines.append(line)
                print(f"{name}: {relative:.2f}", file=sys.stderr, flush=True)
                for adapter in adapters:
                    engine.execute(Call(next(self._ids), "unload", adapter.digest))
        return lines

    def _copies(self, base: Any, config: peft.PeftConfig | Write, name: str) -> list[AdapterId]:
        """A checkpoint with small random weights, as often as there are rows."""
        directory = self.scratch / name.replace(" ", "-").replace(",", "")
        if isinstance(config, peft.PeftConfig):
            self._have_peft_write(base, config, directory)
        else:
            config(base, directory)
        tensors = load_file(directory / "adapter_model.safetensors")
        found = []
        for number in range(self.num_rows):
            staged = self._blobs.new_staging()
            shutil.copytree(directory, staged, dirs_exist_ok=True)
            metadata = {"format": "pt", "copy": str(number)}
            save_file(tensors, staged / "adapter_model.safetensors", metadata=metadata)
            digest = digest_of(list_files(staged))
            self._blobs.put(staged, digest)
            found.append(AdapterId(f"{name}-{number}", 1, digest))
        return found

    def _have_peft_write(self, base: Any, config: peft.PeftConfig, directory: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(copy.deepcopy(base), config)
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        noise = torch.randn(parameter.shape, generator=generator)
                        parameter.add_(noise * 0.02)
            model.save_pretrained(directory)

    @contextmanager
    def _engine(self) -> Iterator[Engine]:
        # Two seats each: a request whose experts are weighed by a first pass is two sequences.
        config = EngineConfig(
            model=str(self.model_dir), device="cpu", dtype=self.dtype, num_threads=self.threads,
            max_num_seqs=2 * self.num_rows, kv_cache_bytes=256 << 20, max_adapter_bytes=4 << 30,
            prefix_cache=False,
        )  # fmt: skip
        engine = build_engine(
            config, self.model_dir, self.scratch / "blobs", lambda: None, name="base"
        )
        try:
            yield engine
        finally:
            engine.pool.close()

    def _load(self, engine: Engine, adapters: list[AdapterId]) -> int:
        """Bring the adapters to the device; return the bytes of one."""
        for adapter in adapters:
            engine.execute(Call(next(self._ids), "load", adapter.digest))
        nbytes, refused = 0, ""
        while engine.has_work:
            output = engine.step()
            for residency in output.residencies:
                nbytes = max(nbytes, residency.nbytes)
            refused = next((r.error_message or "" for r in output.replies if r.error_code), refused)
            time.sleep(1e-3)  # the reader needs the interpreter
        if refused:
            raise RuntimeError(refused)
        return nbytes

    def _step_s(self, engine: Engine, adapters: list[AdapterId]) -> float:
        """Seconds that a token of every adapter takes while all of them decode: the median step,
        times the steps per token, which are more than one where a first pass weighs experts.
        """
        params = SamplingParams(max_tokens=self.num_steps + 3, temperature=0.0, ignore_eos=True)
        for adapter in adapters:
            prompt = tuple(range(3, 35))
            applied = (AppliedAdapter(adapter),)
            engine.execute(Submit(Request(f"r{next(self._ids)}", prompt, params, applied)))
        times: list[float] = []
        num_tokens, spoken, is_whole = 0, set[str](), True
        while engine.has_work:
            began = time.perf_counter()
            events = engine.step().events
            took = time.perf_counter() - began
            is_whole = is_whole and not any(isinstance(event, Finished) for event in events)
            if is_whole and len(spoken) == len(adapters):  # everyone decodes
                times.append(took)
                num_tokens += sum(isinstance(event, Tokens) for event in events)
            spoken |= {event.request_id for event in events if isinstance(event, Tokens)}
        return statistics.median(times) * len(times) * len(adapters) / num_tokens


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a Llama-like transformers directory")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, help="default: all")
    parser.add_argument("--rows", type=int, default=8, help="rows, each with its own adapter")
    parser.add_argument("--steps", type=int, default=12, help="decode steps of a block")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="instead of bench/results/<date>-<machine>")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
