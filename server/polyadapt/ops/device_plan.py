"""A plan on a device, as the kernels read it: chunks of at most CHUNK rows of one segment.

    int32: num chunks and gate width of each lane, padding | chunks of lane 0, 1, ... | rows
A chunk is (where its rows begin in here, how many they are, slot, the float32 bits of the scale).
The heads of all lanes and the chunks of lane 0 never move, so that a launch that was captured for
more chunks than there are reads its own end. One copy brings all of it, besides the gates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from polyadapt.ops.device import Device
from polyadapt.ops.pinned_buffers import PinnedBuffers
from polyadapt.ops.slot_table import SlotTable
from polyadapt.types import MAX_ADAPTERS

if TYPE_CHECKING:
    from polyadapt.ops.plan import BatchPlan, Lane

# Rows of one program. Always as many, whatever the batch: a row's sums are then made by the same
# instructions beside any neighbours. 16 is the least that a matrix instruction takes.
CHUNK = 16
COLUMNS = 4  # of a chunk
FIRST_CHUNK = 16  # position of lane 0's: behind MAX_ADAPTERS heads of 2, and aligned for loads
assert 2 * MAX_ADAPTERS <= FIRST_CHUNK

# A captured launch reads gates up to so many columns wide for every row; what is wider runs
# eagerly.
GATE_WIDTH = 64

# A captured launch has programs and scratch for ranks up to one of these.
_RANK_BUCKETS = (16, 64, 256, 1024)


@dataclass(frozen=True, slots=True)
class Work:
    """One lane for the kernels.

    plan int32: the whole of the above. gate float32, flat: gate[row * width + component], and
    nothing of it is read where the head says 0. num_chunks, max_rank: at most so many, and of such
    rank, are in the plan when the launch runs. is_routed: some of its cells are left to the torch
    form. is_fixed: all that the kernels read lies where a captured launch expects it.
    """

    plan: torch.Tensor
    gate: torch.Tensor
    lane: int
    first_chunk: int
    num_chunks: int
    max_rank: int
    is_routed: bool
    is_fixed: bool


@dataclass(frozen=True, slots=True)
class Placed:
    """What one lane of a plan became: gate and table [rows, width] on the device, or None; work is
    None where no kernel serves.
    """

    gate: torch.Tensor | None
    table: torch.Tensor | None
    work: Work | None


class DevicePlan:
    """The buffers of one row space on a device. They live as long as the engine."""

    def __init__(self, max_rows: int, device: Device, slots: SlotTable | None) -> None:
        """slots: whose cells the kernels serve; None: no kernel serves, the torch form does."""
        self._slots = slots
        self._device = device.torch_device
        num = max_rows * MAX_ADAPTERS
        self._plan = torch.zeros(
            FIRST_CHUNK + num * (COLUMNS + 1), dtype=torch.int32, device=self._device
        )
        # Of lane 0, the only one that a captured launch serves.
        num_fixed = max_rows * GATE_WIDTH if slots is not None else 1
        self._gate = torch.ones(num_fixed, dtype=torch.float32, device=self._device)
        self._pinned = PinnedBuffers(device)
        self.rows = self._plan[:0]  # int32, all lanes end to end; another view after every load

    def load(self, plan: BatchPlan) -> list[Placed]:
        """Copy the plan in, lane by lane. The host goes on before the copy is done."""
        if not plan.lanes:
            self.rows = self._plan[:0]
            return []
        tables = [_cut(lane) for lane in plan.lanes] if self._slots is not None else []
        num_chunks = [len(table) for table in tables] or [0] * len(plan.lanes)
        first_row = FIRST_CHUNK + COLUMNS * sum(num_chunks)
        num_rows = sum(len(lane.rows) for lane in plan.lanes)
        by_row = [values for lane in plan.lanes for values in (lane.gate, lane.table)]
        num_floats = sum(values.size for values in by_row if values is not None)
        size = first_row + num_rows
        with self._pinned.turn(4 * (size + num_floats)) as buffer:
            ints = buffer.view(torch.int32)
            staged = ints.numpy()
            staged[:FIRST_CHUNK] = 0
            at, row = FIRST_CHUNK, first_row
            for lane_id, lane in enumerate(plan.lanes):
                width = 0 if lane.gate is None else lane.gate.shape[1]
                staged[2 * lane_id : 2 * lane_id + 2] = num_chunks[lane_id], width
                staged[row : row + len(lane.rows)] = lane.rows
                if tables:
                    tables[lane_id][:, 0] += row
                    stop = at + COLUMNS * num_chunks[lane_id]
                    staged[at:stop] = tables[lane_id].ravel()
                    at = stop
                row += len(lane.rows)
            self._plan[:size].copy_(ints[:size], non_blocking=True)
            self.rows = self._plan[first_row:size]
            floats = _Floats(buffer.view(torch.float32), size, self._device)
            placed, at = [], FIRST_CHUNK
            for lane_id, lane in enumerate(plan.lanes):
                fixed = self._gate if lane_id == 0 else None
                gate = None if lane.gate is None else floats.send(lane.gate, fixed)
                table = None if lane.table is None else floats.send(lane.table, None)
                work = self._work(lane, lane_id, at, num_chunks[lane_id], gate)
                placed.append(Placed(gate, table, work))
                at += COLUMNS * num_chunks[lane_id]
        return placed

    def widened(self, work: Work, num_rows: int) -> Work:
        """The work of lane 0 as a launch has to be captured with: of as many chunks as there may be
        with so many rows, and of any rank of the same bucket.
        """
        assert work.is_fixed, "a captured launch would read what moves"
        rank = rank_bucket(work.max_rank)
        return replace(work, gate=self._gate, num_chunks=num_rows, max_rank=rank)

    def _work(
        self, lane: Lane, lane_id: int, at: int, num_chunks: int, gate: torch.Tensor | None
    ) -> Work | None:
        if self._slots is None:
            return None
        is_gate_fixed = gate is None or gate.data_ptr() == self._gate.data_ptr()
        flat = self._gate if gate is None else gate.view(-1)
        return Work(
            self._plan, flat, lane_id, at, num_chunks,
            max_rank=int(self._slots.max_ranks[lane.slots].max(initial=0)),
            is_routed=bool(self._slots.is_routed[lane.slots].any()),
            is_fixed=lane_id == 0 and is_gate_fixed,
        )  # fmt: skip


def rank_bucket(rank: int) -> int:
    """The least rank, of a few, that a launch is captured for and that is enough for `rank`."""
    for bucket in _RANK_BUCKETS:
        if rank <= bucket:
            return bucket
    return -(-rank // _RANK_BUCKETS[-1]) * _RANK_BUCKETS[-1]


def _cut(lane: Lane) -> np.ndarray:
    """The lane's chunks, int32 [num_chunks, COLUMNS], their rows counted from the lane's first."""
    starts, stops = lane.bounds[:-1].astype(np.int64), lane.bounds[1:].astype(np.int64)
    counts = -(-(stops - starts) // CHUNK)
    segment_of = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(segment_of)) - (np.cumsum(counts) - counts)[segment_of]
    firsts = starts[segment_of] + CHUNK * within
    chunks = np.empty((len(segment_of), COLUMNS), np.int32)
    chunks[:, 0] = firsts
    chunks[:, 1] = np.minimum(stops[segment_of] - firsts, CHUNK)
    chunks[:, 2] = lane.slots[segment_of]
    chunks[:, 3] = lane.scales[segment_of].view(np.int32)
    return chunks


class _Floats:
    """What is indexed by row, on its way through the staging buffer from element `at` on."""

    def __init__(self, buffer: torch.Tensor, at: int, device: torch.device) -> None:
        self._buffer = buffer
        self._at = at
        self._device = device

    def send(self, values: np.ndarray, fixed: torch.Tensor | None) -> torch.Tensor:
        """values [rows, width] on the device: at the beginning of `fixed` if they fit there."""
        staged = self._buffer[self._at : self._at + values.size]
        self._at += values.size
        staged.numpy()[:] = values.ravel()
        if fixed is not None and values.size <= len(fixed):
            target = fixed[: values.size]
        else:
            target = torch.empty(values.size, dtype=torch.float32, device=self._device)
        target.copy_(staged, non_blocking=True)
        return target.view(values.shape)
