"""What was read from a registry, kept in memory as long as nobody has written since."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from polyadapt.errors import PolyadaptError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_MAX_KNOWN = 10_000


class SinceWrite(Generic[K, V]):
    """Answers by key. Thread-safe; it never waits for a reading that another thread does."""

    def __init__(
        self,
        num_writes: Callable[[], int],
        keeps: type[PolyadaptError] | tuple[type[PolyadaptError], ...] = (),
    ) -> None:
        """num_writes: see Database. keeps: errors of a reading that are an answer too, told again
        until somebody writes; others are not kept.
        """
        self._num_writes = num_writes
        self._keeps = keeps
        # In one piece, for it is read in several threads: after how many writes, and the answers.
        self._known: tuple[int, dict[K, V | PolyadaptError]] = (-1, {})

    def get(self, key: K, read: Callable[[], V]) -> V:
        """Return what `read` gave for the key since the last write that was seen, or gives now;
        raises what it raises.
        """
        # The number is taken first: what is written meanwhile is read again.
        written = self._num_writes()
        since, known = self._known
        if since != written or (key not in known and len(known) >= _MAX_KNOWN):
            self._known = written, (known := {})
        if key not in known:
            try:
                known[key] = read()
            except self._keeps as error:
                known[key] = error
        found = known[key]
        if isinstance(found, PolyadaptError):
            raise found.with_traceback(None)
        return found

    def __contains__(self, key: K) -> bool:
        """Whether `get` has its answer in memory."""
        written = self._num_writes()
        since, known = self._known
        return since == written and key in known
