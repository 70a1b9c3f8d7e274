"""The host tier: copies of adapters beside or behind the device, within a budget of bytes.

Which of them leaves first is decided by what it would cost to read it again. Knows no slots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from polyadapt.adapters.entry import Entry, State
from polyadapt.adapters.eviction import EvictionOrder
from polyadapt.adapters.packing import PackedAdapter


class HostCopies:
    """Counts the copies that entries hold; the entries themselves are the pool's."""

    def __init__(
        self, budget: int, read_seconds: Callable[[int], float], counters: Counter[str]
    ) -> None:
        """budget in bytes; read_seconds: what reading so many bytes is expected to take."""
        self.nbytes = 0  # of all copies
        self._budget = budget
        self._read_seconds = read_seconds
        self._counters = counters
        self._order = EvictionOrder()

    def keep(self, entry: Entry, packed: PackedAdapter) -> None:
        """Give the entry its copy."""
        assert entry.packed is None
        entry.packed, entry.nbytes = packed, packed.nbytes
        self.nbytes += entry.nbytes
        self.use(entry)

    def use(self, entry: Entry) -> None:
        """Note one use of the adapter."""
        self._order.use(entry.on_host_standing)

    def drop(self, entry: Entry) -> None:
        """Take the entry's copy away, if it has one."""
        if entry.packed is not None:
            self.nbytes -= entry.nbytes
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

    def _score(self, entry: Entry) -> tuple[float, int]:
        return_s = self._read_seconds(entry.nbytes)
        return self._order.score(entry.on_host_standing, return_s, entry.nbytes)
