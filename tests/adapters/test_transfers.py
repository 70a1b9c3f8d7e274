"""Copies to an asynchronous device, and the pool that has them made: nothing is read or written
while another writes it, whatever order things are done in.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import wait

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.fake_streams import FakeDevice, overlap, span_of
from tests.support.pool_rig import Rig, Store, applied, packed_cells

from polyadapt.adapters import pinned as pinned_module
from polyadapt.adapters import pool as pool_module
from polyadapt.adapters import transfers as transfers_module
from polyadapt.adapters.entry import Entry, State
from polyadapt.adapters.transfers import Ended, StreamTransfers
from polyadapt.errors import AdapterUnavailable
from polyadapt.types import Residency


@pytest.fixture(autouse=True)
def small_bounds() -> Iterator[None]:
    """Ten elements under way, slabs of 100, and ten moved between two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfers_module, "_UNDER_WAY_NBYTES", 40)
        patch.setattr(pinned_module, "_SLAB_NBYTES", 400)
        patch.setattr(pool_module, "_MOVED_ASIDE", 40)
        yield


# --------------------------------------------------------------------------- transfers alone
class Copying:
    """Transfers into an arena of 100 elements on a fake device."""

    def __init__(self) -> None:
        self.device = FakeDevice()
        self.arena = torch.zeros(100)
        self.now = itertools.count()
        self.transfers = StreamTransfers(self.device, lambda: next(self.now) * 1e-3)
        (self.stream,) = self.device.copies

    def start(self, name: str, start: int, size: int) -> Entry:
        entry = Entry(name, State.PLACING)
        source = torch.arange(float(size)) + 1
        self.transfers.start(entry, self.arena[start : start + size], source)
        return entry

    @property
    def under_way(self) -> list[int]:
        return [len(copy.target) for copy in self.stream.pending]


def test_no_more_is_under_way_than_the_bound_and_the_rest_follows():
    it = Copying()
    large = it.start("large", 0, 25)
    small = it.start("small", 30, 3)
    parts = []
    ended: list[Ended] = []
    while not ended or it.transfers.entries:
        assert sum(it.under_way) <= 10
        parts.append(it.under_way)
        it.device.run_all()
        ended += it.transfers.advance(0.0)
    assert parts == [[10], [10], [5, 3]]
    assert ended == [Ended(large, True), Ended(small, True)]
    assert torch.equal(it.arena[:25], torch.arange(25.0) + 1)
    assert torch.equal(it.arena[30:33], torch.arange(3.0) + 1)
    assert it.device.num_waits == 0


def test_a_transfer_ends_when_its_mark_is_reached_and_steps_run_behind_it():
    it = Copying()
    it.start("a", 0, 10)
    for _ in range(3):
        assert it.transfers.advance(0.0) == []
        if not it.stream.stream.is_busy:
            it.device.run_one()  # it follows the steps' mark, then begins
    assert it.transfers.advance(0.0) == []
    it.device.run_all()
    before = it.device.steps.num_enqueued
    (ended,) = it.transfers.advance(0.0)
    assert ended.is_whole
    assert it.device.steps.num_enqueued == before + 1, "the steps wait for the mark"
    assert it.device.num_waits == 0


def test_steps_that_are_enqueued_read_what_lay_there_before():
    it = Copying()
    it.device.step([(it.arena[:10], torch.zeros(10))])
    it.start("a", 0, 10)
    it.device.run_one(1)  # whichever stream can go on
    assert torch.equal(it.arena[:10], torch.zeros(10))
    for choice in itertools.count(1):
        if not it.device.run_one(choice):
            break
    assert float(it.arena[0]) == 1.0


def test_what_is_cut_short_ends_behind_the_part_that_is_under_way():
    it = Copying()
    entry, other = it.start("a", 0, 30), it.start("b", 50, 5)
    it.transfers.cut_short(entry)
    assert it.transfers.advance(0.0) == [], "ten elements are still being written"
    it.device.run_all()
    assert it.transfers.advance(0.0) == [Ended(entry, False)]
    assert it.under_way == [5], "and the next one's turn has come"
    it.device.run_all()
    assert it.transfers.advance(0.0) == [Ended(other, True)]
    assert float(it.arena[10:50].sum()) == 0.0


