"""Pinned memory through which small tensors are sent to a device while the host goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from polyadapt.ops.device import Device, Mark


class PinnedBuffers:
    """Buffers that take turns; one is written again once what was sent from it has arrived."""

    def __init__(self, device: Device, num_buffers: int = 2) -> None:
        self.device = device
        self._buffers = [device.pinned((0,), torch.uint8) for _ in range(num_buffers)]
        self._marks: list[Mark | None] = [None] * num_buffers
        self._turn = 0

    @contextmanager
    def turn(self, nbytes: int) -> Iterator[torch.Tensor]:
        """Lend the next buffer, uint8 [at least nbytes], not cleared, to be filled and copied from
        until the context ends. Waits while an earlier copy from it is under way.
        """
        turn = self._turn
        self._turn = (turn + 1) % len(self._buffers)
        mark = self._marks[turn]
        if mark is not None:
            mark.wait()
        if len(self._buffers[turn]) < nbytes:
            self._buffers[turn] = self.device.pinned((2 * nbytes,), torch.uint8)
        try:
            yield self._buffers[turn]
        finally:
            self._marks[turn] = self.device.mark()
