"""The bits that tell a user, looked up for every request. Knows no engine and no adapters' content.

tasks/directory.py applies them, so that nobody who asks for adapters passes them by.
"""

from __future__ import annotations

from polyadapt.errors import SecretsUnavailable
from polyadapt_store.signatures import Signature, SignatureBook

_MAX_KNOWN = 10_000

_Key = tuple[str, str]  # a mark's digest, a user


class Signatures:
    """The signatures as the registry holds them now, those in use at hand."""

    def __init__(self, book: SignatureBook) -> None:
        self.book = book
        # In one piece, for it is read in several threads: after how many writes, and what was read.
        self._known: tuple[int, dict[_Key, Signature | SecretsUnavailable | None]] = (-1, {})

    def knows(self, digest: str, user: str) -> bool:
        """Whether `of` has its answer in memory."""
        written, known = self._known
        return written == self.book.num_writes and (digest, user) in known

    def of(self, digest: str, user: str) -> str | None:
        """Return the user's bits under a mark, as the last write left them; None: there are none,
        or they were revoked. Raises SecretsUnavailable for bits that do not open.
        """
        key = digest, user
        written, known = self._known
        # The number was taken first: what is written meanwhile is read again.
        if written != self.book.num_writes or (key not in known and len(known) >= _MAX_KNOWN):
            self._known = self.book.num_writes, (known := {})
        if key not in known:
            try:
                known[key] = self.book.find(digest, user)
            except SecretsUnavailable as error:
                known[key] = error
        found = known[key]
        if isinstance(found, SecretsUnavailable):
            raise found.with_traceback(None)
        return None if found is None or found.revoked_at is not None else found.bits
