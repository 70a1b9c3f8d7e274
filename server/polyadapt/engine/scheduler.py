"""Which sequences run in the next step, under row, token, page and adapter budgets. Torch-free.

Running decode rows come first, then running prompts, then the waiting queue by rank: priority, then
arrival. Requests whose adapters are not on the device yet are passed over, and so are those whose
heavy adapters would be too many beside the running ones'. When pages run out the
running sequence of the last rank is preempted: it waits again and its tokens are computed again,
except those whose full pages are still in the prefix cache: a sequence takes over the pages that
continue what it has computed, and its own full pages are published there once they are written.
What is written is what num_computed counts, and what is published is what was read of it: the rows
of a step in flight are computed behind those of earlier steps, but may turn out to be no numbers.

The budget of a step is in tokens of the base. A token of a request whose adapters make it costlier
(Traits.token_cost) takes as many; so many sequences run that each could have one in every step.

A request whose adapter needs a first pass is two sequences with one list of tokens, see Sequence:
the scout runs up to the newest token, its main as far as the scout had come before the step. In the
queue the main stands for both.

Nobody waits for ever:
- A request that sequences of later ones were preferred to MAX_OVERTAKEN times ranks before all
  others from then on, and while it waits nobody behind it is admitted. Until then only those and
  requests that came earlier, finitely many, were served before it, and whoever could go on while
  its adapter was being read.
- Whoever is first in rank is never preempted.
- Of the tokens that decode rows leave (one at least: a running prompt is no decode row) the prompt
  that was admitted first gets half or all that it needs; hence it ends, and the next is the first.
"""

from __future__ import annotations

import time
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from polyadapt.adapters.adapter import Traits
from polyadapt.adapters.gates import arrange
from polyadapt.engine.pages import PageAllocator
from polyadapt.engine.prefix import PageKeys
from polyadapt.engine.prompt_lookup import NgramIndex, PromptLookup
from polyadapt.engine.request import RequestGroup, Sequence, SequenceState
from polyadapt.errors import InvalidRequest, PolicyConflict
from polyadapt.types import AppliedAdapter

# As often may requests that came later be preferred to one, for their priority or because its
# adapter has no room; about one full batch of the default size.
MAX_OVERTAKEN = 64
# Decode rows and drafts of a step together: beyond a few rows each one costs time of its own, and
# a large batch has no idle time that a guess could use.
MAX_SPECULATIVE_ROWS = 32
# Adapters of the running sequences that cost a step a product of their own, if nobody says other.
MAX_HEAVY_ADAPTERS = 8
# Read for every row of a step: looking a member up in its Enum takes several times as long.
_RUNNING = SequenceState.RUNNING


class AdapterSlots(Protocol):
    """What the scheduler needs of the pool: leases on device slots, all of a request's or none."""

    def find(self, adapters: tuple[AppliedAdapter, ...]) -> tuple[int, ...] | None:
        """The slots, or start bringing the adapters to the device and return None. They keep them
        as long as the queue asks in every step.
        """

    def lease(self, slots: tuple[int, ...]) -> None:
        """Lease slots that were just found."""

    def release(self, slots: tuple[int, ...]) -> None:
        """Give one lease of each slot back."""

    def is_hopeless(self, adapters: tuple[AppliedAdapter, ...]) -> bool:
        """Whether they will never be on the device, so that nobody may turn from them unheard."""

    def is_short_of_room(self, adapters: tuple[AppliedAdapter, ...]) -> bool:
        """Whether they wait for room, and not for a read or a copy under way."""

    def traits(self, slot: int) -> Traits:
        """What has to be known of the adapter in a slot that was found or leased."""

    def is_heavy(self, slot: int) -> bool:
        """Whether the adapter in such a slot costs each of its steps a product of its own."""


class MustRead(Exception):
    """A step is in flight whose tokens have to be read before the next one can be scheduled.

    Whoever called `schedule` reads them and calls again; nothing is lost.
    """

    def __init__(self, reason: Literal["drafts", "preemption"]) -> None:
        super().__init__(reason)
        self.reason = reason


