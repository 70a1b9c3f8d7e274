"""What a device makes of the engine: checks first, then times, at most eight minutes.

    python -m bench.gpu [--device cuda:0] [--seconds 450] [--parts base adapters ...]
    python -m bench.gpu --tiny --device cpu        # tries the program, measures nothing

A Llama of the 8B shape with random weights made on the device is served by an engine in this
process, through its own scheduler, runner, pool and kernels; each part's figures stand beside what
the device's measured bandwidth allows. Contexts are random keys and values that nobody computed,
but for the prefill. Every part has a limit of its own, and what was found is written after each
row: gpu.json, gpu.md and charts under bench/results/<date>-<device>/.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import re
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from bench.adapters import make_adapters
from bench.gpu_checks import put_blob, run_checks, store_adapters
from bench.gpu_engine import DeviceClock, Driver
from bench.gpu_model import (
    ALL_TARGETS,
    ATTENTION_TARGETS,
    LLAMA_8B,
    TINY,
    Shape,
    adapter_nbytes,
    loader,
    pack_random,
    weight_nbytes,
)
from bench.gpu_report import charts, list_targets, render
from bench.machine import describe

from polyadapt.config import EngineConfig
from polyadapt.engine import kv_cache
from polyadapt.engine.build import build_engine
from polyadapt.engine.worker import spare_collections
from polyadapt.errors import StartupError
from polyadapt.ops.device import Device, Host, open_device

# Of the process: what it takes to import torch counts.
_STARTED = time.monotonic() - (time.time() - psutil.Process().create_time())
ROOT = Path(__file__).parents[1]
TARGETS = {"q,k,v,o": ATTENTION_TARGETS, "all seven linears": ALL_TARGETS}
_ROOM = 128  # tokens behind a context, of all steps of one cell
_PAGE = 256  # tokens, as many as a device's page may have
_STOP_S = 10.0  # for ending what a part has left behind
_GRACE_S = 20.0  # for what cannot be interrupted
NOTES = (
    "Weights are random; adapters of one set hold equal values in memory of their own.",
    "Contexts hold random keys and values that nobody computed; the prefill is computed.",
    "limit: the bytes that a step must read, over the larger bandwidth that this run measured.",
    "ideal: the base's step of the same part, and the adapters' bytes over that bandwidth.",
    "A step's time is the median of the cell's.",
)


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of everything."""

    shape: Shape
    rows: tuple[int, ...] = (1, 8, 64, 256)
    adapters: tuple[int, ...] = (1, 8, 64)
    adapter_rows: int = 64
    rank: int = 16
    num_warm: int = 5
    num_steps: int = 30
    prompts: tuple[int, ...] = (1, 8)
    num_cold: int = 3
    peft_steps: int = 5
    read_nbytes: int = 4 << 30  # of the bandwidth's measurement


FULL = Scale(LLAMA_8B)
SMALL = Scale(
    TINY, rows=(1, 2), adapters=(1, 2), adapter_rows=2, rank=4, num_warm=1, num_steps=3,
    prompts=(1, 2), num_cold=2, peft_steps=1, read_nbytes=1 << 20,
)  # fmt: skip


class TimeUpError(Exception):
    """No more time is left for the part."""


@dataclass
class Part:
    """What came of one part; rows are added as they are measured."""

    status: str = "cut"  # done, cut, failed, skipped
    seconds: float = 0.0
    note: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)


