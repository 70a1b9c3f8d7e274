"""The bits that tell a user, looked up for every request. Knows no engine and no adapters' content.

tasks/directory.py applies them, so that nobody who asks for adapters passes them by.
"""

from __future__ import annotations

from typing import Protocol

from polyadapt_store.signatures import Signature

_MAX_KNOWN = 10_000


class Book(Protocol):
    """What is needed of polyadapt_store's SignatureBook."""

    @property
    def num_writes(self) -> int: ...

    def find(self, digest: str, user: str) -> Signature | None: ...

    def issue(self, digest: str, user: str, bits: str) -> tuple[Signature, bool]: ...

    def revoke(self, digest: str, user: str) -> Signature: ...

    def list(self, digest: str) -> tuple[Signature, ...]: ...


class Signatures:
    """The signatures as the registry holds them now, those in use at hand."""

    def __init__(self, book: Book) -> None:
        self.book = book
        # In one piece, for it is read in several threads: after how many writes, and what was read.
        self._known: tuple[int, dict[tuple[str, str], Signature | None]] = (-1, {})

    def of(self, digest: str, user: str) -> str | None:
        """Return the user's bits under a mark, as the last write left them; None: there are none,
        or they were revoked.
        """
        written = self.book.num_writes
        if self._known[0] != written or len(self._known[1]) >= _MAX_KNOWN:
            # The number was taken first: what is written meanwhile is read again.
            self._known = (written, {})
        known = self._known[1]
        if (digest, user) not in known:
            known[digest, user] = self.book.find(digest, user)
        found = known[digest, user]
        return None if found is None or found.revoked_at is not None else found.bits
