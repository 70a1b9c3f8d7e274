"""The scheduler alone: budgets, preemption, skipping, companions. No torch."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyadapt.engine.pages import PageAllocator
from polyadapt.engine.request import RequestGroup, Sequence, SequenceState
from polyadapt.engine.scheduler import MAX_SKIPS, Scheduler
from polyadapt.types import AdapterId, AppliedAdapter, Request, SamplingParams


class FakeSlots:
    """Adapters that are in `ready` have a slot each; leases are counted."""

    def __init__(self, *ready: str) -> None:
        self.ready = list(ready)
        self.leases: Counter[int] = Counter()
        self.loading: set[str] = set()  # on their way, as against short of room
        self.asked: list[str] = []

    def acquire(self, adapters: tuple[AppliedAdapter, ...]) -> tuple[int, ...] | None:
        digests = [applied.adapter.digest for applied in adapters]
        self.asked += digests
        if any(digest not in self.ready for digest in digests):
            return None
        slots = tuple(self.ready.index(digest) for digest in digests)
        self.leases.update(slots)
        return slots

    def is_short_of_room(self, adapters: tuple[AppliedAdapter, ...]) -> bool:
        digests = {applied.adapter.digest for applied in adapters}
        return bool(digests - set(self.ready) - self.loading)

    def release(self, slots: tuple[int, ...]) -> None:
        self.leases.subtract(slots)
        assert all(count >= 0 for count in self.leases.values())


def new_scheduler(
    slots: FakeSlots | None = None,
    *,
    num_pages: int = 64,
    page_size: int = 4,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
) -> Scheduler:
    return Scheduler(
        PageAllocator(num_pages, page_size),
        slots or FakeSlots(),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        counters=Counter(),
    )


def new_group(name: str, num_prompt: int, adapter: str | None = None, n: int = 1) -> RequestGroup:
    adapters = (AppliedAdapter(AdapterId(adapter, 1, adapter)),) if adapter else ()
    request = Request(name, tuple(range(num_prompt)), SamplingParams(100), adapters, n)
    return RequestGroup.of(request, 0.0)


def run_step(scheduler: Scheduler) -> dict[str, int]:
    """Schedule, pretend to compute, append a token where a sequence is complete."""
    batch = scheduler.schedule()
    scheduler.check_integrity()
    for rows in batch:
        is_last = rows.is_last_chunk
        rows.sequence.num_computed += rows.num_tokens
        if is_last:
            rows.sequence.token_ids.append(0)
    return {rows.sequence.group.request.id: rows.num_tokens for rows in batch}


def test_prompts_are_admitted_in_order_under_the_token_budget():
    scheduler = new_scheduler(max_num_batched_tokens=10)
    for name, length in (("a", 6), ("b", 6), ("c", 6)):
        scheduler.add(new_group(name, length))
    assert run_step(scheduler) == {"a": 6, "b": 4}
    assert run_step(scheduler) == {"a": 1, "b": 2, "c": 6}
    assert run_step(scheduler) == {"a": 1, "b": 1, "c": 1}


def test_decode_rows_come_before_an_older_sequences_long_prompt():
    scheduler = new_scheduler(max_num_batched_tokens=8)
    scheduler.add(new_group("long", 40))
    assert run_step(scheduler) == {"long": 8}
    scheduler.max_num_batched_tokens = 12
    scheduler.add(new_group("short", 2))
    assert run_step(scheduler) == {"long": 12}
    scheduler.max_num_batched_tokens = 24
    assert run_step(scheduler) == {"long": 20, "short": 2}
    scheduler.add(new_group("other", 30))
    scheduler.max_num_batched_tokens = 8
    batch = scheduler.schedule()
    assert [rows.num_tokens for rows in batch] == [1, 1, 6]


def test_rows_are_bounded_by_max_num_seqs():
    scheduler = new_scheduler(max_num_seqs=2)
    for name in "abc":
        scheduler.add(new_group(name, 3))
    assert set(run_step(scheduler)) == {"a", "b"}
    scheduler.finish(scheduler.running[0])
    assert set(run_step(scheduler)) == {"b", "c"}


def test_a_request_whose_adapter_is_not_ready_is_passed_over():
    slots = FakeSlots("ready")
    scheduler = new_scheduler(slots)
    scheduler.add(new_group("cold", 3, "cold"))
    scheduler.add(new_group("warm", 3, "ready"))
    assert set(run_step(scheduler)) == {"warm"}
    assert "cold" in slots.asked
    slots.ready.append("cold")
    assert set(run_step(scheduler)) == {"warm", "cold"}


def test_a_request_passed_over_too_often_holds_the_queue_until_it_is_served():
    slots = FakeSlots("hot")
    scheduler = new_scheduler(slots)
    scheduler.add(new_group("cold", 3, "cold"))
    for number in range(MAX_SKIPS):
        scheduler.add(new_group(f"hot{number}", 3, "hot"))
        assert f"hot{number}" in run_step(scheduler)
        scheduler.finish(scheduler.running[-1])
    scheduler.add(new_group("late", 3, "hot"))
    assert run_step(scheduler) == {}
    slots.ready.append("cold")
    assert set(run_step(scheduler)) == {"cold", "late"}


def test_a_slow_load_and_many_sequences_of_one_request_hold_nobody_back():
    slots = FakeSlots()
    slots.loading.add("cold")
    scheduler = new_scheduler(slots)
    scheduler.add(new_group("cold", 3, "cold"))
    for _ in range(2 * MAX_SKIPS):
        run_step(scheduler)
    scheduler.add(new_group("base", 3))
    assert set(run_step(scheduler)) == {"base"}
    crowded = new_scheduler(FakeSlots())
    crowded.add(new_group("many", 3, "no-room", n=MAX_SKIPS + 6))
    crowded.add(new_group("base", 3))
    assert set(run_step(crowded)) == {"base"}, "a round counts once for a request"


def test_the_youngest_is_preempted_when_pages_run_out_and_resumes():
    slots = FakeSlots("x")
    scheduler = new_scheduler(slots, num_pages=5, page_size=2)
    old, young = new_group("old", 3, "x"), new_group("young", 3, "x")
    scheduler.add(old)
    scheduler.add(young)
    seen = []
    for _ in range(6):
        seen.append(set(run_step(scheduler)))
    assert scheduler.counters["preemptions"] > 0
    (preempted,) = young.sequences
    assert preempted.state is SequenceState.WAITING
    assert preempted.num_computed == 0
    assert not preempted.pages
    assert slots.leases[0] == 1
    num_kept = len(preempted.token_ids)
    assert num_kept > 3, "what it had generated is kept"
    scheduler.finish(old.sequences[0])
    assert run_step(scheduler) == {"young": num_kept}, "its tokens are computed again in one chunk"


def test_finishing_frees_pages_and_leases_wherever_the_sequence_is():
    slots = FakeSlots("x")
    scheduler = new_scheduler(slots, max_num_seqs=1)
    running, waiting = new_group("running", 9, "x"), new_group("waiting", 9, "x")
    scheduler.add(running)
    scheduler.add(waiting)
    run_step(scheduler)
    scheduler.finish(waiting.sequences[0])
    scheduler.finish(running.sequences[0])
    assert not scheduler.has_work
    assert scheduler.pages.num_used == 0
    assert slots.leases[0] == 0


# --------------------------------------------------------------------------- companions
def _coupled(num_prompt: int, adapter: str | None = None) -> tuple[RequestGroup, Sequence]:
    """A group whose one sequence has a companion, as a probe pass beside its main pass has."""
    group = new_group("coupled", num_prompt, adapter)
    companion = Sequence(group, 1, list(range(num_prompt)), num_prompt, is_companion=True)
    group.sequences[0].companions = (companion,)
    group.sequences.append(companion)
    return group, companion


def test_companions_are_admitted_together_or_not_at_all():
    scheduler = new_scheduler(max_num_seqs=2)
    scheduler.add(new_group("single", 3))
    group, companion = _coupled(3)
    scheduler.add(group)
    run_step(scheduler)
    assert [s.state for s in group.sequences] == [SequenceState.WAITING] * 2
    scheduler.finish(scheduler.running[0])
    batch = scheduler.schedule()
    assert {rows.sequence for rows in batch} == {group.sequences[0], companion}


def test_companions_are_preempted_and_cancelled_together():
    slots = FakeSlots("x")
    scheduler = new_scheduler(slots, num_pages=8, page_size=2)
    scheduler.add(new_group("old", 3))
    group, companion = _coupled(3, "x")
    scheduler.add(group)
    run_step(scheduler)
    assert slots.leases[0] == 2
    while scheduler.counters["preemptions"] == 0:
        run_step(scheduler)
    assert [s.state for s in group.sequences] == [SequenceState.WAITING] * 2
    assert slots.leases[0] == 0
    assert list(scheduler.waiting) == group.sequences, "the leader leads again"
    scheduler.finish(group.sequences[0])
    assert companion.state is SequenceState.DONE
    assert not scheduler.waiting


# --------------------------------------------------------------------------- properties
@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    num_pages=st.integers(12, 40),
    budget=st.integers(1, 40),
    max_num_seqs=st.integers(1, 6),
    outputs=st.integers(1, 10),
)
def test_every_request_ends_whatever_the_budgets(lengths, num_pages, budget, max_num_seqs, outputs):
    """No request starves or deadlocks as long as each alone fits into the pages."""
    slots = FakeSlots("x")
    scheduler = new_scheduler(
        slots,
        num_pages=num_pages,
        page_size=4,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
    )
    for number, length in enumerate(lengths):
        scheduler.add(new_group(str(number), length, "x" if number % 2 else None))
    ended: list[str] = []
    for _ in range(5000):
        if not scheduler.has_work:
            break
        assert sum(run_step(scheduler).values()) <= scheduler.max_num_batched_tokens
        for sequence in list(scheduler.running):
            if sequence.num_output >= outputs:
                scheduler.finish(sequence)
                ended.append(sequence.group.request.id)
    assert sorted(ended) == sorted(str(number) for number in range(len(lengths)))
    assert scheduler.pages.num_used == 0
    assert slots.leases.total() == 0


def test_pages_refuse_to_overdraw_and_notice_a_double_owner():
    pages = PageAllocator(4, 16)
    owned: list[int] = []
    assert pages.extend(owned, 33)
    assert len(owned) == 3
    assert not pages.extend([], 17)
    assert pages.num_free == 1
    pages.check_integrity([owned])
    with pytest.raises(AssertionError, match="two owners"):
        pages.check_integrity([owned, owned[:1]])
