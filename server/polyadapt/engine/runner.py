"""One forward of the wrapped model for the rows that the scheduler picked. Knows no queue and no
sampling.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from polyadapt.engine.device_tokens import DeviceTokens
from polyadapt.engine.forward import Forward, StepInputs
from polyadapt.engine.request import Sequence
from polyadapt.engine.scheduler import ScheduledRows
from polyadapt.models.base import BaseModel
from polyadapt.ops.plan import BatchPlan, PlanBuffers, Runs, plan_of
from polyadapt.ops.strategy import Strategy


@dataclass(frozen=True, slots=True)
class StepLogits:
    """The logits of one step, sequence by sequence: iterating yields tensors [k, vocabulary].

    table [rows, vocabulary] holds them end to end, counts[i] rows for sequence i. hidden [step's
    rows, width] are the final hidden states, which the head reads, of all rows in the batch's
    order; None where no sequence wants them.
    """

    table: torch.Tensor
    counts: list[int]
    hidden: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.counts)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.split(self.table, self.counts))


class ModelRunner:
    """Turns scheduled rows into logits; owns the plan buffers of both row spaces.

    The head sees only the rows whose logits are wanted, so it has a plan of its own.
    """

    def __init__(
        self,
        base: BaseModel,
        tokens: PlanBuffers,
        outputs: PlanBuffers,
        page_size: int,
        strategy: Strategy,
        ranks: np.ndarray,
        forward: Forward,
    ) -> None:
        """ranks int64 [num_slots]: the largest of the adapter in each slot, kept by the pool."""
        self.base = base
        self.strategy = strategy
        self._ranks = ranks
        self.tokens = tokens
        self.outputs = outputs
        self.page_size = page_size
        self.num_override_steps = 0  # in which a segment needed more than the gated product
        self.forward = forward
        self._page_table = PageTable()
        self._planned: tuple[object, ...] = ()  # what the plans below were made for
        self._plans = BatchPlan(0), BatchPlan(0)

    @property
    def num_native_steps(self) -> int:
        """Steps whose decoder layers were one native call each."""
        return self.base.step.num_steps if self.base.step is not None else 0

    @torch.inference_mode()
    def run(self, batch: Seq[ScheduledRows], previous: DeviceTokens | None = None) -> StepLogits:
        """Compute the rows, writing their keys and values; returns logits [k, vocabulary] per
        sequence.

        k is 0 for a chunk that does not reach the sequence's newest token, 1 otherwise, and one per
        row where prompt logprobs are wanted; drafts have a row each besides. The dtype is the
        model's. A token ~i of a sequence is that of row i of `previous`, not read yet.
        """
        sequences = [rows.sequence for rows in batch]
        step, counts = self._inputs(batch, sequences)
        num_outputs = (
            step.lengths
            if len(step.keep) == len(step.starts) == len(step.ids)
            else np.array(counts)
        )
        self._load_plans(sequences, step.lengths, num_outputs)
        self.num_override_steps += bool(self.tokens.overrides or self.outputs.overrides)
        try:
            logits, hidden = self.forward.run(step, previous)
        finally:
            self.tokens.clear()
            self.outputs.clear()
        is_wanted = any(sequence.wants_hidden for sequence in sequences)
        return StepLogits(logits, counts, hidden[: len(step.ids)] if is_wanted else None)

    def _inputs(
        self, batch: Seq[ScheduledRows], sequences: list[Sequence]
    ) -> tuple[StepInputs, list[int]]:
        """The step's arrays, and how many logits each sequence gets."""
        num_tokens = [rows.num_tokens for rows in batch]
        num = num_tokens.count(1)  # they come first
        decodes = sequences[:num]
        if num == len(batch):
            lengths, starts = np.ones(num, np.int64), np.arange(num)
        else:
            lengths = np.array(num_tokens, np.int64)
            starts = np.cumsum(lengths) - lengths
        ids, positions = _inputs(batch, decodes)
        table = self._page_table.of(sequences)
        kv_lens = positions[starts + lengths - 1] + 1
        pages, offsets = np.divmod(positions, self.page_size)
        row_of = starts if num == len(batch) else np.repeat(np.arange(len(batch)), lengths)
        keep, counts = _wanted(batch, decodes, starts)
        step = StepInputs(
            ids=ids,
            positions=positions,
            write_slots=table[row_of, pages].astype(np.int64) * self.page_size + offsets,
            starts=starts,
            lengths=lengths,
            kv_lens=kv_lens,
            page_table=table,
            num_decodes=num,
            keep=keep,
        )
        return step, counts

    def _load_plans(
        self, sequences: list[Sequence], lengths: np.ndarray, num_outputs: np.ndarray
    ) -> None:
        """Load the plans of both row spaces; lengths and num_outputs are int64 [sequences].

        Decoding goes on with the same sequences for many steps, and with the same plans.
        """
        slots = [sequence.slots for sequence in sequences]
        idle = _idle_rows(sequences, lengths)
        # A sequence keeps its scales and weights once it runs; its slots may change.
        planned = (sequences, slots, idle, lengths.tobytes(), num_outputs.tobytes())
        is_probed = any(sequence.group.is_probed for sequence in sequences)
        if planned != self._planned:
            limit = self.strategy.gemm_rows(self._ranks)
            self._plans = _plans(sequences, lengths, num_outputs, idle, limit, is_probed=is_probed)
            # What weighs experts is another in every step.
            self._planned = () if is_probed else planned
        tokens, outputs = self._plans
        self.tokens.load(tokens)
        self.outputs.load(outputs)


