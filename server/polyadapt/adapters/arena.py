"""Extents of one flat region: first fit, no padding to a maximum rank, and which to move so that
gaps become one.

Knows sizes and owners only; units are elements. The tensor belongs to the pool.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Extent:
    """Elements [start, start + size) of the arena, owned by one slot.

    While it is moved down, its elements lie anywhere in [start, stop): `tail` more of them.
    """

    start: int
    size: int
    slot: int = -1  # whose cells point into it
    is_fixed: bool = False  # it is being written to, and cannot be moved
    tail: int = 0

    @property
    def stop(self) -> int:
        """The first element behind it that is nobody's or another's."""
        return self.start + self.size + self.tail


class Arena:
    """Allocates extents in [0, size)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.num_used = 0  # elements that belong to an extent
        self._extents: list[Extent] = []  # sorted by start, never overlapping

    @property
    def num_free(self) -> int:
        """Elements that belong to nobody, in however many gaps."""
        return self.size - self.num_used

    def allocate(self, size: int) -> Extent | None:
        """Return the lowest extent that fits, or None when no gap is large enough.

        Low addresses first: memory that was never touched costs nothing yet.
        """
        start = 0
        for index, extent in enumerate([*self._extents, Extent(self.size, 0)]):
            if extent.start - start >= size:
                found = Extent(start, size)
                self._extents.insert(index, found)
                self.num_used += size
                return found
            start = extent.stop
        return None

    def has_gap(self, size: int, *, without: Extent) -> bool:
        """Whether `size` elements would fit between the extents if `without` were gone."""
        start = 0
        for extent in [*self._extents, Extent(self.size, 0)]:
            if extent is not without:
                if extent.start - start >= size:
                    return True
                start = extent.stop
        return False

    def release(self, extent: Extent) -> None:
        """Give the extent back; it must be one that allocate returned."""
        self._extents.remove(extent)
        self.num_used -= extent.size

    def next_move(self, size: int) -> tuple[Extent, int] | None:
        """The extent that has to be moved first, and the start that it has to be moved down to,
        for a gap of `size` to come about with as few elements moved as possible.

        The neighbours that are pushed together begin behind a gap, so that each move leaves less
        to be moved. None where extents that are fixed leave no such neighbours.
        """
        ends = [*self._extents, Extent(self.size, 0, is_fixed=True)]
        best: tuple[int, int] | None = None  # elements to move, index of the first
        first = used = 0
        for last, behind in enumerate(ends):
            # The gaps from before extent `first` to before `behind`, of whom none is fixed.
            while first <= last:
                below = ends[first - 1].stop if first else 0
                if behind.start - below - used < size:
                    break
                # Of equal sums the later: an extent of nothing need not be moved first.
                if first < last and (best is None or used <= best[0]):
                    best = used, first
                if first < last:
                    used -= ends[first].size + ends[first].tail
                first += 1
            if behind.is_fixed:
                first, used = last + 1, 0
            elif first <= last:
                used += behind.size + behind.tail
        if best is None:
            return None
        index = best[1]
        return ends[index], ends[index - 1].stop if index else 0

    def check_integrity(self) -> None:
        """Assert the order of the extents."""
        start = 0
        for extent in self._extents:
            assert extent.start >= start, "extents overlap"
            start = extent.stop
        assert start <= self.size
        assert sum(extent.size for extent in self._extents) == self.num_used
