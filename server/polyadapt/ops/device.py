"""What a device does beside holding tensors: host memory that it reads, copies beside the steps,
captured forwards.

The seam behind which CUDA is used, so that whoever relies on it can be tried on a machine without.
Work on an asynchronous device is enqueued; reading a result on the host waits for it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from polyadapt.errors import StartupError

_ALIGNMENT = 256  # bytes, of the fields of a staging


class Mark(Protocol):
    """A point in a stream of work."""

    @property
    def is_reached(self) -> bool:
        """Whether everything before it is done. Does not wait."""

    def wait(self) -> None:
        """Hold the caller up until everything before it is done."""

    def precede(self) -> None:
        """Let work that is enqueued for the steps from now on run behind it. Does not wait."""


class CopyStream(Protocol):
    """Copies beside the steps, one behind the other."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueue target <- source, of one shape and dtype; both stay as they are until it is
        done.
        """

    def follow(self, mark: Mark) -> None:
        """Let copies that are enqueued from now on run behind the mark of the steps."""

    def mark(self) -> Mark:
        """The point behind the last copy."""


class Graph(Protocol):
    """A captured forward: it reads and writes the tensors that it was captured with."""

    def replay(self) -> None:
        """Enqueue it once more; the tensors hold what they held when it comes to run."""


class Device(Protocol):
    """One device that an engine computes on."""

    @property
    def torch_device(self) -> torch.device:
        """What tensors are made on."""

    @property
    def is_asynchronous(self) -> bool:
        """Whether work is enqueued, so that the host may prepare the next step meanwhile."""

    @property
    def can_capture(self) -> bool:
        """Whether `capture` works."""

    def free_bytes(self) -> int:
        """Memory that is free now."""

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Host memory, not cleared, that the device copies from while the host goes on."""

    def copy_stream(self) -> CopyStream:
        """A new stream of copies beside the steps."""

    def mark(self) -> Mark:
        """The point behind what is enqueued for the steps."""

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Graph, torch.Tensor]:
        """Capture what `run` enqueues, which must read nothing on the host; returns the graph and
        what it writes at every replay. `run` is called more than once.
        """


class Staging:
    """Fixed tensors on the device that the host writes before a step, all with one copy.

    Two host buffers take turns: the next step is written while the last one's copy waits. Both hold
    anything at first.
    """

    def __init__(self, device: Device, fields: Mapping[str, tuple[tuple[int, ...], np.dtype]]):
        """fields: shape and dtype by name, in the order of the memory."""
        self._device = device
        offsets, total = {}, 0
        for name, (shape, dtype) in fields.items():
            offsets[name] = total
            total += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        self._bytes = torch.zeros(total, dtype=torch.uint8, device=device.torch_device)
        self._turns = [device.pinned((total,), torch.uint8) for _ in range(2)]
        self._marks: list[Mark] = [Done(), Done()]
        self._turn = 0
        self.hosts: list[dict[str, np.ndarray]] = []
        for turn in self._turns:
            raw = turn.numpy()
            views = {}
            for name, (shape, dtype) in fields.items():
                nbytes = math.prod(shape) * dtype.itemsize
                views[name] = raw[offsets[name] : offsets[name] + nbytes].view(dtype).reshape(shape)
            self.hosts.append(views)
        self.tensors: dict[str, torch.Tensor] = {}
        for name, (shape, dtype) in fields.items():
            nbytes = math.prod(shape) * dtype.itemsize
            raw_tensor = self._bytes[offsets[name] : offsets[name] + nbytes]
            kind = torch.from_numpy(np.empty(0, dtype)).dtype
            self.tensors[name] = raw_tensor.view(kind).view(shape)
        self._row_nbytes = {
            name: math.prod(shape[1:]) * dtype.itemsize for name, (shape, dtype) in fields.items()
        }
        self._offsets = offsets

    def begin(self) -> dict[str, np.ndarray]:
        """The host's arrays to write, holding anything; waits for the copy before the last."""
        self._turn = 1 - self._turn
        self._marks[self._turn].wait()
        return self.hosts[self._turn]

    def send(self, last: str, num_rows: int) -> None:
        """Enqueue the copy of the fields before `last` and the first num_rows rows of it."""
        stop = self._offsets[last] + num_rows * self._row_nbytes[last]
        self._bytes[:stop].copy_(self._turns[self._turn][:stop], non_blocking=True)
        self._marks[self._turn] = self._device.mark()


