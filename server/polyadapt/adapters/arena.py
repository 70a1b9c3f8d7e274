"""Extents of one flat region: first fit, no padding to a maximum rank, compaction on request.

Knows sizes and owners only; units are elements. The tensor belongs to the pool.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Extent:
    """Elements [start, start + size) of the arena, owned by one slot."""

    start: int
    size: int


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
            start = extent.start + extent.size
        return None

    def has_gap(self, size: int, *, without: Extent) -> bool:
        """Whether `size` elements would fit between the extents if `without` were gone."""
        start = 0
        for extent in [*self._extents, Extent(self.size, 0)]:
            if extent is not without:
                if extent.start - start >= size:
                    return True
                start = extent.start + extent.size
        return False

    def release(self, extent: Extent) -> None:
        """Give the extent back; it must be one that allocate returned."""
        self._extents.remove(extent)
        self.num_used -= extent.size

    def compact(self) -> list[tuple[Extent, int]]:
        """Close all gaps; returns (extent, old start) in the order in which the owner must copy
        down.
        """
        moves, start = [], 0
        for extent in self._extents:
            if extent.start != start:
                moves.append((extent, extent.start))
                extent.start = start
            start += extent.size
        return moves