class PageTable:
    """The page ids of decoding sequences in one array, of which a step rewrites what has changed.

    Nobody reports changes: a row is compared with the sequence's own list.
    """

    def __init__(self) -> None:
        self._table = np.zeros((0, 0), np.int32)
        self._row_of: dict[Sequence, int] = {}
        self._asked: Seq[Sequence] = ()  # the last sequences, whose rows are `_rows`
        self._rows: list[int] = []
        self._index = np.zeros(0, np.int64)  # the same rows
        self._pages: list[list[int]] = []  # what each row of the table holds

    def of(self, sequences: Seq[Sequence]) -> np.ndarray:
        """Page ids int32 [sequences, widest], a copy; behind a sequence's last page anything."""
        all_pages = [sequence.pages for sequence in sequences]
        width = max(map(len, all_pages))
        self._fit(len(sequences), width)
        if sequences != self._asked:  # decoding goes on with the same ones for many steps
            self._rows = self._assign(sequences)
            self._asked, self._index = list(sequences), np.array(self._rows)
        table, held = self._table, self._pages
        for row, pages in zip(self._rows, all_pages, strict=True):
            if held[row] != pages:
                table[row, : len(pages)] = pages
                held[row] = pages.copy()
        return table[self._index, :width]

    def _fit(self, num_rows: int, width: int) -> None:
        """Grow by doubling; nothing that the table holds is lost."""
        has_rows, has_width = self._table.shape
        if num_rows > has_rows or width > has_width:
            shape = (
                max(has_rows, 2 * num_rows if num_rows > has_rows else 0),
                max(has_width, 2 * width if width > has_width else 0),
            )
            table = np.zeros(shape, np.int32)
            table[:has_rows, :has_width] = self._table
            self._table = table
            self._pages += [[] for _ in range(shape[0] - has_rows)]

    def _assign(self, sequences: Seq[Sequence]) -> list[int]:
        """Give every sequence a row; the rows of those that are not here are free for newcomers."""
        kept = {of: self._row_of[of] for of in sequences if of in self._row_of}
        free = sorted(set(range(len(self._pages))) - set(kept.values()), reverse=True)
        self._row_of = {of: kept[of] if of in kept else free.pop() for of in sequences}
        return [self._row_of[of] for of in sequences]