class Done:
    """The mark of work that is done when it is asked for."""

    is_reached = True

    def wait(self) -> None:
        """Return."""

    def precede(self) -> None:
        """Return."""


class HostCopies:
    """Copies that are made at once."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy, and return when it is done."""
        target.copy_(source)

    def follow(self, mark: Mark) -> None:
        """Return: the steps are done."""

    def mark(self) -> Mark:
        """Reached."""
        return Done()


class Host:
    """The CPU: everything is done when the call returns."""

    is_asynchronous = False
    can_capture = False

    @property
    def torch_device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def free_bytes(self) -> int:
        """What the system calls available, or half of its memory where it does not say."""
        meminfo = Path("/proc/meminfo")
        if meminfo.is_file():  # counts the page cache as free, which sysconf does not
            for line in meminfo.read_text("ascii").splitlines():
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Ordinary memory."""
        return torch.empty(shape, dtype=dtype)

    def copy_stream(self) -> CopyStream:
        """Copies that are made at once."""
        return HostCopies()

    def mark(self) -> Mark:
        """Reached."""
        return Done()

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Graph, torch.Tensor]:
        """Raises RuntimeError: there is nothing to capture."""
        raise RuntimeError("the CPU has no graphs to capture; ask can_capture first")


class _CudaMark:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(stream)

    @property
    def is_reached(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self._event.synchronize()

    def precede(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)

    def hold(self, stream: torch.cuda.Stream) -> None:
        """Let the stream's further work run behind it."""
        stream.wait_event(self._event)


class _CudaCopies:
    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def follow(self, mark: Mark) -> None:
        assert isinstance(mark, _CudaMark)
        mark.hold(self._stream)

    def mark(self) -> Mark:
        return _CudaMark(self._stream)


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph

    def replay(self) -> None:
        self._graph.replay()


class Cuda:
    """One CUDA device. Written against torch's documentation; it has never run on a device."""

    is_asynchronous = True
    can_capture = True

    def __init__(self, index: int = 0) -> None:
        """Raises StartupError where torch finds no such device."""
        if not torch.cuda.is_available():
            raise StartupError(
                f"--device cuda: torch {torch.__version__} finds no CUDA device; install a CUDA "
                "build of torch and check nvidia-smi, or use --device cpu"
            )
        if index >= torch.cuda.device_count():
            raise StartupError(
                f"--device cuda:{index}: there are {torch.cuda.device_count()} CUDA devices, "
                "counted from 0"
            )
        self._device = torch.device("cuda", index)
        torch.cuda.set_device(self._device)
        self._pool: Any = None  # memory that all graphs share

    @property
    def torch_device(self) -> torch.device:
        """The device."""
        return self._device

    def free_bytes(self) -> int:
        """What the driver says."""
        return int(torch.cuda.mem_get_info(self._device)[0])

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Page-locked memory."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def copy_stream(self) -> CopyStream:
        """A stream of its own."""
        return _CudaCopies(self._device)

    def mark(self) -> Mark:
        """An event of the current stream."""
        return _CudaMark(torch.cuda.current_stream(self._device))

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Graph, torch.Tensor]:
        """Warm up on a side stream, as torch asks, then capture into memory that all graphs
        share: only one of them may be between its replay and the reading of what it wrote.
        """
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # Threads that read adapters may lock more host memory meanwhile, which is none of its work.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = run()
        return _CudaGraph(graph), output


def open_device(name: str) -> Device:
    """The device of --device: cpu, cuda, cuda:N, or auto (CUDA where there is one)."""
    kind, _, index = name.partition(":")
    if kind == "auto":
        return Cuda() if torch.cuda.is_available() else Host()
    if kind == "cpu":
        return Host()
    if kind != "cuda" or (index and not index.isdigit()):
        raise StartupError(f"--device {name!r} is none of auto, cpu, cuda, cuda:N")
    return Cuda(int(index or 0))
