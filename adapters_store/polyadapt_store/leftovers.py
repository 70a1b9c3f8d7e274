"""Which bytes of a shared object store nobody may name any more. Knows no bytes.

A row is written before the first byte of an upload and leaves in the transaction that names the
bytes; deleting the last name writes it again. So whatever is killed, and whenever, every object is
named by a version or by a row here, and rows that are older than the grace are swept with their
objects. Servers that still read what was just deleted have that long to end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable

import sqlalchemy as sa

from polyadapt.errors import Unavailable
from polyadapt_store.database import Database, blob_leftovers, insert, versions

GRACE_S = 3600.0  # more than any upload takes


class Leftovers:
    """Owns the rows of one Database. Thread-safe."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    def claim(self, digest: str) -> None:
        """Keep the digest from being swept for the grace: bytes are about to be written and
        named. Waits for a sweep of this digest that is under way.
        """
        with self._database.note() as connection:
            abandon(connection, [digest], int(self._clock()))

    def sweep(self, delete: Callable[[str], object], grace_s: float = GRACE_S) -> list[str]:
        """Have the bytes deleted of which no version is live and that were left for `grace_s`;
        return their digests. Each under its row's lock, so that a claim comes before or after.
        """
        before = self._clock() - grace_s
        old = blob_leftovers.c.since < before
        with self._database.read() as connection:
            found = list(
                connection.execute(sa.select(blob_leftovers.c.digest).where(old)).scalars()
            )
        swept = []
        for digest in found:
            with self._database.note() as connection:
                mine = blob_leftovers.c.digest == digest
                locked = sa.select(blob_leftovers.c.digest).where(mine, old).with_for_update()
                if connection.execute(locked).first() is None:
                    continue
                if not _live(connection, [digest]):
                    delete(digest)
                    swept.append(digest)
                connection.execute(blob_leftovers.delete().where(mine))
        return swept


def settle(connection: sa.Connection, digest: str) -> None:
    """Take the claim back in the transaction that names the digest; raises Unavailable if it was
    swept meanwhile.
    """
    gone = connection.execute(blob_leftovers.delete().where(blob_leftovers.c.digest == digest))
    # Another upload of the same bytes may have settled them; then a version names them.
    if gone.rowcount == 0 and not _live(connection, [digest]):
        raise Unavailable("the upload took too long and its bytes were swept; send it again")


def abandon_unnamed(connection: sa.Connection, digests: Iterable[str], since: int) -> None:
    """Leave those digests that no version names any more, in the transaction that made it so."""
    wanted = set(digests)
    abandon(connection, wanted - _live(connection, wanted), since)


def abandon(connection: sa.Connection, digests: Collection[str], since: int) -> None:
    """Write the rows, with their time from now on."""
    for digest in sorted(digests):
        made = insert(connection, blob_leftovers).values(digest=digest, since=since)
        connection.execute(
            made.on_conflict_do_update(
                index_elements=[blob_leftovers.c.digest], set_={"since": since}
            )
        )


def _live(connection: sa.Connection, digests: Collection[str]) -> set[str]:
    query = sa.select(versions.c.digest).where(
        versions.c.digest.in_(digests), versions.c.status == "ready"
    )
    return set(connection.execute(query).scalars())