# Place in the batch -> lane by lane the rows before the first that its adapter acts on, and those
# behind the last one.
_Idle = dict[int, tuple[tuple[int, int], ...]]


def _idle_rows(sequences: Seq[Sequence], lengths: np.ndarray) -> _Idle:
    """How many of a sequence's first and last rows its adapters leave alone, where any do."""
    found: _Idle = {}
    for i in [i for i, sequence in enumerate(sequences) if sequence.group.is_gated]:
        length, position = int(lengths[i]), sequences[i].num_computed
        found[i] = tuple(
            (
                min(max(lane.first - position, 0), length),
                min(max(position + length - lane.stop, 0), length),
            )
            for lane in sequences[i].lanes
        )
    return found


def _plans(
    sequences: Seq[Sequence],
    lengths: np.ndarray,
    num_outputs: np.ndarray,
    idle: _Idle,
    gemm_rows: int | np.ndarray,
    *,
    is_probed: bool = False,
) -> tuple[BatchPlan, BatchPlan]:
    """The plans of tokens and of outputs; lengths and num_outputs are int64 [sequences], and a
    sequence's outputs are its last rows. is_probed: whether tables weigh the experts of any.
    """
    ends, out_ends = np.cumsum(lengths), np.cumsum(num_outputs)
    # Positions behind the last row of each sequence.
    stops = lengths + [of.num_computed for of in sequences] if is_probed else None
    num_rows, num_kept = int(ends[-1]), int(out_ends[-1])
    token_lanes, output_lanes = _Lanes(num_rows), _Lanes(max(num_kept, 1))
    for lane_id in range(max(len(sequence.slots) for sequence in sequences)):
        members = [i for i, sequence in enumerate(sequences) if len(sequence.slots) > lane_id]
        at = np.array(members, np.int64)
        own, out = lengths[at], num_outputs[at]
        before = behind = np.zeros(len(members), np.int64)
        if idle:
            pairs = [idle[i][lane_id] if i in idle else (0, 0) for i in members]
            before, behind = np.array(pairs, np.int64).T
        served = [sequences[i] for i in members]
        own_stops = None if stops is None else stops[at] - behind
        token_lanes.add(lane_id, served, ends[at] - behind, own - before - behind, own_stops)
        # Of the last `out` rows those that are neither before nor behind.
        num_own = np.maximum(np.minimum(out, own - before) - behind, 0)
        output_lanes.add(lane_id, served, out_ends[at] - behind, num_own, own_stops)
    tokens = token_lanes.plan(gemm_rows)
    # Where every row has one output both row spaces are the same.
    is_same = num_kept == num_rows == len(sequences) and bool((num_outputs == 1).all())
    return tokens, tokens if is_same else output_lanes.plan(gemm_rows)


