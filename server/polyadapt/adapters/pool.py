"""Owns all device memory of adapters: the arena, the slots, their leases, and the host copies
behind.

    store (files) --read--> host copy --place--> device slot
Reading happens in one thread and copying in another, so that a host copy never waits behind a
read; a short copy is made at once. Slots, extents and the cell table change only here, on the
thread that steps the engine, between steps. An adapter that is leased or pinned is never evicted.
Where the device's memory is the host's, a host copy is dropped once it is placed. Everything is
keyed by digest; no step looks at an adapter that nothing happens to.
"""

from __future__ import annotations

import enum
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from polyadapt.adapters.adapter import ORDINARY, Traits
from polyadapt.adapters.arena import Arena, Extent
from polyadapt.adapters.eviction import EvictionOrder, Standing
from polyadapt.adapters.load_estimate import LoadEstimate
from polyadapt.adapters.packing import PackedAdapter
from polyadapt.errors import AdapterUnavailable, InvalidRequest, PolyadaptError
from polyadapt.ops import cells as layout
from polyadapt.types import AdapterId, AppliedAdapter, Residency, ServedAdapter, Tier

logger = logging.getLogger(__name__)

Read = Callable[[str], PackedAdapter]  # digest -> weights; raises PolyadaptError
Done = Callable[["Residency | PolyadaptError"], None]

# Rounds: a full batch asks for nobody in the queue for a while, and asks again.
_ABANDONED_AFTER = 100
_NUM_AHEAD = 2  # adapters read for the queue beyond what the device has room for now

# Rounds without a lease or a job after which the queue's first may take others' idle adapters.
_RESTS_TO_YIELD = 3


class _State(enum.Enum):
    READING = enum.auto()
    HOST = enum.auto()
    PLACING = enum.auto()
    DEVICE = enum.auto()


