"""Whose answers which branches of a mark tell: a row per user and generation. Knows no requests.

A signature is issued by one row, and none is ever changed but to be revoked, so that a leak can be
traced to whoever had those bits at that time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from polyadapt.errors import Conflict, NotFound
from polyadapt_store.database import Database, signatures


@dataclass(frozen=True, slots=True)
class Signature:
    """The bits of one user under one mark."""

    digest: str  # of the mark's adapter
    user: str
    generation: int  # counted from 1
    bits: str  # characters 0 and 1
    issued_at: int  # unix seconds
    revoked_at: int | None = None

    def __repr__(self) -> str:
        return f"Signature({self.digest}, {self.user}, generation {self.generation})"


class SignatureBook:
    """Owns the signatures of one Database. Thread-safe."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    @property
    def num_writes(self) -> int:
        """See Database: what was read is still so while this does not change."""
        return self._database.num_writes

    def issue(self, digest: str, user: str, bits: str) -> tuple[Signature, bool]:
        """Give the user these bits from now on; return them and whether they are new.

        Raises Conflict for bits that another user has or had: a leak would name both.
        """
        of_mark = signatures.c.digest == digest
        with self._database.write() as connection:
            taken = sa.select(signatures.c.user).where(
                of_mark, signatures.c.bits == bits, signatures.c.user != user
            )
            if connection.execute(taken).first() is not None:
                raise Conflict(
                    f"the bits for {user!r} are or were another user's of this mark; give others",
                    param="signature",
                )
            last = _last(connection, digest, user)
            if last is not None and last.revoked_at is None and last.bits == bits:
                return last, False
            generation = 1 if last is None else last.generation + 1
            made = Signature(digest, user, generation, bits, int(self._clock()))
            connection.execute(
                signatures.insert().values(
                    digest=digest, user=user, generation=generation, bits=bits,
                    issued_at=made.issued_at,
                )
            )  # fmt: skip
        return made, True

    def revoke(self, digest: str, user: str) -> Signature:
        """Take the user's signature back; raises NotFound if it has none that acts."""
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
        return Signature(digest, user, last.generation, last.bits, last.issued_at, revoked_at)

    def find(self, digest: str, user: str) -> Signature | None:
        """Return the user's last signature, be it revoked, or None."""
        with self._database.read() as connection:
            return _last(connection, digest, user)

    def list(self, digest: str) -> tuple[Signature, ...]:
        """Return every signature that was ever issued under a mark, by user and generation."""
        query = sa.select(signatures).where(signatures.c.digest == digest)
        query = query.order_by(signatures.c.user, signatures.c.generation)
        with self._database.read() as connection:
            return tuple(map(_signature, connection.execute(query)))


def no_signature(user: str) -> NotFound:
    """The error of a user without a signature that acts."""
    return NotFound(f"the user {user[:200]!r} has no signature under this mark")


def _last(connection: sa.Connection, digest: str, user: str) -> Signature | None:
    query = (
        sa.select(signatures)
        .where(signatures.c.digest == digest, signatures.c.user == user)
        .order_by(signatures.c.generation.desc())
        .limit(1)
    )
    row = connection.execute(query).first()
    return None if row is None else _signature(row)


def _signature(row: sa.Row[Any]) -> Signature:
    return Signature(row.digest, row.user, row.generation, row.bits, row.issued_at, row.revoked_at)