class _Lanes:
    """The lanes of one row space of num_rows rows, one after the other."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._runs: list[Runs] = []
        self._gates: list[np.ndarray | None] = []
        self._tables: list[np.ndarray | None] = []

    def add(
        self,
        lane_id: int,
        served: list[Sequence],
        ends: np.ndarray,
        lengths: np.ndarray,
        stops: np.ndarray | None,
    ) -> None:
        """Add a lane: of each sequence the `lengths` rows before `ends`, int64 [sequences], which
        are the tokens before the positions `stops`; None: no table weighs anybody's experts.
        """
        if not lengths.all():
            kept = lengths > 0
            served = [of for of, is_kept in zip(served, kept.tolist(), strict=True) if is_kept]
            ends, lengths = ends[kept], lengths[kept]
            stops = None if stops is None else stops[kept]
        slots = np.array([of.slots[lane_id] for of in served], np.int64)
        scales = np.array([of.lanes[lane_id].applied.scale for of in served], np.float64)
        self._runs.append(Runs(ends - lengths, lengths, slots, scales))
        self._gates.append(self._gate(lane_id, served, ends, lengths))
        table = None if stops is None else self._table(lane_id, served, ends, lengths, stops)
        self._tables.append(table)

    def plan(self, gemm_rows: int | np.ndarray) -> BatchPlan:
        """The plan of all of them."""
        return plan_of(self._runs, self._num_rows, self._gates, gemm_rows, self._tables)

    def _gate(
        self, lane_id: int, served: list[Sequence], ends: np.ndarray, lengths: np.ndarray
    ) -> np.ndarray | None:
        """float32 [rows, widest], ones where nobody has weights; None where nobody has any."""
        weights = [of.lanes[lane_id].weights for of in served]
        width = max(map(len, weights), default=0)
        if width == 0:
            return None
        table = np.ones((self._num_rows, width), np.float32)
        for own, end, length in zip(weights, ends.tolist(), lengths.tolist(), strict=True):
            table[end - length : end, : len(own)] = own
        return table

    def _table(
        self,
        lane_id: int,
        served: list[Sequence],
        ends: np.ndarray,
        lengths: np.ndarray,
        stops: np.ndarray,
    ) -> np.ndarray | None:
        """float32 [rows, widest], zeros where nobody is weighed; None where nobody is anywhere."""
        spans = zip(served, ends.tolist(), lengths.tolist(), stops.tolist(), strict=True)
        given = [
            (end - length, end, of.weights_at(lane_id, stop - length, stop))
            for of, end, length, stop in spans
            if of.lanes[lane_id].probing is not None
        ]
        width = max((weights.shape[1] for _, _, weights in given), default=0)
        if width == 0:
            return None
        table = np.zeros((self._num_rows, width), np.float32)
        for start, end, weights in given:
            table[start:end, : weights.shape[1]] = weights
        return table


def _inputs(batch: Seq[ScheduledRows], decodes: list[Sequence]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and positions int64 [rows], packed in the batch's order, decode rows first."""
    firsts = [sequence.num_computed for sequence in decodes]
    ids = [of.token_ids[first] for of, first in zip(decodes, firsts, strict=True)]
    positions = [np.array(firsts, np.int64)]
    for rows in batch[len(decodes) :]:
        first = rows.sequence.num_computed
        ids += rows.sequence.token_ids[first : first + rows.num_tokens]
        ids += rows.drafts
        positions.append(np.arange(first, first + rows.num_tokens))
    return np.array(ids, np.int64), np.concatenate(positions)


def _wanted(
    batch: Seq[ScheduledRows], decodes: list[Sequence], starts: np.ndarray
) -> tuple[np.ndarray, list[int]]:
    """Indices int64 of the rows that need logits, and how many they are per sequence."""
    # Behind its prompt a sequence's only pending token is sampled from, and nothing is scored.
    if len(decodes) == len(batch) and all(
        len(of.token_ids) - 1 == of.num_computed >= of.num_prompt and of.main is None
        for of in decodes
    ):
        return starts, [1] * len(batch)
    wanted = [_wanted_rows(rows) for rows in batch]
    keep = np.concatenate([start + rows for start, rows in zip(starts, wanted, strict=True)])
    return keep, [len(rows) for rows in wanted]


def _wanted_rows(rows: ScheduledRows) -> np.ndarray:
    """Which of the sequence's rows, counted from 0, need logits."""
    if rows.sequence.main is not None:  # of a scout the hidden states are read
        return np.arange(0)
    sequence = rows.sequence
    if sequence.is_embedded:
        return np.arange(0)
    is_scored = sequence.group.request.sampling.num_prompt_logprobs is not None
    if is_scored and sequence.num_computed < sequence.num_prompt and not sequence.is_scored:
        return np.arange(rows.num_tokens)
    return np.arange(rows.num_tokens - len(rows.drafts) - rows.is_last_chunk, rows.num_tokens)
