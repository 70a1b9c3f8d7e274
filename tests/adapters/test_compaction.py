"""Moving adapters together, cell by cell: the table always says where everything lies."""

from __future__ import annotations

import random
from itertools import accumulate, pairwise

import pytest
import torch

from polyadapt.adapters.arena import Arena, Extent
from polyadapt.adapters.compaction import Compaction
from polyadapt.ops import cells as layout

NUM_SITES = 6


class Rig:
    """Slots whose cells hold numbers of their own, in an arena of `size` elements."""

    def __init__(self, size: int, num_slots: int = 16) -> None:
        self.arena = Arena(size)
        self.weights = torch.full((size,), -1.0)
        self.cells = torch.zeros(num_slots, NUM_SITES, layout.COLUMNS, dtype=torch.int64)
        self.cells[:, :, layout.OFFSET] = -1
        self.compaction = Compaction(self.arena, self.weights, self.cells)
        self.held: dict[int, tuple[Extent, dict[int, torch.Tensor]]] = {}
        self._next = 0.0

    def put(self, slot: int, sizes: dict[int, int]) -> bool:
        """Fill the slot: by site id the elements of its cell. Whether there was room."""
        extent = self.arena.allocate(sum(sizes.values()))
        if extent is None:
            return False
        extent.slot, start, found = slot, extent.start, {}
        for site_id, size in sorted(sizes.items()):
            found[site_id] = torch.arange(size) + self._next
            self._next += size
            self.weights[start : start + size] = found[site_id]
            self.cells[slot, site_id, layout.OFFSET] = start
            start += size
        self.held[slot] = extent, found
        return True

    def take_out(self, slot: int) -> None:
        extent, _ = self.held.pop(slot)
        self.compaction.forget(extent)
        self.arena.release(extent)
        self.cells[slot, :, layout.OFFSET] = -1

    def check(self) -> None:
        self.arena.check_integrity()
        self.compaction.check_integrity([extent for extent, _ in self.held.values()])
        for slot, (_, found) in self.held.items():
            for site_id in range(NUM_SITES):
                offset = int(self.cells[slot, site_id, layout.OFFSET])
                assert (offset >= 0) == (site_id in found)
                if offset >= 0:
                    there = self.weights[offset : offset + len(found[site_id])]
                    assert torch.equal(there, found[site_id]), (slot, site_id)


def fragmented(*, num: int = 5) -> Rig:
    """Every second of some adapters of three cells of 10 elements is gone."""
    rig = Rig(30 * num)
    for slot in range(num):
        assert rig.put(slot, {0: 10, 2: 10, 5: 10})
    for slot in range(0, num, 2):
        rig.take_out(slot)
    return rig


def test_one_cell_at_a_time_and_each_is_found_at_once():
    rig = fragmented()
    moved = []
    while rig.arena.allocate(90) is None:
        moved.append(rig.compaction.advance(90, most=1))
        rig.check()
    assert moved == [10] * 6


@pytest.mark.parametrize(("most", "expected"), [(9, 10), (10, 10), (29, 20), (1000, 30)])
def test_no_more_is_moved_at_once_than_is_allowed_or_one_cell(most: int, expected: int):
    rig = fragmented()
    assert rig.compaction.advance(60, most) == expected
    rig.check()


def test_only_what_has_to_be_moved_is_moved_and_the_least_of_it():
    rig = Rig(200)
    for slot, size in enumerate((20, 50, 20, 20, 5, 20, 20)):
        rig.put(slot, {0: size})
    for slot in (0, 2, 3, 5):
        rig.take_out(slot)
    # Gaps 0-20, 70-110, 115-135 and 155-200; 5 elements part the two in the middle.
    assert rig.arena.next_move(60) == (rig.held[4][0], 70)
    assert rig.compaction.advance(60, most=1000) == 5
    rig.check()
    found = rig.arena.allocate(60)
    assert found is not None
    assert found.start == 75


def test_what_is_being_written_stays_where_it_is():
    rig = fragmented()
    rig.held[1][0].is_fixed = True
    start = rig.held[1][0].start
    while rig.arena.allocate(60) is None:
        assert rig.compaction.advance(60, most=7)
        rig.check()
    assert rig.held[1][0].start == start
    rig.held[3][0].is_fixed = True
    assert rig.compaction.advance(61, most=7) == 0


@pytest.mark.parametrize("left", [0, 1, 2])
def test_whoever_leaves_in_the_middle_of_its_move_leaves_no_trace(left: int):
    rig = fragmented()
    for _ in range(left):
        rig.compaction.advance(90, most=1)
    rig.take_out(1)
    rig.check()
    while (extent := rig.arena.allocate(120)) is None:
        rig.compaction.advance(120, most=1)
        rig.check()
    assert rig.arena.num_used == 150
    rig.arena.release(extent)


