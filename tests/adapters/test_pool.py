"""The pool alone: tiers, leases, eviction, compaction, failure, unloading."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.pool_rig import Rig, Store, packed_cells

from polyadapt.adapters import pool as pool_module
from polyadapt.adapters.adapter import Probe, Traits
from polyadapt.adapters.arena import Arena
from polyadapt.adapters.pace import Pace
from polyadapt.adapters.packing import PackedAdapter
from polyadapt.errors import AdapterUnavailable, InvalidRequest, PolyadaptError
from polyadapt.ops import cells as layout
from polyadapt.types import AdapterId, AppliedAdapter, Residency


@pytest.fixture
def rig(request: pytest.FixtureRequest):
    made: list[Rig] = []

    def make(**kwargs) -> Rig:
        names = ("size", "slots", "host", "keeps_host_copies", "clock", "has_overrides", "pace")
        options = {key: kwargs.pop(key) for key in names if key in kwargs}
        made.append(Rig(Store(**kwargs), **options))
        return made[-1]

    yield make
    for each in made:
        each.store.gate.set()
        each.pool.close()


def test_acquire_waits_for_the_load_and_reports_it_once(rig):
    it = rig(a=40)
    it.store.gate.clear()
    assert it.acquire("a") is None
    assert it.acquire("a") is None
    assert it.store.reads["a"] == 1, "asking twice reads once"
    it.store.gate.set()
    it.settle()
    it.take("a")
    first = it.pool.served(AdapterId("a", 1, "a"))
    assert first.tier == "store"
    assert first.load_ms > 0
    again = it.pool.served(AdapterId("a", 1, "a"))
    assert (again.tier, again.load_ms) == ("device", 0.0)


def test_a_leased_adapter_says_what_it_is(rig):
    it = rig(a=10, b=10)
    it.store.adapters["b"] = replace(it.store.adapters["b"], traits=Traits(is_kv_neutral=True))
    it.take("a")
    it.take("b")
    slots = it.pool.find(
        tuple(AppliedAdapter(AdapterId(f"named-{name}", 1, name)) for name in "bab")
    )
    it.pool.lease(slots)
    traits = [it.pool.traits(slot) for slot in slots]
    assert [own.is_kv_neutral for own in traits] == [True, False, True]
    it.pool.release(slots)


def test_asking_whether_adapters_are_on_the_device_brings_none(rig):
    it = rig(a=10, b=10)
    it.take("a")
    a, b = (AppliedAdapter(AdapterId(name, 1, name)) for name in "ab")
    assert it.pool.are_on_device([a])
    assert it.pool.are_on_device([])
    assert not it.pool.are_on_device([a, b])
    assert it.store.reads["b"] == 0


def test_a_prepared_adapter_comes_from_the_host(rig):
    it = rig(a=40)
    told: list[Residency | PolyadaptError] = []
    it.pool.prepare("a", told.append)
    it.settle()
    (residency,) = told
    assert isinstance(residency, Residency)
    assert (residency.tier, residency.nbytes) == ("host", 160)
    it.take("a")
    assert it.pool.served(AdapterId("a", 1, "a")).tier == "host"
    assert it.store.reads["a"] == 1


def test_the_least_recently_used_idle_adapter_makes_room_and_a_leased_one_never(rig):
    it = rig(a=40, b=40, c=40, d=40)
    a, b = it.take("a"), it.take("b")
    assert it.acquire("c") is None
    it.settle()
    assert it.acquire("c") is None, "both residents are leased"
    assert it.counters["adapter_evictions"] == 0
    it.pool.release((b,))
    it.settle()
    assert it.tier("b") == "host"
    c = it.take("c")
    it.check("a", a)
    it.pool.release((a,))
    it.pool.release((c,))
    it.take("c")
    it.pool.release((c,))
    it.take("d")
    assert it.tier("a") == "host", "a was used longest ago"
    assert it.tier("c") == "device"
    assert it.counters["adapter_evictions"] == 2


def test_a_slot_is_known_to_have_overrides_as_long_as_its_adapter_lies_there(rig):
    has = np.zeros(1, np.bool_)
    pool = rig(plain=10, scaled=10, turned=10, slots=1, has_overrides=has)
    adapters = pool.store.adapters
    adapters["scaled"].cells[1, layout.PARTS] = layout.BIAS | layout.OUT_SCALE
    adapters["turned"].cells[1, layout.PARTS] = layout.TRANSFORM | 4 << layout.GROUP_SHIFT
    for name in ("plain", "turned", "scaled", "turned"):
        slot = pool.take(name)
        assert has[slot] == (name == "turned")
        pool.pool.release((slot,))
    pool.pool.unload("turned", lambda: None)
    assert not has.any()
    pool.pool.check_integrity()


def test_a_pinned_adapter_is_not_evicted_until_it_is_unpinned(rig):
    it = rig(a=60, b=60)
    told: list[Residency | PolyadaptError] = []
    it.pool.load("a", True, told.append)
    it.settle()
    assert isinstance(told[0], Residency)
    assert told[0].is_pinned
    assert it.acquire("b") is None
    it.settle()
    assert it.acquire("b") is None
    assert frozenset("b") in it.pool.take_failures()
    it.pool.load("a", False, told.append)
    it.take("b")
    assert it.tier("a") == "host"


def test_a_fragmented_arena_is_compacted_under_running_leases(rig):
    it = rig(a=30, b=30, c=30, d=50)
    slots = {name: it.take(name) for name in "abc"}
    it.pool.release((slots["a"],))
    it.pool.release((slots["c"],))
    it.take("d")
    assert it.counters["arena_compactions"] == 1
    it.check("b", slots["b"])


def test_a_compaction_is_spread_over_rounds_and_whoever_comes_later_does_not_take_its_room(
    rig, monkeypatch
):
    monkeypatch.setattr(pool_module, "_MOVED_TOGETHER", 40)  # bytes: one of b's cells
    it = rig(a=30, b=30, c=30, d=50, small=5)
    it.store.adapters["b"] = packed_cells(2.0, [10, 10, 10])
    slots = {"a": it.take("a"), "b": it.acquire_all("b"), "c": it.take("c")}
    it.pool.release((slots["a"],))
    it.pool.release((slots["c"],))
    for name in ("d", "small"):
        it.pool.prepare(name, lambda _: None)
    it.settle()
    moved = []
    for number in range(3):
        it.pool.poll()
        before = it.counters["arena_moved_bytes"]
        assert it.acquire("d") is None
        it.acquire("small")
        it.pool.check_integrity()
        it.check_cells("b", slots["b"])
        moved.append(it.counters["arena_moved_bytes"] - before)
        assert (it.pool._entries["small"].extent is None) == (number < 2)
    assert moved == [40, 40, 40]
    assert it.counters["arena_compactions"] == 1
    it.settle()
    it.take("d")
    it.take("small")


def test_what_lies_behind_the_cells_is_found_wherever_they_are_moved(rig, monkeypatch):
    monkeypatch.setattr(pool_module, "_MOVED_TOGETHER", 40)
    it = rig(a=30, b=30, c=30, d=50)
    probe = Probe((2, 2), 1)  # of 6 elements
    whole = packed_cells(2.0, [10, 10, 10])
    whole.weights[-6:] = torch.arange(6.0)
    it.store.adapters["b"] = replace(whole, traits=Traits(probe=probe))
    slots = {"a": it.take("a"), "b": it.acquire_all("b"), "c": it.take("c")}
    it.pool.release((slots["a"],))
    it.pool.release((slots["c"],))
    it.pool.prepare("d", lambda _: None)
    it.settle()
    for _ in range(4):
        assert torch.equal(it.pool.probe_weights(slots["b"]), torch.arange(6.0))
        it.pool.poll()
        it.acquire("d")
    assert it.counters["arena_compactions"] == 1
    assert not len(it.pool.probe_weights(slots["c"])), "who has none has nothing there"


def test_the_time_that_copies_may_take_bounds_what_is_moved_in_a_round(rig, monkeypatch):
    monkeypatch.setattr(pool_module, "_MOVED_TOGETHER", 40)
    clock = FakeClock()
    it = rig(a=30, b=30, c=30, d=50, clock=clock)
    it.store.adapters["b"] = packed_cells(2.0, [10, 10, 10])
    slots = {"a": it.take("a"), "b": it.acquire_all("b"), "c": it.take("c")}
    it.pool.release((slots["a"],))
    it.pool.release((slots["c"],))
    it.pool.prepare("d", lambda _: None)
    it.settle()
    part_s = clock.step_s = it.pool._copy_estimate.seconds(40)
    it.pool.poll(2.5 * part_s)  # the first part leaves one and a half
    assert it.acquire("d") is None
    assert it.counters["arena_moved_bytes"] == 80


def test_whoever_is_unloaded_while_it_is_moved_is_moved_no_further(rig, monkeypatch):
    monkeypatch.setattr(pool_module, "_MOVED_TOGETHER", 40)
    it = rig(a=25, b=30, x=5, c=30, d=60)
    it.store.adapters["b"] = packed_cells(2.0, [10, 10, 10])
    slots = {"a": it.take("a"), "b": it.acquire_all("b"), "x": it.take("x"), "c": it.take("c")}
    it.pool.release((slots["a"],))
    it.pool.release((slots["c"],))
    it.pool.prepare("d", lambda _: None)
    it.settle()
    it.acquire("d")
    assert it.counters["arena_moved_bytes"] == 40
    it.pool.release((slots["b"],))
    it.pool.unload("b", lambda: None)
    it.pool.check_integrity()
    it.take("d")
    assert it.counters["arena_moved_bytes"] == 60, "and x, which still stood in the way"
    it.check("x", slots["x"])


def test_a_prefetch_neither_compacts_nor_evicts_where_only_that_makes_room(rig):
    it = rig(a=30, b=30, c=30, d=50)
    slots = {name: it.take(name) for name in "abc"}
    it.pool.release((slots["a"],))
    it.pool.release((slots["c"],))
    it.pool.prepare("d", lambda _: None)
    for _ in range(3):
        it.settle()
    applied = (AppliedAdapter(AdapterId("d", 1, "d")),)
    it.pool.prefetch(applied)
    assert (it.tier("a"), it.tier("c"), it.tier("d")) == ("device", "device", "host")
    for name in "ac":
        it.pool.unload(name, lambda: None)
    it.pool.poll()
    it.pool.prefetch(applied)
    assert it.tier("d") == "host"
    assert it.counters["adapter_evictions"] == it.counters["arena_compactions"] == 0
    it.take("d")
    assert it.counters["arena_compactions"] == 1


def test_a_prefetch_evicts_whoever_leaves_enough_room_by_itself(rig):
    it = rig(a=60, b=60)
    it.pool.release((it.take("a"),))
    it.pool.prepare("b", lambda _: None)
    for _ in range(3):
        it.settle()
    it.pool.prefetch((AppliedAdapter(AdapterId("b", 1, "b")),))
    it.settle()
    assert (it.tier("a"), it.tier("b")) == ("host", "device")


def test_no_two_queued_adapters_evict_each_other_for_ever(rig):
    it = rig(a=60, b=60)
    slot = it.take("a")
    it.pool.release((slot,))
    loads = it.counters["adapter_loads"]
    for _ in range(20):  # the queue asks for b once, then keeps asking for a as its head does
        it.acquire("a")
        it.pool.release((slot,))
        it.pool.poll()
    assert it.counters["adapter_loads"] == loads


def test_loads_beyond_the_slots_evict_and_come_back(rig):
    names = [f"n{number}" for number in range(12)]
    it = rig(slots=3, size=1000, **dict.fromkeys(names, 10))
    order = random.Random(0).choices(names, k=120)
    for name in order:
        it.pool.release((it.take(name),))
    assert it.counters["adapter_evictions"] > 0
    assert max(it.store.reads.values()) == 1, "the host copies spare the disk"


def test_the_host_budget_sends_adapters_back_to_the_store(rig):
    names = [f"n{number}" for number in range(6)]
    it = rig(slots=1, size=10, host=80, **dict.fromkeys(names, 10))
    for name in names * 2:
        it.pool.release((it.take(name),))
        it.pool.poll()
        held = [r for r in it.residencies().values() if r.tier == "host"]
        assert sum(r.nbytes for r in held) <= 80
    assert it.counters["host_evictions"] > 0
    assert it.store.reads.total() > len(names)


def test_a_failed_read_is_told_once_and_can_be_tried_again(rig):
    it = rig(a=10)
    gone = it.store.adapters.pop("a")
    assert it.acquire("a") is None
    it.settle()
    assert it.acquire("a") is None
    failures = it.pool.take_failures()
    assert isinstance(failures[frozenset("a")], AdapterUnavailable)
    assert it.pool.take_failures() == {}
    it.store.adapters["a"] = gone
    it.take("a")


def test_a_good_read_ends_what_bad_ones_said_though_there_is_no_room_yet(rig):
    it = rig(a=60, b=60)
    hopeless = (AppliedAdapter(AdapterId("b", 1, "b")),)
    gone = it.store.adapters.pop("b")
    it.take("a")
    for _ in range(10):
        assert not it.pool.is_hopeless(hopeless)
        assert it.acquire("b") is None
        it.settle()
        it.pool.take_failures()
    assert it.pool.is_hopeless(hopeless)
    it.store.adapters["b"] = gone
    it.acquire("b")
    it.settle()
    assert it.pool.is_short_of_room(hopeless)
    assert not it.pool.is_hopeless(hopeless)


def test_whoever_pins_keep_out_time_and_again_is_hopeless_until_they_leave_room(rig):
    it = rig(a=60, b=60, c=60)
    crowded = (AppliedAdapter(AdapterId("b", 1, "b")),)
    it.pool.load("a", True, lambda _: None)
    it.settle()
    for _ in range(10):
        assert not it.pool.is_hopeless(crowded)
        while not it.pool.take_failures():
            assert it.acquire("b") is None
            it.settle()
    assert it.pool.is_hopeless(crowded), "every one of its reads was a good one"
    it.queue = ()
    it.take("a")  # in use, and pinned no longer
    it.pool.load("a", False, lambda _: None)
    for _ in range(2):
        assert it.acquire("b") is None
        it.settle()
    assert it.pool.is_short_of_room(crowded)
    assert not it.pool.is_hopeless(crowded)


def test_whoever_is_too_large_stays_hopeless_however_often_it_is_read(rig):
    it = rig(a=101)
    large = (AppliedAdapter(AdapterId("a", 1, "a")),)
    for _ in range(2):
        assert it.acquire("a") is None
        it.settle()
        assert it.pool.is_hopeless(large)
        it.pool.take_failures()


def test_finding_an_adapter_keeps_it_on_the_device_and_says_nothing(rig):
    it = rig(a=60, b=60)
    it.pool.release((it.take("a"),))
    for _ in range(3):
        it.pool.poll()
    it.residencies()
    for _ in range(5):
        it.pool.poll()
        assert it.find("a") is not None
        it.find("b")
    it.settle()
    _, gone = it.pool.take_changes()
    assert (it.pool.num_leases, gone) == (0, [])
    assert it.tier("a") == "device"
    changed = [r.digest for r in it.residencies().values() if r.num_leases]
    assert not changed


def test_an_adapter_larger_than_the_device_budget_says_both_numbers(rig):
    it = rig(a=101)
    told: list[Residency | PolyadaptError] = []
    it.pool.prepare("a", told.append)
    it.settle()
    (error,) = told
    assert isinstance(error, InvalidRequest)
    assert "404 bytes" in error.message
    assert "400" in error.message


def test_unload_waits_for_the_last_lease_and_then_releases_every_tier(rig):
    it = rig(a=40)
    slot = it.take("a")
    done: list[bool] = []
    it.pool.unload("a", lambda: done.append(True))
    it.pool.poll()
    assert not done
    it.check("a", slot)
    it.pool.release((slot,))
    it.pool.poll()
    assert done == [True]
    assert it.tier("a") is None
    assert it.pool.nbytes_used == 0
    it.pool.check_integrity()
    it.take("a")
    assert it.store.reads["a"] == 2


def test_unloading_while_it_is_read_leaves_nothing_behind(rig):
    it = rig(a=40)
    it.store.gate.clear()
    it.acquire("a")
    done: list[bool] = []
    it.pool.unload("a", lambda: done.append(True))
    it.queue = ()  # the request is gone
    it.store.gate.set()
    it.settle()
    assert done == [True]
    assert not it.residencies()


def test_several_adapters_of_one_request_are_leased_all_or_none(rig):
    it = rig(a=30, b=30)
    it.take("a")
    assert it.acquire("a", "b") is None
    it.settle()
    slots = it.acquire("a", "b")
    assert slots is not None
    leases = {r.digest: r.num_leases for r in it.residencies().values()}
    assert leases == {"a": 2, "b": 1}


def test_adapters_of_one_request_that_never_fit_together_are_refused(rig):
    it = rig(a=60, b=60)
    assert it.acquire("a", "b") is None
    it.settle()
    assert it.acquire("a", "b") is None
    ((digests, error),) = it.pool.take_failures().items()
    assert digests == {"a", "b"}
    assert isinstance(error, InvalidRequest)
    assert "480 bytes" in error.message
    assert "400" in error.message
    it.queue = ()
    for _ in range(3):
        it.settle()
    it.take("b")


def test_adapters_of_one_request_that_do_not_fit_beside_the_pins_of_others_are_refused(rig):
    it = rig(a=40, b=40, pinned=40)
    it.pool.load("pinned", True, lambda _: None)
    it.settle()
    assert it.acquire("a", "b") is None
    it.settle()
    assert it.acquire("a", "b") is None
    ((digests, error),) = it.pool.take_failures().items()
    assert digests == {"a", "b"}
    assert isinstance(error, AdapterUnavailable)
    assert "320 bytes" in error.message
    assert "unpin" in error.message
    assert it.acquire("a", "pinned") is not None
    assert it.pool.take_failures() == {}


def test_a_thousand_loads_and_unloads_leave_the_pool_as_it_was(rig):
    names = [f"n{number}" for number in range(5)]
    it = rig(slots=3, size=50, **dict.fromkeys(names, 17))
    for number in range(1000):
        name = names[number % 5]
        it.pool.release((it.take(name),))
        if number % 3 == 0:
            it.pool.unload(name, lambda: None)
            it.pool.poll()
    for name in names:
        it.pool.unload(name, lambda: None)
    it.settle()
    assert not it.residencies()
    assert it.pool.nbytes_used == 0


def test_extents_are_first_fit_and_never_overlap():
    arena, rng, held = Arena(200), random.Random(1), []
    for _ in range(2000):
        if held and rng.random() < 0.5:
            arena.release(held.pop(rng.randrange(len(held))))
        else:
            extent = arena.allocate(rng.randrange(1, 40))
            if extent is not None:
                held.append(extent)
        spans = sorted((e.start, e.start + e.size) for e in held)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
        assert arena.num_used == sum(e.size for e in held)
        arena.check_integrity()


def test_a_load_that_waits_for_room_is_served_when_a_lease_ends(rig):
    it = rig(a=60, b=60)
    slot = it.take("a")
    told: list[Residency | PolyadaptError] = []
    it.pool.load("b", False, told.append)
    it.settle()
    assert not told
    assert it.pool.is_busy, "or the engine would sleep over it"
    it.acquire("a")
    it.pool.release((slot,))
    it.pool.release((slot,))
    for _ in range(3):
        it.settle()
    (residency,) = told
    assert isinstance(residency, Residency)
    assert residency.tier == "device"


def test_a_load_that_pins_leave_no_room_for_fails_with_both_numbers(rig):
    it = rig(a=60, b=60)
    told: list[Residency | PolyadaptError] = []
    it.pool.load("a", True, told.append)
    it.settle()
    it.pool.load("b", False, told.append)
    it.settle()
    error = told[1]
    assert isinstance(error, AdapterUnavailable)
    assert "240 bytes" in error.message
    assert "400" in error.message
    assert it.acquire("b") is None
    it.settle()
    it.acquire("b")
    assert frozenset("b") in it.pool.take_failures(), "a queued request hears of it too"


def test_unloading_answers_a_load_that_was_under_way(rig):
    it = rig(a=40)
    told: list[Residency | PolyadaptError] = []
    done: list[bool] = []
    it.pool.load("a", False, told.append)
    it.pool.unload("a", lambda: done.append(True))
    it.settle()
    it.pool.poll()
    assert done == [True]
    assert len(told) == 1
    assert not it.pool.is_busy


def test_two_cold_requests_with_room_for_one_take_turns(rig):
    """The queue asks for both in every round, as the scheduler does."""
    it = rig(a=60, b=60)
    first_slots = None
    for _ in range(200):
        first_slots = it.acquire("a")
        it.acquire("b")
        if first_slots is not None:
            break
        it.woken.wait(0.05)
        it.woken.clear()
        it.pool.poll()
    assert first_slots is not None
    b = (AppliedAdapter(AdapterId("b", 1, "b")),)
    for _ in range(200):  # until it is read: then there is no room for it
        it.acquire("b")
        if it.pool.is_short_of_room(b):
            break
        it.woken.wait(0.05)
        it.woken.clear()
        it.pool.poll()
    assert it.pool.is_short_of_room(b)
    assert it.counters["adapter_evictions"] == 0
    it.pool.release(first_slots)
    for _ in range(200):
        if it.acquire("b") is not None:
            break
        it.woken.wait(0.05)
        it.woken.clear()
        it.pool.poll()
    assert it.tier("b") == "device"
    assert it.counters["adapter_loads"] == 2


def test_a_large_newcomer_evicts_nobody_in_vain(rig):
    it = rig(a=50, c=30, big=90)
    slot = it.take("a")
    it.pool.release((it.take("c"),))
    for _ in range(5):
        it.pool.poll()
    assert it.acquire("big") is None
    it.settle()
    assert it.acquire("big") is None
    assert it.tier("c") == "device"
    it.pool.release((slot,))
    for _ in range(4):
        it.settle()
    it.take("big")


def test_without_host_copies_the_weights_lie_in_memory_once(rig):
    it = rig(a=60, b=60, keeps_host_copies=False)
    it.pool.release((it.take("a"),))
    assert it.pool._host.nbytes == 0
    it.pool.release((it.take("b"),))
    assert it.tier("a") is None, "evicted, and the store is what is left"
    it.take("a")
    assert it.store.reads["a"] == 2


def test_what_has_a_host_copy_makes_room_before_what_must_be_read_again(rig):
    it = rig(a=40, b=40, c=40)
    for name in "ba":
        it.pool.release((it.take(name),))
    entries = it.pool._entries
    it.pool._host.drop(entries["b"])  # b was used longer ago and would have to be read
    for _ in range(3):
        it.pool.poll()
    it.take("c")
    assert (it.tier("a"), it.tier("b")) == ("host", "device")


def test_a_queue_of_thousands_reads_only_what_has_room_in_the_queues_order(rig):
    names = [f"n{number:05d}" for number in range(10_000)]
    it = rig(size=100, slots=8, **dict.fromkeys(names, 25))
    it.take(names[-1])  # now a size is known; it stays leased
    it.store.reads.clear()
    it.store.gate.clear()
    for _ in range(5):
        it.pool.poll()
        for name in names[:-1]:
            it.acquire(name)
    it.store.gate.set()
    it.queue = ()
    it.settle()
    assert list(it.store.reads) == names[:5], "room for three and two ahead"
    for name in names[:3]:
        it.pool.poll()
        it.take(name)


def test_whoever_is_not_read_yet_for_want_of_room_is_short_of_it(rig):
    it = rig(slots=8, **dict.fromkeys("abcdef", 50))
    it.take("a")
    it.take("b")
    it.pool.poll()
    for name in "cdef":
        it.acquire(name)
    is_short = [
        it.pool.is_short_of_room((AppliedAdapter(AdapterId(name, 1, name)),)) for name in "cdef"
    ]
    assert is_short == [False, False, True, True], "two are read ahead"


def test_before_any_size_is_known_three_are_read(rig):
    names = [f"n{number}" for number in range(9)]
    it = rig(size=1000, slots=16, **dict.fromkeys(names, 10))
    it.store.gate.clear()
    for name in [name for name in names for _ in range(3)]:
        it.acquire(name)
    it.store.gate.set()
    it.queue = ()
    it.settle()
    assert list(it.store.reads) == names[:3]


def test_the_hosts_budget_bounds_what_is_read_ahead(rig):
    names = [f"n{number}" for number in range(50)]
    it = rig(size=1000, slots=60, host=250, **dict.fromkeys(names, 25))
    it.pool.release((it.take(names[-1]),))
    it.store.reads.clear()
    it.store.gate.clear()
    it.pool.poll()
    for name in names[:-1]:
        it.acquire(name)
    it.store.gate.set()
    it.queue = ()
    it.settle()
    assert list(it.store.reads) == names[:2]


def test_the_head_of_the_queue_is_read_whatever_waits_behind_it(rig):
    it = rig(a=100, b=100, c=100, d=100, e=100, head=100)
    it.pool.release((it.take("a"),))
    it.pool.poll()
    for name in "bcde":
        it.acquire(name)
    it.pool.poll()
    it.acquire("head")
    assert it.tier("head") == "store", "under way"


def test_reads_that_nobody_wants_any_more_are_given_up(rig):
    it = rig(a=10, b=10, c=10)
    it.store.gate.clear()
    for name in "abc":
        it.acquire(name)
    it.queue = ()
    for _ in range(200):
        it.pool.poll()
    it.store.gate.set()
    it.settle()
    assert set(it.store.reads) == {"a"}, "it had begun"
    assert it.tier("b") is None
    assert set(it.residencies()) == {"a"}


def test_short_copies_take_turns_before_the_steps_and_a_long_one_overlaps(rig):
    clock = FakeClock()
    it = rig(a=10, b=10, c=10, clock=clock)
    for name in "abc":
        it.pool.prepare(name, lambda _: None)
    it.settle()
    copy_s = clock.step_s = it.pool._copy_estimate.seconds(40)  # as long as was guessed
    it.pool.poll(copy_s * 1.01)
    assert it.acquire("a") is not None, "on the device in the same round"
    assert it.counters["adapter_loads_waited"] == 1
    it.pool.poll(copy_s * 1.9)  # the second copy finds too little left
    assert it.acquire("b") is not None
    assert it.acquire("c") is None
    assert it.tier("c") == "host"
    it.pool.poll(copy_s * 0.5)  # too little for any
    assert it.acquire("c") is None
    assert it.counters["adapter_loads_overlapped"] == 1
    it.settle()
    it.take("c")
    assert it.counters["adapter_loads_waited"] == 2


def test_commanded_loads_take_turns_until_all_are_done(rig):
    clock = FakeClock()
    it = rig(a=10, b=10, c=10, clock=clock)
    told: list[object] = []
    for name in "abc":
        it.pool.prepare(name, lambda _: None)
    it.settle()
    copy_s = clock.step_s = it.pool._copy_estimate.seconds(40)
    it.pool.poll()
    for name in "abc":
        it.pool.load(name, False, told.append)
    it.settle()
    assert len(told) == 3
    for name in "abc":
        it.pool.unload(name, lambda: None)
        it.pool.prepare(name, lambda _: None)
    it.settle()
    it.pool.poll(copy_s * 1.5)
    for name in "abc":
        it.pool.load(name, False, told.append)
    for num_done in (4, 5, 6):
        assert len(told) == num_done
        assert it.pool.is_busy == (num_done < 6)
        it.pool.poll(copy_s * 1.5)
    assert it.counters["adapter_loads_overlapped"] == 3
    assert it.counters["adapter_loads_waited"] == 3


def test_a_host_copy_is_placed_while_a_read_is_held_up(rig):
    it = rig(a=10, b=10)
    it.pool.prepare("a", lambda _: None)
    it.settle()
    it.store.gate.clear()
    it.acquire("b")
    it.acquire("a")
    while it.tier("a") != "device":
        assert it.woken.wait(10)
        it.woken.clear()
        it.pool.poll()
    assert it.tier("b") == "store"


def test_a_read_that_takes_long_holds_no_short_one_up(rig):
    own = threading.local()
    pace = Pace(lambda: getattr(own, "worked", 0.0), lambda _: None)
    it = rig(long=10, short=10, pace=pace)
    begun, parts = threading.Event(), []

    def read(digest: str) -> PackedAdapter:
        own.worked = 0.0
        for number in range(20 if digest == "long" else 2):
            own.worked += 0.1
            parts.append(digest)
            if number == 10:
                begun.set()
                assert it.store.gate.wait(10)
            pace.breathe()
        return it.store(digest)

    it.pool._read = read
    it.store.gate.clear()
    it.acquire("long")
    assert begun.wait(10)
    it.acquire("short")
    it.store.gate.set()
    it.queue = ("long", "short")
    it.settle()
    assert parts == ["long"] * 11 + ["short"] * 2 + ["long"] * 9
    it.take("short")
    it.take("long")


def test_nothing_is_told_of_adapters_that_nothing_happened_to(rig):
    names = [f"n{number}" for number in range(100)]
    it = rig(size=5000, slots=128, **dict.fromkeys(names, 10))
    for name in names:
        it.pool.release((it.take(name),))
    assert len(it.residencies()) == 100
    it.pool.poll()
    assert it.pool.take_changes() == ([], [])
    slots = it.acquire("n7")
    (changed,), gone = it.pool.take_changes()
    assert (changed.digest, changed.num_leases, gone) == ("n7", 1, [])
    it.pool.release(slots)
    (changed,), _ = it.pool.take_changes()
    assert changed.num_leases == 0


def test_pins_may_fill_the_device_and_an_unpinned_one_makes_room_again(rig):
    it = rig(a=50, b=50, c=50)
    told: list[Residency | PolyadaptError] = []
    it.pool.load("a", True, told.append)
    it.pool.load("b", True, told.append)
    it.settle()
    it.pool.load("c", True, told.append)
    it.settle()
    assert [type(each) for each in told] == [Residency, Residency, AdapterUnavailable]
    assert "c" not in it.residencies(), "a refused pin leaves nothing behind"
    it.pool.load("a", False, told.append)
    it.pool.load("c", True, told.append)
    it.settle()
    assert isinstance(told[-1], Residency)
    assert told[-1].is_pinned
    tiers = {r.digest: r.tier for r in it.residencies().values()}
    assert tiers == {"a": "host", "b": "device", "c": "device"}
    done: list[bool] = []
    it.pool.unload("b", lambda: done.append(True))
    it.pool.poll()
    assert done == [True], "a pin does not outlive its adapter"
    it.take("a")


class FakeClock:
    """Advances by step_s at every look."""

    def __init__(self) -> None:
        self.now = 0.0
        self.step_s = 0.0

    def __call__(self) -> float:
        self.now += self.step_s
        return self.now


NAMES = ("a", "b", "c", "d", "e", "missing", "huge")
ACTIONS = st.one_of(
    st.tuples(st.just("acquire"), st.lists(st.sampled_from(NAMES), min_size=1, max_size=2)),
    st.tuples(st.sampled_from(["prepare", "load", "pin", "unload"]), st.sampled_from(NAMES)),
    st.tuples(st.sampled_from(["release", "poll", "wait"]), st.none()),
)


@settings(max_examples=150, deadline=None)
@given(actions=st.lists(ACTIONS, max_size=40), keeps=st.booleans(), host=st.sampled_from([0, 150]))
def test_no_order_of_commands_breaks_the_books_or_forgets_a_waiter(actions, keeps, host):
    sizes = {"a": 20, "b": 30, "c": 40, "d": 50, "e": 60, "huge": 101}
    it = Rig(Store(**sizes), slots=3, host=host, keeps_host_copies=keeps)
    asked = 0
    told: list[object] = []
    leases: list[tuple[int, ...]] = []

    def tell(outcome: object = None) -> None:
        told.append(outcome)

    def check() -> None:
        it.pool.check_integrity()
        assert sum(map(len, leases)) == it.pool.num_leases
        for slots in leases:
            for slot in slots:
                it.check(it.pool._by_slot[slot].digest, slot)

    try:
        for action, subject in actions:
            if action == "acquire":
                slots = it.acquire(*dict.fromkeys(subject))
                leases += [slots] if slots else []
            elif action == "release" and leases:
                it.pool.release(leases.pop(0))
            elif action == "poll":
                it.pool.take_failures()
                it.pool.poll(patience_s=1.0)
            elif action == "wait":
                it.settle()
            elif action in ("prepare", "load", "pin", "unload"):
                asked += 1
                if action == "prepare":
                    it.pool.prepare(subject, tell)
                elif action == "unload":
                    it.pool.unload(subject, tell)
                else:
                    it.pool.load(subject, action == "pin", tell)
            check()
        it.queue = ()
        while leases:
            it.pool.release(leases.pop())
        for _ in range(4):
            it.settle()
        check()
        assert len(told) == asked, "every command is answered once"
        assert not it.pool.is_busy
        assert set(it.residencies()) == set(it.pool._entries)
    finally:
        it.pool.close()
