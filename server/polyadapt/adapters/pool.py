"""Owns all device memory of adapters: the arena, the slots, their leases, and the host copies
behind.

    store (files) --read--> host copy --place--> device slot
Reading and copying happen in a loader thread; slots, extents and the cell table change only here,
on the thread that steps the engine, between steps. An adapter that is leased or pinned is never
evicted. Everything is keyed by digest.
"""

from __future__ import annotations

import enum
import logging
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from polyadapt.adapters.arena import Arena, Extent
from polyadapt.adapters.packing import PackedAdapter
from polyadapt.errors import AdapterUnavailable, InvalidRequest, PolyadaptError
from polyadapt.types import AdapterId, AppliedAdapter, Residency, ServedAdapter, Tier

logger = logging.getLogger(__name__)

Read = Callable[[str], PackedAdapter]  # digest -> weights; raises PolyadaptError
Done = Callable[["Residency | PolyadaptError"], None]


class _State(enum.Enum):
    READING = enum.auto()
    HOST = enum.auto()
    PLACING = enum.auto()
    DEVICE = enum.auto()


@dataclass(slots=True)
class _Entry:
    digest: str
    state: _State
    nbytes: int = 0
    is_scalable: bool = True
    is_kv_neutral: bool = False
    packed: PackedAdapter | None = None  # the host copy
    slot: int = -1
    extent: Extent | None = None
    num_leases: int = 0
    is_pinned: bool = False
    wanted_round: int = -2  # the latest round in which a queued request asked for it
    is_short: bool = False  # it lies on the host because nothing could be evicted for it
    recency: float = 0.0  # monotonic seconds, for the order of eviction
    last_used: float = 0.0  # unix seconds, for people
    load_ms: float = 0.0  # of the latest trip to the device, until the first lease reports it
    load_tier: Tier = "device"
    started: float = 0.0
    on_host: list[Done] = field(default_factory=list)
    on_device: list[Done] = field(default_factory=list)


