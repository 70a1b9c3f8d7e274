"""Which sequences run in the next step, under row, token, page and adapter budgets. Torch-free.

Running sequences come first, oldest first; then the waiting queue in order, skipping requests whose
adapters are not on the device yet. When pages run out the youngest running sequence is preempted:
it goes back to the head of the queue and its tokens are computed again, except those whose full
pages are still in the prefix cache: a sequence takes over the pages that continue what it has
computed, and its own full pages are published there once they are written. What is written is what
num_computed counts.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from polyadapt.engine.pages import PageAllocator
from polyadapt.engine.prefix import PageKeys
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

    def kv_identities(self, adapters: tuple[AppliedAdapter, ...]) -> tuple[str, ...]:
        """What each leased adapter is in the keys of cached pages; see PageKeys.root."""


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
        page_keys: PageKeys | None = None,  # None: no prefix cache
    ) -> None:
        self.pages = pages
        self.page_keys = page_keys
        self.adapters = adapters
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max(max_num_batched_tokens, max_num_seqs)
        self.counters = counters
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest admission first
        for name in ("prefix_query_tokens", "prefix_hit_tokens"):
            self.counters[name] += 0  # listed from the start

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
        for sequence in self.running:
            self._publish(sequence)
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

    def distrust(self, group: RequestGroup) -> None:
        """Count nothing of the group's running sequences as computed, and let nobody find their
        pages.
        """
        for sequence in group.sequences:
            self.pages.forget(sequence.pages)
            sequence.num_computed = sequence.num_shareable = 0

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
        for sequence in self.running:
            num_full = sequence.num_computed // self.pages.page_size
            assert sequence.num_shareable <= num_full, "a page is shared before it is written"
            private = sequence.pages[sequence.num_shareable :]
            assert all(map(self.pages.is_private, private)), "a page to write is shared"

    def _continue(self, sequence: Sequence, budget: int, picked: list[ScheduledRows]) -> int:
        """Schedule a running sequence's next rows; returns how many tokens that takes."""
        if sequence.num_pending > 1:  # somebody else may have computed what comes next meanwhile
            self.counters["prefix_hit_tokens"] += self._take_cached(sequence)
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
            self._take_cached(leader)
            share = budget // len(unit)
            counts = [min(member.num_pending, share) for member in unit]
            if not self._has_room(unit, counts):
                self.adapters.release(slots)
                self._give_back(leader)
                return
            if self._is_cacheable(leader):
                self.counters["prefix_query_tokens"] += len(leader.token_ids)
                self.counters["prefix_hit_tokens"] += leader.num_computed
            for member, num_tokens in zip(unit, counts, strict=True):
                self._enter(member, slots if member is leader else self._lease(member))
                self.pages.extend(member.pages, member.num_computed + num_tokens)
                picked.append(ScheduledRows(member, num_tokens))
                budget -= num_tokens

    def _has_room(self, unit: tuple[Sequence, ...], counts: list[int]) -> bool:
        """Whether the first rows fit and every running sequence can still grow by one page."""
        needed = sum(
            self.pages.num_needed(member.num_computed + count) - len(member.pages)
            for member, count in zip(unit, counts, strict=True)
        )
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

    # ------------------------------------------------------------------ the prefix cache
    def _is_cacheable(self, sequence: Sequence) -> bool:
        """Whether its pages may be shared.

        Not with companions: coupled sequences advance in step, so one must not be ahead of the
        others by what it found, and what one computes may depend on another's results, of which
        its keys know nothing.
        """
        return self.page_keys is not None and not (sequence.companions or sequence.is_companion)

    def _take_cached(self, sequence: Sequence) -> int:
        """Go on behind the cached pages that continue what the sequence has computed; return by
        how many tokens. Its newest token is never among them: the next one is sampled from its row.
        """
        params = sequence.group.request.sampling
        if params.num_prompt_logprobs is not None and not sequence.is_scored:
            return 0  # every row of the prompt has to run
        if not self._is_cacheable(sequence):
            return 0
        size = self.pages.page_size
        first = sequence.num_computed // size
        found: list[int] = []
        for number in range(first, (len(sequence.token_ids) - 1) // size):
            page = self.pages.find(self._key(sequence, number))
            if page is None:
                break
            found.append(page)
        if not found:
            return 0
        self.pages.share(found)
        stale = sequence.pages[first:]  # the page it has begun to fill
        sequence.pages[first:] = found
        self.pages.release(stale)
        sequence.num_shareable = first + len(found)
        gained = sequence.num_shareable * size - sequence.num_computed
        sequence.num_computed += gained
        return gained

    def _publish(self, sequence: Sequence) -> None:
        """Let others find the sequence's full pages, as far as they are written."""
        num_full = sequence.num_computed // self.pages.page_size
        if num_full == sequence.num_shareable or not self._is_cacheable(sequence):
            return
        for number in range(sequence.num_shareable, num_full):
            key = self._key(sequence, number)
            sequence.pages[number] = self.pages.publish(sequence.pages[number], key)
        sequence.num_shareable = num_full

    def _key(self, sequence: Sequence, number: int) -> bytes:
        """The key of the sequence's page `number`; its adapters are on the device."""
        assert self.page_keys is not None
        group, keys, size = sequence.group, sequence.page_keys, self.pages.page_size
        if group.root_key is None:
            identities = self.adapters.kv_identities(group.request.adapters)
            group.root_key = self.page_keys.root(group.request, identities)
        while len(keys) <= number:
            start = len(keys) * size
            parent = keys[-1] if keys else group.root_key
            keys.append(self.page_keys.page(parent, sequence.token_ids[start : start + size]))
        return keys[number]

    def _give_back(self, sequence: Sequence) -> None:
        """Release the sequence's pages: it starts over."""
        self.pages.release(sequence.pages)
        sequence.num_computed = sequence.num_shareable = 0

    def _leave(self, sequence: Sequence) -> None:
        self._publish(sequence)
        self.running.remove(sequence)
        self.adapters.release(sequence.slots)
        sequence.slots = ()
        self._give_back(sequence)
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
