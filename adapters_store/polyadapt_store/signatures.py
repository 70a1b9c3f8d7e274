"""Whose answers which branches of a mark tell: a row per user and generation. Knows no requests.

A signature is issued by one row, and none is ever changed but to be revoked, so that a leak can be
traced to whoever had those bits at that time. Bits are sealed by a cipher that others give.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import sqlalchemy as sa

from polyadapt.errors import Conflict, NotFound, SecretsUnavailable
from polyadapt_store.database import Database, signatures

logger = logging.getLogger(__name__)

_CLEAR = frozenset("01")  # what an older release wrote


@dataclass(frozen=True, slots=True)
class Signature:
    """The bits of one user under one mark."""

    digest: str  # of the mark's adapter
    user: str
    generation: int  # counted from 1
    bits: str | None  # characters 0 and 1; None: not asked for, or not to be opened
    issued_at: int  # unix seconds
    revoked_at: int | None = None

    def __repr__(self) -> str:
        return f"Signature({self.digest}, {self.user}, generation {self.generation})"


class Rows(Protocol):
    """Seals the bits of one mark's users; a text opens for its own user and generation alone."""

    def seal(self, user: str, generation: int, bits: str) -> str: ...

    def open(self, user: str, generation: int, text: str) -> str:
        """Raises SecretsUnavailable for whatever `seal` did not give for just these."""


class RowCipher(Protocol):
    """Gives every mark its Rows."""

    def of(self, digest: str) -> Rows:
        """Raises SecretsUnavailable where there is no key, or another one."""


class NoCipher:
    """Opens and seals nothing: of a server without the key that signatures are sealed under."""

    def of(self, digest: str) -> Rows:
        """See RowCipher."""
        raise SecretsUnavailable(
            "signatures are sealed and this server has no key for them; start it with "
            "POLYADAPT_MARK_KEK_FILE, or POLYADAPT_MARK_KEK"
        )


