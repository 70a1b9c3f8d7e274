"""Page-locked host memory in slabs, from which a device copies while the host goes on.

Locking pages takes a tenth of a second a gigabyte and more, and holds up all streams of a CUDA
device; so it is done for many adapters at once. Called by reading threads and the engine's.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

import torch

from polyadapt.adapters.arena import Arena, Extent
from polyadapt.errors import StartupError
from polyadapt.ops.device import Device

logger = logging.getLogger(__name__)

_SLAB_NBYTES = 1 << 30


@dataclass(slots=True, eq=False)
class _Slab:
    memory: torch.Tensor  # [elements], page-locked
    arena: Arena


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """weights [size], a part of a slab, until it is given back."""

    weights: torch.Tensor
    slab: _Slab
    extent: Extent


class PinnedMemory:
    """Owns at most `nbytes` of it, in slabs that are locked when they are needed, the first one
    from the start, and kept.
    """

    def __init__(self, device: Device, dtype: torch.dtype, nbytes: int) -> None:
        """Raises StartupError where the first slab cannot be locked."""
        self._device = device
        self._dtype = dtype
        self._slab_size = _SLAB_NBYTES // dtype.itemsize
        self._num_left = nbytes // dtype.itemsize  # elements that may still be locked
        self._lock = threading.Lock()
        self._slabs: list[_Slab] = []
        first = min(self._slab_size, self._num_left)
        if not first:
            return
        try:
            self._slabs.append(self._locked(first))
        except RuntimeError as error:
            raise StartupError(
                f"--host-adapter-bytes {nbytes}: {first * dtype.itemsize} bytes of host memory "
                f"cannot be page-locked ({error}); lower it, or raise what the system lets a "
                "process lock (ulimit -l)"
            ) from error
        self._num_left -= first

    def take(self, size: int) -> Block | None:
        """A block of `size` elements, not cleared; None where there is no room for it."""
        with self._lock:
            found = self._find(size)
            if found is not None or size > self._num_left:
                return found
            length = min(max(size, self._slab_size), self._num_left)
            self._num_left -= length
        try:
            slab = self._locked(length)  # nobody waits for the lock meanwhile
        except RuntimeError as error:
            logger.warning(
                "%d more bytes of host memory cannot be page-locked, and none will be tried: %s",
                length * self._dtype.itemsize, error,
            )  # fmt: skip
            with self._lock:
                self._num_left = 0
            return None
        block = _block_of(slab, size)
        with self._lock:
            self._slabs.append(slab)
        return block

    def give_back(self, block: Block) -> None:
        """End the use of a block; no copy from it is under way."""
        with self._lock:
            block.slab.arena.release(block.extent)

    @property
    def num_used(self) -> int:
        """Elements of all blocks."""
        with self._lock:
            return sum(slab.arena.num_used for slab in self._slabs)

    def check_integrity(self) -> None:
        """Assert the order of every slab's blocks."""
        with self._lock:
            for slab in self._slabs:
                slab.arena.check_integrity()

    def _find(self, size: int) -> Block | None:
        for slab in self._slabs:
            block = _block_of(slab, size)
            if block is not None:
                return block
        return None

    def _locked(self, length: int) -> _Slab:
        return _Slab(self._device.pinned((length,), self._dtype), Arena(length))


def _block_of(slab: _Slab, size: int) -> Block | None:
    extent = slab.arena.allocate(size)
    if extent is None:
        return None
    return Block(slab.memory[extent.start : extent.start + size], slab, extent)
