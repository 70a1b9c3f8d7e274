"""Owns all device memory of adapters: the arena, the slots and their leases.

    store (files) --read--> host copy --place--> device slot
Reading happens in threads of its own (read_ahead.py) and copying beside the steps (transfers.py),
so that a host copy never waits behind a read; a short copy is made at once. Slots, extents and the
cell table change only here, on the thread that steps the engine, between steps. An extent is
nobody else's until the copy into it is over, and its cells are filled only then. An adapter that is
leased or pinned is never evicted, but it may be moved (compaction.py), a bounded part between two
steps. Where the device's memory is the host's, a host copy is dropped once it is placed. Everything
is keyed by digest; no step looks at an adapter that nothing happens to.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future

import numpy as np
import torch

from polyadapt.adapters.adapter import Traits
from polyadapt.adapters.arena import Arena, Extent
from polyadapt.adapters.compaction import Compaction
from polyadapt.adapters.entry import Done, Entry, State
from polyadapt.adapters.eviction import EvictionOrder, Standing
from polyadapt.adapters.host_copies import HostCopies
from polyadapt.adapters.load_estimate import LoadEstimate
from polyadapt.adapters.pace import Pace
from polyadapt.adapters.packing import PackedAdapter, num_behind
from polyadapt.adapters.pinned import PinnedMemory
from polyadapt.adapters.read_ahead import Read, ReadAhead, Room
from polyadapt.adapters.transfers import StreamTransfers, ThreadTransfers, Transfers
from polyadapt.distribution import LOAD_SECONDS, Distribution
from polyadapt.errors import AdapterUnavailable, InvalidRequest, PolyadaptError, Unavailable
from polyadapt.ops import cells as layout
from polyadapt.ops.device import Device, Host
from polyadapt.ops.plan import experts_in
from polyadapt.types import AdapterId, AppliedAdapter, Residency, ServedAdapter

logger = logging.getLogger(__name__)

# Rounds without a lease or a job after which the queue's first may take others' idle adapters.
_RESTS_TO_YIELD = 3

# So many loads of an adapter have to fail one after the other for it to be given up, if each may
# have been for want of something that comes back.
_HOPELESS_AFTER = 10
_WIDE = 1 << 20  # a rank that none has
_MAX_REMEMBERED = 4096  # adapters whose sizes and failures are known when they are nowhere
_STAGES = ("read", "pack", "copy")  # of an adapter's way to the device

# Bytes that are moved together; so many in every round, however short it has to be, or gaps would
# never become one. Inside an asynchronous device's memory: 0.1 ms at 0.7 TB/s, written and read.
_MOVED_TOGETHER = 1 << 18
_MOVED_ASIDE = 32 << 20


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
        on_bind: Callable[[int], None] = lambda slot: None,
        on_change: Callable[[int], None] = lambda slot: None,
        pace: Pace | None = None,
        device: Device | None = None,
    ) -> None:
        """keeps_host_copies: whether an adapter on the device keeps its host copy, so that it
        need not be read again after an eviction. has_overrides: bool [num_slots], also of slots
        with experts for an MLP; written here, read by the plans' buffers. on_bind is told of every
        slot that is given to an adapter, on_change of every slot whose row of `cells` is another
        one from now on. pace: what `read` breathes by. device: where the arena lies; None: the
        host.

        Raises StartupError where an asynchronous device's host memory cannot be page-locked.
        """
        if has_overrides is None:
            has_overrides = np.zeros(cells.shape[0], np.bool_)
        self.has_overrides = has_overrides
        self._is_heavy = np.zeros(cells.shape[0], np.bool_)
        # The largest of each slot; more where overrides or experts make its products wider.
        self.ranks = np.zeros(cells.shape[0], np.int64)
        self.weights = arena  # [num_elements], on the device
        self.cells = cells  # int64 [num_slots, num_sites, 4], on the host
        self.counters = counters
        self.keeps_host_copies = keeps_host_copies
        self._read = read
        self._wake = wake
        self._clock = clock
        self._on_bind = on_bind
        self._on_change = on_change
        self._arena = Arena(arena.numel())
        self._device = device or Host()
        self._compaction = Compaction(
            self._arena, self.weights, self.cells, on_change, self._device
        )
        self._pace = pace or Pace()
        self._read_ahead = ReadAhead(
            self._read_to_host, host_bytes, counters, wake, clock, self._pace
        )
        pinned = None
        if self._device.is_asynchronous:
            pinned = PinnedMemory(self._device, arena.dtype, host_bytes)
        self._host = HostCopies(host_bytes, self._read_ahead.seconds, counters, pinned)
        self._free_slots = list(range(cells.shape[0] - 1, -1, -1))
        self._entries: dict[str, Entry] = {}
        self._by_slot: dict[int, Entry] = {}
        self._commanded: dict[str, Entry] = {}  # a pin or a load call wants them on the device
        self._changed: dict[str, None] = {}  # digests whose residency is to be told
        self._failures: dict[str, PolyadaptError] = {}
        self._refusals: dict[frozenset[str], PolyadaptError] = {}  # of adapters for one request
        # Of an adapter's reads, and of its ways from there to the device, one after the other.
        self._failed_reads: dict[str, int] = {}
        self._failed_places: dict[str, int] = {}
        self._load_seconds = {name: Distribution(LOAD_SECONDS) for name in _STAGES}
        self._known_nbytes: dict[str, int] = {}  # of adapters that were read, wherever they are
        self._unloading: dict[str, list[Callable[[], None]]] = {}
        self._transfers: Transfers = ThreadTransfers(wake)
        self._device_order = EvictionOrder()
        self._copy_estimate = LoadEstimate(1e-4, 1e-9)  # a guess, until something was copied
        if self._device.is_asynchronous:
            self._transfers = StreamTransfers(self._device, clock)
            self._copy_estimate = LoadEstimate(1e-4, 1e-10)
        self._round = 0
        self._step_patience_s = 0.0  # what copies may delay one step by
        self._patience_s = 0.0  # what is left of that for the next one
        self._moved_nbytes = 0  # in this round
        self._may_compact = True  # not for a prefetch
        self._num_leases = 0  # of all adapters
        self._num_rests = 0  # rounds in a row that began with no lease and no job
        self._no_room_from: int | None = None  # extents so large were refused since room was made
        self.cells[:, :, 0] = -1

    # ------------------------------------------------------------------ leases
    def find(self, adapters: tuple[AppliedAdapter, ...]) -> tuple[int, ...] | None:
        """Every adapter's slot, for `lease`; None when one is not on the device yet (then it is
        under way, or its turn to be read has not come: see _may_read; or take_failures says why
        never). What is asked for in every round is not evicted.
        """
        if len(adapters) > 1 and self._refuses_together({a.adapter.digest for a in adapters}):
            return None
        entries = [self._want(applied.adapter.digest) for applied in adapters]
        if any(entry is None or entry.state is not State.DEVICE for entry in entries):
            return None
        return tuple(entry.slot for entry in entries if entry is not None)

    def lease(self, slots: tuple[int, ...]) -> None:
        """Lease slots that `find` returned in this round."""
        for slot in slots:
            entry = self._by_slot[slot]
            assert entry.state is State.DEVICE, "a lease of what is not there"
            entry.num_leases += 1
            self._num_leases += 1
            self._use(entry)

    def prefetch(self, adapters: tuple[AppliedAdapter, ...]) -> None:
        """Start bringing the adapters to the device for a request that cannot be admitted yet; no
        step waits for their copies, and none for others to move together: where that is what
        makes room, find does it.
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

    def latest_load(self, digest: str) -> tuple[float, float] | None:
        """When the adapter's way to the device began and ended, by the pool's clock, until
        `served` has told of it; then None.
        """
        entry = self._entries[digest]
        if entry.load_tier == "device":
            return None
        return entry.started, entry.started + entry.load_ms / 1e3

    def take_failures(self) -> dict[frozenset[str], PolyadaptError]:
        """Why loads failed since the last call, and for requests of which digests: those that ask
        for all of the key. Forgotten here, so that whoever asks next tries again.
        """
        taken = {frozenset([digest]): error for digest, error in self._failures.items()}
        taken |= self._refusals
        self._failures, self._refusals = {}, {}
        return taken

    def is_hopeless(self, adapters: tuple[AppliedAdapter, ...]) -> bool:
        """Whether they will not be on the device together, as far as can be told: one cannot be
        served or failed to load time and again, or all are too large. Asking for them tries it
        again; take_failures then says why not.
        """
        digests = {applied.adapter.digest for applied in adapters}
        for failures in (self._failed_reads, self._failed_places):
            if any(failures.get(digest, 0) >= _HOPELESS_AFTER for digest in digests):
                return True
        return any(
            asked <= digests and not isinstance(error, Unavailable)
            for asked, error in self._refusals.items()
        )

    def traits(self, slot: int) -> Traits:
        """What the engine has to know of the resident adapter."""
        return self._by_slot[slot].traits

    def digests(self) -> dict[int, str]:
        """The adapters on the device by their slots; not those that are on their way there."""
        entries = self._by_slot.items()
        return {slot: entry.digest for slot, entry in entries if entry.state is State.DEVICE}

    def is_heavy(self, slot: int) -> bool:
        """Whether the resident adapter holds a dense matrix at some site: then every step that it
        takes part in has products of its own.
        """
        return bool(self._is_heavy[slot])

    def probe_weights(self, slot: int) -> torch.Tensor:
        """The tensors of the resident adapter's probe, flat, as packing.pack laid them; a view."""
        entry = self._by_slot[slot]
        assert entry.extent is not None
        stop = entry.extent.stop  # of an adapter that is being moved they come last
        return self.weights[stop - num_behind(entry.traits) : stop]

    def are_on_device(self, adapters: Iterable[AppliedAdapter]) -> bool:
        """Whether a lease of all of them would be given now; changes nothing."""
        entries = (self._entries.get(applied.adapter.digest) for applied in adapters)
        return all(entry is not None and entry.state is State.DEVICE for entry in entries)

    # ------------------------------------------------------------------ commands
    def prepare(self, digest: str, done: Done) -> None:
        """Read and check the weights into host memory, then call done once."""
        entry = self._entries.get(digest) or self._start_reading(digest)
        self._use(entry)
        if entry.state is State.READING:
            entry.on_host.append(done)
        else:
            done(entry.residency())

    def load(self, digest: str, is_pinned: bool, done: Done) -> None:
        """Bring the adapter to the device and set its pin, then call done once."""
        for unloaded in self._unloading.pop(digest, []):  # the later command wins
            unloaded()
        entry = self._entries.get(digest) or self._start_reading(digest)
        entry.is_pinned = is_pinned
        self._use(entry)
        if entry.state is State.DEVICE:
            done(entry.residency())
            return
        entry.on_device.append(done)
        self._commanded[digest] = entry
        if entry.state is State.HOST:
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
        the finds that follow; longer ones are made while the engine steps.
        """
        self._round += 1
        self._step_patience_s = self._patience_s = patience_s
        self._read_ahead.begin_round()
        self._moved_nbytes, self._no_room_from = 0, None
        self._may_compact = True
        self._num_rests = 0 if self._num_leases or self._is_at_work else self._num_rests + 1
        for entry, outcome in self._read_ahead.take_done():
            self._absorb(entry, outcome)
        self._advance_transfers()
        for entry in list(self._commanded.values()):
            if entry.state is State.HOST and entry.digest not in self._unloading:
                self._place(entry)
        for entry in self._read_ahead.give_up(self._is_awaited, self._round):
            self._forget(entry)
        self._finish_unloading()
        self._host.trim(self._entries.values(), self._is_wanted, self._forget)

    def close(self) -> None:
        """Stop the threads; nothing is usable afterwards."""
        self._read_ahead.close()
        self._transfers.close()

    # ------------------------------------------------------------------ what it says of itself
    @property
    def _jobs(self) -> list[Future[PackedAdapter] | Future[None]]:
        """What threads work at."""
        return [*self._read_ahead.jobs, *self._transfers.futures]

    @property
    def _is_at_work(self) -> bool:
        """Whether a read or a copy is under way."""
        return bool(self._read_ahead.jobs or self._transfers.entries)

    @property
    def is_busy(self) -> bool:
        """Whether a poll has something to do, now or once a job or a lease ends."""
        is_awaited = any(entry.on_device for entry in self._commanded.values())
        return bool(self._is_at_work or self._unloading or is_awaited)

    @property
    def is_asynchronous(self) -> bool:
        """Whether copies are made by the device, so that no step need wait for one."""
        return self._device.is_asynchronous

    @property
    def nbytes_used(self) -> int:
        """Device bytes that belong to an adapter."""
        return self._arena.num_used * self.weights.element_size()

    @property
    def num_leases(self) -> int:
        """Leases that are held now."""
        return sum(entry.num_leases for entry in self._by_slot.values())

    def load_seconds(self) -> dict[str, tuple[float, ...]]:
        """By stage what the adapters' ways to the device took: see EngineStats."""
        return {name: taken.snapshot() for name, taken in self._load_seconds.items()}

    def take_changes(self) -> tuple[list[Residency], list[str]]:
        """Where the adapters are that something happened to since the last call, and the digests
        that left every tier.
        """
        changed, self._changed = self._changed, {}
        known = [self._entries[digest] for digest in changed if digest in self._entries]
        gone = [digest for digest in changed if digest not in self._entries]
        return [entry.residency() for entry in known], gone

    def check_integrity(self) -> None:
        """Assert the book-keeping of slots, extents and cells."""
        on_device = [e for e in self._entries.values() if e.slot >= 0]
        assert {e.slot for e in on_device} == set(self._by_slot)
        assert sorted([*self._by_slot, *self._free_slots]) == list(range(self.cells.shape[0]))
        assert sum(e.extent.size for e in on_device if e.extent) == self._arena.num_used
        assert sum(e.num_leases for e in on_device) == self._num_leases
        assert all(self._entries[e.digest] is e for e in self._commanded.values())
        copying = set(self._transfers.entries)
        for entry in self._entries.values():
            assert (entry.state is State.PLACING) == (entry in copying), "a state without its job"
            assert not entry.on_device or entry.digest in self._commanded, "a load left alone"
        for e in on_device:
            assert e.extent is not None
            assert e.extent.slot == e.slot
            assert e.extent.is_fixed == (e.state is State.PLACING)
        self._arena.check_integrity()
        self._compaction.check_integrity([e.extent for e in on_device if e.extent])
        self._read_ahead.check_integrity(list(self._entries.values()))
        self._host.check_integrity(self._entries.values())
        free = self.cells[self._free_slots, :, 0]
        assert bool((free == -1).all()), "a free slot still has cells"
        assert not self.has_overrides[self._free_slots].any(), "a free slot still has overrides"
        assert not self._is_heavy[self._free_slots].any(), "a free slot is still heavy"

    # ------------------------------------------------------------------ inside
    def _want(self, digest: str) -> Entry | None:
        """Mark the digest as wanted on the device and start what is missing; None when it
        failed.
        """
        if digest in self._failures:
            return None
        entry = self._entries.get(digest)
        if entry is None:
            if not self._read_ahead.may_read(self._room):
                return None
            entry = self._start_reading(digest)
        is_first_time = entry.wanted_round < self._round
        entry.wanted_round = self._round
        if entry.state is State.HOST:
            self._place(entry)
        if digest in self._failures:
            return None
        if is_first_time and entry.state in (State.READING, State.HOST):
            self._read_ahead.count_cold(entry)
        return entry

    def _read_to_host(self, digest: str) -> PackedAdapter:
        """On a reading thread."""
        return self._host.hold(self._read(digest), self._pace.breathe)

    def _room(self) -> Room:
        idle = [entry for entry in self._by_slot.values() if self._is_idle(entry)]
        num_elements = self._arena.num_free + sum(e.extent.size for e in idle if e.extent)
        return Room(len(self._free_slots) + len(idle), num_elements * self.weights.element_size())

    def _use(self, entry: Entry) -> None:
        self._device_order.use(entry.on_device_standing)
        self._host.use(entry)
        entry.last_used = time.time()
        self._changed[entry.digest] = None

    def _is_wanted(self, entry: Entry) -> bool:
        """Whether a pin, a load call or a queued request waits for it. The queue asks again in
        every round, so that a request that is gone stops wanting by itself.
        """
        is_queued = entry.wanted_round >= self._round - 1
        return bool(entry.is_pinned or entry.on_device or is_queued)

    def _is_awaited(self, entry: Entry) -> bool:
        """Whether anybody has to hear how its read ends."""
        return bool(self._is_wanted(entry) or entry.on_host or entry.digest in self._unloading)

    def _start_reading(self, digest: str) -> Entry:
        entry = Entry(digest, State.READING, started=self._clock(), last_used=time.time())
        entry.load_tier = "store"
        self._entries[digest] = entry
        self._changed[digest] = None
        self._read_ahead.start(entry)
        return entry

    def _absorb(self, entry: Entry, outcome: PackedAdapter | BaseException) -> None:
        """Take in what was read."""
        if isinstance(outcome, BaseException):
            self._fail(entry, outcome)
            return
        entry.nbytes, entry.traits = outcome.nbytes, outcome.traits
        _remember(self._known_nbytes, entry.digest, entry.nbytes)
        if outcome.weights.numel() > self._arena.size:
            self._host.release(outcome)
            self._fail(entry, _too_large(entry, self._arena.size, self.weights.element_size()))
            return
        self._failed_reads.pop(entry.digest, None)
        self._read_ahead.observe(entry)
        self._load_seconds["read"].observe(entry.read_s - outcome.pack_s)
        if outcome.pack_s:
            self._load_seconds["pack"].observe(outcome.pack_s)
        self._host.keep(entry, outcome)
        entry.state = State.HOST
        self._changed[entry.digest] = None
        if not self._is_wanted(entry):
            entry.load_tier = "device"  # nobody waits for it: the trip that counts starts later
        self._tell(entry.on_host, entry.residency())

    def _advance_transfers(self) -> None:
        if not self._transfers.entries:
            return
        started = self._clock()
        for ended in self._transfers.advance(self._patience_s):
            if ended.error is not None:
                self._fail(ended.entry, ended.error)
            elif ended.is_whole:
                self._land(ended.entry)
            else:  # cut short: whoever wants it after all has it placed anew
                self._discard_slot(ended.entry)
                ended.entry.state = State.HOST
                self._changed[ended.entry.digest] = None
        self._patience_s -= self._clock() - started

    def _land(self, entry: Entry) -> None:
        """The weights are in their extent: the adapter can be leased from now on."""
        assert entry.extent is not None
        entry.extent.is_fixed = False
        entry.state = State.DEVICE
        now = self._clock()
        entry.load_ms = (now - entry.started) * 1e3
        self._load_seconds["copy"].observe(now - entry.copy_started)
        self._bind(entry)
        if not self.keeps_host_copies:
            self._host.drop(entry)
        self._device_order.use(entry.on_device_standing)
        self.counters["adapter_loads"] += 1
        self._commanded.pop(entry.digest, None)
        self._failed_places.pop(entry.digest, None)
        self._changed[entry.digest] = None
        self._tell(entry.on_device, entry.residency())

    def _fail(self, entry: Entry, error: BaseException) -> None:
        failures = self._failed_reads if entry.packed is None else self._failed_places
        is_lasting = not isinstance(error, Unavailable)
        count = _HOPELESS_AFTER if is_lasting else failures.get(entry.digest, 0) + 1
        _remember(failures, entry.digest, count)
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

    def _place(self, entry: Entry) -> None:
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
            if self._no_room_from is None or size < self._no_room_from:
                self._no_room_from = size if self._free_slots else 0
            if self._fits_beside_pins(entry):  # what is in use comes free: asked again
                self._failed_places.pop(entry.digest, None)
            else:
                self._fail(entry, self._crowded_out(entry))
            return
        entry.extent, entry.slot = extent, self._free_slots.pop()
        extent.slot, extent.is_fixed = entry.slot, True
        self._by_slot[entry.slot] = entry
        entry.state = State.PLACING
        if entry.load_tier == "device":
            entry.load_tier, entry.started = "host", self._clock()
        self._changed[entry.digest] = None
        target = self.weights[extent.start : extent.start + extent.size]
        started = entry.copy_started = self._clock()
        if copy_s <= self._patience_s:
            self._transfers.make(target, packed.weights)
            took = self._clock() - started
            self._patience_s -= took
            self._copy_estimate.observe(entry.nbytes, took)
            self.counters["adapter_loads_waited"] += 1
            self._land(entry)
            return
        self._transfers.start(entry, target, packed.weights)
        self.counters["adapter_loads_overlapped"] += 1

    def _make_room(self, size: int) -> Extent | None:
        """An extent, made of gaps or of idle adapters'; None: not in this round."""
        has_moved = False
        while True:
            extent = self._arena.allocate(size) if self._free_slots else None
            if extent is not None:
                self.counters["arena_compactions"] += has_moved
                return extent
            if self._free_slots and self._arena.num_free >= size:
                if not self._may_compact:
                    return None
                if not self._may_move():
                    # What is being put together here is nobody's who comes later in the round.
                    self._no_room_from = 0
                    return None
                if self._move(size):
                    has_moved = True
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

    def _is_idle(self, entry: Entry) -> bool:
        """Whether it may leave the device. Whoever a queued request waits for may not: two
        requests of the queue would otherwise evict each other's adapters for ever.

        Unless nothing moves at all: requests for several adapters may each hold a part of what
        another needs. Then the first of the queue, who asks first in a round, gets what those
        behind it wanted.
        """
        if entry.state is not State.DEVICE or entry.num_leases:
            return False
        if self._num_rests < _RESTS_TO_YIELD or entry.is_pinned or entry.on_device:
            return not self._is_wanted(entry)
        return entry.wanted_round < self._round

    def _device_score(self, entry: Entry) -> tuple[float, int]:
        return_s = self._copy_estimate.seconds(entry.nbytes)
        if entry.packed is None:
            return_s += self._read_ahead.seconds(entry.nbytes)
        return self._device_order.score(entry.on_device_standing, return_s, entry.nbytes)

    def _fits_beside_pins(self, entry: Entry) -> bool:
        """Whether the adapter would fit if everything that is not pinned were gone."""
        assert entry.packed is not None
        pinned = [e for e in self._by_slot.values() if e.is_pinned and e.extent is not None]
        room = self._arena.size - sum(e.extent.size for e in pinned if e.extent)
        return room >= entry.packed.weights.numel() and len(pinned) < self.cells.shape[0]

    def _refuses_together(self, digests: set[str]) -> bool:
        """Whether one request's adapters can never be on the device at once, beside the pins of
        others; take_failures says so then. Whoever was not read yet counts as nothing.
        """
        nbytes = sum(self._known_nbytes.get(digest, 0) for digest in digests)
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

    def _crowded_out(self, entry: Entry) -> AdapterUnavailable:
        total = self._arena.size * self.weights.element_size()
        return AdapterUnavailable(
            f"the adapter needs {entry.nbytes} bytes of device memory and the pinned adapters "
            f"leave less of --max-adapter-bytes {total}; unpin one or raise the limit"
        )

    def _may_move(self) -> bool:
        """Whether the next step can wait for more to be moved."""
        if self._moved_nbytes < self._moved_together:
            return True
        return self._copy_estimate.seconds(self._moved_together) <= self._patience_s

    @property
    def _moved_together(self) -> int:
        return _MOVED_ASIDE if self._device.is_asynchronous else _MOVED_TOGETHER

    def _move(self, size: int) -> bool:
        """Move a part of what stands between gaps; False: copies under way are in between."""
        started, element_size = self._clock(), self.weights.element_size()
        moved = self._compaction.advance(size, self._moved_together // element_size)
        self._patience_s -= self._clock() - started
        self._moved_nbytes += moved * element_size
        self.counters["arena_moved_bytes"] += moved * element_size
        return moved > 0

    def _bind(self, entry: Entry) -> None:
        assert entry.packed is not None
        assert entry.extent is not None
        cells = entry.packed.cells.clone()
        cells[cells[:, 0] >= 0, 0] += entry.extent.start
        self.cells[entry.slot] = cells
        parts = cells[cells[:, layout.OFFSET] >= 0, layout.PARTS]
        has_overrides = bool((parts & layout.OVERRIDES).any())
        self.has_overrides[entry.slot] = has_overrides or bool(experts_in(cells).any())
        self._is_heavy[entry.slot] = bool((parts & layout.DENSE).any())
        is_wide = self.has_overrides[entry.slot]
        self.ranks[entry.slot] = _WIDE if is_wide else int(cells[:, layout.RANK].max())
        self._on_bind(entry.slot)
        self._on_change(entry.slot)

    def _evict(self, entry: Entry) -> None:
        self.counters["adapter_evictions"] += 1
        if entry.packed is None:
            self._forget(entry)
            return
        self._discard_slot(entry)
        self._changed[entry.digest] = None
        entry.state, entry.on_device_standing = State.HOST, Standing()
        entry.load_tier, entry.load_ms = "device", 0.0

    def _forget(self, entry: Entry) -> None:
        """Release every tier."""
        self._discard_slot(entry)
        self._host.drop(entry)
        self._commanded.pop(entry.digest, None)
        self._changed[entry.digest] = None
        del self._entries[entry.digest]

    def _discard_slot(self, entry: Entry) -> None:
        if entry.slot < 0:
            return
        assert entry.extent is not None
        self.cells[entry.slot, :, 0] = -1
        self._on_change(entry.slot)
        self.has_overrides[entry.slot] = self._is_heavy[entry.slot] = False
        self._compaction.forget(entry.extent)
        self._arena.release(entry.extent)
        self._free_slots.append(entry.slot)
        self._no_room_from = None
        del self._by_slot[entry.slot]
        entry.slot, entry.extent = -1, None

    def _finish_unloading(self) -> None:
        for digest in list(self._unloading):
            entry = self._entries.get(digest)
            if entry is not None:
                if entry.state is State.PLACING:
                    self._transfers.cut_short(entry)
                if entry.num_leases or entry.state in (State.READING, State.PLACING):
                    continue
                self._forget(entry)
                gone = AdapterUnavailable("the adapter was unloaded before its load was done")
                self._tell(entry.on_host, gone)
                self._tell(entry.on_device, gone)
            for done in self._unloading.pop(digest):
                done()

    @staticmethod
    def _tell(waiters: list[Done], outcome: Residency | PolyadaptError) -> None:
        told, waiters[:] = list(waiters), []
        for done in told:
            done(outcome)


def _remember(table: dict[str, int], digest: str, value: int) -> None:
    table.pop(digest, None)
    table[digest] = value
    if len(table) > _MAX_REMEMBERED:
        del table[next(iter(table))]


def _too_large(entry: Entry, capacity: int, element_size: int) -> InvalidRequest:
    return InvalidRequest(
        f"the adapter needs {entry.nbytes} bytes of device memory, --max-adapter-bytes is "
        f"{capacity * element_size}; raise it or lower the adapter's rank",
        param="model",
    )
