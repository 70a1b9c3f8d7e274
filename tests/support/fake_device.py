"""A device in the host's memory that treats its user as CUDA does.

Graphs are what was recorded: a replay runs the same operators on the same tensors, whatever Python
would do by now. Reading on the host while recording is the error that it is under CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from polyadapt.ops.device import CopyStream, Done, Graph, HostCopies, Mark

# They make a value of the host from one of the device, or a tensor of the device from one of the
# host's: neither can stand in a graph.
_READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "lift_fresh", "lift"}


# The same in Python's dress, which no operator shows for a tensor of the host.
_READING = {
    getattr(torch.Tensor, name)
    for name in ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
}


class CaptureError(RuntimeError):
    """Something was recorded that a graph cannot hold."""


class _NoReads(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _READING:
            raise CaptureError(f"{func.__name__} reads on the host, which no graph can hold")
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.split("::")[1]
        if name in _READS:
            raise CaptureError(f"{name} reads on the host, which no graph can hold")
        output = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, output))
        return output


class RecordedGraph:
    """Runs recorded operators again, each writing where it wrote when it was recorded."""

    def __init__(self, calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]]) -> None:
        self._calls = calls
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1
        for func, args, kwargs, recorded in self._calls:
            output = func(*args, **kwargs)
            if not isinstance(recorded, tuple | list):
                output, recorded = (output,), (recorded,)
            for new, old in zip(output, recorded, strict=True):
                # A view lies in the memory that it was taken of, and an in-place step wrote there.
                if isinstance(new, torch.Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)


class FakeDevice:
    """See the module."""

    is_asynchronous = True
    can_capture = True

    def __init__(self) -> None:
        self.graphs: list[RecordedGraph] = []

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu")

    def free_bytes(self) -> int:
        return 4 << 30

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def copy_stream(self) -> CopyStream:
        return HostCopies()

    def mark(self) -> Mark:
        return Done()

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Graph, torch.Tensor]:
        run()
        with _NoReads(), _Recorder() as recorder:
            output = run()
        graph = RecordedGraph(recorder.calls)
        self.graphs.append(graph)
        # Under CUDA a capture computes nothing: what is read before a replay must show.
        for _, _, _, found in recorder.calls:
            for tensor in found if isinstance(found, tuple | list) else (found,):
                if tensor is output:
                    tensor.fill_(float("nan"))
        return graph, output
