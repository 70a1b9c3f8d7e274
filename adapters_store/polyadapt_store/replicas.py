"""Which servers share the registry, what each has seen of it and where each has which adapter.

Heartbeats: rows that nobody waits for, written by the server they are about, gone when it is
silent.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa

from polyadapt_store.database import Database, replica_adapters, replicas

EXPIRES_S = 15  # without a heartbeat
MAX_ADAPTERS = 4096  # of one server that are told; those on the device first
_MAX_SHOWN = 1000
_ORDER = {"device": 0, "host": 1}


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """One server, as of its last heartbeat, and where it has one adapter."""

    id: str
    is_current: bool  # it has seen the registry's last write
    tier: Literal["device", "host", "store"]  # "store" is neither of the others
    seen: int  # unix seconds


class ReplicaBoard:
    """Owns the rows of one server among those of one Database. One thread at a time beats."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.id = f"replica-{secrets.token_hex(6)}"
        self._told: dict[str, str] = {}  # digest -> tier, as the rows say

    def beat(self, tiers: Mapping[str, str]) -> None:
        """Say that this server lives and where it has which digest; forget the silent ones. Raises
        Unavailable.
        """
        ranked = sorted(tiers.items(), key=lambda item: (_ORDER.get(item[1], 2), item[0]))
        wanted = dict(ranked[:MAX_ADAPTERS])
        mine = replicas.c.id == self.id
        with self._database.note() as connection:
            now = _now(connection)
            values = {"seen": now, "num_writes": self._database.num_writes}
            told = self._told
            if connection.execute(replicas.update().where(mine).values(**values)).rowcount == 0:
                told = {}
                connection.execute(replicas.insert().values(id=self.id, started=now, **values))
            changed = {d for d, tier in told.items() if wanted.get(d) != tier}
            if changed:
                connection.execute(
                    replica_adapters.delete().where(
                        replica_adapters.c.replica == self.id,
                        replica_adapters.c.digest.in_(changed),
                    )
                )
            rows = [
                {"replica": self.id, "digest": digest, "tier": tier}
                for digest, tier in wanted.items()
                if told.get(digest) != tier
            ]
            if rows:
                connection.execute(replica_adapters.insert(), rows)
            # Some seconds later than they are no longer shown: a late one finds its rows again.
            _remove(connection, replicas.c.seen < now - 4 * EXPIRES_S)
        self._told = wanted

    def leave(self) -> None:
        """Forget this server: it ends. Raises Unavailable."""
        with self._database.note() as connection:
            _remove(connection, replicas.c.id == self.id)
        self._told = {}

    def states(self, digest: str) -> tuple[ReplicaState, ...]:
        """Return every server that lives, by id, with where it has the digest. Raises
        Unavailable.
        """
        here = sa.and_(
            replica_adapters.c.replica == replicas.c.id, replica_adapters.c.digest == digest
        )
        with self._database.read() as connection:
            query = (
                sa.select(replicas, replica_adapters.c.tier)
                .outerjoin(replica_adapters, here)
                .where(replicas.c.seen >= _now(connection) - EXPIRES_S)
                .order_by(replicas.c.id)
                .limit(_MAX_SHOWN)
            )
            rows = connection.execute(query).all()
            written = self._database.count(connection)
        return tuple(
            ReplicaState(row.id, row.num_writes >= written, row.tier or "store", row.seen)
            for row in rows
        )


def _remove(connection: sa.Connection, condition: sa.ColumnElement[bool]) -> None:
    # In the order of their ids, as everybody else does: two that lock each other's rows would end
    # one of them.
    found = sa.select(replicas.c.id).where(condition).order_by(replicas.c.id).with_for_update()
    gone = list(connection.execute(found).scalars())
    if gone:
        doomed = replica_adapters.delete().where(replica_adapters.c.replica.in_(gone))
        connection.execute(doomed)
        connection.execute(replicas.delete().where(replicas.c.id.in_(gone)))


def _now(connection: sa.Connection) -> int:
    """The time by one clock for all: the database's, or this machine's, which has the file."""
    if connection.dialect.name == "sqlite":
        return int(time.time())
    clock = sa.extract("epoch", sa.func.clock_timestamp())
    return int(connection.execute(sa.select(clock)).scalar_one())