class AdapterPool:
    """See the module. Every method is called on the engine's thread."""

    def __init__(
        self,
        *,
        arena: torch.Tensor,
        cells: torch.Tensor,
        read: Read,
        host_bytes: int,
        counters: Counter[str],
        wake: Callable[[], None],
    ) -> None:
        self.weights = arena  # [num_elements], on the device
        self.cells = cells  # int64 [num_slots, num_sites, 3], on the host
        self.host_bytes = host_bytes
        self.counters = counters
        self._read = read
        self._wake = wake
        self._arena = Arena(arena.numel())
        self._free_slots = list(range(cells.shape[0] - 1, -1, -1))
        self._entries: dict[str, _Entry] = {}
        self._round = 0
        self._by_slot: dict[int, _Entry] = {}
        self._failures: dict[str, PolyadaptError] = {}
        self._unloading: dict[str, list[Callable[[], None]]] = {}
        self._jobs: dict[Future[PackedAdapter | None], _Entry] = {}
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="adapter-loader")
        self.cells[:, :, 0] = -1

    # ------------------------------------------------------------------ leases
    def acquire(self, adapters: tuple[AppliedAdapter, ...]) -> tuple[int, ...] | None:
        """Lease every adapter's slot; None when one is not on the device yet (then it is under
        way).
        """
        entries = [self._want(applied.adapter.digest) for applied in adapters]
        if any(entry is None or entry.state is not _State.DEVICE for entry in entries):
            return None
        slots = []
        for entry in entries:
            assert entry is not None
            entry.num_leases += 1
            slots.append(entry.slot)
        return tuple(slots)

    def release(self, slots: tuple[int, ...]) -> None:
        """Give one lease of each slot back."""
        for slot in slots:
            entry = self._by_slot[slot]
            assert entry.num_leases > 0, "a lease was released twice"
            entry.num_leases -= 1

    def is_short_of_room(self, adapters: tuple[AppliedAdapter, ...]) -> bool:
        """Whether one of them waits for room on the device, and not for a read or a copy."""
        entries = [self._entries.get(applied.adapter.digest) for applied in adapters]
        return any(entry is not None and entry.is_short for entry in entries)

    def served(self, adapter: AdapterId) -> ServedAdapter:
        """What the reply says of an adapter that was just leased; the load is reported once."""
        entry = self._entries[adapter.digest]
        served = ServedAdapter(adapter, entry.load_tier, round(entry.load_ms, 3))
        entry.load_tier, entry.load_ms = "device", 0.0
        return served

    def take_failures(self) -> dict[str, PolyadaptError]:
        """Why loads failed since the last call, by digest; forgotten here, so that whoever asks
        next tries again.
        """
        taken, self._failures = self._failures, {}
        return taken

    def is_scalable(self, slot: int) -> bool:
        """Whether the resident adapter may be scaled by anything but 0 and 1."""
        return self._by_slot[slot].is_scalable

    def kv_identities(self, adapters: tuple[AppliedAdapter, ...]) -> tuple[str, ...]:
        """What each adapter is to keys and values while it is leased: its digest, or "" when it
        leaves all of them as the base's.
        """
        digests = (applied.adapter.digest for applied in adapters)
        return tuple("" if self._entries[d].is_kv_neutral else d for d in digests)

    # ------------------------------------------------------------------ commands
    def prepare(self, digest: str, done: Done) -> None:
        """Read and check the weights into host memory, then call done once."""
        entry = self._entries.get(digest) or self._start_reading(digest)
        if entry.state is _State.READING:
            entry.on_host.append(done)
        else:
            done(self._residency(entry))

    def load(self, digest: str, is_pinned: bool, done: Done) -> None:
        """Bring the adapter to the device and set its pin, then call done once."""
        for unloaded in self._unloading.pop(digest, []):  # the later command wins
            unloaded()
        entry = self._entries.get(digest) or self._start_reading(digest)
        entry.is_pinned = is_pinned
        self._touch(entry)
        if entry.state is _State.DEVICE:
            done(self._residency(entry))
            return
        entry.on_device.append(done)
        if entry.state is _State.HOST:
            self._place(entry)

    def unload(self, digest: str, done: Callable[[], None]) -> None:
        """Release every tier as soon as no lease is left, then call done once."""
        entry = self._entries.get(digest)
        if entry is None:
            done()
            return
        entry.is_pinned = False
        self._unloading.setdefault(digest, []).append(done)
        self._finish_unloading()

    def poll(self) -> None:
        """Between steps: take in finished reads and copies, and place what is wanted."""
        self._round += 1
        for future in [job for job in self._jobs if job.done()]:
            self._absorb(self._jobs.pop(future), future)
        for entry in list(self._entries.values()):
            if entry.state is _State.HOST and self._is_wanted(entry):
                self._place(entry)
        self._finish_unloading()
        self._trim_host()

    def close(self) -> None:
        """Stop the loader thread; nothing is usable afterwards."""
        self._loader.shutdown(wait=True, cancel_futures=True)

    # ------------------------------------------------------------------ what it says of itself
    @property
    def is_loading(self) -> bool:
        """Whether a read or a copy is under way."""
        return bool(self._jobs)

    @property
    def is_busy(self) -> bool:
        """Whether a poll has something to do, now or once a job or a lease ends."""
        is_awaited = any(entry.on_device for entry in self._entries.values())
        return bool(self._jobs or self._unloading or is_awaited)

    @property
    def nbytes_used(self) -> int:
        """Device bytes that belong to an adapter."""
        return self._arena.num_used * self.weights.element_size()

    def residencies(self) -> tuple[Residency, ...]:
        """Every adapter on the device or the host."""
        return tuple(self._residency(entry) for entry in self._entries.values())

    def check_integrity(self) -> None:
        """Assert the book-keeping of slots, extents and cells."""
        on_device = [e for e in self._entries.values() if e.slot >= 0]
        assert {e.slot for e in on_device} == set(self._by_slot)
        assert sorted([*self._by_slot, *self._free_slots]) == list(range(self.cells.shape[0]))
        assert sum(e.extent.size for e in on_device if e.extent) == self._arena.num_used
        free = self.cells[self._free_slots, :, 0]
        assert bool((free == -1).all()), "a free slot still has cells"

    # ------------------------------------------------------------------ inside
    def _want(self, digest: str) -> _Entry | None:
        """Mark the digest as wanted on the device and start what is missing; None when it
        failed.
        """
        if digest in self._failures:
            return None
        entry = self._entries.get(digest) or self._start_reading(digest)
        entry.wanted_round = self._round
        self._touch(entry)
        if entry.state is _State.HOST:
            self._place(entry)
        return None if digest in self._failures else entry

    def _touch(self, entry: _Entry) -> None:
        entry.recency, entry.last_used = time.monotonic(), time.time()

    def _is_wanted(self, entry: _Entry) -> bool:
        """Whether a pin, a load call or a queued request waits for it. The queue asks again in
        every round, so that a request that is gone stops wanting by itself.
        """
        is_queued = entry.wanted_round >= self._round - 1
        return bool(entry.is_pinned or entry.on_device or is_queued)

    def _start_reading(self, digest: str) -> _Entry:
        entry = _Entry(digest, _State.READING, started=time.monotonic())
        self._touch(entry)
        entry.load_tier = "store"
        self._entries[digest] = entry
        self._submit(entry, lambda: self._read(digest))
        self.counters["adapter_reads"] += 1
        return entry

    def _submit(self, entry: _Entry, work: Callable[[], PackedAdapter | None]) -> None:
        future: Future[PackedAdapter | None] = self._loader.submit(work)
        self._jobs[future] = entry
        future.add_done_callback(lambda _: self._wake())

    def _absorb(self, entry: _Entry, future: Future[PackedAdapter | None]) -> None:
        error = future.exception()
        if error is not None:
            self._fail(entry, error)
        elif entry.state is _State.READING:
            entry.packed = future.result()
            assert entry.packed is not None
            entry.nbytes, entry.is_scalable = entry.packed.nbytes, entry.packed.is_scalable
            entry.is_kv_neutral = entry.packed.is_kv_neutral
            if entry.packed.weights.numel() > self._arena.size:
                self._fail(entry, _too_large(entry, self._arena.size, self.weights.element_size()))
                return
            entry.state = _State.HOST
            if not self._is_wanted(entry):
                entry.load_tier = "device"  # nobody waits for it: the trip that counts starts later
            self._tell(entry.on_host, self._residency(entry))
        else:
            entry.state = _State.DEVICE
            entry.load_ms = (time.monotonic() - entry.started) * 1e3
            self._bind(entry)
            self.counters["adapter_loads"] += 1
            self._tell(entry.on_device, self._residency(entry))

    def _fail(self, entry: _Entry, error: BaseException) -> None:
        if not isinstance(error, PolyadaptError):
            logger.error("loading adapter %s failed", entry.digest, exc_info=error)
            error = AdapterUnavailable(
                "the adapter's weights could not be read; see the server log"
            )
        self.counters["adapter_load_failures"] += 1
        self._discard_slot(entry)
        del self._entries[entry.digest]
        if entry.wanted_round >= self._round - 1:  # a queued request has to hear of it
            self._failures[entry.digest] = error
        self._tell(entry.on_host, error)
        self._tell(entry.on_device, error)

    def _place(self, entry: _Entry) -> None:
        """Give the host copy a slot and an extent, evicting idle adapters, and start the copy."""
        assert entry.packed is not None
        packed = entry.packed
        extent = self._make_room(packed.weights.numel())
        entry.is_short = extent is None
        if extent is None:
            if not self._fits_beside_pins(entry):
                self._fail(entry, self._crowded_out(entry))
            return  # everything resident is in use: asked again at the next poll
        entry.extent, entry.slot = extent, self._free_slots.pop()
        self._by_slot[entry.slot] = entry
        entry.state = _State.PLACING
        if entry.load_tier == "device":
            entry.load_tier, entry.started = "host", time.monotonic()
        target = self.weights[extent.start : extent.start + extent.size]

        def copy() -> None:
            target.copy_(packed.weights)

        self._submit(entry, copy)

    def _make_room(self, size: int) -> Extent | None:
        while True:
            extent = self._arena.allocate(size) if self._free_slots else None
            if extent is not None:
                return extent
            if self._free_slots and self._arena.num_free >= size and self._compact():
                continue
            # Whoever a queued request waits for makes no room: two requests of the queue would
            # otherwise evict each other's adapters for ever.
            idle = [
                entry
                for entry in self._by_slot.values()
                if entry.state is _State.DEVICE
                and not entry.num_leases
                and not self._is_wanted(entry)
            ]
            reachable = self._arena.num_free + sum(e.extent.size for e in idle if e.extent)
            if not idle or reachable < size:
                return None  # before anybody is evicted in vain
            self._evict(min(idle, key=lambda entry: entry.recency))

    def _fits_beside_pins(self, entry: _Entry) -> bool:
        """Whether the adapter would fit if everything that is not pinned were gone."""
        assert entry.packed is not None
        pinned = [e for e in self._by_slot.values() if e.is_pinned and e.extent is not None]
        room = self._arena.size - sum(e.extent.size for e in pinned if e.extent)
        return room >= entry.packed.weights.numel() and len(pinned) < self.cells.shape[0]

    def _crowded_out(self, entry: _Entry) -> AdapterUnavailable:
        total = self._arena.size * self.weights.element_size()
        return AdapterUnavailable(
            f"the adapter needs {entry.nbytes} bytes of device memory and the pinned adapters "
            f"leave less of --max-adapter-bytes {total}; unpin one or raise the limit"
        )

    def _compact(self) -> bool:
        """Close the arena's gaps; not while a copy into it is under way."""
        if any(entry.state is _State.PLACING for entry in self._by_slot.values()):
            return False
        by_extent = {id(entry.extent): entry for entry in self._by_slot.values()}
        for extent, old_start in self._arena.compact():
            old = self.weights[old_start : old_start + extent.size]
            # The ranges may overlap, which copy_ does not allow.
            self.weights[extent.start : extent.start + extent.size] = old.clone()
            entry = by_extent[id(extent)]
            moved = self.cells[entry.slot, :, 0]
            moved[moved >= 0] += extent.start - old_start
        self.counters["arena_compactions"] += 1
        return True

    def _bind(self, entry: _Entry) -> None:
        assert entry.packed is not None
        assert entry.extent is not None
        cells = entry.packed.cells.clone()
        cells[cells[:, 0] >= 0, 0] += entry.extent.start
        self.cells[entry.slot] = cells

    def _evict(self, entry: _Entry) -> None:
        self._discard_slot(entry)
        self.counters["adapter_evictions"] += 1
        entry.state = _State.HOST
        entry.load_tier, entry.load_ms = "device", 0.0
        if entry.packed is None:
            del self._entries[entry.digest]

    def _discard_slot(self, entry: _Entry) -> None:
        if entry.slot < 0:
            return
        assert entry.extent is not None
        self.cells[entry.slot, :, 0] = -1
        self._arena.release(entry.extent)
        self._free_slots.append(entry.slot)
        del self._by_slot[entry.slot]
        entry.slot, entry.extent = -1, None

    def _finish_unloading(self) -> None:
        for digest in list(self._unloading):
            entry = self._entries.get(digest)
            if entry is not None:
                if entry.num_leases or entry.state in (_State.READING, _State.PLACING):
                    continue
                self._discard_slot(entry)
                del self._entries[digest]
                gone = AdapterUnavailable("the adapter was unloaded before its load was done")
                self._tell(entry.on_host, gone)
                self._tell(entry.on_device, gone)
            for done in self._unloading.pop(digest):
                done()

    def _trim_host(self) -> None:
        held = [e for e in self._entries.values() if e.packed is not None]
        total = sum(e.nbytes for e in held)
        for entry in sorted(held, key=lambda e: (e.state is not _State.DEVICE, e.recency)):
            if total <= self.host_bytes:
                return
            if entry.state is _State.DEVICE:
                entry.packed = None
            elif entry.state is _State.HOST and not self._is_wanted(entry):
                del self._entries[entry.digest]
            else:
                continue
            total -= entry.nbytes
            self.counters["host_evictions"] += 1

    def _residency(self, entry: _Entry) -> Residency:
        tier: Tier = "store" if entry.state is _State.READING else "host"
        if entry.state is _State.DEVICE:
            tier = "device"
        return Residency(
            entry.digest,
            tier,
            is_pinned=entry.is_pinned,
            num_leases=entry.num_leases,
            last_used=entry.last_used,
            nbytes=entry.nbytes,
        )

    @staticmethod
    def _tell(waiters: list[Done], outcome: Residency | PolyadaptError) -> None:
        told, waiters[:] = list(waiters), []
        for done in told:
            done(outcome)


def _too_large(entry: _Entry, capacity: int, element_size: int) -> InvalidRequest:
    return InvalidRequest(
        f"the adapter needs {entry.nbytes} bytes of device memory, --max-adapter-bytes is "
        f"{capacity * element_size}; raise it or lower the adapter's rank",
        param="model",
    )
