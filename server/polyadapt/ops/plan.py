"""Which rows of a step belong to which resident adapter: the host plan and its fixed buffers.

A plan knows slots, never names or families. The buffers live as long as the engine and keep
their addresses, so that compiled or captured code may hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from polyadapt.ops import cells as layout
from polyadapt.ops.device_plan import DevicePlan, Placed, Work, rank_bucket
from polyadapt.ops.routing import note_usage
from polyadapt.types import MAX_ADAPTERS

MAX_LANES = MAX_ADAPTERS

# From this many rows of one adapter on two plain GEMMs may serve them; ops/strategy.py decides.
GEMM_MIN_ROWS = 256


@dataclass(frozen=True, slots=True)
class RowUse:
    """Adapters of one run of neighbouring rows [start, stop), lane by lane."""

    start: int
    stop: int
    slots: tuple[int, ...]
    scales: tuple[float, ...]
    gates: tuple[np.ndarray | None, ...] = ()  # per lane: [rank] float32, absent when all ones
    # Per lane [stop - start, width] float32, for cells whose router is TABLE.
    tables: tuple[np.ndarray | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Lane:
    """One adapter per row at most: rows sorted by adapter, cut into segments.

    rows [num_rows] int32; segment s holds rows[bounds[s]:bounds[s+1]], served by slots[s] times
    scales[s]; the first num_short segments are shorter than the plan's limit for GEMMs.
    gate [num_batch_rows, width] float32 is indexed by row, not by position; None means ones. table
    [num_batch_rows, width] float32 likewise: what weighs components whose router is TABLE.
    """

    rows: np.ndarray
    bounds: np.ndarray
    slots: np.ndarray
    scales: np.ndarray
    num_short: int
    gate: np.ndarray | None = None
    table: np.ndarray | None = None

    @property
    def num_segments(self) -> int:
        """How many segments the lane has."""
        return len(self.slots)


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The lanes of one row space; rows of the base alone are in no lane."""

    num_rows: int
    lanes: tuple[Lane, ...] = ()


@dataclass(frozen=True, slots=True)
class Runs:
    """One lane's runs of neighbouring rows as arrays [num_runs], in the order of their rows.

    starts and lengths int64, slots int64, scales float64; a run of scale 0 is left out of the plan.
    """

    starts: np.ndarray
    lengths: np.ndarray
    slots: np.ndarray
    scales: np.ndarray


def build_plan(uses: Sequence[RowUse], num_rows: int) -> BatchPlan:
    """Sort the runs of each lane by (slot, scale) and cut them into segments.

    Runs with no adapter may be left out. Scale 0 drops the adapter from the plan, so that it
    equals the base exactly.
    """
    num_lanes = max((len(use.slots) for use in uses), default=0)
    runs, gates, tables = [], [], []
    for lane_id in range(num_lanes):
        members = [use for use in uses if len(use.slots) > lane_id and use.scales[lane_id] != 0.0]
        runs.append(
            Runs(
                np.array([use.start for use in members], np.int64),
                np.array([use.stop - use.start for use in members], np.int64),
                np.array([use.slots[lane_id] for use in members], np.int64),
                np.array([use.scales[lane_id] for use in members], np.float64),
            )
        )
        gates.append(_build_gate(members, lane_id, num_rows))
        tables.append(_build_table(members, lane_id, num_rows))
    return plan_of(runs, num_rows, gates, tables=tables)


def plan_of(
    lanes: Sequence[Runs],
    num_rows: int,
    gates: Sequence[np.ndarray | None] = (),
    gemm_rows: int | np.ndarray = GEMM_MIN_ROWS,
    tables: Sequence[np.ndarray | None] = (),
) -> BatchPlan:
    """Return the plan of runs that are given as arrays, lane by lane; `gates` and `tables` are the
    lanes'.

    Segments of `gemm_rows` rows and more are left to GEMMs; an array has a limit per slot.
    Raises ValueError for more than MAX_LANES lanes.
    """
    if len(lanes) > MAX_LANES:
        raise ValueError(
            f"a request uses {len(lanes)} adapters, at most {MAX_LANES} are served together"
        )
    built = []
    for lane_id, runs in enumerate(lanes):
        if not runs.scales.all():
            runs = _only(runs, runs.scales != 0.0)
        if len(runs.slots):
            gate = gates[lane_id] if gates else None
            table = tables[lane_id] if tables else None
            built.append(_build_lane(runs, gate, table, gemm_rows))
    return BatchPlan(num_rows, tuple(built))


