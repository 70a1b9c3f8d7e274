"""The engine between two moments: takes commands, runs one step, returns what happened.

Single-threaded; owns time. A step is always one forward, and a fault of one request ends that
request alone.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from polyadapt.adapters.pace import Pace
from polyadapt.adapters.pool import AdapterPool
from polyadapt.engine.left_cold import LeftCold
from polyadapt.engine.output import Call, Cancel, Command, Reply, StepOutput, Submit
from polyadapt.engine.overlap import Overlap
from polyadapt.engine.pooling import add_rows, mean_of
from polyadapt.engine.probing import forget_used, weigh_experts
from polyadapt.engine.request import RequestGroup, Sequence, SequenceState
from polyadapt.engine.runner import ModelRunner, StepLogits
from polyadapt.engine.sampler import Sampled, sample, sample_rows, score
from polyadapt.engine.scheduler import ScheduledRows, Scheduler, is_overdue
from polyadapt.engine.usage import RoutingUsage
from polyadapt.errors import (
    AdapterCold,
    AdapterDeleted,
    AdapterRejected,
    InternalError,
    NumericalError,
    PolyadaptError,
    RequestTimeout,
    Unavailable,
)
from polyadapt.logs import fields
from polyadapt.ops.device import Device, Host
from polyadapt.types import (
    AppliedAdapter,
    Embedded,
    EngineInfo,
    EngineStats,
    Event,
    Failed,
    Finished,
    FinishReason,
    PromptScored,
    Request,
    Residency,
    ServedAdapter,
    Started,
    Timeline,
    TokenLogprob,
    Tokens,
)

logger = logging.getLogger(__name__)

_STATS_INTERVAL_S = 0.1
# A copy that is waited for is in the batch one step earlier; running streams wait with it. So much
# of a decode step they may, as long as the next token is then no 1.3 times later than usual.
_PATIENCE = 0.25
_NUM_PREFETCHED = 8  # sequences at the head of the queue
_IDLE_PATIENCE_S = 0.25  # nobody runs; commands are taken in between


class Engine:
    """Schedules, runs and samples; `step` returns events and replies."""

    def __init__(
        self,
        *,
        info: EngineInfo,
        scheduler: Scheduler,
        runner: ModelRunner,
        pool: AdapterPool,
        pace: Pace,
        counters: Counter[str],
        usage: RoutingUsage | None = None,
        device: Device | None = None,  # None: the CPU
    ) -> None:
        self.info = info
        self.scheduler = scheduler
        self.runner = runner
        self.pool = pool
        self._pace = pace
        self.counters = counters
        self._usage = usage or RoutingUsage(pool.cells)
        self._groups: dict[str, RequestGroup] = {}
        self._impatient: dict[str, RequestGroup] = {}  # who fails rather than wait for adapters
        self._left_cold = LeftCold(pool)
        self._steps_by_adapters: Counter[int] = Counter()
        self._steps_by_rows: Counter[int] = Counter()  # by the number's bit length
        self._events: list[Event] = []
        self._replies: list[Reply] = []
        self._last_news = float("-inf")
        self._decode_s = 0.0  # a step of decode rows alone takes about so long
        self._overlap: Overlap | None = None
        device = device or Host()
        if device.is_asynchronous:
            length = info.base.max_model_len
            self._overlap = Overlap(device, scheduler, runner, self, counters, max_model_len=length)

    # ------------------------------------------------------------------ commands
    def execute(self, command: Command) -> None:
        """Take one command; its effects are in the next step's output."""
        if isinstance(command, Submit):
            group = RequestGroup.of(command.request, time.monotonic())
            self._groups[command.request.id] = group
            self.scheduler.add(group)
            cold = command.request.when_cold
            if cold.wait_ms is not None and cold.instead is None:
                self._impatient[command.request.id] = group
        elif isinstance(command, Cancel):
            group_or_none = self._groups.get(command.request_id)
            if group_or_none is not None:  # else it ended while the message was on its way
                self.counters["cancelled_requests"] += 1
                self._end(group_or_none, Finished(command.request_id, is_cancelled=True))
        else:
            self._call(command)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything: requests, loads, or answers not handed out yet."""
        is_loading = self.pool.is_busy or self._left_cold
        is_in_flight = self._overlap is not None and self._overlap.is_busy
        has_rows = self.scheduler.has_work or is_in_flight
        return bool(has_rows or is_loading or self._events or self._replies)

    # ------------------------------------------------------------------ the step
    def step(self) -> StepOutput:
        """Move loads on, start at most one forward, and return everything that happened."""
        self.pool.poll(self._patience_s())
        self._expire()
        batch = (self._overlap or self.scheduler).schedule()
        # A full batch admits nobody; the next in the queue need not find their adapters cold.
        for sequence in itertools.islice(self.scheduler.waiting, _NUM_PREFETCHED):
            self.pool.prefetch(sequence.group.adapters)
            # Nobody behind it is admitted: their adapters must not keep its own from the device.
            if is_overdue(sequence.group):
                break
        self._fail_refused()
        self._fail_cold()
        self._bring_left_cold()
        self._fail_unloadable()
        batch = self._start(batch)
        self._pace.is_shared = bool(batch)
        started = time.monotonic()
        if self._overlap is not None:
            batch = self._overlap.run(batch)
        elif batch:
            self.run_now(batch)
        num_rows = sum(rows.num_tokens for rows in batch)
        if batch and num_rows == len(batch):
            took = time.monotonic() - started
            self._decode_s += (took - self._decode_s) * (0.2 if self._decode_s else 1.0)
        residencies, gone = self.pool.take_changes()
        output = StepOutput(self._events, self._replies, residencies, gone, None, num_rows)
        self._events, self._replies = [], []
        output.stats = self._news(output)
        return output

    def _news(self, output: StepOutput) -> EngineStats | None:
        """A snapshot now and then; where adapters are is told as it changes.

        Always with an answer to a call and before a rest, so that nobody is left with old figures.
        """
        now = time.monotonic()
        is_due = now - self._last_news >= _STATS_INTERVAL_S or bool(output.replies)
        if self.has_work and output.num_rows and not is_due:
            return None
        self._last_news = now
        return self.stats()

    def stats(self) -> EngineStats:
        """A snapshot of queue, memory and counters."""
        pages = self.scheduler.pages
        waiting = [
            applied.adapter.digest
            for group in self.scheduler.waiting_groups()
            for applied in group.adapters
        ]
        return EngineStats(
            num_steps=self.counters["steps"],
            num_running=sum(sequence.main is None for sequence in self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_used_pages=pages.num_used,
            num_cached_pages=pages.num_cached,
            num_pages=pages.num_pages,
            adapter_bytes_used=self.pool.nbytes_used,
            waiting_digests=tuple(dict.fromkeys(waiting)),
            counters=dict(
                self.counters,
                native_layer_steps=self.runner.num_native_steps,
                override_steps=self.runner.num_override_steps,
            ),
            steps_by_adapters=dict(self._steps_by_adapters),
            steps_by_rows=dict(self._steps_by_rows),
            load_seconds=self.pool.load_seconds(),
            routing=self._usage.snapshot(self.pool.digests()),
        )

    def check_integrity(self) -> None:
        """Assert the book-keeping of every owner of memory; cheap enough for an idle moment."""
        self.scheduler.check_integrity()
        self.pool.check_integrity()
        holders = (*self.scheduler.running, *self.scheduler.leaving)
        leases = sum(len(sequence.slots) for sequence in holders)
        held = self.pool.num_leases
        assert leases == held, f"{held} leases are held for {leases} adapter uses"

    # ------------------------------------------------------------------ inside a step
    def _patience_s(self) -> float:
        """How long copies to the device may hold up the next step."""
        if not self.scheduler.running:
            return _IDLE_PATIENCE_S
        return 0.0 if self.pool.is_asynchronous else _PATIENCE * self._decode_s

    def run_now(self, batch: list[ScheduledRows]) -> None:
        """Compute the rows and take in what comes of them."""
        self.observe(batch)
        outcomes = self._run(batch)
        drawn = self._draw(batch, outcomes)
        for rows, logits, sampled in zip(batch, outcomes, drawn, strict=True):
            self._advance(rows, logits, sampled)

    def _run(self, batch: list[ScheduledRows]) -> StepLogits | list[torch.Tensor | None]:
        """Logits per sequence; None for one whose rows cannot be computed."""
        try:
            together = self._compute(batch)
        except Exception:
            # Keys and values are written by position, so that running rows again is harmless.
            logger.exception("a step of %d sequences failed; running each alone", len(batch))
            self.counters["isolated_steps"] += 1
        else:
            _pool(batch, together.hidden)
            return together
        results: list[torch.Tensor | None] = []
        for rows in batch:
            try:
                alone = self._compute([rows])
            except Exception:
                request_id = rows.sequence.group.request.id
                logger.exception(
                    "request %s failed alone", request_id, extra=fields(generation=request_id)
                )
                results.append(None)
            else:
                _pool([rows], alone.hidden)
                results += alone
        return results

    def _compute(self, batch: list[ScheduledRows]) -> StepLogits:
        """One forward, and what the rows of scouts say of their mains' experts."""
        logits = self.runner.run(batch)
        if logits.hidden is not None:
            is_exact = self.runner.strategy.is_exact
            weigh_experts(batch, logits.hidden, self.pool, is_exact=is_exact)
        return logits

    def _draw(
        self, batch: list[ScheduledRows], outcomes: StepLogits | list[torch.Tensor | None]
    ) -> list[Sampled | None]:
        """What plain rows sample, drawn together; None where `_advance` must do it."""
        drawn: list[Sampled | None] = [None] * len(batch)
        if not isinstance(outcomes, StepLogits):
            return drawn
        # Decode rows come first, so that the others seldom hide a plain one.
        places = []
        for place, (rows, count) in enumerate(zip(batch, outcomes.counts, strict=True)):
            if count == 0:  # a scout, or a part of a prompt
                continue
            if count != 1 or not rows.is_last_chunk:
                break
            places.append(place)
        sequences = [batch[place].sequence for place in places]
        try:
            together = sample_rows(outcomes.table[: len(sequences)], sequences)
        except Exception:
            # One sequence at a time shows whose fault it is.
            logger.exception("sampling %d rows together failed; now each alone", len(sequences))
            self.counters["isolated_samplings"] += 1
            return drawn
        for place, sampled in zip(places, together, strict=True):
            drawn[place] = sampled
        self.counters["rows_drawn_together"] += len(batch) - drawn.count(None)
        return drawn

    def _start(self, batch: list[ScheduledRows]) -> list[ScheduledRows]:
        """Announce requests on their first rows; leave out what has ended meanwhile."""
        for rows in batch:
            group = rows.sequence.group
            if group.is_started or group.request.id not in self._groups:
                continue
            group.is_started = True
            assert group.lanes is not None, "whoever has rows has its adapters settled"
            lanes = sorted(group.lanes, key=lambda lane: lane.place)  # as the caller wrote them
            if group.timeline is not None:
                group.timeline = self._admitted(group, group.timeline)
            served = tuple(
                replace(self._served(lane.applied), is_approximate=lane.is_approximate)
                for lane in lanes
            )
            # None of its rows has run yet: what counts as computed was found in the cache.
            num_cached = rows.sequence.leader.num_computed
            self._events.append(
                Started(group.request.id, served, num_cached, timeline=group.timeline)
            )
        return [rows for rows in batch if rows.sequence.state is SequenceState.RUNNING]

    def _admitted(self, group: RequestGroup, timeline: Timeline) -> Timeline:
        """What a traced request's timeline says once it is admitted; before `_served` is asked."""
        loads = []
        for applied in group.adapters:
            load = self.pool.latest_load(applied.adapter.digest)
            if load is not None:
                offset = time.time() - time.monotonic()
                loads.append((applied.adapter.digest, load[0] + offset, load[1] + offset))
        first_step = self.counters["steps"] + 1
        return replace(timeline, admitted=time.time(), first_step=first_step, loads=tuple(loads))

    def _served(self, applied: AppliedAdapter) -> ServedAdapter:
        served = self.pool.served(applied.adapter)
        return replace(served, is_mandatory=True) if applied.is_mandatory else served

    def _advance(
        self, rows: ScheduledRows, logits: torch.Tensor | None, sampled: Sampled | None
    ) -> None:
        """Take in a sequence's logits: count its rows as computed, and sample if it is complete.

        `sampled` was drawn from them already; None: still to be drawn.
        """
        sequence = rows.sequence
        group = sequence.group
        if sequence.state is not SequenceState.RUNNING:  # a sibling's failure ended the request
            return
        if logits is None:
            self._fail(group, InternalError("the model failed on this request; see the server log"))
            return
        if sequence.is_embedded:
            self._advance_embedding(rows)
            return
        is_last_chunk = rows.is_last_chunk
        num_logits = logits.shape[0]
        is_scored = num_logits > 1 or (num_logits == 1 and not is_last_chunk)
        choice: _Choice | None = None
        try:
            if is_scored and not rows.drafts:
                self._score_prompt(sequence, logits)
            if is_last_chunk and sequence.main is None:
                choice = self._choose(rows, logits, sampled)
        except Exception:
            logger.exception(
                "request %s failed while it was sampled",
                group.request.id,
                extra=fields(generation=group.request.id),
            )
            self._fail(group, InternalError("sampling this request failed; see the server log"))
            return
        sequence.num_computed += rows.num_tokens - len(rows.drafts)
        if sequence.scout is not None:
            forget_used(sequence)
        if choice is None:
            return
        self._announce_scores(sequence)
        # The row of each accepted draft has computed that draft's keys and values.
        sequence.num_computed += max(0, len(choice.tokens) - 1)
        self._conclude(sequence, choice)

    def take(self, sequence: Sequence, position: int, sampled: Sampled | None) -> None:
        """Take in a token that a step in flight has sampled; None: its logits are not finite."""
        choice = _Choice()
        if sampled is None:
            choice.is_finite = False
        else:
            sequence.settle(position, sampled.token_id)
            choice.tokens.append(sampled)
            reason = self._finish_reason(sequence, sampled.token_id, position + 1)
            choice.finish_reason, choice.stop_token_id = reason
        self._conclude(sequence, choice)

    def _conclude(self, sequence: Sequence, choice: _Choice) -> None:
        """Tell a sequence's next tokens, and end it where they do."""
        group = sequence.group
        self._announce_tokens(sequence, choice)
        if not choice.is_finite:
            self.counters["numerical_errors"] += 1
            # What made the logits so may lie in its keys and values: nobody else shall read them.
            self.scheduler.distrust(group)
            self._fail(group, NumericalError("the model returned non-finite logits"))
        elif choice.finish_reason is not None:
            self.scheduler.finish(sequence)
            if group.is_done:
                self._end(group, Finished(group.request.id))

    def _advance_embedding(self, rows: ScheduledRows) -> None:
        """Count an embedding's rows as computed; behind the last one it ends with their mean."""
        sequence, group = rows.sequence, rows.sequence.group
        sequence.num_computed += rows.num_tokens
        if sequence.num_pending:
            return
        assert sequence.hidden_sum is not None, "rows are pooled as soon as they have run"
        vector = mean_of(sequence.hidden_sum, sequence.num_prompt)
        if vector is None:
            self.counters["numerical_errors"] += 1
            self.scheduler.distrust(group)
            self._fail(group, NumericalError("the model's hidden states are not finite"))
            return
        self.counters["embedded_prompts"] += 1
        self.counters["embedded_tokens"] += sequence.num_prompt
        self._events.append(Embedded(group.request.id, vector, sequence.num_prompt))
        self._end(group, Finished(group.request.id))

    def _choose(self, rows: ScheduledRows, logits: torch.Tensor, first: Sampled | None) -> _Choice:
        """Sample the newest token's row and, as long as each draft proves to be what is sampled,
        the draft's row: every token is chosen from what it would be chosen from without drafts.
        Appends the tokens to the sequence. `first` was drawn already; None: still to be drawn.
        """
        sequence, drafts = rows.sequence, rows.drafts
        choice = _Choice()
        end_token_ids = self.end_tokens(sequence)
        # A row of logits is a tensor of its own, which takes longer than all else here.
        is_drawn = first is not None and not drafts
        for number, row in enumerate((logits,) if is_drawn else logits[-1 - len(drafts) :]):
            sampled, first = first or sample(row, sequence, end_token_ids), None
            if sampled is None:
                choice.is_finite = False
                break
            token_id = sampled.token_id
            sequence.token_ids.append(token_id)
            choice.tokens.append(sampled)
            reason = self._finish_reason(sequence, token_id, len(sequence.token_ids))
            choice.finish_reason, choice.stop_token_id = reason
            if number == len(drafts) or token_id != drafts[number]:
                break
            choice.num_accepted += 1
            if choice.finish_reason is not None:
                break
        if sequence.lookup is not None and drafts:
            sequence.lookup.observe(len(drafts), choice.num_accepted)
            self.counters["spec_drafted_tokens"] += len(drafts)
            self.counters["spec_accepted_tokens"] += choice.num_accepted
        return choice

    def _announce_tokens(self, sequence: Sequence, choice: _Choice) -> None:
        if not choice.tokens:
            return
        self._events.append(
            Tokens(
                sequence.group.request.id,
                sequence.index,
                tuple(sampled.token_id for sampled in choice.tokens),
                tuple(sampled.logprob for sampled in choice.tokens if sampled.logprob),
                choice.finish_reason,
                choice.stop_token_id,
            )
        )
        self.counters["generated_tokens"] += len(choice.tokens)
        timeline = sequence.group.timeline
        if timeline is not None and timeline.first_token is None:
            sequence.group.timeline = replace(timeline, first_token=time.time())

    def _finish_reason(
        self, sequence: Sequence, token_id: int, num_tokens: int
    ) -> tuple[FinishReason | None, int | None]:
        """Why a sequence ends with this token, the last of so many, if it does."""
        params = sequence.group.request.sampling
        if token_id in self.end_tokens(sequence):
            return "stop", token_id
        is_full = num_tokens >= self.info.base.max_model_len
        if num_tokens - sequence.num_prompt >= params.max_tokens or is_full:
            return "length", None
        return None, None

    def end_tokens(self, sequence: Sequence) -> tuple[int, ...]:
        """The tokens that end it."""
        params = sequence.group.request.sampling
        eos = () if params.ignore_eos else self.info.eos_token_ids
        return (*eos, *params.stop_token_ids)

    def _score_prompt(self, sequence: Sequence, logits: torch.Tensor) -> None:
        num_top = sequence.group.request.sampling.num_prompt_logprobs or 0
        for row, position in enumerate(
            range(sequence.num_computed + 1, sequence.num_computed + 1 + len(logits))
        ):
            if position < sequence.num_prompt:
                scored = score(logits[row], sequence.token_ids[position], num_top)
                sequence.prompt_logprobs.append(scored)

    def _announce_scores(self, sequence: Sequence) -> None:
        params = sequence.group.request.sampling
        if params.num_prompt_logprobs is None or sequence.is_scored:
            return
        sequence.is_scored = True
        scores: tuple[TokenLogprob, ...] = tuple(sequence.prompt_logprobs)
        self._events.append(PromptScored(sequence.group.request.id, sequence.index, scores))

    def observe(self, batch: list[ScheduledRows]) -> None:
        """Count a step that is about to be computed."""
        self.counters["steps"] += 1
        num_rows = sum(rows.num_tokens for rows in batch)
        self.counters["rows"] += num_rows
        self._steps_by_rows[num_rows.bit_length()] += 1
        distinct = len({slot for rows in batch for slot in rows.sequence.slots})
        self._steps_by_adapters[distinct] += 1
        num_decodes = sum(rows.num_tokens - len(rows.drafts) == 1 for rows in batch)
        self.counters["mixed_steps"] += 0 < num_decodes < len(batch)

    # ------------------------------------------------------------------ how requests end
    def _end(self, group: RequestGroup, event: Finished | Failed) -> None:
        del self._groups[group.request.id]
        self._impatient.pop(group.request.id, None)
        for sequence in group.sequences:
            if sequence.state is not SequenceState.DONE:
                self.scheduler.finish(sequence)
        if group.timeline is not None:
            ended = replace(group.timeline, ended=time.time(), last_step=self.counters["steps"])
            event = replace(event, timeline=ended)
        self._events.append(event)

    def _fail(self, group: RequestGroup, error: PolyadaptError) -> None:
        self.counters["failed_requests"] += 1
        logger.info(
            "request %s failed: %s",
            group.request.id,
            error.message,
            extra=fields(generation=group.request.id, code=error.code),
        )
        self._end(group, Failed(group.request.id, error.code, error.message, error.param))

    def _expire(self) -> None:
        now = time.monotonic()
        for group in list(self._groups.values()):
            if group.deadline is not None and now > group.deadline:
                self.counters["timeouts"] += 1
                limit = group.request.timeout_s
                self._fail(group, RequestTimeout(f"the request did not end within {limit:g} s"))

    def _fail_unloadable(self) -> None:
        """Fail every waiting request whose adapters could not be read or do not fit, or have it
        served with what it names instead of adapters that cannot be had now.
        """
        errors = self.pool.take_failures()
        if not errors:
            return
        now = time.monotonic()
        for digests, reason in errors.items():
            for digest in digests:
                self._left_cold.fail(digest, reason, now)
        for group in list(self.scheduler.waiting_groups()):
            error = _error_for(group.adapters, errors)
            instead = group.request.when_cold.instead
            may_turn = instead is not None and _is_open(group)
            if (
                may_turn
                and isinstance(error, Unavailable)
                and not self.pool.is_hopeless(group.adapters)
            ):
                assert instead is not None
                group.turn()
                error = _error_for(instead, errors)
            elif error is None and instead and group.has_waited_enough(now):
                error = _error_for(instead, errors)
            if error is not None:
                self._fail(group, error)

    def _fail_refused(self) -> None:
        """Fail requests whose adapters cannot be used in the way that they ask for."""
        refused, self.scheduler.refused = self.scheduler.refused, []
        for group in refused:
            assert group.refusal is not None
            self._fail(group, group.refusal)

    def _fail_cold(self) -> None:
        """Fail requests that do not wait any longer for adapters that are not on the device.

        After the schedule: whoever had its turn has got a short copy made at once.
        """
        now = time.monotonic()
        for group in list(self._impatient.values()):
            if not group.has_waited_enough(now) or self.pool.are_on_device(group.adapters):
                continue
            self.counters["cold_failures"] += 1
            cold = [a for a in group.adapters if not self.pool.are_on_device([a])]
            self.scheduler.left_cold += cold
            known = self._left_cold.take_error(cold, now)
            if known is not None:  # it did not come, and "try again" would not be true
                self._fail(group, known)
                continue
            names = ", ".join(f"'{applied.adapter.name}'" for applied in cold)
            wait_ms = group.request.when_cold.wait_ms
            self._fail(
                group,
                AdapterCold(
                    f"not on the device within cold_timeout_ms {wait_ms:g}: {names}; they are "
                    "being loaded, try again"
                ),
            )

    def _bring_left_cold(self) -> None:
        """Go on loading what requests did not wait for, behind the queue's adapters."""
        now = time.monotonic()
        left, self.scheduler.left_cold = self.scheduler.left_cold, []
        self._left_cold.add(left, now)
        wanted = self._left_cold.wanted(now)
        waiting = self.scheduler.waiting
        if wanted and not (waiting and is_overdue(waiting[0].group)):  # as for those in the queue
            self.pool.prefetch(wanted)

    # ------------------------------------------------------------------ calls
    def _call(self, call: Call) -> None:
        if call.name in ("cancel_adapter", "unload"):  # nobody brings it back for those who left it
            self._left_cold.forget(call.digest)
            self.scheduler.left_cold = [
                left for left in self.scheduler.left_cold if left.adapter.digest != call.digest
            ]
        if call.name == "cancel_adapter":
            self._replies.append(Reply(call.id, count=self._cancel_adapter(call.digest)))
        elif call.name == "unload":
            self.pool.unload(call.digest, lambda: self._replies.append(Reply(call.id)))
        elif call.name == "prepare":
            self.pool.prepare(call.digest, lambda outcome: self._answer(call, outcome))
        else:
            self.pool.load(call.digest, call.is_pinned, lambda outcome: self._answer(call, outcome))

    def _answer(self, call: Call, outcome: Residency | PolyadaptError) -> None:
        if isinstance(outcome, Residency):
            self._replies.append(Reply(call.id, residency=outcome))
            return
        problems: tuple[tuple[str, str, str | None], ...] = ()
        if isinstance(outcome, AdapterRejected):
            problems = tuple((p.code, p.message, p.where) for p in outcome.problems)
        self._replies.append(
            Reply(
                call.id,
                error_code=outcome.code,
                error_message=outcome.message,
                problems=problems,
            )
        )

    def _cancel_adapter(self, digest: str) -> int:
        groups = [
            group for group in self._groups.values() if digest in _digests_held(group.request)
        ]
        for group in groups:
            self._fail(group, AdapterDeleted("the adapter was deleted while the request ran"))
        return len(groups)


