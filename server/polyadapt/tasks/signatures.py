"""The bits that tell a user, looked up for every request. Knows no engine and no adapters' content.

tasks/mandatory.py applies them, so that nobody who asks for adapters passes them by.
"""

from __future__ import annotations

from polyadapt.errors import SecretsUnavailable
from polyadapt_store.signatures import Signature, SignatureBook
from polyadapt_store.since_write import SinceWrite


class Signatures:
    """The signatures as the registry holds them now, those in use at hand."""

    def __init__(self, book: SignatureBook) -> None:
        self.book = book
        self._known: SinceWrite[tuple[str, str], Signature | None] = SinceWrite(
            lambda: book.num_writes, keeps=SecretsUnavailable
        )

    def knows(self, digest: str, user: str) -> bool:
        """Whether `of` has its answer in memory."""
        return (digest, user) in self._known

    def of(self, digest: str, user: str) -> str | None:
        """Return the user's bits under a mark, as the last write left them; None: there are none,
        or they were revoked. Raises SecretsUnavailable for bits that do not open.
        """
        found = self._known.get((digest, user), lambda: self.book.find(digest, user))
        return None if found is None or found.revoked_at is not None else found.bits