def test_what_is_cut_short_before_its_turn_ends_at_once():
    it = Copying()
    it.start("a", 0, 30)
    entry = it.start("b", 50, 5)
    it.transfers.cut_short(entry)
    assert it.transfers.advance(0.0) == [Ended(entry, False)]


def test_an_adapter_of_nothing_is_copied_too():
    it = Copying()
    entry = it.start("empty", 0, 0)
    assert it.transfers.advance(0.0) == [Ended(entry, True)]


def test_an_idle_moment_is_used_to_wait_for_all_of_it():
    it = Copying()
    entry = it.start("a", 0, 95)
    assert it.transfers.advance(1.0) == [Ended(entry, True)]
    assert it.device.num_waits == 10
    entry = it.start("b", 0, 95)
    assert it.transfers.advance(3.5e-3) == []
    assert it.device.num_waits == 13, "no longer than it is allowed to"


def test_a_copy_at_once_is_there_when_it_returns_and_behind_the_steps():
    it = Copying()
    it.device.step([(it.arena[:5], torch.zeros(5))])
    it.transfers.make(it.arena[:5], torch.ones(5))
    assert torch.equal(it.arena[:5], torch.ones(5))


def test_closing_waits_for_what_is_under_way_and_sends_no_more():
    it = Copying()
    it.start("a", 0, 30)
    it.transfers.close()
    assert it.under_way == []
    assert float(it.arena[:10].min()) == 1.0
    assert float(it.arena[10:].max()) == 0.0


# --------------------------------------------------------------------------- the pool on a device
class DeviceRig(Rig):
    """A pool on a fake device, the steps that read what is leased, and what must hold always."""

    def __init__(self, store: Store, **options: object) -> None:
        self.device = FakeDevice()
        super().__init__(store, device=self.device, **options)
        moves, copies = self.device.copies
        self.moves, self.copies = moves, copies
        self.leases: list[tuple[int, ...]] = []

    def lease(self, *names: str) -> bool:
        slots = self.acquire(*dict.fromkeys(names))
        self.leases += [slots] if slots else []
        return slots is not None

    def step(self) -> None:
        """Enqueue a step that reads every cell of every leased adapter."""
        reads = []
        for slot in {slot for slots in self.leases for slot in slots}:
            stored = self.store.adapters[self.pool._by_slot[slot].digest]
            starts = [*stored.cells[:, 0].tolist(), len(stored.weights)]
            for site_id, (start, stop) in enumerate(itertools.pairwise(starts)):
                offset = int(self.pool.cells[slot, site_id, 0])
                here = self.pool.weights[offset : offset + stop - start]
                reads.append((here, stored.weights[start:stop]))
        self.device.step(reads)

    def read_all(self) -> None:
        """Let the reading threads end."""
        wait(self.pool._jobs, timeout=10)

    def check(self) -> None:
        self.pool.check_integrity()
        assert sum(map(len, self.leases)) == self.pool.num_leases
        own = [
            span_of(self.pool.weights[e.extent.start : e.extent.stop])
            for e in self.pool._entries.values()
            if e.state is State.PLACING and e.extent is not None
        ]
        for copy in self.copies.pending:
            target = span_of(copy.target)
            is_owned = any(start <= target[0] and target[1] <= stop for start, stop in own)
            assert is_owned, "what is being written to belongs to nobody, or to another"
        for entry in self.pool._entries.values():
            if entry.state is not State.DEVICE and entry.slot >= 0:
                assert int(self.pool.cells[entry.slot, :, 0].max()) == -1, "bound too early"
        held = [e.packed for e in self.pool._entries.values() if e.packed is not None]
        blocks = [span_of(packed.weights) for packed in held if packed.memory is not None]
        assert not any(overlap(a, b) for a, b in itertools.combinations(blocks, 2))

    def finish(self) -> None:
        """Let everything come to its end, and look whether anything is left behind."""
        self.queue = ()
        while self.leases:
            self.pool.release(self.leases.pop())
        for _ in range(60):
            self.read_all()
            self.pool.poll()
            self.device.run_all()
        self.check()


