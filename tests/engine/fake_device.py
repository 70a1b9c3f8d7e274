"""An asynchronous device without a device: CPU tensors whose copies to the host arrive late."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from polyadapt.engine.engine import Engine
from polyadapt.ops.device import CopyStream, Graph, Mark

UNREAD = -7  # what fresh host memory holds; no token, no float and no flag is like it


@dataclass
class LateMark:
    """Reached after it was asked `latency` times, or as soon as somebody waits for it."""

    latency: int
    arrive: Callable[[], None] = lambda: None
    is_done: bool = False

    @property
    def is_reached(self) -> bool:
        self.latency -= 1
        if self.latency < 0:
            self.wait()
        return self.is_done

    def wait(self) -> None:
        if not self.is_done:
            self.is_done = True
            self.arrive()

    def precede(self) -> None:
        return


@dataclass
class LateCopies:
    """Copies that are made when their mark is reached, of sources that must still be the same."""

    latency: int
    _pending: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert target.shape == source.shape
        assert target.dtype == source.dtype
        self._pending.append((target, source, source.clone()))

    def follow(self, mark: Mark) -> None:
        return

    def mark(self) -> Mark:
        pending, self._pending = self._pending, []

        def arrive() -> None:
            for target, source, snapshot in pending:
                assert torch.equal(source, snapshot), "changed while it was copied"
                with torch.inference_mode():  # where it was made
                    target.copy_(snapshot)

        return LateMark(self.latency, arrive)


class FakeDevice:
    """Computes at once, tells late."""

    torch_device = torch.device("cpu")
    is_asynchronous = True
    can_capture = False

    def __init__(self, latency: int = 3) -> None:
        self._latency = latency

    def free_bytes(self) -> int:
        return 1 << 30

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, UNREAD, dtype=dtype)

    def copy_stream(self) -> CopyStream:
        return LateCopies(self._latency)

    def mark(self) -> Mark:
        return LateMark(self._latency)

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Graph, torch.Tensor]:
        raise RuntimeError("this device has no graphs")


class BlindDevice(FakeDevice):
    """Its tensors have shapes and no values: whoever would read one on the host fails."""

    torch_device = torch.device("meta")

    def copy_stream(self) -> CopyStream:
        return _NoCopies()


class _NoCopies:
    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert (target.shape, target.dtype) == (source.shape, source.dtype)

    def follow(self, mark: Mark) -> None:
        return

    def mark(self) -> Mark:
        return LateMark(0)


def overlapping(engine: Engine, latency: int = 3) -> Engine:
    """The engine, which has not stepped yet, on a device that computes while the host goes on."""
    return Engine(
        info=engine.info,
        scheduler=engine.scheduler,
        runner=engine.runner,
        pool=engine.pool,
        pace=engine._pace,
        counters=engine.counters,
        usage=engine._usage,
        device=FakeDevice(latency),
    )