def _build_lane(
    runs: Runs, gate: np.ndarray | None, table: np.ndarray | None, gemm_rows: int | np.ndarray
) -> Lane:
    order = np.lexsort((runs.scales, runs.slots))  # stable: runs of a segment keep their order
    slots, scales, lengths = runs.slots[order], runs.scales[order], runs.lengths[order]
    is_first = np.ones(len(order), np.bool_)
    is_first[1:] = (slots[1:] != slots[:-1]) | (scales[1:] != scales[:-1])
    firsts = np.flatnonzero(is_first)
    sizes = np.add.reduceat(lengths, firsts)  # rows of each segment
    is_long = sizes >= (gemm_rows if isinstance(gemm_rows, int) else gemm_rows[slots[firsts]])
    num_short = len(sizes) - int(np.count_nonzero(is_long))
    if num_short < len(sizes):
        segments = np.argsort(is_long, kind="stable")
        runs_of = np.diff(firsts, append=len(order))[segments]
        order = order[_ranges(firsts[segments], runs_of)]
        firsts, sizes = firsts[segments], sizes[segments]
        lengths = runs.lengths[order]
    rows = runs.starts[order]
    if len(rows) < sizes.sum():  # some run is longer than one row
        rows = _ranges(rows, lengths)
    bounds = np.zeros(len(sizes) + 1, np.int32)
    np.cumsum(sizes, out=bounds[1:])
    return Lane(
        rows.astype(np.int32), bounds, slots[firsts].astype(np.int32),
        scales[firsts].astype(np.float32), num_short, gate, table,
    )  # fmt: skip


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """All of start..start+length-1, range after range."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1])


def _only(runs: Runs, kept: np.ndarray) -> Runs:
    return Runs(runs.starts[kept], runs.lengths[kept], runs.slots[kept], runs.scales[kept])


def _build_gate(members: list[RowUse], lane_id: int, num_rows: int) -> np.ndarray | None:
    gated = [(use, use.gates[lane_id]) for use in members if len(use.gates) > lane_id]
    width = max((len(gate) for _, gate in gated if gate is not None), default=0)
    if width == 0:
        return None
    table = np.ones((num_rows, width), np.float32)
    for use, gate in gated:
        if gate is not None:
            table[use.start : use.stop, : len(gate)] = gate
    return table


def _build_table(members: list[RowUse], lane_id: int, num_rows: int) -> np.ndarray | None:
    given = [(use, use.tables[lane_id]) for use in members if len(use.tables) > lane_id]
    width = max((values.shape[1] for _, values in given if values is not None), default=0)
    if width == 0:
        return None
    table = np.zeros((num_rows, width), np.float32)
    for use, values in given:
        if values is not None:
            table[use.start : use.stop, : values.shape[1]] = values
    return table


@dataclass(frozen=True, slots=True)
class LoadedLane:
    """One lane in the buffers: bounds [num_segments + 1], slots and scales [num_segments], on the
    host, and its gate and table [rows, width] or None, where the arena lies. work: for the kernels
    that serve it there; None: there are none.
    """

    bounds: torch.Tensor
    slots: torch.Tensor
    scales: torch.Tensor
    num_short: int
    num_segments: int
    gate: torch.Tensor | None
    table: torch.Tensor | None = None
    work: Work | None = None


@dataclass(frozen=True, slots=True)
class Override:
    """A segment whose cell at some site holds parts of cells.OVERRIDES; see ops/overrides.py.

    rows int32 [n], a view of the host's buffers; index: the same rows for tensors on the device, as
    a slice where they are neighbours; is_short: it is shorter than the plan's limit for GEMMs.
    """

    slot: int
    parts: int
    scale: float
    rows: torch.Tensor
    index: slice | torch.Tensor
    is_short: bool


@dataclass(frozen=True, slots=True)
class Mixture:
    """A segment whose adapter has experts of its own for MLPs; see ops/mixture.py.

    index: its rows, as a slice where they are neighbours; `first` is the first of its num_rows
    among the rows of all mixtures.
    """

    slot: int
    index: slice | torch.Tensor
    num_rows: int
    first: int


@dataclass(frozen=True, slots=True)
class Mixtures:
    """Every such segment of a plan, those that are no GEMMs first: num_short of them.

    table int64 [segments, 4]: slot, first position in the buffer of rows, one past the last,
    `first`.
    """

    segments: tuple[Mixture, ...]
    table: torch.Tensor
    num_short: int
    num_rows: int
    width: int  # largest rank of any cell of these slots


class PlanBuffers:
    """Fixed-size tensors that one row space's plan is copied into before each forward.

    rows int32, bounds int32, slots int32, scales float32: all lanes end to end, on the host; bounds
    are positions in `rows`, with one extra entry per lane. gate and table float32 [lanes, rows,
    width], grown on demand, for what on_device does not take. `lanes` are views of one lane each;
    `overrides` are by site the segments, lane after lane, that need more than the gated product
    there; `mixtures` the segments with experts.
    """

    def __init__(
        self,
        max_rows: int,
        device: torch.device,
        cells: torch.Tensor | None = None,
        has_overrides: np.ndarray | None = None,
        on_device: DevicePlan | None = None,
    ) -> None:
        """cells int64 [num_slots, num_sites, 4] and has_overrides, bool [num_slots], are owned by
        whoever fills the slots, and of a slot in a plan they keep their parts; None: no slot has
        overrides or experts. on_device: where the plan goes besides; None: the arena lies on the
        host, and no kernels but its own serve.
        """
        num = max_rows * MAX_LANES
        self.max_rows = max_rows
        self.device = device
        self.lanes: tuple[LoadedLane, ...] = ()  # empty: no row has an adapter
        self.overrides: dict[int, list[Override]] = {}  # empty for nearly every step
        self.mixtures: Mixtures | None = None  # likewise
        # What the rows of adapters with routers chose: float32 [num_slots, cells.USAGE_COLUMNS],
        # added to by every product; None: nobody asks.
        self.usage: torch.Tensor | None = None
        # Told of every choice in the plan: site id, slot, weights of the experts [rows, experts].
        # While there is one, the torch form serves, so that it misses none.
        self.observer: Callable[[int, int, torch.Tensor], None] | None = None
        self._cells = cells
        self._has_overrides = has_overrides
        self._on_device = on_device
        self.rows = torch.zeros(num, dtype=torch.int32)
        self.bounds = torch.zeros(num + MAX_LANES, dtype=torch.int32)
        self.slots = torch.zeros(num, dtype=torch.int32)
        self.scales = torch.zeros(num, dtype=torch.float32)
        self.gate = torch.zeros(0, 0, 0, dtype=torch.float32, device=device)
        self.table = torch.zeros(0, 0, 0, dtype=torch.float32, device=device)
        self._loaded: BatchPlan | None = None  # what the buffers hold
        self._loaded_lanes: tuple[LoadedLane, ...] = ()
        self._loaded_overrides: dict[int, list[Override]] = {}
        self._loaded_sites: frozenset[int] | None = None
        self._loaded_mixtures: Mixtures | None = None

    def load(self, plan: BatchPlan) -> None:
        """Copy the plan in; the previous step's content is gone afterwards.

        A plan that was the last to be loaded must not have been changed since.
        """
        if plan is self._loaded:
            self.lanes, self.overrides = self._loaded_lanes, self._loaded_overrides
            self.mixtures = self._loaded_mixtures
            return
        if plan.num_rows > self.max_rows:
            raise ValueError(f"the plan has {plan.num_rows} rows, the buffers hold {self.max_rows}")
        self._loaded = self._loaded_sites = None  # unless all of it is copied
        lanes: list[LoadedLane] = []
        mixed: list[tuple[bool, int, int, int]] = []
        overrides: dict[int, list[Override]] = {}
        placed = self._on_host(plan) if self._on_device is None else self._on_device.load(plan)
        segment = row = 0
        for lane_id, lane in enumerate(plan.lanes):
            stop = segment + lane.num_segments
            # Each lane has one bound more than segments: lane i's bounds start i entries later.
            first_bound = segment + lane_id
            _fill(self.rows, row, lane.rows)
            _fill(self.bounds, first_bound, lane.bounds + row)
            _fill(self.slots, segment, lane.slots)
            _fill(self.scales, segment, lane.scales)
            lanes.append(
                LoadedLane(
                    self.bounds[first_bound : stop + lane_id + 1],
                    self.slots[segment:stop],
                    self.scales[segment:stop],
                    lane.num_short,
                    lane.num_segments,
                    placed[lane_id].gate,
                    placed[lane_id].table,
                    placed[lane_id].work,
                )
            )
            if self._has_overrides is not None and self._has_overrides[lane.slots].any():
                self._find_overrides(lane, row, overrides)
                mixed += self._find_mixtures(lane, row)
            segment, row = stop, row + len(lane.rows)
        self._loaded, self._loaded_lanes = plan, tuple(lanes)
        self._loaded_overrides, self._loaded_mixtures = overrides, self._mixtures_of(mixed)
        self.lanes, self.overrides = self._loaded_lanes, self._loaded_overrides
        self.mixtures = self._loaded_mixtures

    @property
    def device_rows(self) -> torch.Tensor:
        """`rows`, at least as far as the plan's go, where the arena lies."""
        return self.rows if self._on_device is None else self._on_device.rows

    def note(self, site_id: int, slot: int, weights: torch.Tensor, num_scores: int) -> None:
        """Note what rows of a slot chose at a site: weights [rows, components] of num_scores
        experts with equally many each.
        """
        if self.usage is None and self.observer is None:
            return
        by_expert = weights.view(len(weights), num_scores, -1).mean(2)
        if self.usage is not None:
            note_usage(self.usage[slot], by_expert)
        if self.observer is not None:
            self.observer(site_id, slot, by_expert)

    @property
    def capture_form(self) -> Hashable | None:
        """What a captured forward needs to serve the loaded plan; None: none can.

        Without lanes (). Of one lane that the kernels alone serve, all of it at fixed addresses,
        the bucket of its largest rank.
        """
        if not self.lanes:
            return ()
        work = self.lanes[0].work
        if self.overrides or self.mixtures is not None or len(self.lanes) > 1 or work is None:
            return None
        return rank_bucket(work.max_rank) if work.is_fixed and not work.is_routed else None

    @contextmanager
    def widened(self, num_rows: int) -> Iterator[None]:
        """Let what is captured meanwhile serve every plan of the same capture_form with no more
        than num_rows rows.
        """
        lanes = self.lanes
        if lanes:
            assert self._on_device is not None, "the host captures nothing"
            (lane,) = lanes
            assert lane.work is not None
            work = self._on_device.widened(lane.work, num_rows)
            self.lanes = (replace(lane, work=work),)
        try:
            yield
        finally:
            self.lanes = lanes

    def clear(self) -> None:
        """Return to no plan: wrapped modules are exactly the base model."""
        self.lanes, self.overrides, self.mixtures = (), {}, None

    def adapts(self, site_ids: Iterable[int]) -> bool:
        """Whether an adapter of the plan has a cell at one of the sites."""
        if not self.lanes or self._cells is None:
            return bool(self.lanes)
        if self._loaded_sites is None:
            slots = torch.cat([lane.slots for lane in self.lanes]).long()
            is_adapted = (self._cells[slots, :, layout.OFFSET] >= 0).any(0)
            self._loaded_sites = frozenset(is_adapted.nonzero().flatten().tolist())
        return not self._loaded_sites.isdisjoint(site_ids)

    def _find_overrides(self, lane: Lane, row: int, found: dict[int, list[Override]]) -> None:
        """Add those of the lane, whose rows begin at `row` of the buffer."""
        assert self._has_overrides is not None
        assert self._cells is not None
        for segment in np.flatnonzero(self._has_overrides[lane.slots]).tolist():
            start, stop = lane.bounds[segment : segment + 2].tolist()
            if start == stop:
                continue
            slot, scale = int(lane.slots[segment]), float(lane.scales[segment])
            rows = self.rows[row + start : row + stop]
            index = index_of(rows, self.device_rows[row + start : row + stop])
            is_short = segment < lane.num_short
            cells = self._cells[slot]
            parts = torch.where(cells[:, layout.OFFSET] >= 0, cells[:, layout.PARTS], 0)
            for site_id in (parts & layout.OVERRIDES).nonzero().flatten().tolist():
                override = Override(slot, int(parts[site_id]), scale, rows, index, is_short)
                found.setdefault(site_id, []).append(override)

    def _find_mixtures(self, lane: Lane, row: int) -> list[tuple[bool, int, int, int]]:
        """(whether it is long, slot, first position, one past the last) of those of the lane."""
        assert self._has_overrides is not None
        assert self._cells is not None
        found = []
        for segment in np.flatnonzero(self._has_overrides[lane.slots]).tolist():
            start, stop = lane.bounds[segment : segment + 2].tolist()
            slot = int(lane.slots[segment])
            if start < stop and bool(experts_in(self._cells[slot]).any()):
                found.append((segment >= lane.num_short, slot, row + start, row + stop))
        return found

    def _mixtures_of(self, found: list[tuple[bool, int, int, int]]) -> Mixtures | None:
        if not found:
            return None
        assert self._cells is not None
        found.sort(key=lambda one: one[0])
        segments, table, first, width = [], [], 0, 0
        for _, slot, start, stop in found:
            index = index_of(self.rows[start:stop], self.device_rows[start:stop])
            num_rows = stop - start
            segments.append(Mixture(slot, index, num_rows, first))
            table.append((slot, start, stop, first))
            first += num_rows
            cells = self._cells[slot]
            width = max(width, int(cells[experts_in(cells), layout.RANK].max()))
        num_short = sum(not is_long for is_long, *_ in found)
        return Mixtures(tuple(segments), torch.tensor(table), num_short, first, width)

    def _on_host(self, plan: BatchPlan) -> list[Placed]:
        self.gate = self._widened(self.gate, [lane.gate for lane in plan.lanes])
        self.table = self._widened(self.table, [lane.table for lane in plan.lanes])
        placed = []
        for lane_id, lane in enumerate(plan.lanes):
            gate = table = None
            if lane.gate is not None:
                gate = self.gate[lane_id]
                num_rows, width = lane.gate.shape
                # Whoever is wider than this lane's gates is ungated: ones beyond the given columns.
                gate[:num_rows] = 1.0
                gate[:num_rows, :width] = torch.from_numpy(lane.gate)
            if lane.table is not None:
                num_rows, width = lane.table.shape
                # No wider than what was given: behind it lie earlier steps'.
                table = self.table[lane_id, :, :width]
                table[:num_rows] = torch.from_numpy(lane.table)
            placed.append(Placed(gate, table, None))
        return placed

    def _widened(self, buffer: torch.Tensor, given: list[np.ndarray | None]) -> torch.Tensor:
        """The buffer, or a wider one; before any lane is filled, as what was there is lost."""
        width = max((values.shape[1] for values in given if values is not None), default=0)
        if buffer.shape[2] >= width:
            return buffer
        return torch.zeros(MAX_LANES, self.max_rows, width, dtype=torch.float32, device=self.device)


def experts_in(cells: torch.Tensor) -> torch.Tensor:
    """Where a slot has experts for an MLP: bool [num_sites]; cells int64 [num_sites, 4]."""
    routers = cells[:, layout.ROUTING] & layout.ROUTER_MASK
    return (cells[:, layout.OFFSET] >= 0) & (routers == layout.Router.EXPERTS)


def index_of(rows: torch.Tensor, device_rows: torch.Tensor) -> slice | torch.Tensor:
    """The rows, int32 [n] ascending, n > 0; a slice where they are neighbours, to spare copies.

    device_rows: the same rows where what is to be indexed lies.
    """
    first, last = int(rows[0]), int(rows[-1])
    if last - first == len(rows) - 1:
        return slice(first, last + 1)
    return device_rows.long()


def _fill(buffer: torch.Tensor, start: int, values: np.ndarray) -> None:
    buffer[start : start + len(values)].copy_(torch.from_numpy(values))