SIZES = {"a": [5, 5, 10], "b": [10, 20, 1], "c": [15, 15, 10], "d": [20, 20, 10], "e": [60, 1, 1]}


def stocked(**more: list[int]) -> Store:
    store = Store()
    for number, (name, sizes) in enumerate((SIZES | more).items(), start=1):
        store.adapters[name] = packed_cells(float(number), sizes)
    return store


@pytest.fixture
def rig():
    made: list[DeviceRig] = []

    def make(**options: object) -> DeviceRig:
        made.append(DeviceRig(stocked(), **options))
        return made[-1]

    yield make
    for each in made:
        each.pool.close()


def test_an_adapter_is_leased_a_poll_after_its_last_part_has_come(rig):
    it = rig()
    assert not it.lease("d")  # 50 elements, ten at a time
    it.read_all()
    num_polls = 0
    while not it.lease("d"):
        it.check()
        it.pool.poll()
        it.find("d")
        it.device.run_all()
        num_polls += 1
        assert num_polls < 10
    assert num_polls == 6
    assert it.device.num_waits == 0, "a step waits for no copy"
    it.step()
    it.device.run_all()
    assert it.counters["adapter_loads_overlapped"] == 1


def test_in_an_idle_moment_an_adapter_is_there_at_once(rig):
    it = rig()
    it.pool.prepare("d", lambda _: None)
    it.read_all()
    it.pool.poll(patience_s=1.0)
    assert it.lease("d")
    it.step()
    it.device.run_all()
    assert it.counters["adapter_loads_waited"] == 1


def test_a_load_that_is_cut_short_keeps_its_extent_until_nothing_is_written_there(rig):
    it = rig()
    done: list[bool] = []
    it.lease("d")
    it.read_all()
    it.pool.poll()
    it.lease("d")
    it.pool.unload("d", lambda: done.append(True))
    it.queue = ()
    it.pool.poll()
    assert (done, it.pool.nbytes_used) == ([], 200)
    assert it.pool.is_busy, "or the engine would sleep over it"
    it.device.run_all()
    it.pool.poll()
    assert (done, it.pool.nbytes_used) == ([True], 0)
    assert len(it.copies.pending) == 0, "the other forty elements are not copied"
    it.finish()


def test_whoever_wants_it_after_all_gets_it_whole(rig):
    it = rig()
    told: list[object] = []
    it.pool.load("d", False, told.append)
    it.read_all()
    it.pool.poll()
    it.pool.unload("d", lambda: None)
    it.pool.load("d", True, told.append)
    it.finish()
    assert [type(each) for each in told] == [Residency, Residency]
    assert it.lease("d")
    it.step()
    it.finish()


def test_host_copies_lie_in_page_locked_memory_as_far_as_it_goes(rig):
    it = rig(host=440)  # bytes: a slab of 100 elements, and 10 more
    for name in "acd":  # of 20, 40 and 50
        it.pool.prepare(name, lambda _: None)
        it.read_all()
        it.pool.poll()
    it.check()
    pinned = {name: it.pool._entries[name].packed.memory is not None for name in "acd"}
    assert pinned == {"a": True, "c": True, "d": False}
    assert it.device.num_pinned == [100]
    assert it.counters["adapter_copies_unpinned"] == 1
    for name in "acd":
        it.pool.unload(name, lambda: None)
    it.finish()
    assert it.pool._host._pinned.num_used == 0


def test_an_adapter_too_large_for_the_device_leaves_no_page_locked_memory_behind(rig):
    it = rig(size=30)
    it.pool.prepare("d", lambda _: None)
    it.finish()
    assert it.tier("d") is None
    assert it.pool._host._pinned.num_used == 0


def test_an_engine_that_stops_leaves_no_copy_under_way(rig):
    it = rig()
    it.lease("d")
    it.read_all()
    it.pool.poll()
    it.lease("d")
    assert it.copies.pending
    it.pool.close()
    assert not it.copies.pending


