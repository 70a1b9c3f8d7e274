"""The bits that tell a user, looked up for every request. Knows no engine and no adapters' content.

tasks/directory.py applies them, so that nobody who asks for adapters passes them by.
"""

from __future__ import annotations

from polyadapt_store.signatures import Signature, SignatureBook

_MAX_KNOWN = 10_000


class Signatures:
    """The signatures as the registry holds them now, those in use at hand."""

    def __init__(self, book: SignatureBook) -> None:
        self.book = book
        # In one piece, for it is read in several threads: after how many writes, and what was read.
        self._known: tuple[int, dict[tuple[str, str], Signature | None]] = (-1, {})

    def of(self, digest: str, user: str) -> str | None:
        """Return the user's bits under a mark, as the last write left them; None: there are none,
        or they were revoked. Raises SecretsUnavailable for bits that do not open.
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
