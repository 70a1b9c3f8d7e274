"""Drives an engine in this process: rows that decode behind a context, adapters, timed steps."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bench.gpu_model import Shape

from polyadapt.adapters.packing import PackedAdapter
from polyadapt.engine.engine import Engine
from polyadapt.engine.output import Call, Cancel, Submit
from polyadapt.ops.device import Device
from polyadapt.types import (
    AdapterId,
    AppliedAdapter,
    Event,
    Failed,
    Finished,
    Request,
    SamplingParams,
    Tokens,
)

_ADMITTING = 20  # steps within which all rows of a cell run


class Driver:
    """One engine and the requests that run in it."""

    def __init__(
        self, engine: Engine, device: Device, shape: Shape, check_time: Callable[[], None]
    ) -> None:
        """check_time raises where no more time is left."""
        self.engine = engine
        self._device = device
        self._shape = shape
        self._check_time = check_time
        self._random = random.Random(0)
        self._ids = itertools.count()
        self._running: list[str] = []
        self._made: dict[str, PackedAdapter] = {}
        self._read = engine.pool._read
        engine.pool._read = self._read_made
        for layer in engine.runner.base.layers:  # what contexts find there; see start
            layer.k.normal_()
            layer.v.normal_()

    # ------------------------------------------------------------------ adapters
    def make(self, name: str, packed: PackedAdapter, count: int) -> list[AdapterId]:
        """Name `count` adapters; each gets the values of `packed` in memory of its own."""
        made = [AdapterId(f"{name}-{n}", 1, f"made:{name}-{n}") for n in range(count)]
        self._made |= {adapter.digest: packed for adapter in made}
        return made

    def load(self, adapters: Sequence[AdapterId]) -> float:
        """Bring adapters to the device; return the seconds until all are there."""
        return self._call("load", adapters)

    def prepare(self, adapters: Sequence[AdapterId]) -> float:
        """Read adapters into the host's memory."""
        return self._call("prepare", adapters)

    def unload(self, adapters: Sequence[AdapterId]) -> None:
        """Release every tier of them."""
        self._call("unload", adapters)

    def call(self, name: str, adapter: AdapterId) -> None:
        """Ask for something without waiting for it."""
        self.engine.execute(Call(next(self._ids), name, adapter.digest))  # type: ignore[arg-type]

    # ------------------------------------------------------------------ rows
    def start(self, num_rows: int, adapters: Sequence[AdapterId] = ()) -> None:
        """Let so many rows decode, in turns with the adapters, behind contexts whose keys and
        values are the random ones of the cache: nothing was computed for them.
        """
        for number in range(num_rows):
            applied = adapters[number % len(adapters) :][:1] if adapters else []
            self._submit(applied, 1 << 20, self._shape.context)
        for sequence in self.engine.scheduler.waiting:
            sequence.num_computed = self._shape.context - 1
        for _ in range(_ADMITTING):
            self._step()
            if len(self.engine.scheduler.running) == num_rows:
                return
        raise RuntimeError(
            f"{len(self.engine.scheduler.running)} of {num_rows} rows were admitted in "
            f"{_ADMITTING} steps; is the KV memory too small, or an adapter not on the device?"
        )

    def stop(self) -> None:
        """End all rows."""
        for request_id in self._running:
            self.engine.execute(Cancel(request_id))
        self._running.clear()
        self._settle()

    def prefill(self, num_prompts: int, num_tokens: int) -> float:
        """Compute prompts to their first token; return the seconds that all took."""
        for _ in range(num_prompts):
            self._submit((), 1, num_tokens)
        began = time.perf_counter()
        self._settle()
        self._running.clear()
        return time.perf_counter() - began

    def time_steps(self, num_warm: int, num_steps: int) -> list[float]:
        """Seconds of each of so many steps, after some that nobody times; every row has a token in
        each.
        """
        for _ in range(num_warm):
            self._step()
        self.sync()
        num_rows, num_tokens, times = len(self._running), 0, []
        for _ in range(num_steps):
            began = time.perf_counter()
            events = self._step()
            times.append(time.perf_counter() - began)
            num_tokens += sum(isinstance(event, Tokens) for event in events)
        self.sync()
        # An engine that reads tokens a step later may be behind by one step.
        if num_tokens < num_rows * (num_steps - 1):
            raise RuntimeError(f"{num_rows} rows had {num_tokens} tokens in {num_steps} steps")
        return times

    def complete(self, requests: Sequence[Request]) -> list[Event]:
        """Serve requests to their ends; return all that happened."""
        for request in requests:
            self.engine.execute(Submit(request))
        return self._settle()

    def sync(self) -> None:
        """Wait for the device."""
        self._device.mark().wait()

    def close(self) -> None:
        """Stop the engine's threads."""
        self.engine.pool.close()

    # ------------------------------------------------------------------ inside
    def _read_made(self, digest: str) -> PackedAdapter:
        return self._made[digest] if digest in self._made else self._read(digest)

    def _submit(self, adapters: Sequence[AdapterId], max_tokens: int, num_prompt: int) -> None:
        name = f"row-{next(self._ids)}"
        vocab = self._shape.vocab
        prompt = tuple(self._random.randrange(3, vocab) for _ in range(num_prompt))
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        applied = tuple(AppliedAdapter(adapter) for adapter in adapters)
        self.engine.execute(Submit(Request(name, prompt, params, applied)))
        self._running.append(name)

    def _call(self, name: str, adapters: Sequence[AdapterId]) -> float:
        for adapter in adapters:
            self.call(name, adapter)
        began = time.perf_counter()
        self._settle()
        return time.perf_counter() - began

    def _settle(self) -> list[Event]:
        """Step until nothing is left to do."""
        events: list[Event] = []
        while self.engine.has_work:
            events += self._step()
            if not self.engine.scheduler.running:
                time.sleep(0.0005)  # the reading threads need the interpreter
        return events

    def _step(self) -> list[Event]:
        self._check_time()
        output = self.engine.step()
        failed = [event for event in output.events if isinstance(event, Failed)]
        problems = [reply.error_message for reply in output.replies if reply.error_message]
        if failed or problems:
            raise RuntimeError(f"the engine failed: {[*(f.message for f in failed), *problems]}")
        return list(output.events)


class DeviceClock:
    """Seconds that the device takes for what a function enqueues, call by call."""

    def __init__(self, device: Device) -> None:
        self._is_cuda = device.torch_device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def call(*args: Any, **kwargs: Any) -> Any:
            began = self._now()
            result = function(*args, **kwargs)
            self._spans.append((began, self._now()))
            return result

        return call

    def take(self) -> list[float]:
        """The seconds of every call since the last time; the device is done."""
        spans, self._spans = self._spans, []
        if self._is_cuda:
            return [began.elapsed_time(ended) / 1e3 for began, ended in spans]
        return [ended - began for began, ended in spans]

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def is_over(events: Sequence[Event]) -> int:
    """How many requests ended well."""
    return sum(isinstance(event, Finished) for event in events)