class SignatureBook:
    """Owns the signatures of one Database. Thread-safe."""

    def __init__(
        self,
        database: Database,
        cipher: RowCipher | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._cipher = cipher or NoCipher()
        self._clock = clock

    def sealed_by(self, cipher: RowCipher) -> SignatureBook:
        """Return the same book with another cipher."""
        return SignatureBook(self._database, cipher, clock=self._clock)

    @property
    def num_writes(self) -> int:
        """See Database: what was read is still so while this does not change."""
        return self._database.num_writes

    def issue(self, digest: str, user: str, bits: str) -> tuple[Signature, bool]:
        """Give the user these bits from now on; return them and whether they are new.

        Raises Conflict for bits that another user has or had: a leak would name both; and
        SecretsUnavailable.
        """
        return self.issue_all(digest, {user: bits})[user]

    def issue_all(
        self, digest: str, bits_of: Mapping[str, str]
    ) -> dict[str, tuple[Signature, bool]]:
        """Do the same for many users at once: all of them or, where it raises, none."""
        rows = self._cipher.of(digest)
        made: dict[str, tuple[Signature, bool]] = {}
        with self._database.write() as connection:
            last: dict[str, Signature] = {}
            owners: dict[str, set[str]] = {}
            for known in _opened(digest, connection.execute(_of_mark(digest)).all(), rows):
                last[known.user] = known
                if known.bits is not None:
                    owners.setdefault(known.bits, set()).add(known.user)
            for user, bits in bits_of.items():
                if owners.setdefault(bits, set()) - {user}:
                    raise Conflict(
                        f"the bits for {user!r} are or were another user's of this mark; give "
                        "others, or use a mark of more bits",
                        param="signature",
                    )
                owners[bits].add(user)
                before = last.get(user)
                if before is not None and before.revoked_at is None and before.bits == bits:
                    made[user] = before, False
                    continue
                generation = 1 if before is None else before.generation + 1
                found = Signature(digest, user, generation, bits, int(self._clock()))
                connection.execute(
                    signatures.insert().values(
                        digest=digest, user=user, generation=generation,
                        bits=rows.seal(user, generation, bits), issued_at=found.issued_at,
                    )
                )  # fmt: skip
                made[user] = found, True
        return made

    def revoke(self, digest: str, user: str) -> Signature:
        """Take the user's signature back; raises NotFound if none acts. Needs no key."""
        with self._database.write() as connection:
            last = _last(connection, digest, user)
            if last is None or last.revoked_at is not None:
                raise no_signature(user)
            revoked_at = int(self._clock())
            connection.execute(
                signatures.update()
                .where(
                    signatures.c.digest == digest,
                    signatures.c.user == user,
                    signatures.c.generation == last.generation,
                )
                .values(revoked_at=revoked_at)
            )
        return replace(_signature(last), revoked_at=revoked_at)

    def find(self, digest: str, user: str) -> Signature | None:
        """Return the user's last signature or None; without its bits if it was revoked.

        Raises SecretsUnavailable for bits that do not open.
        """
        with self._database.read() as connection:
            row = _last(connection, digest, user)
        if row is None or row.revoked_at is not None:
            return None if row is None else _signature(row)
        bits = self._cipher.of(digest).open(row.user, row.generation, row.bits)
        return replace(_signature(row), bits=bits)

    def list(self, digest: str, *, has_bits: bool = False) -> tuple[Signature, ...]:
        """Return every signature that was ever issued under a mark, by user and generation; with
        `has_bits` the bits of those that open. Raises SecretsUnavailable where none can.
        """
        with self._database.read() as connection:
            found = connection.execute(_of_mark(digest)).all()
        if not has_bits or not found:
            return tuple(map(_signature, found))
        return _opened(digest, found, self._cipher.of(digest))

    def seal_clear(self) -> int:
        """Seal what an older release wrote and return how many rows that were. Raises
        SecretsUnavailable where there are rows, clear or sealed, and no key for them.
        """
        with self._database.read() as connection:
            found = connection.execute(sa.select(signatures)).all()
        ciphers = {digest: self._cipher.of(digest) for digest in {row.digest for row in found}}
        clear = [row for row in found if _is_clear(row.bits)]
        if not clear:
            return 0
        with self._database.write() as connection:
            if connection.dialect.name == "sqlite":
                # The bytes of what is replaced are overwritten, not only given free.
                connection.exec_driver_sql("PRAGMA secure_delete = ON")
            for row in clear:
                sealed = ciphers[row.digest].seal(row.user, row.generation, row.bits)
                connection.execute(
                    signatures.update()
                    .where(
                        signatures.c.digest == row.digest,
                        signatures.c.user == row.user,
                        signatures.c.generation == row.generation,
                    )
                    .values(bits=sealed)
                )
        return len(clear)


def no_signature(user: str) -> NotFound:
    """The error of a user without a signature that acts."""
    return NotFound(f"the user {user[:200]!r} has no signature under this mark")


def _of_mark(digest: str) -> sa.Select[Any]:
    query = sa.select(signatures).where(signatures.c.digest == digest)
    return query.order_by(signatures.c.user, signatures.c.generation)


def _last(connection: sa.Connection, digest: str, user: str) -> sa.Row[Any] | None:
    query = (
        sa.select(signatures)
        .where(signatures.c.digest == digest, signatures.c.user == user)
        .order_by(signatures.c.generation.desc())
        .limit(1)
    )
    return connection.execute(query).first()


def _opened(digest: str, found: Sequence[sa.Row[Any]], rows: Rows) -> tuple[Signature, ...]:
    """The rows with their bits, where they open: a damaged one keeps nobody else from theirs."""

    def opened(row: sa.Row[Any]) -> Signature:
        try:
            return replace(_signature(row), bits=rows.open(row.user, row.generation, row.bits))
        except SecretsUnavailable:
            return _signature(row)

    signed = tuple(map(opened, found))
    num_closed = sum(one.bits is None for one in signed)
    if num_closed:
        logger.warning("%d of %d signatures of %s do not open", num_closed, len(signed), digest)
    return signed


def _signature(row: sa.Row[Any]) -> Signature:
    return Signature(row.digest, row.user, row.generation, None, row.issued_at, row.revoked_at)


def _is_clear(text: str) -> bool:
    return set(text) <= _CLEAR
