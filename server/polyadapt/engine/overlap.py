"""Keeps one step in flight: the next one is scheduled and enqueued before its tokens are read.

For devices that compute while the host goes on. A step that needs to know them on the host reads
the tokens in flight first, and whatever cannot be sampled on the device is run as without overlap.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Literal, Protocol

from polyadapt.engine.device_sampler import DeviceSampler, is_penalised
from polyadapt.engine.device_tokens import DeviceTokens
from polyadapt.engine.request import Sequence, SequenceState
from polyadapt.engine.runner import ModelRunner
from polyadapt.engine.sampler import Sampled
from polyadapt.engine.scheduler import MustRead, ScheduledRows, Scheduler
from polyadapt.ops.device import Device, Mark

logger = logging.getLogger(__name__)

# Why tokens in flight were read before the next step was enqueued.
Reason = Literal[
    "drafts",  # guesses are looked up in the text
    "preemption",  # pages of a sequence in flight would be given to others
    "penalties",  # they count the newest token
    "watermark",  # its context ends with the newest token, and may have been there before
    "first_pass",  # what weighs a main's experts is kept on the host
    "embedding",  # hidden states are summed on the host
    "prompt_logprobs",  # a row per prompt token, scored one by one
    "failure",  # whose fault it is shows when each sequence is run alone
]
REASONS: tuple[Reason, ...] = (
    "drafts", "preemption", "penalties", "watermark", "first_pass", "embedding",
    "prompt_logprobs", "failure",
)  # fmt: skip


class Steps(Protocol):
    """What the engine does with a step."""

    def run_now(self, batch: list[ScheduledRows]) -> None:
        """Compute the rows and take in what comes of them before it returns."""

    def observe(self, batch: list[ScheduledRows]) -> None:
        """Count a step that somebody else computes."""

    def end_tokens(self, sequence: Sequence) -> tuple[int, ...]:
        """The tokens that end it."""

    def take(self, sequence: Sequence, position: int, sampled: Sampled | None) -> None:
        """Take in the token of a position; None where the logits were not finite. May end it."""


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that is enqueued. sampled: of each token's sequence, and which position it takes."""

    batch: list[ScheduledRows]
    sampled: list[tuple[Sequence, int]]
    tokens: DeviceTokens | None  # None where nothing is sampled
    mark: Mark


