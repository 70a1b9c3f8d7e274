"""Makes gaps of the arena into one between two steps, a few cells at a time.

A cell is moved whole, with what points to it, so that after every call each cell of the table lies
where it says: rows of running adapters find the same weights before and after. On an asynchronous
device the move lies between the steps before it and those after it. Knows no leases and no time;
how much is moved between two steps is the pool's to say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from polyadapt.adapters.arena import Arena, Extent
from polyadapt.ops import cells as layout
from polyadapt.ops.device import Device, Host

_PIECE = 1 << 20  # elements that are copied at once where source and target overlap


@dataclass(slots=True)
class _Move:
    """An extent on its way down by `distance`; cells up to number `num_done` are there."""

    extent: Extent
    distance: int
    site_ids: torch.Tensor  # int64 [cells], in the order in which they lie
    ends: list[int]  # of the cells, where they lay before
    num_done: int
    done_until: int  # element, as before the move


class Compaction:
    """Moves extents of `weights` [num_elements] and what `cells` [slots, sites, columns] says of
    them; at most one is under way. on_change is told of the slot whose cells were moved.
    """

    def __init__(
        self,
        arena: Arena,
        weights: torch.Tensor,
        cells: torch.Tensor,
        on_change: Callable[[int], None] = lambda slot: None,
        device: Device | None = None,
    ) -> None:
        self._arena = arena
        self._weights = weights
        self._cells = cells
        self._on_change = on_change
        self._device = device or Host()
        self._copies = self._device.copy_stream()
        # Here from the start: where all memory is shared out, there may be none later.
        self._scratch = weights.new_empty(min(_PIECE, len(weights)))
        self._move: _Move | None = None

    def advance(self, size: int, most: int) -> int:
        """Move at most `most` elements, or one cell that is larger, towards a gap of `size`; return
        how many, at least 1 in what is counted.

        0: nothing can be moved for such a gap, because extents that are fixed are in the way.
        """
        move = self._move or self._begin(size)
        if move is None:
            return 0
        self._move = move
        first, start = move.num_done, move.done_until
        last = first
        while last < len(move.ends) and (last == first or move.ends[last] - start <= most):
            last += 1
        stop = move.ends[last - 1] if last > first else start
        # Steps that are enqueued read what is moved where it lies, and what lay in the gap.
        self._copies.follow(self._device.mark())
        self._copy_down(start, stop, move.distance)
        self._copies.mark().precede()
        sites = move.site_ids[first:last]
        self._cells[move.extent.slot, sites, layout.OFFSET] -= move.distance
        self._on_change(move.extent.slot)
        move.num_done, move.done_until = last, stop
        if last == len(move.ends):
            move.extent.tail = 0
            self._move = None
        return max(stop - start, 1)

    def forget(self, extent: Extent) -> None:
        """Leave the extent where it is; it is about to be released."""
        if self._move is not None and self._move.extent is extent:
            self._move = None

    def check_integrity(self, extents: list[Extent]) -> None:
        """Assert that all cells lie in their extents and that only what is moved has a tail."""
        for extent in extents:
            is_moved = self._move is not None and self._move.extent is extent
            assert is_moved or extent.tail == 0, "a tail is left of a move"
            offsets = self._cells[extent.slot, :, layout.OFFSET]
            offsets = offsets[offsets >= 0]
            assert bool(((offsets >= extent.start) & (offsets <= extent.stop)).all())

    def _begin(self, size: int) -> _Move | None:
        found = self._arena.next_move(size)
        if found is None:
            return None
        extent, target = found
        if extent.start == target:  # one of nothing, which no gap is below
            return None
        old_stop = extent.start + extent.size
        offsets = self._cells[extent.slot, :, layout.OFFSET]
        site_ids = (offsets >= 0).nonzero().flatten()
        site_ids = site_ids[offsets[site_ids].argsort(stable=True)]
        # Cells lie end to end: each one ends where the next one begins.
        ends = [*offsets[site_ids].tolist()[1:], old_stop][: len(site_ids)]
        move = _Move(extent, extent.start - target, site_ids, ends, 0, extent.start)
        extent.start, extent.tail = target, move.distance
        return move

    def _copy_down(self, start: int, stop: int, distance: int) -> None:
        """weights[start - distance : stop - distance] = weights[start : stop]."""
        weights, copy = self._weights, self._copies.copy
        if distance >= stop - start:
            copy(weights[start - distance : stop - distance], weights[start:stop])
            return
        # The ranges overlap, which copy_ does not allow; from below nothing is lost.
        for piece in range(start, stop, len(self._scratch)):
            end = min(piece + len(self._scratch), stop)
            scratch = self._scratch[: end - piece]
            copy(scratch, weights[piece:end])
            copy(weights[piece - distance : end - distance], scratch)