class Bench:
    """The device, the engine under measurement and what was found so far."""

    def __init__(
        self,
        device: Device,
        name: str,
        scale: Scale,
        dtype: str,
        out: Path,
        seconds: float,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """name: the device as --device says it; settings: more of EngineConfig, for all engines."""
        self.device = device
        self.parts: dict[str, Part] = {}
        self._device_name = name
        self._is_cuda = device.torch_device.type == "cuda"
        self._scale = scale
        self._dtype = dtype
        self._itemsize = getattr(torch, dtype).itemsize
        self._out = out
        self._end = _STARTED + seconds
        self._settings = dict(settings or {})
        self._deadline = self._end
        self._driver: Driver | None = None
        self._part = Part()
        self._bandwidth = 0.0  # bytes a second that were read
        self._scratch = Path()
        self._started = datetime.datetime.now(datetime.UTC)
        self._strategy = "no engine was built"

    def run(self, wanted: Sequence[str], *, goes_on: bool) -> bool:
        """Run the parts; whether all that ran came to their ends and all checks are met. goes_on:
        times are taken even where a check is missed.
        """
        is_good = True
        with tempfile.TemporaryDirectory(prefix="polyadapt-bench-") as scratch:
            self._scratch = Path(scratch)
            for name, (limit_s, run) in PARTS.items():
                if name not in wanted:
                    continue
                self._run_part(name, limit_s, lambda run=run: run(self))
                part = self.parts[name]
                is_missed = name == "checks" and not all(row["met"] for row in part.rows)
                is_good = is_good and not is_missed and part.status in ("done", "skipped")
                if (is_missed or (name == "checks" and part.status == "failed")) and not goes_on:
                    part.note = "the device computes something else, so nothing is timed"
                    self._write()
                    break
            self._close()
        return is_good

    def _run_part(self, name: str, limit_s: float, run: Callable[[], None]) -> None:
        began = time.monotonic()
        self._part = self.parts[name] = Part()
        self._deadline = min(began + limit_s, self._end)
        print(f"{name} (at most {self._deadline - began:.0f} s)", flush=True)
        try:
            self.check_time()
            run()
            self._part.status = "done" if self._part.status == "cut" else self._part.status
        except TimeUpError:
            self._part.note = f"its time was up after {time.monotonic() - began:.0f} s"
        except Exception as error:  # what other parts find shall not be lost; it is a failed run
            traceback.print_exc()
            self._part.status = "failed"
            self._part.note = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if self._part.status in ("cut", "failed") and self._driver is not None:
            self._deadline = time.monotonic() + _STOP_S
            self._driver.stop()  # the next part begins without this one's rows
        self._part.seconds = time.monotonic() - began
        self._write()

    @property
    def seconds_left(self) -> float:
        """Of all parts."""
        return self._end - time.monotonic()

    def check_time(self) -> None:
        """Raise TimeUpError where the part's time is up."""
        if time.monotonic() > self._deadline:
            raise TimeUpError

    # ------------------------------------------------------------------ the parts
    def checks(self) -> None:
        """The device beside the CPU."""
        adapters = store_adapters(self._scratch / "checks")
        made_on = torch.device("cpu")

        def new_driver(is_on_device: bool, dtype: str, has_graphs: bool) -> Driver:
            config = self._config(
                model="toy", device=self._device_name if is_on_device else "cpu", dtype=dtype,
                max_num_seqs=8, max_model_len=256, kv_cache_bytes=8 << 20, prefix_cache=False,
                max_adapter_bytes=8 << 20, host_adapter_bytes=16 << 20, packed_cache_bytes=0,
            )  # fmt: skip
            device = self.device if is_on_device else Host()
            root = self._scratch / "checks"
            return self._new_driver(config, TINY, root, device, has_graphs, made_on)

        for check in run_checks(new_driver, adapters, self.device.can_capture):
            self._add(check=check.name, **{"is": check.value}, limit=check.limit, met=check.is_met)

    def bandwidth(self) -> None:
        """Bytes a second of a copy and of a read that reduces."""
        data = torch.ones(self._scale.read_nbytes // 4, device=self.device.torch_device)
        target = torch.empty_like(data)
        nbytes = data.numel() * 4
        for what, moved, run in (
            ("copy (read and written)", 2 * nbytes, lambda: target.copy_(data)),
            ("read (sum)", nbytes, data.sum),
        ):
            seconds = self._time(run)
            self._add(what=what, **{"MB": moved / 1e6, "GB/s": moved / seconds / 1e9})
            self._bandwidth = max(self._bandwidth, moved / seconds)

    def start(self) -> None:
        """Make the model and build the engine."""
        began = time.monotonic()
        self._driver = self._full_driver(has_graphs=True)
        self._add(what="engine", seconds=time.monotonic() - began, strategy=self._strategy)

    def base(self) -> None:
        """Decode steps of the base alone."""
        driver = self._need()
        for rows in self._scale.rows:
            step = self._step_of(driver, rows, [])
            self._add(rows=rows, **self._base_figures(driver, rows, step))

    def adapters(self) -> None:
        """Decode steps with distinct adapters."""
        driver, scale = self._need(), self._scale
        rows, spec = scale.adapter_rows, driver.engine.info.base
        base = self._step_of(driver, rows, [])
        self._add(targets="none", adapters=0, **{"step, ms": base * 1e3})
        for name, targets in TARGETS.items():
            dtype = driver.engine.pool.weights.dtype
            packed = pack_random(spec, dtype, scale.rank, targets)
            made = driver.make(name, packed, max(scale.adapters))
            loading = driver.load(made)
            nbytes = adapter_nbytes(spec, scale.rank, targets, self._itemsize)
            for count in scale.adapters:
                step = self._step_of(driver, rows, made[:count])
                ideal = base + count * nbytes / self._need_bandwidth()
                figures = {
                    "step, ms": step * 1e3,
                    "tokens/s": rows / step,
                    "adapters, MB": count * nbytes / 1e6,
                    "ideal, ms": ideal * 1e3,
                    "over ideal": step / ideal,
                    "of base": base / step,
                    "added over their bytes": max(step - base, 0.0) / (ideal - base),
                }
                self._add(targets=name, adapters=count, **figures)
            self._part.note += f"{len(made)} adapters on {name} loaded in {loading:.1f} s. "

    def kernels(self) -> None:
        """Which kernels a step's time goes to, with and without adapters."""
        driver, scale = self._need(), self._scale
        made = self._resident(driver)
        base = self._profile(driver, [])
        mixed = self._profile(driver, made)
        added = sum(ms for name, (ms, _) in mixed.items() if name not in base)
        spec = driver.engine.info.base
        nbytes = len(made) * adapter_nbytes(spec, scale.rank, ALL_TARGETS, self._itemsize)
        limit = nbytes / self._need_bandwidth() * 1e3
        self._add(
            batch="what only adapters run", **{"ms a step": added, "limit, ms": limit},
            kernel=f"{len(made)} adapters on all seven linears",
        )  # fmt: skip
        for batch, found in (("base", base), ("adapters", mixed)):
            longest = sorted(found.items(), key=lambda item: -item[1][0])[:10]
            for name, (ms, calls) in longest:
                self._add(batch=batch, **{"ms a step": ms, "calls": calls}, kernel=name[:90])

    def overhead(self) -> None:
        """What a step takes outside its forward."""
        driver, rows = self._need(), max(self._scale.rows)
        clock, runner = DeviceClock(self.device), driver.engine.runner
        run = runner.run
        driver.start(rows)
        runner.run = clock.timed(run)  # type: ignore[method-assign]
        try:
            clock.take()
            steps = driver.time_steps(self._scale.num_warm, self._scale.num_steps)
            forwards = clock.take()[self._scale.num_warm :]
        finally:
            runner.run = run  # type: ignore[method-assign]
        driver.stop()
        step, forward = statistics.median(steps), statistics.median(forwards)
        self._add(
            rows=rows, **{"step, ms": step * 1e3, "forward, ms": forward * 1e3},
            **{"outside, ms": (step - forward) * 1e3},
        )  # fmt: skip

    def prefill(self) -> None:
        """Prompts that are computed."""
        driver, context = self._need(), self._scale.shape.context
        driver.prefill(1, context)  # warms up
        params = weight_nbytes(driver.engine.info.base, 1)
        for prompts in self._scale.prompts:
            seconds, tokens = driver.prefill(prompts, context), prompts * context
            figures = {
                "ms": seconds * 1e3,
                "tokens/s": tokens / seconds,
                "TFLOP/s": 2 * params * tokens / seconds / 1e12,
            }
            self._add(prompts=prompts, tokens=tokens, **figures)

    def loads(self) -> None:
        """Adapters that are cold, alone and beside rows that decode."""
        driver, scale = self._need(), self._scale
        model = scale.shape.write(self._scratch / "model")
        directories = make_adapters(model, self._scratch / "cold", scale.num_cold, scale.rank)
        root = self._scratch / "blobs"
        stored = [put_blob(root, name, directory) for name, directory in directories.items()]
        spec = driver.engine.info.base
        nbytes = adapter_nbytes(spec, scale.rank, ALL_TARGETS, self._itemsize)

        def add(what: str, times: list[float]) -> None:
            ms = statistics.median(times) * 1e3
            self._add(what=what, MB=nbytes / 1e6, ms=ms, **{"GB/s": nbytes / ms / 1e6})

        for what in ("read from safetensors", "read from the packed file"):
            add(f"{what} and copied", [driver.load([adapter]) for adapter in stored])
            driver.unload(stored)
        driver.prepare(stored)
        add("copied from the host", [driver.load([adapter]) for adapter in stored])
        driver.unload(stored)
        driver.prepare(stored)
        driver.start(scale.adapter_rows)
        alone = driver.time_steps(scale.num_warm, scale.num_steps)
        for adapter in stored:
            driver.call("load", adapter)
        beside = driver.time_steps(0, scale.num_steps)
        driver.stop()
        for what, steps in (("a step alone", alone), ("a step beside loads", beside)):
            figures = {"ms": statistics.median(steps) * 1e3, "longest, ms": max(steps) * 1e3}
            self._add(what=what, **figures)
        driver.unload(stored)

    def eager(self) -> None:
        """The same steps module by module."""
        if not self.device.can_capture:
            self._skip("this device has no graphs to leave out")
            return
        self._close()
        driver = self._driver = self._full_driver(has_graphs=False)
        scale = self._scale
        cells = [(rows, 0) for rows in scale.rows] + [(scale.adapter_rows, max(scale.adapters))]
        for rows, count in cells:
            step = self._step_of(driver, rows, self._resident(driver) if count else [])
            graphs = self._found(rows, count)
            figures = {"step, ms": step * 1e3}
            if graphs is not None:
                figures |= {"with graphs, ms": graphs, "over graphs": step * 1e3 / graphs}
            self._add(rows=rows, adapters=count, **figures)

    def peft(self) -> None:
        """PEFT's mixed batch on the same shape, after the engine has given its memory back."""
        from bench.gpu_peft import time_mixed_batch

        self._close()
        scale, (name, targets) = self._scale, next(iter(TARGETS.items()))
        rows, count = scale.adapter_rows, max(scale.adapters)
        times, num_made = time_mixed_batch(
            scale.shape, self.device.torch_device, getattr(torch, self._dtype), num_rows=rows,
            num_adapters=count, rank=scale.rank, targets=targets, num_steps=scale.peft_steps,
            make_s=(self._deadline - time.monotonic()) / 2, sync=lambda: self.device.mark().wait(),
            check_time=self.check_time,
        )  # fmt: skip
        step = statistics.median(times) * 1e3
        if num_made < count:
            self._part.note = f"{num_made} of {count} adapters were made in half of the time"
        figures = {"rows": rows, "adapters": num_made, "targets": name, "step, ms": step}
        measured = self.parts["adapters"].rows if "adapters" in self.parts else []
        for row in measured:
            if (row["targets"], row["adapters"]) == (name, count):
                ours = row["step, ms"]
                figures |= {"ours, ms": ours, "ours over PEFT's": step / ours}
        self._add(**figures)

    # ------------------------------------------------------------------ inside
    def _step_of(self, driver: Driver, rows: int, adapters: Sequence[Any]) -> float:
        """Seconds of a decode step."""
        driver.start(rows, adapters)
        times = driver.time_steps(self._scale.num_warm, self._scale.num_steps)
        driver.stop()
        return statistics.median(times)

    def _base_figures(self, driver: Driver, rows: int, step: float) -> dict[str, float]:
        base, scale = driver.engine.runner.base, self._scale
        context = rows * (scale.shape.context + scale.num_warm + scale.num_steps / 2)
        nbytes = weight_nbytes(base.spec, self._itemsize) + context * kv_cache.token_nbytes(base)
        limit = nbytes / self._need_bandwidth()
        return {
            "step, ms": step * 1e3,
            "tokens/s": rows / step,
            "read, MB": nbytes / 1e6,
            "limit, ms": limit * 1e3,
            "part of limit": limit / step,
        }

    def _resident(self, driver: Driver) -> list[Any]:
        """As many adapters on all linears as are measured, on the device."""
        name, targets = list(TARGETS.items())[-1]
        spec, dtype = driver.engine.info.base, driver.engine.pool.weights.dtype
        made = driver.make(
            name, pack_random(spec, dtype, self._scale.rank, targets), max(self._scale.adapters)
        )
        driver.load(made)
        return made

    def _profile(self, driver: Driver, adapters: Sequence[Any]) -> dict[str, tuple[float, float]]:
        """By kernel, milliseconds and calls of a step."""
        activities = torch.profiler.ProfilerActivity
        is_cuda, num = self._is_cuda, 3
        driver.start(self._scale.adapter_rows, adapters)
        driver.time_steps(self._scale.num_warm, 1)
        with torch.profiler.profile(
            activities=[activities.CUDA] if is_cuda else [activities.CPU]
        ) as profile:
            driver.time_steps(0, num)
        driver.stop()
        found = {}
        for event in profile.key_averages():
            micros = event.self_device_time_total if is_cuda else event.self_cpu_time_total
            if micros > 0:
                found[event.key] = micros / 1e3 / num, event.count / num
        return found

    def _found(self, rows: int, count: int) -> float | None:
        """The step of the same cell with graphs, in milliseconds."""
        name = list(TARGETS)[-1]
        part, where = ("adapters", {"targets": name, "adapters": count}) if count else (
            "base", {"rows": rows}
        )  # fmt: skip
        for row in self.parts[part].rows if part in self.parts else []:
            if all(row.get(key) == value for key, value in where.items()):
                return float(row["step, ms"])
        return None

    def _time(self, run: Callable[[], object]) -> float:
        """Median seconds of a run, of nine."""
        times = []
        for _ in range(10):
            self.check_time()
            self.device.mark().wait()
            began = time.perf_counter()
            run()
            self.device.mark().wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])

    def _full_driver(self, *, has_graphs: bool) -> Driver:
        scale, shape = self._scale, self._scale.shape
        most_rows = max(*scale.rows, scale.adapter_rows)
        head = shape.hidden // shape.heads
        kv_nbytes = 2 * shape.kv_heads * head * shape.layers * self._itemsize
        config = self._config(
            model=shape.name, device=self._device_name, dtype=self._dtype, max_num_seqs=most_rows,
            max_num_batched_tokens=max(8 * shape.context, most_rows), prefix_cache=False,
            max_model_len=shape.context + _ROOM,
            # Nobody is admitted unless every row could still grow by a page.
            kv_cache_bytes=most_rows * (-(-shape.context // _PAGE) + 1) * _PAGE * kv_nbytes,
            max_adapter_bytes=self._adapter_bytes(),
        )  # fmt: skip
        return self._new_driver(config, shape, self._scratch, self.device, has_graphs, None)

    def _config(self, **settings: Any) -> EngineConfig:
        return EngineConfig(**(settings | self._settings))

    def _adapter_bytes(self) -> int:
        """For all adapters of both sets and the cold ones, and a little more."""
        scale, shape = self._scale, self._scale.shape
        keys = shape.hidden // shape.heads * shape.kv_heads
        attention = 4 * shape.hidden + 2 * (shape.hidden + keys)
        both = attention + 3 * (shape.hidden + shape.inner)
        widths = max(scale.adapters) * (attention + both) + scale.num_cold * both
        return int(1.1 * scale.rank * widths * shape.layers * self._itemsize)

    def _new_driver(
        self,
        config: EngineConfig,
        shape: Shape,
        root: Path,
        device: Device,
        has_graphs: bool,
        made_on: torch.device | None,
    ) -> Driver:
        (root / "blobs").mkdir(parents=True, exist_ok=True)
        engine = build_engine(
            config, root / "model", root / "blobs", lambda: None, name="base",
            device=device if has_graphs else _Uncaptured(device), load=loader(shape, made_on),
        )  # fmt: skip
        self._strategy = engine.info.strategy
        spare_collections()
        return Driver(engine, device, shape, self.check_time)

    def _need(self) -> Driver:
        if self._driver is None:
            raise RuntimeError("there is no engine; see the part `start`")
        return self._driver

    def _need_bandwidth(self) -> float:
        if not self._bandwidth:
            raise RuntimeError("the bandwidth was not measured; see that part")
        return self._bandwidth

    def _close(self) -> None:
        """Give the engine's memory back."""
        if self._driver is not None:
            self._driver.close()
        self._driver = None
        gc.unfreeze()  # what spare_collections froze
        gc.collect()
        if self._is_cuda:
            torch.cuda.empty_cache()

    def _skip(self, reason: str) -> None:
        self._part.status, self._part.note = "skipped", reason

    def _add(self, **row: Any) -> None:
        self._part.rows.append(row)
        print("  " + ", ".join(f"{key} {_shown(value)}" for key, value in row.items()), flush=True)
        self._write()

    def _write(self) -> None:
        """Save what was found so far; a reader never sees half a file."""
        result = self.result()
        self._out.mkdir(parents=True, exist_ok=True)
        files = {"gpu.json": json.dumps(result, indent=2) + "\n", "gpu.md": render(result)}
        for name, text in (files | charts(result)).items():
            unfinished = self._out / f"{name}.tmp"
            unfinished.write_text(text)
            unfinished.replace(self._out / name)

    def result(self) -> dict[str, Any]:
        """Everything that was found, as it is saved."""
        scale = self._scale
        settings = [f"{name}={value}" for name, value in self._settings.items()]
        return {
            "started": self._started.isoformat(timespec="seconds"),
            "device": describe_device(self.device),
            "method": {
                "shape": f"{scale.shape.name} shape, {asdict(scale.shape)}",
                "dtype": self._dtype,
                "context": scale.shape.context,
                "rank": scale.rank,
                "engine": ", ".join([self._strategy, *settings]),
                "versions": f"torch {torch.__version__}, CUDA {torch.version.cuda}",
                "notes": NOTES,
            },
            "scale": asdict(replace(scale)) | {"targets": list(TARGETS)},
            "parts": {name: asdict(part) for name, part in self.parts.items()},
        }


# In the order in which they run, with the seconds that each may take.
PARTS: dict[str, tuple[float, Callable[[Bench], None]]] = {
    "checks": (70, Bench.checks),
    "bandwidth": (10, Bench.bandwidth),
    "start": (60, Bench.start),
    "base": (40, Bench.base),
    "adapters": (90, Bench.adapters),
    "overhead": (15, Bench.overhead),
    "kernels": (40, Bench.kernels),
    "prefill": (20, Bench.prefill),
    "loads": (45, Bench.loads),
    "peft": (90, Bench.peft),
    "eager": (80, Bench.eager),
}


class _Uncaptured:
    """A device that captures nothing."""

    can_capture = False

    def __init__(self, device: Device) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)


def describe_device(device: Device) -> str:
    """Its name, as results are filed under."""
    if device.torch_device.type == "cuda":
        return str(torch.cuda.get_device_name(device.torch_device))
    return describe().slug


def _give_up() -> None:
    """End a process that hangs in a call; what was measured is written already."""
    print("the time is up and a call does not return: given up", file=sys.stderr, flush=True)
    os._exit(3)


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _slug(name: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or name not in EngineConfig.model_fields:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no NAME=VALUE of the engine's settings; NAME is one of "
            f"{', '.join(sorted(EngineConfig.model_fields))}"
        )
    return name, value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; 0: all came to their ends, 1: one did not or a check is missed, 2: there is no
    such device, 3: a call hung.
    """
    args = _parse(argv)
    try:
        device = open_device(args.device)
    except StartupError as error:
        print(f"{error.message}\nNothing was measured; `python -m bench.gpu --tiny --device cpu` "
              "tries the program without a device.", file=sys.stderr)  # fmt: skip
        return 2
    torch.manual_seed(0)
    scale = SMALL if args.tiny else FULL
    dtype = args.dtype or ("bfloat16" if device.is_asynchronous else "float32")
    started = datetime.datetime.now(datetime.UTC)
    folder = ROOT / "bench" / "results" / f"{started:%Y-%m-%d}-{_slug(describe_device(device))}"
    out = args.out or (Path(tempfile.mkdtemp(prefix="polyadapt-gpu-")) if args.tiny else folder)
    settings = {name: yaml.safe_load(value) for name, value in args.set}
    bench = Bench(device, args.device, scale, dtype, out, args.seconds, settings)
    watch = threading.Timer(max(bench.seconds_left, 0.0) + _GRACE_S, _give_up)
    watch.daemon = True
    watch.start()
    try:
        is_good = bench.run(args.parts, goes_on=args.anyway)
    finally:
        watch.cancel()
    for target in list_targets(bench.result()):
        value = "" if target.value is None else f" {target.value:.3g}"
        bound = "at least" if target.is_least else "at most"
        print(f"{target.verdict}: {target.name}:{value} ({bound} {target.limit:g})")
    print(f"saved under {out}")
    return 0 if is_good else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu with --tiny")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--tiny", action="store_true", help="a toy shape: tries the program")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=450.0, help="for all parts together")
    parser.add_argument("--anyway", action="store_true", help="take times though a check is missed")
    parser.add_argument("--out", type=Path, help="instead of bench/results/<date>-<device>")
    parser.add_argument(
        "--set", action="append", default=[], type=_setting, metavar="NAME=VALUE",
        help="another setting of the engine, such as triton=true",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.tiny:
        parser.error("the CPU is measured by `make bench`; --device cpu goes with --tiny")
    return args


if __name__ == "__main__":
    sys.exit(main())
