"""Which sequences run in the next step, under row, token, page and adapter budgets. Torch-free.

Running sequences come first, oldest first; then the waiting queue in order, skipping requests whose
adapters are not on the device yet. When pages run out the youngest running sequence is preempted:
it goes back to the head of the queue and its tokens are computed again.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from polyadapt.engine.pages import PageAllocator
from polyadapt.engine.request import RequestGroup, Sequence, SequenceState
from polyadapt.types import AppliedAdapter

# A request that was passed over this often for want of adapter room is passed over no more: nobody
# behind it is admitted until it is, so that a stream of newcomers cannot starve it.
MAX_SKIPS = 64
# Read for every row of a step: looking a member up in its Enum takes several times as long.
_RUNNING = SequenceState.RUNNING


class AdapterSlots(Protocol):
    """What the scheduler needs of the pool: leases on device slots, all of a request's or none."""

    def acquire(self, adapters: tuple[AppliedAdapter, ...]) -> tuple[int, ...] | None:
        """Lease the slots, or start bringing the adapters to the device and return None."""

    def release(self, slots: tuple[int, ...]) -> None:
        """Give one lease of each slot back."""

    def is_short_of_room(self, adapters: tuple[AppliedAdapter, ...]) -> bool:
        """Whether they wait for room on the device, and not for a read or a copy under way."""


# Not frozen, which would treble the time to make one: every row of every step is one.
@dataclass(slots=True)
class ScheduledRows:
    """num_tokens rows of one sequence, positions num_computed.. ; a decode row when it is 1."""

    sequence: Sequence
    num_tokens: int

    @property
    def is_last_chunk(self) -> bool:
        """Whether the sequence's newest token is among the rows, so that it is sampled from."""
        return self.num_tokens == self.sequence.num_pending


class Scheduler:
    """Owns the queue, the running set and the page ids."""

    def __init__(
        self,
        pages: PageAllocator,
        adapters: AdapterSlots,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        counters: Counter[str],
    ) -> None:
        self.pages = pages
        self.adapters = adapters
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max(max_num_batched_tokens, max_num_seqs)
        self.counters = counters
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest admission first

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, group: RequestGroup) -> None:
        """Queue the group's sequences."""
        self.waiting.extend(group.sequences)

    def schedule(self) -> list[ScheduledRows]:
        """Return the next step's rows, decode rows first. Pages for them are allocated."""
        picked: list[ScheduledRows] = []
        budget = self.max_num_batched_tokens
        num_before = self.counters["preemptions"]
        # Decode rows first: a long prompt must not hold back tokens that streams wait for.
        decodes = [of for of in self.running if len(of.token_ids) - of.num_computed <= 1]
        is_mixed = len(decodes) < len(self.running)
        prompts = [of for of in self.running if of.num_pending > 1] if is_mixed else []
        for sequence in [*decodes, *prompts]:
            if sequence.state is _RUNNING:
                budget -= self._continue(sequence, budget, picked)
        # Whoever was just preempted would come straight back and be preempted again.
        if len(picked) == len(self.running) and self.counters["preemptions"] == num_before:
            self._admit(budget, picked)
        picked = [rows for rows in picked if rows.sequence.state is _RUNNING]
        if is_mixed or len(picked) > len(decodes):
            picked.sort(key=lambda rows: rows.num_tokens > 1)
        return picked

    def finish(self, sequence: Sequence) -> None:
        """End the sequence and its companions wherever they are; frees pages and leases."""
        for member in sequence.unit:
            if member.state is SequenceState.RUNNING:
                self._leave(member)
            elif member.state is SequenceState.WAITING and member in self.waiting:
                self.waiting.remove(member)
            member.state = SequenceState.DONE

    def waiting_groups(self) -> Iterator[RequestGroup]:
        """The groups that have a waiting sequence, in queue order, each once."""
        seen: set[int] = set()
        for sequence in self.waiting:
            if id(sequence.group) not in seen:
                seen.add(id(sequence.group))
                yield sequence.group

    def check_integrity(self) -> None:
        """Assert the book-keeping: states, and pages owned by running sequences alone."""
        assert all(s.state is SequenceState.WAITING and not s.pages for s in self.waiting)
        assert all(s.state is SequenceState.RUNNING for s in self.running)
        self.pages.check_integrity([sequence.pages for sequence in self.running])

    def _continue(self, sequence: Sequence, budget: int, picked: list[ScheduledRows]) -> int:
        """Schedule a running sequence's next rows; returns how many tokens that takes."""
        num_tokens = min(sequence.num_pending, budget)
        if num_tokens <= 0:
            return 0
        while not self.pages.extend(sequence.pages, sequence.num_computed + num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            if sequence.state is not SequenceState.RUNNING:
                return 0
        picked.append(ScheduledRows(sequence, num_tokens))
        return num_tokens

    def _admit(self, budget: int, picked: list[ScheduledRows]) -> None:
        skipped: set[int] = set()
        # A companion is admitted by its leader and never on its own.
        for leader in [sequence for sequence in self.waiting if not sequence.is_companion]:
            unit = leader.unit
            if budget < len(unit) or len(self.running) + len(unit) > self.max_num_seqs:
                return
            slots = self.adapters.acquire(leader.group.request.adapters)
            if slots is None:
                group = leader.group
                is_short = self.adapters.is_short_of_room(group.request.adapters)
                if is_short and id(group) not in skipped:
                    skipped.add(id(group))
                    group.num_skips += 1
                if group.num_skips > MAX_SKIPS:
                    return
                continue
            share = budget // len(unit)
            counts = [min(member.num_pending, share) for member in unit]
            if not self._has_room(unit, counts):
                self.adapters.release(slots)
                return
            for member, num_tokens in zip(unit, counts, strict=True):
                self._enter(member, slots if member is leader else self._lease(member))
                self.pages.extend(member.pages, num_tokens)
                picked.append(ScheduledRows(member, num_tokens))
                budget -= num_tokens

    def _has_room(self, unit: tuple[Sequence, ...], counts: list[int]) -> bool:
        """Whether the first rows fit and every running sequence can still grow by one page."""
        needed = sum(self.pages.num_needed(count) for count in counts)
        spare = len(self.running) if self.running else 0
        return self.pages.num_free >= needed + spare

    def _lease(self, member: Sequence) -> tuple[int, ...]:
        slots = self.adapters.acquire(member.group.request.adapters)
        assert slots is not None, "the leader's lease keeps its companions' adapters on the device"
        return slots

    def _enter(self, sequence: Sequence, slots: tuple[int, ...]) -> None:
        self.waiting.remove(sequence)
        sequence.slots = slots
        sequence.state = SequenceState.RUNNING
        sequence.group.num_skips = 0
        self.running.append(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pages.release(sequence.pages)
        self.adapters.release(sequence.slots)
        sequence.slots = ()
        sequence.num_computed = 0
        if not sequence.is_scored:  # it starts over, and so do its prompt's scores
            sequence.prompt_logprobs.clear()

    def _preempt(self, sequence: Sequence) -> None:
        """Send the whole unit that holds `sequence` back to the head of the queue."""
        leader = next(s for s in self.running if sequence in s.unit)
        for member in reversed(leader.unit):
            if member.state is SequenceState.RUNNING:
                self._leave(member)
                member.state = SequenceState.WAITING
                self.waiting.appendleft(member)
                self.counters["preemptions"] += 1
