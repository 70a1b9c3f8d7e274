"""The host tier: copies of adapters beside or behind the device, within a budget of bytes.

Which of them leaves first is decided by what it would cost to read it again. For an asynchronous
device they lie in page-locked memory. Knows no slots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch

from polyadapt.adapters.entry import Entry, State
from polyadapt.adapters.eviction import EvictionOrder
from polyadapt.adapters.packing import PackedAdapter
from polyadapt.adapters.pinned import PinnedMemory

_PIECE = 1 << 19  # bytes that are copied between two pauses


class HostCopies:
    """Counts the copies that entries hold; the entries themselves are the pool's."""

    def __init__(
        self,
        budget: int,
        read_seconds: Callable[[int], float],
        counters: Counter[str],
        pinned: PinnedMemory | None = None,
    ) -> None:
        """budget in bytes; read_seconds: what reading so many bytes is expected to take. pinned:
        where copies lie as far as there is room; None: where they were read to.
        """
        self.nbytes = 0  # of all copies
        self._budget = budget
        self._read_seconds = read_seconds
        self._counters = counters
        self._pinned = pinned
        self._order = EvictionOrder()

    def hold(self, packed: PackedAdapter, breathe: Callable[[], None]) -> PackedAdapter:
        """On a reading thread: the same adapter where copies of it are to lie; `keep` or `release`
        takes it from there. `breathe` is called between its parts.

        Without room in page-locked memory it stays where it is, and is counted: its way to the
        device then takes the driver's own buffers.
        """
        if self._pinned is None or not packed.weights.numel():
            return packed
        block = self._pinned.take(packed.weights.numel())
        if block is None:
            return packed
        target, source = _bytes_of(block.weights), _bytes_of(packed.weights)
        for start in range(0, len(source), _PIECE):
            np.copyto(target[start : start + _PIECE], source[start : start + _PIECE])
            breathe()
        return replace(packed, weights=block.weights, memory=block)

    def release(self, packed: PackedAdapter) -> None:
        """Give back what `hold` returned; nothing reads it any more."""
        if packed.memory is not None:
            assert self._pinned is not None
            self._pinned.give_back(packed.memory)

    def keep(self, entry: Entry, packed: PackedAdapter) -> None:
        """Give the entry its copy."""
        assert entry.packed is None
        entry.packed, entry.nbytes = packed, packed.nbytes
        self.nbytes += entry.nbytes
        if self._pinned is not None and packed.memory is None and entry.nbytes:
            self._counters["adapter_copies_unpinned"] += 1
        self.use(entry)

    def use(self, entry: Entry) -> None:
        """Note one use of the adapter."""
        self._order.use(entry.on_host_standing)

    def drop(self, entry: Entry) -> None:
        """Take the entry's copy away, if it has one."""
        if entry.packed is not None:
            self.nbytes -= entry.nbytes
            self.release(entry.packed)
            entry.packed = None

    def trim(
        self,
        entries: Iterable[Entry],
        is_wanted: Callable[[Entry], bool],
        forget: Callable[[Entry], None],
    ) -> None:
        """Drop copies until the rest is within the budget: first those behind the device. An
        adapter that is nowhere else and not wanted is forgotten, which has to drop its copy.
        """
        if self.nbytes <= self._budget:
            return
        held = [entry for entry in entries if entry.packed is not None]
        held.sort(key=lambda e: (e.state is not State.DEVICE, self._score(e)))
        for entry in held:
            if self.nbytes <= self._budget:
                return
            if entry.state is State.DEVICE:
                self.drop(entry)
            elif entry.state is State.HOST and not is_wanted(entry):
                self._order.evicted(self._score(entry))
                forget(entry)
            else:
                continue
            self._counters["host_evictions"] += 1

    def check_integrity(self, entries: Iterable[Entry]) -> None:
        """Assert the count of bytes."""
        copies = [entry.packed for entry in entries if entry.packed is not None]
        assert sum(packed.nbytes for packed in copies) == self.nbytes
        if self._pinned is not None:
            self._pinned.check_integrity()
            places = [packed.memory for packed in copies if packed.memory is not None]
            assert len({id(place) for place in places}) == len(places), "a block of two copies"

    def _score(self, entry: Entry) -> tuple[float, int]:
        return_s = self._read_seconds(entry.nbytes)
        return self._order.score(entry.on_host_standing, return_s, entry.nbytes)


def _bytes_of(weights: torch.Tensor) -> np.ndarray:
    return weights.view(torch.uint8).numpy()
