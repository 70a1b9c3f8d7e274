"""Adapters that requests did not wait for: they are loaded all the same, for whoever asks next.

Knows no requests; the engine says when, and hands the pool what is wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from polyadapt.adapters.pool import AdapterPool
from polyadapt.errors import PolyadaptError
from polyadapt.types import AppliedAdapter

MOST = 16  # the latest so many
KEPT_S = 30.0  # and for so long


class LeftCold:
    """Owns what is being loaded though nobody waits for it, and why some of it could not be.

    `now` of every method: monotonic seconds. Its length is the number of adapters under way.
    """

    def __init__(self, pool: AdapterPool) -> None:
        self._pool = pool
        self._items: dict[str, _Item] = {}  # by digest, the oldest first
        self._errors: dict[str, _Error] = {}  # why those could not be loaded, by digest

    def __len__(self) -> int:
        return len(self._items)

    @property
    def digests(self) -> tuple[str, ...]:
        """What is under way, the oldest first."""
        return tuple(self._items)

    def add(self, adapters: Iterable[AppliedAdapter], now: float) -> None:
        """Have these loaded too, as the newest."""
        for applied in adapters:
            self._items.pop(applied.adapter.digest, None)
            self._items[applied.adapter.digest] = _Item(applied, now + KEPT_S)

    def forget(self, digest: str) -> None:
        """Have it loaded no more."""
        self._items.pop(digest, None)

    def fail(self, digest: str, error: PolyadaptError, now: float) -> None:
        """Keep why a digest could not be loaded, if it is one of these."""
        if self._items.pop(digest, None) is not None:
            self._errors[digest] = _Error(error, now + KEPT_S)

    def take_error(self, cold: Sequence[AppliedAdapter], now: float) -> PolyadaptError | None:
        """Why one of the adapters could not be loaded lately, for nobody was waiting then."""
        self._errors = {d: kept for d, kept in self._errors.items() if now < kept.until}
        found = (self._errors.pop(applied.adapter.digest, None) for applied in cold)
        return next((kept.error for kept in found if kept is not None), None)

    def wanted(self, now: float) -> tuple[AppliedAdapter, ...]:
        """Drop what has come, is too old or too much; return the rest."""
        for digest, item in list(self._items.items()):
            is_crowded_out = len(self._items) > MOST
            if is_crowded_out or now > item.until or self._pool.are_on_device([item.applied]):
                del self._items[digest]
        return tuple(item.applied for item in self._items.values())


@dataclass(frozen=True, slots=True)
class _Error:
    """Why an adapter that nobody waited for could not be loaded; told until then, once."""

    error: PolyadaptError
    until: float


@dataclass(frozen=True, slots=True)
class _Item:
    """An adapter that is loaded though nobody waits for it, until a moment in monotonic seconds."""

    applied: AppliedAdapter
    until: float