def test_a_move_lies_between_the_steps_before_it_and_those_after_it(rig):
    it = rig(size=131)
    for name in "abd":  # 20, 31 and 50 elements
        while not it.lease(name):
            it.read_all()
            it.device.run_all()
            it.pool.poll()
    a = it.leases[0]
    it.pool.release(a)
    it.leases.remove(a)
    it.pool.prepare("c", lambda _: None)
    for _ in range(3):
        it.read_all()
        it.pool.poll()
    while not it.lease("c"):  # room comes of moving b and d
        it.step()
        it.pool.poll()
        it.check()
        for choice in range(6):
            it.device.run_one(choice)
    it.step()
    it.finish()
    assert it.counters["arena_compactions"] == 1
    assert it.device.num_waits == 0


def test_a_load_that_an_unload_overtakes_is_not_begun_anew(rig):
    it = rig()
    told: list[object] = []
    it.pool.load("d", False, told.append)
    it.read_all()
    it.pool.poll()
    it.pool.unload("d", lambda: told.append("unloaded"))
    it.finish()
    assert [type(each) for each in told] == [AdapterUnavailable, str]


def test_what_lies_in_a_gap_is_not_moved_over_before_the_steps_have_read_it(rig):
    it = rig(size=131)
    for name in "abd":
        while not it.lease(name):
            it.read_all()
            it.device.run_all()
            it.pool.poll()
    it.step()  # enqueued with a, which leaves then
    it.pool.release(it.leases.pop(0))
    it.pool.prepare("c", lambda _: None)
    for _ in range(3):
        it.read_all()
        it.pool.poll()
    it.find("c")
    assert it.moves.pending
    for _ in range(100):
        it.device.run_one(-1)  # the last stream that can go on: moves before steps
    assert not it.moves.pending


NAMES = (*SIZES, "missing", "huge")
ACTIONS = st.one_of(
    st.tuples(st.just("lease"), st.lists(st.sampled_from(NAMES), min_size=1, max_size=2)),
    st.tuples(st.just("lease"), st.lists(st.sampled_from("abcd"), min_size=1, max_size=1)),
    st.tuples(st.sampled_from(["prefetch", "prepare", "load", "pin"]), st.sampled_from(NAMES)),
    st.tuples(st.just("unload"), st.sampled_from(NAMES)),
    st.tuples(st.sampled_from(["release", "step", "poll", "idle", "stop"]), st.none()),
    st.tuples(st.just("run"), st.lists(st.integers(0, 2), min_size=1, max_size=12)),
)


@settings(max_examples=200, deadline=None)
@given(
    actions=st.lists(ACTIONS, max_size=60),
    keeps=st.booleans(),
    host=st.sampled_from([0, 300, 1 << 20]),
)
def test_whatever_comes_goes_and_moves_no_step_reads_and_no_copy_writes_what_is_anothers(
    actions, keeps, host
):
    it = DeviceRig(stocked(huge=[200, 200, 1]), slots=3, host=host, keeps_host_copies=keeps)
    asked, told = 0, []

    def tell(outcome: object = None) -> None:
        told.append(outcome)

    try:
        for action, subject in actions:
            num_waits = it.device.num_waits
            if action == "lease":
                it.lease(*subject)
            elif action == "prefetch":
                it.pool.prefetch(applied(subject))
            elif action == "release" and it.leases:
                it.pool.release(it.leases.pop(0))
            elif action == "step":
                it.step()
            elif action == "poll":
                it.pool.take_failures()
                it.pool.poll()
            elif action == "idle":
                it.pool.poll(patience_s=1.0)
                num_waits = it.device.num_waits
            elif action == "run":
                for choice in subject:
                    it.device.run_one(choice)
            elif action == "stop":
                it.pool._transfers.close()
                assert not it.copies.pending
                break
            elif action in ("prepare", "load", "pin", "unload"):
                asked += 1
                if action == "prepare":
                    it.pool.prepare(subject, tell)
                elif action == "unload":
                    it.pool.unload(subject, tell)
                else:
                    it.pool.load(subject, action == "pin", tell)
            if it.pool._step_patience_s == 0.0:
                assert it.device.num_waits == num_waits, "nothing waits while steps are computed"
            it.read_all()
            it.check()
        else:
            it.finish()
            assert len(told) == asked, "every command is answered once"
            assert not it.pool.is_busy
            assert set(it.residencies()) == set(it.pool._entries)
    finally:
        it.pool.close()
    it.device.run_all()
