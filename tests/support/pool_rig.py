"""A pool over adapters that are given by hand, and what it told its callers."""

from __future__ import annotations

import threading
from collections import Counter
from itertools import pairwise
from typing import Any

import torch

from polyadapt.adapters.packing import PackedAdapter
from polyadapt.adapters.pool import AdapterPool
from polyadapt.errors import AdapterUnavailable
from polyadapt.ops import cells as layout
from polyadapt.ops.device import Host
from polyadapt.ops.slot_table import SlotTable
from polyadapt.types import AdapterId, AppliedAdapter, Residency

NUM_SITES = 3


def packed(value: float, size: int) -> PackedAdapter:
    """An adapter of `size` elements at site 1 whose every weight is `value`."""
    cells = torch.full((NUM_SITES, layout.COLUMNS), -1)
    cells[1] = torch.tensor([0, 2, 0, 0])
    return PackedAdapter(torch.full((size,), value), cells, rank=2)


def packed_cells(value: float, sizes: list[int]) -> PackedAdapter:
    """An adapter with a cell at every site, of these elements, each full of a number of its own."""
    whole = packed(value, sum(sizes))
    start = 0
    for site_id, size in enumerate(sizes):
        whole.cells[site_id] = torch.tensor([start, 2, 0, 0])
        whole.weights[start : start + size] = value + site_id / 8
        start += size
    return whole


def applied(*names: str) -> tuple[AppliedAdapter, ...]:
    """The adapters of these digests, as a request names them."""
    return tuple(AppliedAdapter(AdapterId(name, 1, name)) for name in names)


class Store:
    """A reader whose adapters are given by hand; counts reads and can be held back."""

    def __init__(self, **sizes: int) -> None:
        self.adapters = {
            name: packed(float(number), size)
            for number, (name, size) in enumerate(sizes.items(), start=1)
        }
        self.reads: Counter[str] = Counter()
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, digest: str) -> PackedAdapter:
        self.reads[digest] += 1
        assert self.gate.wait(10)
        if digest not in self.adapters:
            raise AdapterUnavailable(f"{digest} is gone")
        return self.adapters[digest]


class Rig:
    """A pool over a store, with what it told its callers."""

    def __init__(
        self,
        store: Store,
        *,
        size: int = 100,
        slots: int = 4,
        host: int = 1 << 20,
        **options: Any,
    ):
        self.store = store
        self.woken = threading.Event()
        self.queue: tuple[str, ...] = ()  # what was asked for last and not leased
        self.counters: Counter[str] = Counter()
        self.known: dict[str, Residency] = {}
        cells = torch.zeros(slots, NUM_SITES, layout.COLUMNS, dtype=torch.int64)
        self.slots = SlotTable(cells, Host())  # what a device would know of them
        self.pool = AdapterPool(
            arena=torch.zeros(size),
            cells=cells,
            on_change=self.slots.update,
            read=store,
            host_bytes=host,
            counters=self.counters,
            wake=self.woken.set,
            **options,
        )

    def acquire(self, *names: str) -> tuple[int, ...] | None:
        """Lease all of them; None when one is not on the device."""
        slots = self.find(*names)
        if slots is not None:
            self.pool.lease(slots)
        return slots

    def find(self, *names: str) -> tuple[int, ...] | None:
        slots = self.pool.find(applied(*names))
        self.queue = names if slots is None else ()
        return slots

    def settle(self) -> None:
        """Poll until no read or copy is under way; the queue asks in every round, as it does."""
        self._poll()
        while self.pool._jobs:
            assert self.woken.wait(10)
            self.woken.clear()
            self._poll()
        self.pool.check_integrity()
        offsets = self.pool.cells[:, :, layout.OFFSET]
        assert torch.equal(self.slots.cells[:, :, layout.OFFSET], offsets), "the device lags behind"
        assert self.slots.max_ranks.tolist() == [2 * bool((row >= 0).any()) for row in offsets]

    def _poll(self) -> None:
        self.pool.poll()
        for name in self.queue:
            self.pool._want(name)

    def take(self, name: str) -> int:
        """Acquire, waiting for the load, and check that the slot really holds the adapter."""
        for _ in range(3):
            slots = self.acquire(name)
            if slots is not None:
                self.check(name, slots[0])
                return slots[0]
            self.settle()
        raise AssertionError(f"{name} did not become resident")

    def acquire_all(self, name: str) -> int:
        """Take an adapter of several cells."""
        assert self.acquire(name) is None
        self.settle()
        slots = self.acquire(name)
        assert slots is not None
        self.check_cells(name, slots[0])
        return slots[0]

    def check_cells(self, name: str, slot: int) -> None:
        stored = self.store.adapters[name]
        starts = [*stored.cells[:, 0].tolist(), len(stored.weights)]
        for site_id, (start, stop) in enumerate(pairwise(starts)):
            offset = int(self.pool.cells[slot, site_id, 0])
            there = self.pool.weights[offset : offset + stop - start]
            assert torch.equal(there, stored.weights[start:stop]), site_id

    def check(self, name: str, slot: int) -> None:
        offset, rank, *_ = self.pool.cells[slot, 1].tolist()
        weights = self.store.adapters[name].weights
        assert rank == 2
        assert torch.equal(self.pool.weights[offset : offset + len(weights)], weights)

    def tier(self, name: str) -> str | None:
        found = self.residencies().get(name)
        return found.tier if found else None

    def residencies(self) -> dict[str, Residency]:
        """What the edge knows: every change since the beginning, put together."""
        residencies, gone = self.pool.take_changes()
        self.known |= {residency.digest: residency for residency in residencies}
        for digest in gone:
            self.known.pop(digest, None)
        return self.known
