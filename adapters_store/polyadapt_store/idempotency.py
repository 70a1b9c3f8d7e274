"""Answers that are given again to who repeats a call with its Idempotency-Key. Kept for a day."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa

from polyadapt.errors import Conflict
from polyadapt_store.database import Database, idempotency, insert

_KEPT_S = 86_400
# Longer than any call takes: the server that answered it is gone.
_LOST_AFTER_S = 1_800


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered; `body` None: what may not be shown twice."""

    status: int
    body: str | None


class AnswerBook:
    """Owns the answers of one Database. Thread-safe."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    def begin(self, tenant: str, key: str, fingerprint: str) -> Answer | None:
        """Return what was answered; None: nothing yet, and the caller is to answer, then to call
        finish() or forget().

        Raises Conflict while somebody else does, and for a key of another call.
        """
        now = int(self._clock())
        mine = sa.and_(idempotency.c.tenant == tenant, idempotency.c.key == key)
        lost = sa.and_(idempotency.c.status.is_(None), idempotency.c.created < now - _LOST_AFTER_S)
        with self._database.note() as connection:
            old = sa.or_(idempotency.c.created < now - _KEPT_S, sa.and_(mine, lost))
            connection.execute(idempotency.delete().where(old))
            made = (
                insert(connection, idempotency)
                .values(tenant=tenant, key=key, fingerprint=fingerprint, created=now)
                .on_conflict_do_nothing()
            )
            if connection.execute(made).rowcount == 1:
                return None
            row = connection.execute(sa.select(idempotency).where(mine)).one()
        if row.fingerprint != fingerprint:
            raise Conflict("the Idempotency-Key was sent with another request; make a new one")
        if row.status is None:
            raise Conflict("a request with this Idempotency-Key is under way; ask again shortly")
        return Answer(row.status, row.body)

    def finish(self, tenant: str, key: str, answer: Answer) -> None:
        """Keep the answer."""
        self._change(
            idempotency.update().values(status=answer.status, body=answer.body), tenant, key
        )

    def forget(self, tenant: str, key: str) -> None:
        """Let the call be made again: it failed."""
        self._change(idempotency.delete(), tenant, key)

    def _change(self, change: sa.Update | sa.Delete, tenant: str, key: str) -> None:
        mine = sa.and_(idempotency.c.tenant == tenant, idempotency.c.key == key)
        with self._database.note() as connection:
            connection.execute(change.where(mine))