def test_moves_by_less_than_a_cell_and_cells_without_elements():
    rig = Rig(1000)
    rig.put(0, {0: 3})
    rig.put(1, {0: 400, 1: 0, 2: 0, 3: 5, 4: 0})
    rig.take_out(0)
    assert rig.compaction.advance(595, most=1) == 400
    rig.check()
    while rig.arena.allocate(595) is None:
        rig.compaction.advance(595, most=1)
        rig.check()
    rig.check()


def test_overlapping_ranges_longer_than_a_piece_are_copied_from_below(monkeypatch):
    monkeypatch.setattr("polyadapt.adapters.compaction._PIECE", 16)
    test_moves_by_less_than_a_cell_and_cells_without_elements()


@pytest.mark.parametrize("seed", range(3))
def test_whatever_comes_and_goes_meanwhile(seed: int):
    rng, rig = random.Random(seed), Rig(200)
    wanted = 0
    num_calls = 0
    for _ in range(250):
        slot = rng.randrange(16)
        sizes = {s: rng.randrange(12) for s in rng.sample(range(NUM_SITES), rng.randint(1, 6))}
        if slot in rig.held and rng.random() < 0.3:
            rig.take_out(slot)
        elif slot not in rig.held:
            size = sum(sizes.values())
            if not rig.put(slot, sizes) and rig.arena.num_free >= size:
                wanted = size
        if wanted and (extent := rig.arena.allocate(wanted)) is not None:
            rig.arena.release(extent)
            wanted = 0
        elif wanted and rig.arena.num_free >= wanted:
            assert rig.compaction.advance(wanted, most=rng.randrange(1, 30))
            num_calls += 1
        rig.check()
    assert num_calls > 20


@pytest.mark.parametrize("seed", range(8))
def test_every_gap_that_there_is_room_for_comes_about(seed: int):
    rng, rig = random.Random(seed), Rig(300)
    for slot in range(16):
        rig.put(slot, {0: rng.randrange(1, 20), 1: rng.randrange(1, 20)})
    for slot in rng.sample(sorted(rig.held), 6):
        rig.take_out(slot)
    size, moved = rig.arena.num_free, 0
    while rig.arena.allocate(size) is None:
        step = rig.compaction.advance(size, most=1)
        assert step, "nothing is in the way"
        moved += step
        rig.check()
    assert moved <= rig.arena.num_used - size, "nothing is moved twice"


def test_the_cheapest_neighbours_are_those_of_a_search_of_all():
    rng = random.Random(3)
    for _ in range(300):
        arena, ends = Arena(120), sorted(rng.sample(range(1, 120), 2 * rng.randint(1, 6)))
        spans = list(pairwise([0, *ends, 120]))
        for number, (start, stop) in enumerate(spans):
            extent = arena.allocate(stop - start)
            assert extent is not None
            extent.slot = number
        extents = arena._extents
        for extent in [e for e in extents if rng.random() < 0.5]:
            arena.release(extent)
        for extent in arena._extents:
            extent.is_fixed = rng.random() < 0.2
        size = rng.randrange(1, 121)
        if any(b - a >= size for a, b in _gaps(arena)):
            continue
        found = arena.next_move(size)
        costs = [cost for cost, gap in _windows(arena) if gap >= size]
        assert (found is None) == (not costs)
        if found is not None:
            assert found[0].start > found[1], "it moves"
            first = arena._extents.index(found[0])
            ends_at = accumulate(e.size for e in arena._extents[first:])
            assert min(costs) in list(ends_at)


def _gaps(arena: Arena) -> list[tuple[int, int]]:
    ends = [(e.start, e.stop) for e in arena._extents]
    return list(zip([0, *(stop for _, stop in ends)], [*(s for s, _ in ends), arena.size],
                    strict=True))  # fmt: skip


def _windows(arena: Arena) -> list[tuple[int, int]]:
    """(elements to move, gaps together) of every run of neighbours none of which is fixed."""
    extents, gaps, found = arena._extents, _gaps(arena), []
    for first in range(len(extents)):
        for last in range(first, len(extents)):
            run = extents[first : last + 1]
            if any(e.is_fixed for e in run):
                break
            total = sum(b - a for a, b in gaps[first : last + 2])
            found.append((sum(e.size for e in run), total))
    return found


def test_an_extent_of_nothing_is_not_moved_for_ever():
    arena = Arena(30)
    nothing = arena.allocate(0)
    below, kept = arena.allocate(10), arena.allocate(10)
    assert nothing is not None
    assert below is not None
    assert kept is not None
    nothing.slot, kept.slot = 0, 1
    arena.release(below)
    cells = torch.full((2, 1, layout.COLUMNS), -1)
    cells[1, 0] = torch.tensor([kept.start, 1, 0, 0])
    compaction = Compaction(arena, torch.arange(30.0), cells)
    moved = 0
    while arena.allocate(20) is None:
        assert compaction.advance(20, 4) > 0
        moved += 1
        assert moved < 10
    assert kept.start == 0