@dataclass(slots=True, eq=False)
class _Entry:
    digest: str
    state: _State
    nbytes: int = 0
    traits: Traits = ORDINARY
    packed: PackedAdapter | None = None  # the host copy
    slot: int = -1
    extent: Extent | None = None
    num_leases: int = 0
    is_pinned: bool = False
    wanted_round: int = -2  # the latest round in which a queued request asked for it
    is_short: bool = False  # it lies on the host because nothing could be evicted for it
    on_device_standing: Standing = field(default_factory=Standing)
    on_host_standing: Standing = field(default_factory=Standing)
    last_used: float = 0.0  # unix seconds, for people
    load_ms: float = 0.0  # of the latest trip to the device, until the first lease reports it
    load_tier: Tier = "device"
    started: float = 0.0
    read_s: float = 0.0  # what its own read took
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
        keeps_host_copies: bool = True,
        clock: Callable[[], float] = time.monotonic,
        has_overrides: np.ndarray | None = None,
    ) -> None:
        """keeps_host_copies: whether an adapter on the device keeps its host copy, so that it
        need not be read again after an eviction. has_overrides: bool [num_slots], written here,
        read by the plans' buffers.
        """
        if has_overrides is None:
            has_overrides = np.zeros(cells.shape[0], np.bool_)
        self.has_overrides = has_overrides
        self.weights = arena  # [num_elements], on the device
        self.cells = cells  # int64 [num_slots, num_sites, 4], on the host
        self.host_bytes = host_bytes
        self.counters = counters
        self.keeps_host_copies = keeps_host_copies
        self._read = read
        self._wake = wake
        self._clock = clock
        self._arena = Arena(arena.numel())
        self._free_slots = list(range(cells.shape[0] - 1, -1, -1))
        self._entries: dict[str, _Entry] = {}
        self._by_slot: dict[int, _Entry] = {}
        self._commanded: dict[str, _Entry] = {}  # a pin or a load call wants them on the device
        self._changed: dict[str, None] = {}  # digests whose residency is to be told
        self._failures: dict[str, PolyadaptError] = {}
        self._refusals: dict[frozenset[str], PolyadaptError] = {}  # of adapters for one request
        self._unloading: dict[str, list[Callable[[], None]]] = {}
        self._jobs: dict[Future[PackedAdapter | None], _Entry] = {}
        self._host_nbytes = 0  # of all host copies
        self._device_order, self._host_order = EvictionOrder(), EvictionOrder()
        # Guesses of an ordinary machine, until something was loaded.
        self._read_estimate = LoadEstimate(5e-3, 1e-8)
        self._copy_estimate = LoadEstimate(1e-4, 1e-9)
        self._round = 0
        self._step_patience_s = 0.0  # what copies may delay one step by
        self._patience_s = 0.0  # what is left of that for the next one
        self._num_cold = self._cold_nbytes = 0  # wanted in this round and not on the device
        self._may_compact = True  # not for a prefetch
        self._num_leases = 0  # of all adapters
        self._num_rests = 0  # rounds in a row that began with no lease and no job
        self._has_deferred = False  # whoever comes later in the round is read later
        self._no_room_from: int | None = None  # extents so large were refused since room was made
        self._mean_nbytes = 0.0  # of the adapters that were read lately
        # One reader: reading is Python for the most part, and two would share one interpreter.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapter-reader")
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="adapter-copier")
        self.cells[:, :, 0] = -1

    # ------------------------------------------------------------------ leases
    def acquire(self, adapters: tuple[AppliedAdapter, ...]) -> tuple[int, ...] | None:
        """Lease every adapter's slot; None when one is not on the device yet (then it is under
        way, or its turn to be read has not come: see _may_read; or take_failures says why never).
        """
        if len(adapters) > 1 and self._refuses_together({a.adapter.digest for a in adapters}):
            return None
        entries = [self._want(applied.adapter.digest) for applied in adapters]
        if any(entry is None or entry.state is not _State.DEVICE for entry in entries):
            return None
        slots = []
        for entry in entries:
            assert entry is not None
            entry.num_leases += 1
            self._num_leases += 1
            self._use(entry)
            slots.append(entry.slot)
        return tuple(slots)

    def prefetch(self, adapters: tuple[AppliedAdapter, ...]) -> None:
        """Start bringing the adapters to the device for a request that cannot be admitted yet; no
        step waits for their copies, and none for others to move together: where that is what
        makes room, acquire does it.
        """
        self._step_patience_s = self._patience_s = 0.0
        self._may_compact = False
        for applied in adapters:
            self._want(applied.adapter.digest)

    def release(self, slots: tuple[int, ...]) -> None:
        """Give one lease of each slot back."""
        for slot in slots:
            entry = self._by_slot[slot]
            assert entry.num_leases > 0, "a lease was released twice"
            entry.num_leases -= 1
            self._num_leases -= 1
            self._no_room_from = None
            self._changed[entry.digest] = None

    def is_short_of_room(self, adapters: tuple[AppliedAdapter, ...]) -> bool:
        """Whether one of them waits for room on the device, or to be read once there is some, and
        not for a read or a copy.
        """
        entries = [self._entries.get(applied.adapter.digest) for applied in adapters]
        return any(entry is None or entry.is_short for entry in entries)

    def served(self, adapter: AdapterId) -> ServedAdapter:
        """What the reply says of an adapter that was just leased; the load is reported once."""
        entry = self._entries[adapter.digest]
        served = ServedAdapter(adapter, entry.load_tier, round(entry.load_ms, 3))
        entry.load_tier, entry.load_ms = "device", 0.0
        return served

    def take_failures(self) -> dict[frozenset[str], PolyadaptError]:
        """Why loads failed since the last call, and for requests of which digests: those that ask
        for all of the key. Forgotten here, so that whoever asks next tries again.
        """
        taken = {frozenset([digest]): error for digest, error in self._failures.items()}
        taken |= self._refusals
        self._failures, self._refusals = {}, {}
        return taken

    def traits(self, slot: int) -> Traits:
        """What the engine has to know of the resident adapter."""
        return self._by_slot[slot].traits

    def are_on_device(self, adapters: Iterable[AppliedAdapter]) -> bool:
        """Whether a lease of all of them would be given now; changes nothing."""
        entries = (self._entries.get(applied.adapter.digest) for applied in adapters)
        return all(entry is not None and entry.state is _State.DEVICE for entry in entries)

    # ------------------------------------------------------------------ commands
    def prepare(self, digest: str, done: Done) -> None:
        """Read and check the weights into host memory, then call done once."""
        entry = self._entries.get(digest) or self._start_reading(digest)
        self._use(entry)
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
        self._use(entry)
        if entry.state is _State.DEVICE:
            done(self._residency(entry))
            return
        entry.on_device.append(done)
        self._commanded[digest] = entry
        if entry.state is _State.HOST:
            self._place(entry)

    def unload(self, digest: str, done: Callable[[], None]) -> None:
        """Release every tier as soon as no lease is left, then call done once."""
        entry = self._entries.get(digest)
        if entry is None:
            done()
            return
        entry.is_pinned = False
        self._changed[digest] = None
        self._unloading.setdefault(digest, []).append(done)
        self._finish_unloading()

    def poll(self, patience_s: float = 0.0) -> None:
        """Between steps: take in finished reads and copies, and place what is wanted.

        Copies that are expected to take less than patience_s together are waited for, here and in
        the acquires that follow; longer ones are made while the engine steps.
        """
        self._round += 1
        self._step_patience_s = self._patience_s = patience_s
        self._num_cold = self._cold_nbytes = 0
        self._has_deferred, self._no_room_from = False, None
        self._may_compact = True
        self._num_rests = 0 if self._num_leases or self._jobs else self._num_rests + 1
        for future in [job for job in self._jobs if job.done()]:
            self._absorb(self._jobs.pop(future), future)
        for entry in list(self._commanded.values()):
            if entry.state is _State.HOST:
                self._place(entry)
        self._forget_unwanted_reads()
        self._finish_unloading()
        self._trim_host()

    def close(self) -> None:
        """Stop the threads; nothing is usable afterwards."""
        for executor in (self._reader, self._copier):
            executor.shutdown(wait=True, cancel_futures=True)

    # ------------------------------------------------------------------ what it says of itself
    @property
    def is_busy(self) -> bool:
        """Whether a poll has something to do, now or once a job or a lease ends."""
        is_awaited = any(entry.on_device for entry in self._commanded.values())
        return bool(self._jobs or self._unloading or is_awaited)

    @property
    def nbytes_used(self) -> int:
        """Device bytes that belong to an adapter."""
        return self._arena.num_used * self.weights.element_size()

    @property
    def num_leases(self) -> int:
        """Leases that are held now."""
        return sum(entry.num_leases for entry in self._by_slot.values())

    def take_changes(self) -> tuple[list[Residency], list[str]]:
        """Where the adapters are that something happened to since the last call, and the digests
        that left every tier.
        """
        changed, self._changed = self._changed, {}
        known = [self._entries[digest] for digest in changed if digest in self._entries]
        gone = [digest for digest in changed if digest not in self._entries]
        return [self._residency(entry) for entry in known], gone

    def check_integrity(self) -> None:
        """Assert the book-keeping of slots, extents and cells."""
        on_device = [e for e in self._entries.values() if e.slot >= 0]
        assert {e.slot for e in on_device} == set(self._by_slot)
        assert sorted([*self._by_slot, *self._free_slots]) == list(range(self.cells.shape[0]))
        assert sum(e.extent.size for e in on_device if e.extent) == self._arena.num_used
        assert sum(e.num_leases for e in on_device) == self._num_leases
        copies = [e.packed for e in self._entries.values() if e.packed is not None]
        assert sum(packed.nbytes for packed in copies) == self._host_nbytes
        assert all(self._entries[e.digest] is e for e in self._commanded.values())
        working = set(self._jobs.values())
        for entry in self._entries.values():
            is_working = entry.state in (_State.READING, _State.PLACING)
            assert is_working == (entry in working), "a state without its job"
            assert not entry.on_device or entry.digest in self._commanded, "a load left alone"
        free = self.cells[self._free_slots, :, 0]
        assert bool((free == -1).all()), "a free slot still has cells"
        assert not self.has_overrides[self._free_slots].any(), "a free slot still has overrides"

    # ------------------------------------------------------------------ inside
    def _want(self, digest: str) -> _Entry | None:
        """Mark the digest as wanted on the device and start what is missing; None when it
        failed.
        """
        if digest in self._failures:
            return None
        entry = self._entries.get(digest)
        if entry is None:
            self._has_deferred = self._has_deferred or not self._may_read()
            if self._has_deferred:
                return None
            entry = self._start_reading(digest)
        is_first_time = entry.wanted_round < self._round
        entry.wanted_round = self._round
        if entry.state is _State.HOST:
            self._place(entry)
        if digest in self._failures:
            return None
        if is_first_time and entry.state in (_State.READING, _State.HOST):
            self._num_cold += 1
            self._cold_nbytes += entry.nbytes or int(self._mean_nbytes)
        return entry

    def _may_read(self) -> bool:
        """Whether the queue's next cold adapter is read already now.

        The first of a round always is. The others, in the queue's order, as long as what is cold
        before them and they fit into the host's memory and into the device's that is free or
        idle, and _NUM_AHEAD more: beyond that they would only push each other out.
        """
        if self._num_cold == 0:
            return True
        if self._mean_nbytes == 0.0:  # nothing was read yet: no size is known
            return self._num_cold <= _NUM_AHEAD
        nbytes = self._cold_nbytes + self._mean_nbytes
        if nbytes > self.host_bytes:
            return False
        idle = [entry for entry in self._by_slot.values() if self._is_idle(entry)]
        if self._num_cold >= len(self._free_slots) + len(idle) + _NUM_AHEAD:
            return False
        room = self._arena.num_free + sum(e.extent.size for e in idle if e.extent)
        return nbytes <= room * self.weights.element_size() + _NUM_AHEAD * self._mean_nbytes

    def _use(self, entry: _Entry) -> None:
        self._device_order.use(entry.on_device_standing)
        self._host_order.use(entry.on_host_standing)
        entry.last_used = time.time()
        self._changed[entry.digest] = None

    def _is_wanted(self, entry: _Entry) -> bool:
        """Whether a pin, a load call or a queued request waits for it. The queue asks again in
        every round, so that a request that is gone stops wanting by itself.
        """
        is_queued = entry.wanted_round >= self._round - 1
        return bool(entry.is_pinned or entry.on_device or is_queued)

    def _start_reading(self, digest: str) -> _Entry:
        entry = _Entry(digest, _State.READING, started=self._clock(), last_used=time.time())
        entry.load_tier = "store"
        self._entries[digest] = entry
        self._changed[digest] = None

        def read() -> PackedAdapter:
            started = self._clock()
            packed = self._read(digest)
            entry.read_s = self._clock() - started
            return packed

        self._submit(self._reader, entry, read)
        self.counters["adapter_reads"] += 1
        return entry

    def _submit(
        self,
        executor: ThreadPoolExecutor,
        entry: _Entry,
        work: Callable[[], PackedAdapter | None],
    ) -> None:
        future: Future[PackedAdapter | None] = executor.submit(work)
        self._jobs[future] = entry
        future.add_done_callback(lambda _: self._wake())

    def _absorb(self, entry: _Entry, future: Future[PackedAdapter | None]) -> None:
        error = future.exception()
        if error is not None:
            self._fail(entry, error)
        elif entry.state is _State.READING:
            packed = future.result()
            assert packed is not None
            entry.nbytes, entry.traits = packed.nbytes, packed.traits
            if packed.weights.numel() > self._arena.size:
                self._fail(entry, _too_large(entry, self._arena.size, self.weights.element_size()))
                return
            self._read_estimate.observe(entry.nbytes, entry.read_s)
            self._mean_nbytes += (entry.nbytes - self._mean_nbytes) * (
                0.1 if self._mean_nbytes else 1.0
            )
            entry.packed, entry.state = packed, _State.HOST
            self._host_nbytes += entry.nbytes
            self._host_order.use(entry.on_host_standing)
            self._changed[entry.digest] = None
            if not self._is_wanted(entry):
                entry.load_tier = "device"  # nobody waits for it: the trip that counts starts later
            self._tell(entry.on_host, self._residency(entry))
        else:
            self._land(entry)

    def _land(self, entry: _Entry) -> None:
        """The weights are in their extent: the adapter can be leased from now on."""
        entry.state = _State.DEVICE
        entry.load_ms = (self._clock() - entry.started) * 1e3
        self._bind(entry)
        if not self.keeps_host_copies:
            self._drop_host_copy(entry)
        self._device_order.use(entry.on_device_standing)
        self.counters["adapter_loads"] += 1
        self._commanded.pop(entry.digest, None)
        self._changed[entry.digest] = None
        self._tell(entry.on_device, self._residency(entry))

    def _fail(self, entry: _Entry, error: BaseException) -> None:
        if not isinstance(error, PolyadaptError):
            logger.error("loading adapter %s failed", entry.digest, exc_info=error)
            error = AdapterUnavailable(
                "the adapter's weights could not be read; see the server log"
            )
        self.counters["adapter_load_failures"] += 1
        self._forget(entry)
        if entry.wanted_round >= self._round - 1:  # a queued request has to hear of it
            self._failures[entry.digest] = error
        self._tell(entry.on_host, error)
        self._tell(entry.on_device, error)

    def _place(self, entry: _Entry) -> None:
        """Give the host copy a slot and an extent, evicting idle adapters, and start the copy."""
        assert entry.packed is not None
        packed = entry.packed
        size = packed.weights.numel()
        if self._no_room_from is not None and size >= self._no_room_from:
            entry.is_short = True
            return
        copy_s = self._copy_estimate.seconds(entry.nbytes)
        if self._patience_s < copy_s <= self._step_patience_s:
            return  # its turn comes before a later step: beside this one it would slow it as much
        extent = self._make_room(size)
        entry.is_short = extent is None
        if extent is None:
            self._no_room_from = size if self._free_slots else 0
            if not self._fits_beside_pins(entry):
                self._fail(entry, self._crowded_out(entry))
            return  # everything resident is in use: asked again at the next poll
        entry.extent, entry.slot = extent, self._free_slots.pop()
        self._by_slot[entry.slot] = entry
        entry.state = _State.PLACING
        if entry.load_tier == "device":
            entry.load_tier, entry.started = "host", self._clock()
        self._changed[entry.digest] = None
        target = self.weights[extent.start : extent.start + extent.size]
        started = self._clock()
        if copy_s <= self._patience_s:
            target.copy_(packed.weights)
            took = self._clock() - started
            self._patience_s -= took
            self._copy_estimate.observe(entry.nbytes, took)
            self.counters["adapter_loads_waited"] += 1
            self._land(entry)
            return

        self._submit(self._copier, entry, lambda: _copy_beside(target, packed.weights))
        self.counters["adapter_loads_overlapped"] += 1

    def _make_room(self, size: int) -> Extent | None:
        while True:
            extent = self._arena.allocate(size) if self._free_slots else None
            if extent is not None:
                return extent
            if self._free_slots and self._arena.num_free >= size:
                if not self._may_compact:
                    return None
                if self._compact():
                    continue
            idle = [entry for entry in self._by_slot.values() if self._is_idle(entry)]
            reachable = self._arena.num_free + sum(e.extent.size for e in idle if e.extent)
            if not idle or reachable < size:
                return None  # before anybody is evicted in vain
            victim = min(idle, key=self._device_score)
            assert victim.extent is not None
            if not self._may_compact and not self._arena.has_gap(size, without=victim.extent):
                return None
            self._device_order.evicted(self._device_score(victim))
            self._evict(victim)

    def _is_idle(self, entry: _Entry) -> bool:
        """Whether it may leave the device. Whoever a queued request waits for may not: two
        requests of the queue would otherwise evict each other's adapters for ever.

        Unless nothing moves at all: requests for several adapters may each hold a part of what
        another needs. Then the first of the queue, who asks first in a round, gets what those
        behind it wanted.
        """
        if entry.state is not _State.DEVICE or entry.num_leases:
            return False
        if self._num_rests < _RESTS_TO_YIELD or entry.is_pinned or entry.on_device:
            return not self._is_wanted(entry)
        return entry.wanted_round < self._round

    def _device_score(self, entry: _Entry) -> tuple[float, int]:
        return_s = self._copy_estimate.seconds(entry.nbytes)
        if entry.packed is None:
            return_s += self._read_estimate.seconds(entry.nbytes)
        return self._device_order.score(entry.on_device_standing, return_s, entry.nbytes)

    def _host_score(self, entry: _Entry) -> tuple[float, int]:
        return_s = self._read_estimate.seconds(entry.nbytes)
        return self._host_order.score(entry.on_host_standing, return_s, entry.nbytes)

    def _fits_beside_pins(self, entry: _Entry) -> bool:
        """Whether the adapter would fit if everything that is not pinned were gone."""
        assert entry.packed is not None
        pinned = [e for e in self._by_slot.values() if e.is_pinned and e.extent is not None]
        room = self._arena.size - sum(e.extent.size for e in pinned if e.extent)
        return room >= entry.packed.weights.numel() and len(pinned) < self.cells.shape[0]

    def _refuses_together(self, digests: set[str]) -> bool:
        """Whether one request's adapters can never be on the device at once, beside the pins of
        others; take_failures says so then. Whoever was not read yet counts as nothing.
        """
        known = [self._entries[digest] for digest in digests if digest in self._entries]
        nbytes = sum(entry.nbytes for entry in known)
        pins = [e for e in self._by_slot.values() if e.is_pinned and e.digest not in digests]
        total = self._arena.size * self.weights.element_size()
        if nbytes > total:
            self._refusals[frozenset(digests)] = InvalidRequest(
                f"the request's {len(digests)} adapters need {nbytes} bytes of device memory or "
                f"more at once, --max-adapter-bytes is {total}; raise it or ask for fewer",
                param="adapters",
            )
        elif nbytes > total - sum(e.nbytes for e in pins) or (
            len(digests) + len(pins) > self.cells.shape[0]
        ):
            self._refusals[frozenset(digests)] = AdapterUnavailable(
                f"the request's {len(digests)} adapters need {nbytes} bytes of device memory or "
                f"more at once and {len(pins)} pinned adapters leave less of "
                f"--max-adapter-bytes {total}; unpin one or raise the limit"
            )
        else:
            return False
        return True

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
        parts = cells[cells[:, layout.OFFSET] >= 0, layout.PARTS]
        self.has_overrides[entry.slot] = bool((parts & layout.OVERRIDES).any())

    def _evict(self, entry: _Entry) -> None:
        self.counters["adapter_evictions"] += 1
        if entry.packed is None:
            self._forget(entry)
            return
        self._discard_slot(entry)
        self._changed[entry.digest] = None
        entry.state, entry.on_device_standing = _State.HOST, Standing()
        entry.load_tier, entry.load_ms = "device", 0.0

    def _forget(self, entry: _Entry) -> None:
        """Release every tier."""
        self._discard_slot(entry)
        self._drop_host_copy(entry)
        self._commanded.pop(entry.digest, None)
        self._changed[entry.digest] = None
        del self._entries[entry.digest]

    def _drop_host_copy(self, entry: _Entry) -> None:
        if entry.packed is not None:
            self._host_nbytes -= entry.nbytes
            entry.packed = None

    def _discard_slot(self, entry: _Entry) -> None:
        if entry.slot < 0:
            return
        assert entry.extent is not None
        self.cells[entry.slot, :, 0] = -1
        self.has_overrides[entry.slot] = False
        self._arena.release(entry.extent)
        self._free_slots.append(entry.slot)
        self._no_room_from = None
        del self._by_slot[entry.slot]
        entry.slot, entry.extent = -1, None

    def _finish_unloading(self) -> None:
        for digest in list(self._unloading):
            entry = self._entries.get(digest)
            if entry is not None:
                if entry.num_leases or entry.state in (_State.READING, _State.PLACING):
                    continue
                self._forget(entry)
                gone = AdapterUnavailable("the adapter was unloaded before its load was done")
                self._tell(entry.on_host, gone)
                self._tell(entry.on_device, gone)
            for done in self._unloading.pop(digest):
                done()

    def _forget_unwanted_reads(self) -> None:
        """Give up reads that have not begun and that nobody waits for any more."""
        for future, entry in list(self._jobs.items()):
            is_awaited = (
                self._is_wanted(entry)
                or entry.on_host
                or entry.digest in self._unloading
                or entry.wanted_round >= self._round - _ABANDONED_AFTER
            )
            if entry.state is _State.READING and not is_awaited and future.cancel():
                del self._jobs[future]
                self._forget(entry)

    def _trim_host(self) -> None:
        """Drop host copies until the rest is within its budget: first those behind the device."""
        if self._host_nbytes <= self.host_bytes:
            return
        held = [entry for entry in self._entries.values() if entry.packed is not None]
        held.sort(key=lambda e: (e.state is not _State.DEVICE, self._host_score(e)))
        for entry in held:
            if self._host_nbytes <= self.host_bytes:
                return
            if entry.state is _State.DEVICE:
                self._drop_host_copy(entry)
            elif entry.state is _State.HOST and not self._is_wanted(entry):
                self._host_order.evicted(self._host_score(entry))
                self._forget(entry)
            else:
                continue
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


def _copy_beside(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy while the engine steps: on one core, not all, and without the interpreter."""
    if target.device.type == "cpu":
        np.copyto(target.view(torch.uint8).numpy(), source.view(torch.uint8).numpy())
    else:
        target.copy_(source)


def _too_large(entry: _Entry, capacity: int, element_size: int) -> InvalidRequest:
    return InvalidRequest(
        f"the adapter needs {entry.nbytes} bytes of device memory, --max-adapter-bytes is "
        f"{capacity * element_size}; raise it or lower the adapter's rank",
        param="model",
    )
