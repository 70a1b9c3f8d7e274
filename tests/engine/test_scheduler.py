"""The scheduler alone: budgets, preemption, skipping, first passes. No torch."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyadapt.adapters.adapter import Probe, Traits
from polyadapt.engine import scheduler as scheduler_module
from polyadapt.engine.pages import PageAllocator
from polyadapt.engine.prefix import PageKeys
from polyadapt.engine.request import RequestGroup, SequenceState
from polyadapt.engine.scheduler import MAX_OVERTAKEN, ScheduledRows, Scheduler
from polyadapt.types import AdapterId, AppliedAdapter, Request, SamplingParams


class FakeSlots:
    """Adapters that are in `ready` have a slot each; leases are counted."""

    def __init__(self, *ready: str) -> None:
        self.ready = list(ready)
        self.leases: Counter[int] = Counter()
        self.loading: set[str] = set()  # on their way, as against short of room
        self.neutral: set[str] = set()  # they leave keys and values as the base's
        self.special: dict[str, Traits] = {}
        self.heavy: set[str] = set()
        self.asked: list[str] = []
        self.found: tuple[int, ...] = ()
        self.num_leased = 0  # slots, of all times

    def find(self, adapters: tuple[AppliedAdapter, ...]) -> tuple[int, ...] | None:
        digests = [applied.adapter.digest for applied in adapters]
        self.asked += digests
        if any(digest not in self.ready for digest in digests):
            return None
        self.found = tuple(self.ready.index(digest) for digest in digests)
        return self.found

    def lease(self, slots: tuple[int, ...]) -> None:
        assert set(slots) <= set(self.found), "only of what was just found"
        self.leases.update(slots)
        self.num_leased += len(slots)

    def is_hopeless(self, adapters: tuple[AppliedAdapter, ...]) -> bool:
        return False

    def is_short_of_room(self, adapters: tuple[AppliedAdapter, ...]) -> bool:
        digests = {applied.adapter.digest for applied in adapters}
        return bool(digests - set(self.ready) - self.loading)

    def traits(self, slot: int) -> Traits:
        assert self.leases[slot] or slot in self.found
        digest = self.ready[slot]
        if digest in self.neutral:
            return Traits(is_kv_neutral=True)
        return self.special.get(digest, Traits())

    def is_heavy(self, slot: int) -> bool:
        assert self.leases[slot] or slot in self.found
        return self.ready[slot] in self.heavy

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
    has_prefix_cache: bool = False,
    **options: int,
) -> Scheduler:
    keys = PageKeys(base_digest="sha256:base", kv_dtype="float32", page_size=page_size)
    return Scheduler(
        PageAllocator(num_pages, page_size),
        slots or FakeSlots(),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        counters=Counter(),
        page_keys=keys if has_prefix_cache else None,
        **options,
    )


def new_group(
    name: str,
    num_prompt: int,
    adapter: str | None = None,
    n: int = 1,
    *,
    priority: int = 0,
    speculative_tokens: int | None = None,
) -> RequestGroup:
    adapters = (AppliedAdapter(AdapterId(adapter, 1, adapter)),) if adapter else ()
    request = Request(
        name,
        tuple(range(num_prompt)),
        SamplingParams(100),
        adapters,
        n,
        priority=priority,
        speculative_tokens=speculative_tokens,
    )
    return RequestGroup.of(request, 0.0)


def run_step(scheduler: Scheduler) -> dict[str, int]:
    """Schedule, pretend to compute, append a token where a sequence is complete."""
    batch = scheduler.schedule()
    scheduler.check_integrity()
    for rows in batch:
        is_last = rows.is_last_chunk
        rows.sequence.num_computed += rows.num_tokens
        if is_last and rows.sequence.main is None:
            rows.sequence.token_ids.append(0)
    return _by_request(batch)


def _by_request(batch: list[ScheduledRows]) -> dict[str, int]:
    """Rows of each request, of its first pass as well."""
    found: Counter[str] = Counter()
    for rows in batch:
        found[rows.sequence.group.request.id] += rows.num_tokens
    return dict(found)


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
    assert run_step(scheduler) == {"long": 10, "short": 2}
    scheduler.max_num_batched_tokens = 24
    assert run_step(scheduler) == {"short": 1, "long": 22}
    scheduler.add(new_group("other", 30))
    scheduler.max_num_batched_tokens = 8
    batch = scheduler.schedule()
    assert [rows.num_tokens for rows in batch] == [1, 1, 6]


def test_a_costly_token_takes_as_many_of_the_budget():
    slots = FakeSlots("dear")
    slots.special["dear"] = Traits(token_cost=4)
    scheduler = new_scheduler(slots, max_num_batched_tokens=20)
    scheduler.add(new_group("dear", 6, "dear"))
    scheduler.add(new_group("cheap", 6))
    # Of five dear tokens half are the first prompt's; what others leave of the rest comes back.
    assert run_step(scheduler) == {"dear": 3, "cheap": 6}
    assert run_step(scheduler) == {"dear": 3, "cheap": 1}
    assert run_step(scheduler) == {"dear": 1, "cheap": 1}


def test_as_many_run_as_could_have_a_token_in_every_step():
    slots = FakeSlots("dear")
    slots.special["dear"] = Traits(token_cost=4)
    scheduler = new_scheduler(slots, max_num_batched_tokens=10)
    for name in "abc":
        scheduler.add(new_group(name, 1, "dear"))
    scheduler.add(new_group("cheap", 1))
    assert run_step(scheduler) == {"a": 1, "b": 1}
    assert run_step(scheduler) == {"a": 1, "b": 1}
    assert slots.leases[0] == 2
    scheduler.finish(scheduler.running[0])
    assert run_step(scheduler) == {"b": 1, "c": 1, "cheap": 1}


def test_a_token_that_costs_more_than_a_step_has_a_step_of_its_own():
    slots = FakeSlots("dear")
    slots.special["dear"] = Traits(token_cost=100)
    scheduler = new_scheduler(slots, max_num_batched_tokens=8)
    scheduler.add(new_group("dear", 3, "dear"))
    scheduler.add(new_group("next", 2))
    for _ in range(3):
        assert run_step(scheduler) == {"dear": 1}
    scheduler.finish(scheduler.running[0])
    assert run_step(scheduler) == {"next": 2}


def test_a_costly_adapter_at_scale_zero_costs_nothing():
    slots = FakeSlots("dear")
    slots.special["dear"] = Traits(token_cost=4)
    scheduler = new_scheduler(slots, max_num_batched_tokens=10)
    group = new_group("dear", 8, "dear")
    zero = replace(group.request, adapters=(replace(group.request.adapters[0], scale=0.0),))
    scheduler.add(RequestGroup.of(zero, 0.0))
    assert run_step(scheduler) == {"dear": 8}


def test_drafts_cost_what_their_tokens_cost():
    slots = FakeSlots("dear")
    slots.special["dear"] = Traits(token_cost=4)
    scheduler = new_scheduler(slots, max_num_batched_tokens=14, speculative_tokens=8)
    _decoding(scheduler, 1, 8, adapter="dear")
    (rows,) = scheduler.schedule()
    assert len(rows.drafts) == 2


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
    for number in range(MAX_OVERTAKEN):
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
    for number in range(2 * MAX_OVERTAKEN):
        scheduler.add(new_group(f"base{number}", 3))
        assert set(run_step(scheduler)) == {f"base{number}"}
        scheduler.finish(scheduler.running[-1])
    crowded = new_scheduler(FakeSlots())
    crowded.add(new_group("many", 3, "no-room", n=MAX_OVERTAKEN + 6))
    for name in "ab":
        crowded.add(new_group(name, 3))
        assert name in run_step(crowded), "an admission counts once for a request"


# --------------------------------------------------------------------------- heavy adapters
def heavy_scheduler(limit: int, **options: int) -> tuple[FakeSlots, Scheduler]:
    slots = FakeSlots("h1", "h2", "h3", "light")
    slots.heavy = {"h1", "h2", "h3"}
    return slots, new_scheduler(slots, max_heavy_adapters=limit, **options)


def test_a_heavy_adapter_beyond_the_limit_is_passed_over_until_another_one_ends():
    slots, scheduler = heavy_scheduler(2)
    groups = {name: new_group(name, 3, name) for name in ("h1", "h2", "h3", "light")}
    for group in groups.values():
        scheduler.add(group)
    assert set(run_step(scheduler)) == {"h1", "h2", "light"}
    assert set(run_step(scheduler)) == {"h1", "h2", "light"}
    assert slots.num_leased == 3, "whoever waits has no lease, and had none"
    assert scheduler.counters["heavy_waits"] == 1, "a request that waits counts once"
    scheduler.finish(groups["h1"].sequences[0])
    assert set(run_step(scheduler)) == {"h2", "h3", "light"}


def test_more_sequences_of_a_running_heavy_adapter_cost_nothing_more():
    _, scheduler = heavy_scheduler(1)
    for number in range(3):
        scheduler.add(new_group(str(number), 3, "h1", n=2))
    assert len(scheduler.schedule()) == 6
    for sequence in list(scheduler.running)[:5]:
        scheduler.finish(sequence)
    scheduler.add(new_group("other", 3, "h2"))
    assert set(run_step(scheduler)) == {"2"}, "one sequence of it still runs"


def test_a_request_that_waits_for_heavy_ones_to_end_is_overtaken_no_more_often_than_others():
    _, scheduler = heavy_scheduler(1)
    scheduler.add(new_group("first", 3, "h1"))
    run_step(scheduler)
    scheduler.add(new_group("waits", 3, "h2"))
    for number in range(MAX_OVERTAKEN):
        scheduler.add(new_group(f"h1-{number}", 3, "h1"))
        assert f"h1-{number}" in run_step(scheduler)
        scheduler.finish(scheduler.running[-2])
    scheduler.add(new_group("late", 3, "h1"))
    assert "late" not in run_step(scheduler)
    scheduler.finish(scheduler.running[0])
    assert set(run_step(scheduler)) == {"waits"}, "and h1 waits in its turn"


def test_a_request_heavier_than_any_step_is_refused_and_one_of_the_limit_waits():
    slots, scheduler = heavy_scheduler(2)
    running = new_group("running", 3, "h3")
    scheduler.add(running)
    run_step(scheduler)
    names = {"three": ("h1", "h2", "h3"), "two": ("h1", "h2", "light")}
    groups = {}
    for name, digests in names.items():
        adapters = tuple(AppliedAdapter(AdapterId(d, 1, d)) for d in digests)
        request = replace(new_group(name, 3).request, adapters=adapters)
        groups[name] = RequestGroup.of(request, 0.0)
        scheduler.add(groups[name])
    assert set(run_step(scheduler)) == {"running"}
    assert scheduler.refused == [groups["three"]]
    error = groups["three"].refusal
    assert error is not None
    assert (error.code, error.param) == ("invalid_request", "adapters")
    assert "3 of the request's 3" in error.message
    assert "--max-heavy-adapters is 2" in error.message
    scheduler.finish(groups["three"].sequences[0])
    scheduler.finish(running.sequences[0])
    assert set(run_step(scheduler)) == {"two"}
    assert slots.leases[2] == 0


def test_a_request_that_its_policy_makes_too_heavy_is_told_so():
    _, scheduler = heavy_scheduler(1)
    one, other = (AppliedAdapter(AdapterId(d, 1, d)) for d in ("h1", "h2"))
    for name, adapters in (
        ("policy_conflict", (one, replace(other, is_mandatory=True))),
        ("invalid_request", (one, other)),
    ):
        group = RequestGroup.of(replace(new_group(name, 3).request, adapters=adapters), 0.0)
        scheduler.add(group)
        run_step(scheduler)
        assert group.refusal is not None
        assert (group.refusal.code, group.refusal.param) == (name, "adapters")
        assert ("'h2' is mandatory" in group.refusal.message) == (name == "policy_conflict")
        scheduler.finish(group.sequences[0])


def test_a_preempted_heavy_sequence_makes_room_for_another():
    _, scheduler = heavy_scheduler(1)
    scheduler.add(new_group("h1", 3, "h1"))
    run_step(scheduler)
    scheduler.add(new_group("h2", 3, "h2", priority=-1))
    assert set(run_step(scheduler)) == {"h1"}
    scheduler._preempt(scheduler.running[0])
    assert set(run_step(scheduler)) == {"h2"}, "its priority counts now"
    scheduler.check_integrity()


# --------------------------------------------------------------------------- priority
def test_a_lower_priority_value_is_admitted_earlier_and_equals_by_arrival():
    scheduler = new_scheduler(max_num_seqs=1)
    for name, priority in (("late", 5), ("plain", 0), ("urgent", -5), ("urgent2", -5)):
        scheduler.add(new_group(name, 3, priority=priority))
    served = []
    while scheduler.has_work:
        served += run_step(scheduler)
        scheduler.finish(scheduler.running[0])
    assert served == ["urgent", "urgent2", "plain", "late"]


def test_the_last_priority_is_preempted_first_however_old_it_is():
    scheduler = new_scheduler(num_pages=12, page_size=2)
    groups = [new_group("low", 3, priority=1), new_group("a", 3), new_group("b", 3)]
    for group in groups:
        scheduler.add(group)
        run_step(scheduler)
    while not scheduler.counters["preemptions"]:
        run_step(scheduler)
    assert [group.sequences[0].state for group in groups] == [
        SequenceState.WAITING,
        SequenceState.RUNNING,
        SequenceState.RUNNING,
    ]
    while scheduler.counters["preemptions"] < 2:
        run_step(scheduler)
    assert [s.group.request.id for s in scheduler.running] == ["a"], "then the youngest"
    assert [s.group.request.id for s in scheduler.waiting] == ["b", "low"]


def test_a_request_that_was_overtaken_often_goes_first_and_keeps_its_pages():
    scheduler = new_scheduler(max_num_seqs=1, num_pages=8, page_size=2)
    low = new_group("low", 3, priority=100)
    scheduler.add(new_group("first", 3))
    run_step(scheduler)
    scheduler.add(low)
    for number in range(MAX_OVERTAKEN):
        scheduler.add(new_group(f"urgent{number}", 3, priority=-100))
        scheduler.finish(scheduler.running[0])
        assert set(run_step(scheduler)) == {f"urgent{number}"}
    scheduler.add(new_group("urgent", 3, priority=-100))
    scheduler.finish(scheduler.running[0])
    scheduler.max_num_seqs = 2
    assert set(run_step(scheduler)) == {"low", "urgent"}
    assert scheduler.counters["overdue_requests"] == 1
    while not scheduler.counters["preemptions"]:
        run_step(scheduler)
    assert low.sequences[0].state is SequenceState.RUNNING


def test_pages_lost_to_later_requests_count_as_being_overtaken():
    scheduler = new_scheduler(num_pages=6, page_size=2)
    low = new_group("low", 3, priority=1)
    scheduler.add(low)
    run_step(scheduler)
    scheduler.add(new_group("urgent", 3))
    while not scheduler.counters["preemptions"]:
        run_step(scheduler)
    assert low.num_overtaken == 1


# --------------------------------------------------------------------------- prompts share a step
def test_a_long_prompt_leaves_tokens_to_those_behind_it_and_takes_what_they_leave():
    scheduler = new_scheduler(max_num_batched_tokens=16, num_pages=200)
    scheduler.add(new_group("long", 100))
    assert run_step(scheduler) == {"long": 16}
    scheduler.add(new_group("short", 3))
    assert run_step(scheduler) == {"long": 13, "short": 3}
    scheduler.add(new_group("longer", 200))
    scheduler.add(new_group("other", 3))
    assert run_step(scheduler) == {"short": 1, "long": 8, "longer": 4, "other": 3}
    assert run_step(scheduler) == {"short": 1, "other": 1, "long": 10, "longer": 4}


def test_a_stream_of_short_urgent_prompts_leaves_half_of_the_tokens_to_a_long_one():
    scheduler = new_scheduler(max_num_batched_tokens=16, num_pages=200)
    long = new_group("long", 160, priority=100)
    scheduler.add(long)
    assert run_step(scheduler) == {"long": 16}
    gets: list[int] = []
    while not long.is_done:
        for extra in "abc":
            scheduler.add(new_group(f"{extra}{len(gets)}", 8, priority=-100))
        gets.append(run_step(scheduler)["long"])
        for sequence in list(scheduler.running):
            if sequence.num_output:
                scheduler.finish(sequence)
    assert gets == [8] * 16 + [16], "and the last ones as it fits into a step"


def test_the_prompt_admitted_first_has_half_and_the_others_follow_by_rank():
    scheduler = new_scheduler(max_num_batched_tokens=16, num_pages=200)
    for name, priority in (("first", 1), ("plain", 0), ("urgent", -1)):
        scheduler.add(new_group(name, 200, priority=priority))
        run_step(scheduler)
    assert run_step(scheduler) == {"first": 10, "urgent": 4, "plain": 2}


# --------------------------------------------------------------------------- speculation
def _decoding(scheduler: Scheduler, num_groups: int, num_prompt: int, **options: int) -> None:
    """Bring groups whose text repeats to their first decode row; their guesses have full length."""
    for number in range(num_groups):
        group = new_group(str(number), num_prompt, **options)
        group.sequences[0].token_ids = [1, 2] * (num_prompt // 2)
        group.request = replace(group.request, prompt_ids=tuple(group.sequences[0].token_ids))
        scheduler.add(group)
    while any(not s.num_output for s in scheduler.running) or scheduler.waiting:
        for rows in scheduler.schedule():
            rows.sequence.num_computed += rows.num_tokens
            if rows.sequence.num_pending == 0:
                rows.sequence.token_ids.append(1)
    for sequence in scheduler.running:
        lookup = scheduler._lookup(sequence)
        for _ in range(4):
            lookup.observe(1, 1)


def test_drafts_are_more_rows_of_a_decode_row():
    scheduler = new_scheduler(speculative_tokens=4)
    _decoding(scheduler, 1, 8)
    (rows,) = scheduler.schedule()
    scheduler.check_integrity()
    assert (rows.num_tokens, rows.drafts) == (5, (2, 1, 2, 1))
    assert rows.is_last_chunk
    assert len(rows.sequence.pages) * 4 >= 9 + 4
    assert len(rows.sequence.token_ids) == 9, "a guess is not part of the sequence"


def test_a_request_chooses_its_own_number_of_drafts():
    for default, asked, expected in ((4, 0, 0), (0, 3, 3), (4, 2, 2), (0, None, 0)):
        scheduler = new_scheduler(speculative_tokens=default)
        _decoding(scheduler, 1, 8, speculative_tokens=asked)
        (rows,) = scheduler.schedule()
        assert len(rows.drafts) == expected


def test_only_the_end_of_a_long_prompt_is_indexed_for_drafts():
    scheduler = new_scheduler(speculative_tokens=4, num_pages=2000, max_num_batched_tokens=6000)
    scheduler.add(new_group("long", 5000))
    run_step(scheduler)
    (rows,) = scheduler.schedule()
    index = rows.sequence.group.prompt_ngrams
    assert index is not None
    assert index.find((4000, 4001)) == 4002
    assert index.find((100, 101)) is None


def test_a_large_batch_drafts_less_and_then_not_at_all():
    for num_groups, expected in ((2, 32), (16, 32), (24, 32), (31, 32), (32, 32), (40, 40)):
        scheduler = new_scheduler(
            speculative_tokens=16, max_num_seqs=64, num_pages=999, max_num_batched_tokens=512
        )
        _decoding(scheduler, num_groups, 8)
        assert sum(rows.num_tokens for rows in scheduler.schedule()) == expected


def test_drafts_take_only_tokens_that_prompts_leave():
    scheduler = new_scheduler(speculative_tokens=8, max_num_batched_tokens=16)
    _decoding(scheduler, 1, 8)
    scheduler.add(new_group("prompt", 12))
    decode, prompt = sorted(scheduler.schedule(), key=lambda rows: rows.sequence.group.order)
    assert (decode.num_tokens, len(decode.drafts), prompt.num_tokens) == (4, 3, 12)


def test_drafts_take_no_page_that_another_sequence_is_about_to_need():
    scheduler = new_scheduler(speculative_tokens=8, num_pages=6, page_size=4)
    _decoding(scheduler, 2, 8)
    assert [len(s.pages) for s in scheduler.running] == [2, 2]
    batch = scheduler.schedule()
    scheduler.check_integrity()
    assert [rows.num_tokens for rows in batch] == [4, 4], "as much as the page has that each needs"
    assert scheduler.counters["preemptions"] == 0


def test_no_draft_reaches_the_end_of_the_output_or_of_the_context():
    scheduler = new_scheduler(speculative_tokens=8, max_model_len=12)
    _decoding(scheduler, 1, 8)
    (rows,) = scheduler.schedule()
    assert len(rows.sequence.token_ids) + len(rows.drafts) == 11
    scheduler = new_scheduler(speculative_tokens=8)
    _decoding(scheduler, 1, 8)
    (sequence,) = scheduler.running
    short = replace(sequence.group.request, sampling=SamplingParams(3))
    sequence.group.request = short
    (rows,) = scheduler.schedule()
    assert len(rows.drafts) == 1


# --------------------------------------------------------------------------- preemption
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


# --------------------------------------------------------------------------- the prefix cache
class Memory:
    """What every KV slot holds: who computed it, and the tokens up to there."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.slots: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}
        self.num_rows: Counter[str] = Counter()  # computed, by request

    def step(self) -> dict[str, int]:
        """Schedule and compute; every row must find what its own sequence alone would have."""
        size = self.scheduler.pages.page_size
        batch = self.scheduler.schedule()
        self.scheduler.check_integrity()
        for rows in batch:
            scout = rows.sequence.scout
            assert scout is None or scout.is_complete or self._end(rows) <= scout.num_computed
            for at in range(rows.sequence.num_computed, self._end(rows)):
                self.slots[rows.sequence.pages[at // size], at % size] = self._own(rows, at)
        for rows in batch:
            for at in range(self._end(rows)):
                found = self.slots[rows.sequence.pages[at // size], at % size]
                assert found == self._own(rows, at)
        for rows in batch:
            is_last = rows.is_last_chunk
            rows.sequence.num_computed += rows.num_tokens
            if is_last and rows.sequence.main is None:
                rows.sequence.token_ids.append(7)
            self.num_rows[rows.sequence.group.request.id] += rows.num_tokens
        self.scheduler.check_integrity()
        return _by_request(batch)

    @staticmethod
    def _end(rows: ScheduledRows) -> int:
        return rows.sequence.num_computed + rows.num_tokens

    @staticmethod
    def _own(rows: ScheduledRows, at: int) -> tuple[str, tuple[int, ...]]:
        sequence = rows.sequence
        who = sequence.lanes[0].applied.adapter.digest if sequence.lanes else "base"
        for lane in sequence.lanes:
            if lane.probing is not None and at >= lane.probing.frozen_from:
                who += f" frozen at {lane.probing.frozen_from}"
            who += " at rest" if lane.is_resting else ""
            who += str(lane.options)
        return who, tuple(sequence.token_ids[: at + 1])


def _finish_all(scheduler: Scheduler) -> None:
    for sequence in [*scheduler.running, *scheduler.waiting]:
        scheduler.finish(sequence)


def test_a_prompt_that_was_computed_before_runs_only_behind_its_full_pages():
    scheduler = new_scheduler(FakeSlots("x", "y"), has_prefix_cache=True)
    memory = Memory(scheduler)
    for name, adapter in (("first", "x"), ("again", "x"), ("other", "y"), ("base", None)):
        scheduler.add(new_group(name, 11, adapter))
        memory.step()
        _finish_all(scheduler)
    assert memory.num_rows == {"first": 11, "again": 3, "other": 11, "base": 11}
    assert scheduler.counters["prefix_query_tokens"] == 44
    assert scheduler.counters["prefix_hit_tokens"] == 8


def test_the_newest_token_always_runs_and_never_into_a_shared_page():
    scheduler = new_scheduler(has_prefix_cache=True)
    memory = Memory(scheduler)
    for name in ("first", "again"):
        scheduler.add(new_group(name, 8))
        memory.step()
    assert memory.num_rows == {"first": 9, "again": 4}


def test_what_was_generated_is_found_by_the_next_turn():
    scheduler = new_scheduler(has_prefix_cache=True)
    memory = Memory(scheduler)
    first = new_group("first", 6)
    scheduler.add(first)
    for _ in range(7):
        memory.step()
    (sequence,) = first.sequences
    request = Request("turn", (*sequence.token_ids, 5, 5), SamplingParams(9))
    scheduler.finish(sequence)
    assert len(request.prompt_ids) == 15
    scheduler.add(RequestGroup.of(request, 0.0))
    assert memory.step() == {"turn": 3}


def test_a_neutral_adapter_and_scale_zero_share_with_the_base():
    slots = FakeSlots("x", "n")
    slots.neutral.add("n")
    scheduler = new_scheduler(slots, has_prefix_cache=True)
    scheduler.add(new_group("base", 9))
    run_step(scheduler)
    scheduler.add(new_group("neutral", 9, "n"))
    zero = new_group("zero", 9, "x").request
    zero = replace(zero, adapters=(replace(zero.adapters[0], scale=0.0),))
    scheduler.add(RequestGroup.of(zero, 0.0))
    scheduler.add(new_group("x", 9, "x"))
    assert run_step(scheduler) == {"base": 1, "neutral": 1, "zero": 1, "x": 9}


def test_samples_of_one_prompt_wait_for_nobody_and_use_what_the_first_has_computed():
    scheduler = new_scheduler(max_num_batched_tokens=40, has_prefix_cache=True)
    memory = Memory(scheduler)
    scheduler.add(new_group("many", 33, n=4))
    memory.step()
    assert memory.num_rows["many"] == 40, "the second sample began beside the first"
    memory.step()
    assert memory.num_rows["many"] == 40 + 4, "one row each: the rest was there"
    assert scheduler.pages.num_used == 8 + 4


def test_equal_prompts_of_one_step_end_up_on_the_same_pages():
    scheduler = new_scheduler(has_prefix_cache=True)
    memory = Memory(scheduler)
    for name in ("one", "two"):
        scheduler.add(new_group(name, 9))
    memory.step()
    assert scheduler.pages.num_used == 6
    memory.step()
    assert scheduler.pages.num_used == 4


def test_only_what_was_computed_is_found():
    """A step that failed, or was accepted in part, leaves num_computed where it stands."""
    scheduler = new_scheduler(has_prefix_cache=True)
    broken = new_group("broken", 12)
    scheduler.add(broken)
    scheduler.schedule()
    broken.sequences[0].num_computed = 7  # of 12 rows
    scheduler.finish(broken.sequences[0])
    scheduler.add(new_group("next", 12))
    assert run_step(scheduler) == {"next": 8}


def test_what_is_distrusted_is_found_no_more():
    scheduler = new_scheduler(has_prefix_cache=True)
    first, second = new_group("first", 9), new_group("second", 9)
    scheduler.add(first)
    run_step(scheduler)
    scheduler.add(second)
    assert run_step(scheduler) == {"first": 1, "second": 1}
    scheduler.distrust(second)
    scheduler.finish(second.sequences[0])
    scheduler.check_integrity()
    scheduler.add(new_group("third", 9))
    assert run_step(scheduler) == {"first": 1, "third": 9}


def test_a_prompt_whose_logprobs_are_wanted_runs_whole_and_is_found_by_others():
    scheduler = new_scheduler(has_prefix_cache=True)
    for name in ("first", "second"):
        request = new_group(name, 9).request
        scored = replace(request, sampling=replace(request.sampling, num_prompt_logprobs=0))
        scheduler.add(RequestGroup.of(scored, 0.0))
        assert run_step(scheduler)[name] == 9
    scheduler.add(new_group("third", 9))
    assert run_step(scheduler)["third"] == 1


def test_a_preempted_sequence_finds_its_pages_again():
    scheduler = new_scheduler(has_prefix_cache=True)
    memory = Memory(scheduler)
    group = new_group("r", 10)
    scheduler.add(group)
    for _ in range(4):
        memory.step()
    scheduler._preempt(group.sequences[0])
    scheduler.check_integrity()
    assert memory.step() == {"r": 2}


def test_a_request_that_finds_its_prefix_but_no_room_leaves_it_cached():
    scheduler = new_scheduler(num_pages=6, page_size=4, has_prefix_cache=True)
    memory = Memory(scheduler)
    scheduler.add(new_group("first", 9))
    memory.step()
    _finish_all(scheduler)
    big = new_group("big", 14)
    big.sequences[0].token_ids[0] = 99  # begins otherwise
    scheduler.add(big)
    scheduler.add(new_group("again", 12))
    assert memory.step() == {"big": 14}
    assert scheduler.pages.num_cached == 2
    assert scheduler.counters["prefix_hit_tokens"] == 0
    scheduler.finish(big.sequences[0])
    assert memory.step() == {"again": 4}


def test_both_passes_find_and_leave_pages_each_its_own():
    scheduler = new_scheduler(_probing(), has_prefix_cache=True)
    memory = Memory(scheduler)
    scheduler.add(new_group("first", 9, "x"))
    assert [memory.step(), memory.step()] == [{"first": 9}, {"first": 9}]
    _finish_all(scheduler)
    assert scheduler.pages.num_cached == 4, "two of each pass"
    scheduler.add(new_group("again", 9, "x"))
    assert [memory.step(), memory.step()] == [{"again": 1}, {"again": 1}]
    _finish_all(scheduler)
    scheduler.add(new_group("base", 9))
    assert memory.step() == {"base": 1}
    assert scheduler.counters["prefix_query_tokens"] == 27, "a request counts once"
    assert scheduler.counters["prefix_hit_tokens"] == 16


# Adapters and options: none, an ordinary one, and two passes, of which one may end early. Below,
# prompts may go on with sevens, which is what is generated.
USES = [(None, ()), ("y", ()), ("x", ()), ("x", (("frozen_after", 2),)), ("x", (("top_k", 1),))]


@settings(max_examples=100, deadline=None)
@given(
    prompts=st.lists(
        st.tuples(
            st.sampled_from([0, 1, 7]), st.integers(1, 24), st.sampled_from(USES), st.integers(1, 3)
        ),
        min_size=2,
        max_size=12,
    ),
    num_pages=st.integers(10, 40),
    budget=st.integers(1, 40),
    outputs=st.integers(1, 10),
    cancelled=st.sets(st.integers(0, 30)),
)
def test_no_row_ever_reads_what_another_prefix_wrote(
    prompts, num_pages, budget, outputs, cancelled
):
    slots = _probing()
    scheduler = new_scheduler(
        slots, num_pages=num_pages, max_num_batched_tokens=budget, has_prefix_cache=True
    )
    memory = Memory(scheduler)
    for number, (branch, length, (adapter, options), n) in enumerate(prompts):
        tokens = tuple(at if at < 9 else branch for at in range(length))
        request = new_group(str(number), 1, adapter, n).request
        uses = tuple(replace(use, options=options) for use in request.adapters)
        request = replace(
            request, prompt_ids=tokens, adapters=uses, sampling=SamplingParams(outputs)
        )
        scheduler.add(RequestGroup.of(request, 0.0))
    for step in range(5000):
        if not scheduler.has_work:
            break
        assert sum(memory.step().values()) <= scheduler.max_num_batched_tokens
        for group in scheduler.refused:
            assert group.is_probed, "only two passes may need more than there is"
            for sequence in group.sequences:
                scheduler.finish(sequence)
        scheduler.refused.clear()
        if step in cancelled and scheduler.running:
            scheduler.finish(scheduler.running[-1])
        for sequence in list(scheduler.running):
            if sequence.num_output >= outputs:
                scheduler.finish(sequence)
    assert not scheduler.has_work
    assert scheduler.pages.num_used == 0
    assert slots.leases.total() == 0


# --------------------------------------------------------------------------- first passes
def _probing(**probe: float) -> FakeSlots:
    """The adapter x, whose experts a first pass weighs, and y, which has none."""
    slots = FakeSlots("x", "y")
    made = Probe((4, 6), 2, **probe)
    slots.special["x"] = Traits(options=made.options, probe=made)
    return slots


def _frozen(name: str, num_prompt: int, after: int) -> RequestGroup:
    group = new_group(name, num_prompt, "x")
    (use,) = group.adapters
    adapters = (replace(use, options=(("frozen_after", after),)),)
    return RequestGroup.of(replace(group.request, adapters=adapters), 0.0)


def test_a_request_is_two_sequences_only_where_its_adapter_needs_it():
    scheduler = new_scheduler(_probing())
    for name, adapter in (("base", None), ("plain", "y"), ("weighed", "x")):
        scheduler.add(new_group(name, 3, adapter))
    run_step(scheduler)
    assert [(s.group.request.id, s.main is not None) for s in scheduler.running] == [
        ("base", False), ("plain", False), ("weighed", False), ("weighed", True)
    ]  # fmt: skip


def test_the_main_runs_what_its_scout_has_run_before_the_step():
    scheduler = new_scheduler(_probing(), max_num_batched_tokens=8)
    scheduler.add(new_group("r", 12, "x"))
    found = []
    for _ in range(9):
        batch = scheduler.schedule()
        scheduler.check_integrity()
        found.append({("scout" if rows.sequence.main else "main"): rows.num_tokens
                      for rows in batch})  # fmt: skip
        for rows in batch:
            is_last = rows.is_last_chunk
            rows.sequence.num_computed += rows.num_tokens
            if is_last and rows.sequence.main is None:
                rows.sequence.token_ids.append(0)
    # The main comes first, so that what its scout has found need not be kept for a whole prompt.
    assert found[:3] == [{"scout": 8}, {"main": 8}, {"scout": 4}]
    assert found[3:] == [{"main": 4}, *[{"scout": 1}, {"main": 1}] * 3][:6]


def test_both_sequences_are_admitted_or_none():
    scheduler = new_scheduler(_probing(), max_num_seqs=2)
    scheduler.add(new_group("single", 3))
    group = new_group("coupled", 3, "x")
    scheduler.add(group)
    assert run_step(scheduler) == {"single": 3}
    (leader,) = group.sequences
    assert [s.state for s in leader.unit] == [SequenceState.WAITING] * 2
    scheduler.finish(scheduler.running[0])
    assert run_step(scheduler) == {"coupled": 3}
    assert {s.state for s in leader.unit} == {SequenceState.RUNNING}


def test_others_are_admitted_while_one_of_both_waits_for_the_other():
    scheduler = new_scheduler(_probing())
    scheduler.add(new_group("coupled", 3, "x"))
    run_step(scheduler)
    for name in "abc":
        scheduler.add(new_group(name, 2))
        assert name in run_step(scheduler)


def test_both_sequences_are_preempted_and_cancelled_together():
    slots = _probing()
    scheduler = new_scheduler(slots, num_pages=12, page_size=2)
    scheduler.add(new_group("old", 3))
    group = RequestGroup.of(replace(new_group("coupled", 3, "x").request,
                                    sampling=SamplingParams(5)), 0.0)  # fmt: skip
    scheduler.add(group)
    run_step(scheduler)
    assert slots.leases[0] == 1, "its scout runs without the adapter"
    while scheduler.counters["preemptions"] == 0:
        run_step(scheduler)
    (leader,) = group.sequences
    assert [s.state for s in leader.unit] == [SequenceState.WAITING] * 2
    assert slots.leases.total() == 0
    assert list(scheduler.waiting) == [leader], "the leader stands for both"
    scheduler.finish(leader)
    assert {s.state for s in leader.unit} == {SequenceState.DONE}
    assert not scheduler.waiting


@pytest.mark.parametrize(("num_pages", "max_num_seqs"), [(16, 1), (15, 8)])
def test_what_could_never_run_to_its_end_is_refused(num_pages, max_num_seqs):
    scheduler = new_scheduler(_probing(), num_pages=num_pages, max_num_seqs=max_num_seqs)
    request = replace(new_group("r", 12, "x").request, sampling=SamplingParams(20))
    for name in ("r", "frozen"):
        scheduler.add(RequestGroup.of(replace(request, id=name), 0.0))
    scheduler.add(new_group("y", 12, "y"))
    assert run_step(scheduler) == {"y": 12}
    assert [group.request.id for group in scheduler.refused] == ["r", "frozen"]


def test_a_short_first_pass_takes_less_room():
    scheduler = new_scheduler(_probing(), num_pages=12)
    for name in ("a", "b"):
        request = replace(_frozen(name, 12, 2).request, sampling=SamplingParams(20))
        scheduler.add(RequestGroup.of(request, 0.0))
    run_step(scheduler)
    assert not scheduler.refused


def test_a_scout_leaves_when_it_has_nothing_left_to_run_and_comes_back_with_its_main():
    scheduler = new_scheduler(_probing(), page_size=2, num_pages=64)
    group = _frozen("r", 5, 1)
    scheduler.add(group)
    steps = [sum(run_step(scheduler).values()) for _ in range(8)]
    assert steps == [5, 5, 1, 1, 1, 1, 1, 1]
    (leader,) = group.sequences
    assert leader.scout is not None
    assert leader.scout.state is SequenceState.DONE
    assert scheduler.running == [leader]
    assert leader.num_output == 6
    scheduler._preempt(leader)
    assert [s.state for s in leader.unit] == [SequenceState.WAITING] * 2
    assert run_step(scheduler) == {"r": 6}, "its scout runs to the horizon again"
    assert run_step(scheduler) == {"r": 11}


def test_a_scout_that_rests_holds_a_lease_of_its_own():
    slots = _probing(resting=0.5)
    scheduler = new_scheduler(slots)
    scheduler.add(new_group("r", 3, "x"))
    run_step(scheduler)
    assert slots.leases[0] == 2
    _finish_all(scheduler)
    assert slots.leases.total() == 0


@pytest.mark.parametrize(
    ("cost", "length", "steps"),
    [(4, 3, [3, 2, 1, 1, 1]), (100, 3, [3, 1, 1, 1, 1, 1]), (100, 10, [9, 2, 1, 1])],
)
def test_a_costly_adapter_is_not_in_its_first_pass(cost, length, steps):
    """The scout's tokens are the base's; however dear its main's are, both get one in a step."""
    slots = _probing()
    slots.special["x"] = replace(slots.special["x"], token_cost=cost)
    scheduler = new_scheduler(slots, max_num_batched_tokens=9)
    scheduler.add(new_group("r", length, "x"))
    assert [run_step(scheduler)["r"] for _ in steps] == steps


# --------------------------------------------------------------------------- properties
@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    num_pages=st.integers(12, 40),
    budget=st.integers(1, 40),
    max_num_seqs=st.integers(1, 6),
    outputs=st.integers(1, 10),
    cost=st.integers(1, 9),
)
def test_every_request_ends_whatever_the_budgets(
    lengths, num_pages, budget, max_num_seqs, outputs, cost
):
    """No request starves or deadlocks as long as each alone fits into the pages."""
    slots = _probing()
    slots.special["y"] = Traits(token_cost=cost)
    slots.special["x"] = replace(slots.special["x"], token_cost=cost)
    scheduler = new_scheduler(
        slots,
        num_pages=num_pages,
        page_size=4,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
    )
    for number, length in enumerate(lengths):
        request = new_group(str(number), length, (None, "y", "x")[number % 3]).request
        request = replace(request, sampling=SamplingParams(outputs))
        scheduler.add(RequestGroup.of(request, 0.0))
    ended: list[str] = []
    for _ in range(5000):
        if not scheduler.has_work:
            break
        most = scheduler.max_num_batched_tokens
        taken = [
            num_tokens * (min(cost, most) if int(name) % 3 == 1 else 1)
            for name, num_tokens in run_step(scheduler).items()
        ]
        assert sum(taken) <= most
        assert 0 not in taken
        for group in scheduler.refused:
            scheduler.finish(group.sequences[0])
            ended.append(group.request.id)
        scheduler.refused.clear()
        for sequence in list(scheduler.running):
            if sequence.num_output >= outputs and sequence.main is None:
                scheduler.finish(sequence)
                ended.append(sequence.group.request.id)
    assert sorted(ended) == sorted(str(number) for number in range(len(lengths)))
    assert scheduler.pages.num_used == 0
    assert slots.leases.total() == 0


class DeviceSlots:
    """A device with room for `num_slots` adapters; a load takes `load_steps` steps."""

    def __init__(self, num_slots: int, load_steps: int, heavy: frozenset[str]) -> None:
        self.num_slots, self.load_steps, self.heavy = num_slots, load_steps, heavy
        self.loaded_at: dict[str, int] = {}  # on the device or on their way
        self.leases: Counter[str] = Counter()
        self.short: set[str] = set()
        self.now = 0

    def find(self, adapters: tuple[AppliedAdapter, ...]) -> tuple[str, ...] | None:
        for digest in (applied.adapter.digest for applied in adapters):
            if digest not in self.loaded_at and not self._begin(digest):
                return None
            if self.loaded_at[digest] > self.now:
                return None
            return (digest,)
        return ()

    def lease(self, slots: tuple[str, ...]) -> None:
        self.leases.update(slots)

    def _begin(self, digest: str) -> bool:
        idle = [d for d, at in self.loaded_at.items() if not self.leases[d] and at <= self.now]
        if len(self.loaded_at) == self.num_slots:
            if not idle:
                self.short.add(digest)
                return False
            del self.loaded_at[idle[0]]
        self.short.discard(digest)
        self.loaded_at[digest] = self.now + self.load_steps
        return True

    def release(self, slots: tuple[str, ...]) -> None:
        self.leases.subtract(slots)

    def is_hopeless(self, adapters: tuple[AppliedAdapter, ...]) -> bool:
        return False

    def is_short_of_room(self, adapters: tuple[AppliedAdapter, ...]) -> bool:
        return any(applied.adapter.digest in self.short for applied in adapters)

    def traits(self, slot: str) -> Traits:
        return Traits()

    def is_heavy(self, slot: str) -> bool:
        return slot in self.heavy


@pytest.mark.parametrize("seed", range(16))
def test_nobody_waits_longer_than_a_bound(seed, monkeypatch):
    """Clients that ask again at once, of all priorities, adapters and lengths, on too small a
    machine: every request ends within the steps in which whoever may precede it can have run.
    """
    max_overtaken, max_prompt, max_output, load_steps = 6, 24, 6, 2
    monkeypatch.setattr(scheduler_module, "MAX_OVERTAKEN", max_overtaken)
    rng = random.Random(seed)
    num_clients = rng.randint(6, 12)
    max_num_seqs = rng.randint(1, 4)
    scheduler = new_scheduler(
        DeviceSlots(
            rng.randint(1, 3), load_steps, frozenset(rng.sample("abcd", rng.randint(0, 4)))
        ),
        max_heavy_adapters=rng.randint(1, 2),
        num_pages=rng.randint(8, 20),  # of 4 tokens: one request needs up to 8
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=rng.randint(max_num_seqs, 12),
        speculative_tokens=rng.choice([0, 3]),
        has_prefix_cache=rng.choice([False, True]),
    )
    priorities = [rng.choice([-5, 0, 5]) for _ in range(num_clients)]
    submitted: dict[int, int] = {}
    groups: dict[int, RequestGroup] = {}

    def ask(client: int, now: int) -> None:
        adapter = rng.choice([None, "a", "b", "c", "d"])
        length = rng.choice([1, 3, 8, max_prompt])
        groups[client] = new_group(str(client), length, adapter, priority=priorities[client])
        submitted[client] = now
        scheduler.add(groups[client])

    # One after the other with one token a step, which nothing can be slower than.
    num_before = num_clients + max_overtaken + max_num_seqs
    bound = num_before * (max_prompt + max_output + load_steps)
    longest = 0
    for client in range(num_clients):
        ask(client, 0)
    for now in range(1, 3 * bound):
        scheduler.adapters.now = now
        for rows in scheduler.schedule():
            is_last = rows.is_last_chunk
            rows.sequence.num_computed += rows.num_tokens - len(rows.drafts)
            if is_last:
                rows.sequence.token_ids.append(rng.randint(0, 3))
        scheduler.check_integrity()
        for client in range(num_clients):
            (sequence,) = groups[client].sequences
            longest = max(longest, now - submitted[client])
            if sequence.num_output >= max_output:
                scheduler.finish(sequence)
                ask(client, now)
    assert longest <= bound