# Not frozen, which would treble the time to make one: every row of every step is one.
@dataclass(slots=True)
class ScheduledRows:
    """num_tokens rows of one sequence, positions num_computed.. ; a decode row when it is 1.

    The last rows are `drafts`: guesses behind the sequence's newest token, not yet part of it.
    """

    sequence: Sequence
    num_tokens: int
    drafts: tuple[int, ...] = ()

    @property
    def is_last_chunk(self) -> bool:
        """Whether the sequence's newest token is among the rows, so that it is sampled from."""
        return self.num_tokens - len(self.drafts) == self.sequence.num_pending


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
        speculative_tokens: int = 0,
        max_model_len: int | None = None,
        max_heavy_adapters: int = MAX_HEAVY_ADAPTERS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`speculative_tokens` counts for requests that say nothing; no draft lies at position
        `max_model_len` or behind it. `max_heavy_adapters`: distinct ones of the running sequences.
        """
        self.pages = pages
        self.page_keys = page_keys
        self.adapters = adapters
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max(max_num_batched_tokens, max_num_seqs)
        self.counters = counters
        self.speculative_tokens = speculative_tokens
        self.max_model_len = max_model_len
        self.max_heavy_adapters = max_heavy_adapters
        self.waiting: list[Sequence] = []  # by rank
        self.running: list[Sequence] = []  # oldest admission first
        self.in_flight: set[Sequence] = set()  # they have rows in a step that is not read yet
        self.leaving: list[Sequence] = []  # ended in flight; pages and leases are still theirs
        self.refused: list[RequestGroup] = []  # whose `refusal` nobody has told yet
        self.left_cold: list[AppliedAdapter] = []  # by those who turned to others; see Engine
        self._clock = clock
        self._num_arrived = 0
        self._heavy: Counter[int] = Counter()  # slot -> running sequences that it is heavy for
        for name in ("prefix_query_tokens", "prefix_hit_tokens", "heavy_waits"):
            self.counters[name] += 0  # listed from the start

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, group: RequestGroup) -> None:
        """Queue the group's sequences."""
        self._num_arrived += 1
        group.order = self._num_arrived
        for sequence in group.sequences:
            insort(self.waiting, sequence, key=_rank)

    def schedule(self) -> list[ScheduledRows]:
        """Return the next step's rows, decode rows first. Pages for them are allocated.

        Raises MustRead, only while sequences are in flight.
        """
        picked: dict[Sequence, int] = {}
        budget = self.max_num_batched_tokens
        page_size = self.pages.page_size
        num_before = self.counters["preemptions"]
        # Decode rows first: a long prompt must not hold back tokens that streams wait for.
        num_decodes = num_prompts = 0
        for sequence in self.running.copy():
            if sequence.state is not _RUNNING:  # preempted for one before it
                continue
            num_computed = sequence.num_computed
            if num_computed // page_size != sequence.num_shareable:
                self._publish(sequence)
            num_pending = len(sequence.token_ids) - num_computed
            if sequence.main is not None and sequence.is_complete:
                self._leave(sequence)
                sequence.state = SequenceState.DONE
                continue
            if sequence.scout is not None:
                num_pending = sequence.num_runnable
            if num_pending > 1:
                num_prompts += 1
                continue
            if num_pending == 0:  # its scout comes first, or it is a scout that waits for its main
                continue
            num_decodes += 1
            # For 15 of 16 tokens there is room.
            if budget > 0 and num_computed < len(sequence.pages) * page_size:
                picked[sequence] = 1
                budget -= sequence.token_cost
            else:
                budget -= self._continue(sequence, min(budget, 1), picked)
        may_draft = self.in_flight and num_decodes < MAX_SPECULATIVE_ROWS
        if may_draft and any(map(self._num_drafts, picked)):
            raise MustRead("drafts")
        num_picked = len(picked)  # all of one row; not those that were preempted for others
        num_prompt_tokens = budget
        if num_prompts:
            for sequence in self._prompts():
                share = _share(sequence, budget, num_prompt_tokens)
                budget -= self._continue(sequence, share, picked)
        # Whoever was just preempted would come straight back and be preempted again.
        has_served_all = len(picked) == num_decodes + num_prompts
        if has_served_all and self.counters["preemptions"] == num_before:
            budget = self._admit(budget, num_prompt_tokens, picked)
        if len(picked) > num_picked:
            budget = self._give_rest(budget, picked)
        rows = [
            ScheduledRows(sequence, num_tokens)
            for sequence, num_tokens in picked.items()
            if sequence.state is _RUNNING
        ]
        if num_decodes < MAX_SPECULATIVE_ROWS:
            self._draft(budget, rows)
        elif len(picked) == num_picked:
            return rows  # nobody has more than one row
        rows.sort(key=lambda scheduled: scheduled.num_tokens > 1)
        return rows

    def finish(self, sequence: Sequence) -> None:
        """End the sequence and its scout wherever they are; frees pages and leases, of those in
        flight when `release_left` is called.
        """
        for member in sequence.unit:
            if member.state is SequenceState.RUNNING:
                self._leave(member)
            elif member.state is SequenceState.WAITING and member in self.waiting:
                self.waiting.remove(member)
            member.state = SequenceState.DONE

    def release_left(self) -> None:
        """Free pages and leases of those that ended in flight: their last step is read."""
        left, self.leaving = self.leaving, []
        for sequence in left:
            self._let_go(sequence)

    def distrust(self, group: RequestGroup) -> None:
        """Count nothing of the group's running sequences as computed, and let nobody find their
        pages.
        """
        for sequence in (member for leader in group.sequences for member in leader.unit):
            self.pages.forget(sequence.pages)
            sequence.num_computed = sequence.num_shareable = sequence.num_unread = 0

    def waiting_groups(self) -> Iterator[RequestGroup]:
        """The groups that have a waiting sequence, in queue order, each once."""
        seen: set[int] = set()
        for sequence in self.waiting:
            if id(sequence.group) not in seen:
                seen.add(id(sequence.group))
                yield sequence.group

    def check_integrity(self) -> None:
        """Assert the book-keeping: states, and pages owned by those alone that run or leave."""
        assert all(s.state is SequenceState.WAITING and not s.pages for s in self.waiting)
        assert all(s.main is None for s in self.waiting), "a scout is no leader"
        assert all(s.state is SequenceState.RUNNING for s in self.running)
        assert all(s.state is SequenceState.DONE and s in self.in_flight for s in self.leaving)
        holders = [*self.running, *self.leaving]
        self.pages.check_integrity([sequence.pages for sequence in holders])
        slots = [slot for sequence in holders for slot in sequence.slots]
        assert self._heavy == Counter(slot for slot in slots if self.adapters.is_heavy(slot))
        assert len(self._heavy) <= self.max_heavy_adapters
        for sequence in self.running:
            assert sequence.leader.state is SequenceState.RUNNING, "half a unit runs"
            assert all(member.token_ids is sequence.token_ids for member in sequence.unit)
            num_full = (sequence.num_computed - sequence.num_unread) // self.pages.page_size
            assert sequence.num_shareable <= num_full, "a page is shared before it is written"
            assert not sequence.num_unread or sequence in self.in_flight, "nobody reads its step"
            assert min(sequence.token_ids[:-1], default=0) >= 0, "a token is never read"
            assert sequence.token_ids[-1] >= 0 or sequence in self.in_flight, "a token is not read"
            private = sequence.pages[sequence.num_shareable :]
            assert all(map(self.pages.is_private, private)), "a page to write is shared"

    def _prompts(self) -> list[Sequence]:
        """Running prompts in the order of their shares: the first admitted, the rest by rank."""
        prompts = [sequence for sequence in self.running if sequence.num_runnable > 1]
        for sequence in prompts:  # somebody else may have computed what comes next meanwhile
            gained = self._take_cached(sequence)
            self.counters["prefix_hit_tokens"] += gained if sequence.main is None else 0
        return prompts[:1] + sorted(prompts[1:], key=_rank)

    def _continue(self, sequence: Sequence, num_tokens: int, picked: dict[Sequence, int]) -> int:
        """Schedule a running sequence's next rows, at most num_tokens; returns their cost."""
        num_tokens = min(sequence.num_runnable, num_tokens)
        if num_tokens <= 0 or sequence.state is not _RUNNING:
            return 0
        while not self.pages.extend(sequence.pages, sequence.num_computed + num_tokens):
            if self.in_flight:
                raise MustRead("preemption")
            self._preempt(max(self.running, key=_rank))
            if sequence.state is not _RUNNING:
                return 0
        picked[sequence] = num_tokens
        return num_tokens * sequence.token_cost

    def _admit(self, budget: int, num_prompt_tokens: int, picked: dict[Sequence, int]) -> int:
        """Admit from the queue while rows, tokens and pages last; returns the tokens left."""
        entered: list[int] = []  # orders of arrival
        loading: set[int] = set()
        for leader in self.waiting.copy():
            group = leader.group
            if budget < 1 or not self._has_seats(leader.unit):
                break
            if group.refusal is not None:
                continue
            undecided = None if group.lanes is not None else (group.adapters, group.has_turned)
            slots = self._find(group)
            if slots is None:
                if not self.adapters.is_short_of_room(group.adapters):
                    loading.add(group.order)
                if is_overdue(group):
                    break
                continue
            if self._is_too_heavy(group, slots):
                if undecided is not None:
                    group.reopen(*undecided)
                if is_overdue(group):
                    break
                continue
            if undecided is not None:
                slots = self._settle(group, slots)
                if slots is None:
                    continue
            unit = leader.unit  # of two only now, if its adapters turned out to need a scout
            for member in unit:
                self._take_cached(member)
            first = unit[-1]  # a scout runs before its main
            num_tokens = _share(first, budget, num_prompt_tokens)
            # A costly token may be more than is left of this step.
            has_rows = num_tokens > 0 and self._has_rows(unit) and self._has_seats(unit)
            if not (has_rows and self._has_room(unit, num_tokens)):
                for member in unit:
                    self._give_back(member)
                # What is on the device may be another then, for those who do not wait for theirs.
                if undecided is not None and group.request.when_cold.wait_ms is not None:
                    group.reopen(*undecided)
                break
            if undecided is not None and group.has_turned:
                self.left_cold += group.request.adapters
                name = "fallback" if group.adapters else "base"
                self.counters[f"cold_turned_to_{name}"] += 1
            if self.page_keys is not None and not leader.is_embedded:
                self.counters["prefix_query_tokens"] += len(leader.token_ids)
                self.counters["prefix_hit_tokens"] += leader.num_computed
            entered.append(group.order)
            self.waiting.remove(leader)
            self._enter(leader, slots)
            if leader.scout is not None:
                self._enter(leader.scout, self._slots_of(leader.scout))
            self.pages.extend(first.pages, first.num_computed + num_tokens)
            picked[first] = num_tokens
            budget -= num_tokens * first.token_cost
        if entered:
            # Whoever waits for a read under way has lost nothing to those who went on.
            passed = [group for group in self.waiting_groups() if group.order not in loading]
            self._count_overtakings(entered, passed)
        return budget

    def _count_overtakings(self, entered: list[int], passed: list[RequestGroup]) -> None:
        """Count for each group how many of the arrivals `entered` came after it."""
        entered.sort()
        num_overdue = 0
        for group in passed:
            was_overdue = is_overdue(group)
            group.num_overtaken += len(entered) - bisect_right(entered, group.order)
            num_overdue += is_overdue(group) and not was_overdue
        if num_overdue:
            self.counters["overdue_requests"] += num_overdue
            self.waiting.sort(key=_rank)

    def _give_rest(self, budget: int, picked: dict[Sequence, int]) -> int:
        """Give prompts that left tokens to others what nobody took; returns what is still left."""
        for sequence, num_tokens in picked.items():
            if sequence.state is not SequenceState.RUNNING or num_tokens == sequence.num_runnable:
                continue
            cost = sequence.token_cost
            more = min(budget // cost, sequence.num_runnable - num_tokens)
            num_known = sequence.num_computed + num_tokens + more
            if more > 0 and self._can_spare(self.pages.num_needed(num_known) - len(sequence.pages)):
                self.pages.extend(sequence.pages, num_known)
                picked[sequence] = num_tokens + more
                budget -= more * cost
        return budget

    def _draft(self, budget: int, batch: list[ScheduledRows]) -> None:
        """Add guesses to decode rows in place, as far as rows, tokens and pages are idle."""
        num_decodes = sum(rows.num_tokens == 1 for rows in batch)
        room = min(budget, MAX_SPECULATIVE_ROWS - num_decodes)
        if room <= 0:
            return
        eager = [rows for rows in batch if rows.num_tokens == 1 and self._drafts_after(rows)]
        for number, rows in enumerate(eager):
            sequence = rows.sequence
            cost = sequence.token_cost
            share = room // (len(eager) - number) // cost
            limit = min(share, self._draft_limit(sequence))
            guess = self._lookup(sequence).propose(sequence.token_ids, limit)
            if guess:
                self.pages.extend(sequence.pages, len(sequence.token_ids) + len(guess))
                rows.drafts = guess
                rows.num_tokens += len(guess)
                room -= len(guess) * cost

    def _drafts_after(self, rows: ScheduledRows) -> bool:
        """Whether guesses may follow a decode row: behind its prompt and alone."""
        sequence = rows.sequence
        is_decoding = rows.is_last_chunk and sequence.num_output > 0
        is_single = len(sequence.unit) == 1
        return is_decoding and is_single and self._num_drafts(sequence) > 0

    def _num_drafts(self, sequence: Sequence) -> int:
        asked = sequence.group.request.speculative_tokens
        return self.speculative_tokens if asked is None else asked

    def _draft_limit(self, sequence: Sequence) -> int:
        """How long a guess may be: the sequence must not end in it, and its keys and values take
        pages that nobody is about to need.
        """
        num_known = len(sequence.token_ids)
        limit = sequence.group.request.sampling.max_tokens - sequence.num_output - 1
        if self.max_model_len is not None:
            limit = min(limit, self.max_model_len - num_known - 1)
        num_pages = len(sequence.pages) + max(0, self.pages.num_free - len(self.running))
        return min(limit, num_pages * self.pages.page_size - num_known)

    def _lookup(self, sequence: Sequence) -> PromptLookup:
        if sequence.lookup is None:
            group, num_prompt = sequence.group, sequence.num_prompt
            if group.prompt_ngrams is None:
                group.prompt_ngrams = NgramIndex.of_prompt(group.request.prompt_ids)
            num_drafts = self._num_drafts(sequence)
            sequence.lookup = PromptLookup(group.prompt_ngrams, num_prompt, num_drafts)
        return sequence.lookup

    def _has_rows(self, unit: tuple[Sequence, ...]) -> bool:
        """Whether every running sequence and these could have a token in each step."""
        cost = sum(sequence.token_cost for sequence in (*self.running, *unit))
        return cost <= self.max_num_batched_tokens

    def _has_seats(self, unit: tuple[Sequence, ...]) -> bool:
        """Whether so many more may run."""
        return len(self.running) + len(unit) <= self.max_num_seqs

    def _has_room(self, unit: tuple[Sequence, ...], num_tokens: int) -> bool:
        """Whether so many rows of each member fit, though only the first one gets them now, and
        every running sequence can still grow by one page.
        """
        return self._can_spare(
            sum(
                self.pages.num_needed(member.num_computed + num_tokens) - len(member.pages)
                for member in unit
            )
        )

    def _can_spare(self, num_pages: int) -> bool:
        """Whether every running sequence could still grow by one page without them."""
        return self.pages.num_free >= num_pages + len(self.running)

    def _slots_of(self, scout: Sequence) -> tuple[int, ...]:
        slots = self.adapters.find(tuple(lane.applied for lane in scout.lanes))
        assert slots is not None, "its main's lease keeps its adapters on the device"
        return slots

    def _find(self, group: RequestGroup) -> tuple[int, ...] | None:
        """The slots of the group's adapters or, when it need not wait for them any longer, of what
        it names instead.
        """
        slots = self.adapters.find(group.adapters)
        instead = group.request.when_cold.instead
        if slots is not None or instead is None or not group.has_waited_enough(self._clock()):
            return slots
        if self.adapters.is_hopeless(group.adapters):  # it is told why, and not answered by others
            return None
        slots = self.adapters.find(instead)
        if slots is not None:
            group.turn()
        return slots

    def _settle(self, group: RequestGroup, slots: tuple[int, ...]) -> tuple[int, ...] | None:
        """Fix what the group's first admission decides and return its slots in the order of the
        lanes; None when its adapters cannot be served so.
        """
        traits = [self.adapters.traits(slot) for slot in slots]
        try:
            self._check_heavy(group, slots)
            lanes = arrange(group.adapters, traits, group.request.prompt_ids)
            group.settle(lanes)
            self._check_fits(group.sequences[0].unit)
        except InvalidRequest as error:
            group.refusal = error
            self.refused.append(group)
            return None
        # Whatever a token takes, it gets it in a step of its own, or of its scout's and its own.
        most = self.max_num_batched_tokens - int(group.is_probed)
        group.token_cost = min(group.token_cost, most)
        return tuple(slots[lane.place] for lane in lanes)

    def _is_too_heavy(self, group: RequestGroup, slots: tuple[int, ...]) -> bool:
        """Whether running sequences leave no room for the heavy ones among the slots: then those
        have to end first. Requests that name too many by themselves do not wait.
        """
        heavy = {slot for slot in slots if self.adapters.is_heavy(slot)}
        num_together = len(heavy | self._heavy.keys())
        if num_together <= self.max_heavy_adapters or heavy <= self._heavy.keys():
            return False
        if len(heavy) > self.max_heavy_adapters:
            return False
        self.counters["heavy_waits"] += not group.was_too_heavy
        group.was_too_heavy = True
        return True

    def _check_heavy(self, group: RequestGroup, slots: tuple[int, ...]) -> None:
        """Raise InvalidRequest if one request's adapters are heavier than any step may be; where
        one of the heavy ones is mandatory, PolicyConflict.
        """
        pairs = zip(group.adapters, slots, strict=True)
        heavy = [applied for applied, slot in pairs if self.adapters.is_heavy(slot)]
        if len(heavy) <= self.max_heavy_adapters:
            return
        message = (
            f"{len(heavy)} of the request's {len(slots)} adapters hold dense matrices, each a "
            f"product of its own in every step; --max-heavy-adapters is {self.max_heavy_adapters}: "
            "name fewer or raise it"
        )
        mandatory = [applied.adapter.name for applied in heavy if applied.is_mandatory]
        if mandatory:
            raise PolicyConflict(
                f"{message}; '{mandatory[0]}' is mandatory by policy", param="adapters"
            )
        raise InvalidRequest(message, param="adapters")

    def _check_fits(self, unit: tuple[Sequence, ...]) -> None:
        """Raise InvalidRequest for a unit that could not run to its end even alone; a sequence
        alone always can.
        """
        if len(unit) == 1:
            return
        if len(unit) > self.max_num_seqs:
            raise InvalidRequest(
                f"the adapter is served in {len(unit)} passes at once and --max-num-seqs is "
                f"{self.max_num_seqs}; raise it",
                param="model",
            )
        leader = unit[0]
        most = leader.num_prompt + leader.group.request.sampling.max_tokens
        most = min(most, self.max_model_len or most)
        needed = sum(
            self.pages.num_needed(most if s.horizon is None else min(most, s.horizon)) for s in unit
        )
        if needed > self.pages.num_pages:
            raise InvalidRequest(
                f"the adapter is served in {len(unit)} passes, whose {most} tokens each need "
                f"{needed} pages of KV memory of {self.pages.num_pages}; lower max_tokens, shorten "
                "the prompt or raise --kv-cache-bytes",
                param="max_tokens",
            )

    def _enter(self, sequence: Sequence, slots: tuple[int, ...]) -> None:
        self.adapters.lease(slots)
        self._heavy.update(slot for slot in slots if self.adapters.is_heavy(slot))
        sequence.slots = slots
        sequence.state = SequenceState.RUNNING
        self.running.append(sequence)

    # ------------------------------------------------------------------ the prefix cache
    def _take_cached(self, sequence: Sequence) -> int:
        """Go on behind the cached pages that continue what the sequence has computed; return by
        how many tokens. Its newest token is never among them: the next one is sampled from its row.
        Nor is, of a scout, any token that its main has still to run, or the last that it runs.
        """
        if self.page_keys is None or sequence.leader.needs_every_row:
            return 0
        if sequence.num_unread:  # pages of its own are still to be published before others'
            return 0
        size = self.pages.page_size
        first, limit = sequence.num_computed // size, len(sequence.token_ids) - 1
        if sequence.main is not None:
            limit = min(limit, sequence.main.num_computed)
            limit = limit if sequence.horizon is None else min(limit, sequence.horizon - 1)
        found: list[int] = []
        for number in range(first, limit // size):
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
        """Let others find the sequence's full pages, as far as they are written and read."""
        num_full = (sequence.num_computed - sequence.num_unread) // self.pages.page_size
        if num_full == sequence.num_shareable or self.page_keys is None:
            return
        for number in range(sequence.num_shareable, num_full):
            key = self._key(sequence, number)
            sequence.pages[number] = self.pages.publish(sequence.pages[number], key)
        sequence.num_shareable = num_full

    def _key(self, sequence: Sequence, number: int) -> bytes:
        """The key of the sequence's page `number`; its adapters are on the device."""
        assert self.page_keys is not None
        keys, size = sequence.page_keys, self.pages.page_size
        if sequence.root_key is None:
            salt = sequence.group.request.cache_salt
            sequence.root_key = self.page_keys.root(salt, sequence.lanes)
            sequence.key_turns = self.page_keys.turns(sequence.lanes)
        while len(keys) <= number:
            start = len(keys) * size
            parent = keys[-1] if keys else sequence.root_key
            if len(keys) in sequence.key_turns:
                parent = self.page_keys.turn(parent, sequence.key_turns[len(keys)])
            keys.append(self.page_keys.page(parent, sequence.token_ids[start : start + size]))
        return keys[number]

    def _give_back(self, sequence: Sequence) -> None:
        """Release the sequence's pages: it starts over."""
        self.pages.release(sequence.pages)
        sequence.num_computed = sequence.num_shareable = sequence.num_unread = 0
        sequence.expert_weights.clear()

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        if sequence in self.in_flight:
            self.leaving.append(sequence)
        else:
            self._let_go(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        """Give back whatever it holds."""
        self._publish(sequence)
        for slot in self._heavy.keys() & set(sequence.slots):
            self._heavy[slot] -= 1
            if not self._heavy[slot]:
                del self._heavy[slot]
        self.adapters.release(sequence.slots)
        sequence.slots = ()
        self._give_back(sequence)
        if not sequence.is_scored:  # it starts over, and so do its prompt's scores
            sequence.prompt_logprobs.clear()

    def _preempt(self, sequence: Sequence) -> None:
        """Send the whole unit that holds `sequence` back to the queue."""
        leader = sequence.leader
        for member in leader.unit:
            assert member not in self.in_flight, "its newest token is not known"
            if member.state is SequenceState.RUNNING:
                self._leave(member)
            member.state = SequenceState.WAITING
        insort(self.waiting, leader, key=_rank)
        self.counters["preemptions"] += 1
        # Its pages serve those that stay: if one of them came later, it was overtaken.
        newest = max((other.group.order for other in self.running), default=0)
        self._count_overtakings([newest], [leader.group])


def is_overdue(group: RequestGroup) -> bool:
    """Whether it was overtaken so often that nobody behind it is admitted while it waits."""
    return group.num_overtaken >= MAX_OVERTAKEN


def _rank(sequence: Sequence) -> tuple[bool, int, int, int]:
    """Whose turn it is, the smallest first: to enter, to get tokens, and to keep pages."""
    group = sequence.group
    if is_overdue(group):
        return False, 0, group.order, sequence.index
    return True, group.request.priority, group.order, sequence.index


def _share(sequence: Sequence, budget: int, num_prompt_tokens: int) -> int:
    """Tokens of a prompt's first serving. One that this step's `num_prompt_tokens` could not end
    leaves half of the budget to those behind it, though at least one token is its own; what they do
    not need comes back to it.
    """
    cost = sequence.token_cost
    part = budget if sequence.num_runnable * cost <= num_prompt_tokens else -(-budget // 2)
    return min(sequence.num_runnable, max(part // cost, min(budget // cost, 1)))
