"""What a mark is and what is secret of it, sealed: a row per adapter that is a mark, and one for
the key that all marks' files are sealed under.

Nothing here opens anything: texts come sealed and leave sealed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from polyadapt_store.database import Database, marks, sealed_keys


@dataclass(frozen=True, slots=True)
class MarkRecord:
    """One mark as it is stored."""

    digest: str
    config: str | None
    secrets: str | None
    created: int  # unix seconds


SealedKind = Literal["secrets", "row_key", "file_key"]
_KINDS: tuple[SealedKind, ...] = ("secrets", "row_key")  # of a mark
_FILES = "files"


@dataclass(frozen=True, slots=True)
class SealedText:
    """One thing that is sealed under a key of the operator's: what it is, and of which mark."""

    kind: SealedKind
    digest: str  # empty: of no single mark
    text: str


class MarkBook:
    """Owns the marks of one Database. Thread-safe."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    def put(self, digest: str, config: str, secrets: str) -> MarkRecord:
        """Keep what a mark is and its sealed secrets, in place of what was there."""
        with self._database.write() as connection:
            known = self._ensure(connection, digest)
            connection.execute(
                marks.update()
                .where(marks.c.digest == digest)
                .values(config=config, secrets=secrets)
            )
        return MarkRecord(digest, config, secrets, known.created)

    def find(self, digest: str) -> MarkRecord | None:
        """Return a mark, None for what has neither secrets nor signatures."""
        with self._database.read() as connection:
            row = connection.execute(sa.select(marks).where(marks.c.digest == digest)).first()
        return None if row is None else _record(row)

    def forget(self, digest: str) -> None:
        """Drop a mark's secrets, if it has any here; the key of its signatures stays."""
        with self._database.write() as connection:
            connection.execute(
                marks.update().where(marks.c.digest == digest).values(config=None, secrets=None)
            )

    def row_key(self, digest: str, make: Callable[[], str]) -> str:
        """Return the sealed key of a mark's signatures: what `make` gives if there is none yet."""
        query = sa.select(marks.c.row_key).where(marks.c.digest == digest)
        with self._database.read() as connection:
            found = connection.execute(query).scalar()
        if found is not None:
            return str(found)
        made = make()
        with self._database.write() as connection:
            self._ensure(connection, digest)
            connection.execute(
                marks.update()
                .where(marks.c.digest == digest, marks.c.row_key.is_(None))
                .values(row_key=made)
            )
            # Somebody else's, if that was first.
            return str(connection.execute(query).scalar_one())

    def file_key(self, make: Callable[[], str]) -> str:
        """Return the sealed key of all marks' files: what `make` gives if there is none yet."""
        query = sa.select(sealed_keys.c.sealed).where(sealed_keys.c.name == _FILES)
        with self._database.read() as connection:
            found = connection.execute(query).scalar()
        if found is not None:
            return str(found)
        made = make()
        with self._database.write() as connection:
            found = connection.execute(query).scalar()
            if found is None:  # or somebody else's, if that was first
                row = {"name": _FILES, "sealed": made, "created": int(self._clock())}
                connection.execute(sealed_keys.insert().values(row))
        return made if found is None else str(found)

    def sealed(self) -> tuple[SealedText, ...]:
        """Return every sealed text: the key of files, then in the order of marks' digests."""
        with self._database.read() as connection:
            found = connection.execute(sa.select(marks).order_by(marks.c.digest)).all()
            keys = connection.execute(sa.select(sealed_keys.c.sealed)).scalars().all()
        return tuple(SealedText("file_key", "", text) for text in keys) + tuple(
            SealedText(kind, row.digest, row._mapping[kind])
            for row in found
            for kind in _KINDS
            if row._mapping[kind] is not None
        )

    def reseal(self, old: SealedText, text: str) -> bool:
        """Put `text` in the place of what was sealed otherwise; return False, with nothing changed,
        where that is not there any more.
        """
        if old.kind == "file_key":
            column = sealed_keys.c.sealed
            update = sealed_keys.update().where(sealed_keys.c.name == _FILES)
        else:
            column = marks.c[old.kind]
            update = marks.update().where(marks.c.digest == old.digest)
        with self._database.write() as connection:
            if connection.dialect.name == "sqlite":
                # The bytes of what is replaced are overwritten, not only given free.
                connection.exec_driver_sql("PRAGMA secure_delete = ON")
            changed = connection.execute(update.where(column == old.text).values({column: text}))
        return changed.rowcount == 1

    def _ensure(self, connection: sa.Connection, digest: str) -> sa.Row[Any]:
        query = sa.select(marks).where(marks.c.digest == digest)
        row = connection.execute(query).first()
        if row is None:
            connection.execute(marks.insert().values(digest=digest, created=int(self._clock())))
            row = connection.execute(query).one()
        return row


def _record(row: sa.Row[Any]) -> MarkRecord:
    return MarkRecord(row.digest, row.config, row.secrets, row.created)