def _pool(batch: list[ScheduledRows], hidden: torch.Tensor | None) -> None:
    """Add the rows of embedded sequences, which have not been counted as computed yet, to their
    sums; hidden [rows of the batch, width].

    Such a sequence finds nothing in the prefix cache: at 0 computed tokens it starts over.
    """
    if hidden is None:
        return
    start = 0
    for rows in batch:
        stop = start + rows.num_tokens
        sequence = rows.sequence
        if sequence.is_embedded:
            before = sequence.hidden_sum if sequence.num_computed else None
            sequence.hidden_sum = add_rows(before, hidden[start:stop])
        start = stop


def _is_open(group: RequestGroup) -> bool:
    """Whether it may still turn to what it names instead of its adapters."""
    return group.lanes is None and not group.has_turned


def _error_for(
    adapters: tuple[AppliedAdapter, ...], errors: dict[frozenset[str], PolyadaptError]
) -> PolyadaptError | None:
    """Why these adapters cannot be had together, if one of the errors says so."""
    asked = {applied.adapter.digest for applied in adapters}
    return next((error for digests, error in errors.items() if digests <= asked), None)


def _digests_held(request: Request) -> set[str]:
    """Every adapter whose use the caller counts until the request ends."""
    named = (*request.adapters, *(request.when_cold.instead or ()))
    return {applied.adapter.digest for applied in named}


@dataclass(slots=True)
class _Choice:
    """A sequence's next tokens: one, and one more for every draft that was right."""

    tokens: list[Sampled] = field(default_factory=list)
    num_accepted: int = 0
    finish_reason: FinishReason | None = None  # of the last token
    stop_token_id: int | None = None
    is_finite: bool = True


NewEngine = Callable[[Callable[[], None]], Engine]