class Overlap:
    """Owns the step in flight.

    In flight a sequence's rows count as computed (`num_unread` of them) and its newest token is
    ~row of the step's tokens; without one where that token is the last that it may have. Whoever
    ends while it has rows in flight keeps its pages and leases until that step is read.
    """

    def __init__(
        self,
        device: Device,
        scheduler: Scheduler,
        runner: ModelRunner,
        steps: Steps,
        counters: Counter[str],
        *,
        max_model_len: int,
    ) -> None:
        self._device = device
        self._scheduler = scheduler
        self._runner = runner
        self._steps = steps
        self._counters = counters
        self._max_model_len = max_model_len
        self._sampler = DeviceSampler(device)
        self._flight: _Flight | None = None
        for name in ("overlapped_steps", *(f"drained_by_{reason}" for reason in REASONS)):
            counters[name] += 0  # listed from the start

    @property
    def is_busy(self) -> bool:
        """Whether a step is in flight."""
        return self._flight is not None

    def schedule(self) -> list[ScheduledRows]:
        """The next step's rows; empty only when nothing is in flight."""
        try:
            batch = self._scheduler.schedule()
        except MustRead as must:
            self._drain(must.reason)
            return self._scheduler.schedule()
        if not batch and self._flight is not None:  # there is nothing to compute meanwhile
            self._land()
            batch = self._scheduler.schedule()
        return batch

    def run(self, batch: list[ScheduledRows]) -> list[ScheduledRows]:
        """Enqueue the rows, then read the step before; returns the rows that were run."""
        if not batch:
            self._land()
            return batch
        reason, is_sampled_here = _reason(batch)
        if reason is not None:
            self._drain(reason)
            batch = _still_running(batch)
        flight = None
        if is_sampled_here and batch:
            try:
                flight = self._launch(batch)
            except Exception:
                logger.exception("enqueueing %d sequences failed; running them now", len(batch))
                self._drain("failure")
                batch = _still_running(batch)
        if flight is None:
            if batch:
                self._steps.run_now(batch)
            return batch
        self._steps.observe(batch)
        before, self._flight = self._flight, flight
        self._scheduler.in_flight = {rows.sequence for rows in batch}
        if before is not None:
            self._counters["overlapped_steps"] += 1
            self._read(before)
        return batch

    def _drain(self, reason: Reason) -> None:
        if self._flight is not None:
            self._counters[f"drained_by_{reason}"] += 1
            self._land()

    def _land(self) -> None:
        """Read the step in flight with none behind it."""
        if self._flight is not None:
            flight, self._flight = self._flight, None
            self._read(flight, is_last=True)

    def _launch(self, batch: list[ScheduledRows]) -> _Flight:
        """Enqueue the forward and the sampling; nothing changes on the host if that raises."""
        previous = self._flight.tokens if self._flight is not None else None
        logits = self._runner.run(batch, previous)
        pairs = zip(batch, logits.counts, strict=True)
        sequences = [rows.sequence for rows, count in pairs if count]
        tokens = None
        if sequences:
            assert max(logits.counts) == 1, "every row of logits is sampled from"
            ends = [self._steps.end_tokens(sequence) for sequence in sequences]
            tokens = self._sampler.sample(logits.table, sequences, ends)
        sampled = []
        for rows in batch:
            rows.sequence.num_computed += rows.num_tokens
            rows.sequence.num_unread += rows.num_tokens
        for row, sequence in enumerate(sequences):
            sampled.append((sequence, len(sequence.token_ids)))
            if self._goes_on(sequence):
                sequence.token_ids.append(~row)
        return _Flight(batch, sampled, tokens, self._device.mark())

    def _goes_on(self, sequence: Sequence) -> bool:
        """Whether another token may follow the one that is being sampled."""
        is_last = sequence.num_output + 1 >= sequence.group.request.sampling.max_tokens
        return not is_last and len(sequence.token_ids) + 1 < self._max_model_len

    def _read(self, flight: _Flight, *, is_last: bool = False) -> None:
        """Wait for a step and take in its tokens. is_last: no other is in flight."""
        flight.mark.wait()
        tokens = flight.tokens.read() if flight.tokens is not None else []
        chosen = list(zip(flight.sampled, tokens, strict=True))
        failed = {sequence for (sequence, _), sampled in chosen if sampled is None}
        for rows in flight.batch:
            sequence = rows.sequence
            if sequence.num_unread and sequence not in failed:  # 0: it is distrusted
                sequence.num_unread -= rows.num_tokens
        # Nobody of the step that is in flight now has left yet: it was scheduled afterwards.
        self._scheduler.release_left()
        if is_last:
            self._scheduler.in_flight = set()
        for (sequence, position), sampled in chosen:
            if sequence.state is SequenceState.RUNNING:
                self._steps.take(sequence, position, sampled)


def _reason(batch: list[ScheduledRows]) -> tuple[Reason | None, bool]:
    """Why tokens in flight have to be read first, if so, and whether the step can be sampled on
    the device.
    """
    reason: Reason | None = None
    for rows in batch:
        sequence = rows.sequence
        if rows.drafts:
            return "drafts", False
        if sequence.group.is_probed:
            return "first_pass", False
        if sequence.is_embedded:
            return "embedding", False
        params = sequence.group.request.sampling
        if params.num_prompt_logprobs is not None and not sequence.is_scored:
            return "prompt_logprobs", False
        mark = sequence.group.request.text_mark
        if mark is not None and mark.settings.is_lefthash:
            return "watermark", False
        if sequence.token_ids[-1] < 0 and (mark is not None or is_penalised(params)):
            reason = "penalties" if mark is None else "watermark"
    return reason, True


def _still_running(batch: list[ScheduledRows]) -> list[ScheduledRows]:
    return [rows for rows in batch if rows.sequence.state is SequenceState.RUNNING]
