"""Adapters that are fetched from sources: which are under way, and what came of the others."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import sqlalchemy as sa

from polyadapt.errors import NotFound, Unavailable
from polyadapt_store.database import Database, imports

_KEPT_S = 86_400
RENEW_S = 30.0  # how often a server says that it still works at its own
# Of silence: the server that began it is gone.
_LOST_AFTER_S = 300


@dataclass(frozen=True, slots=True)
class Import:
    """One of them. Neither a version nor an error: under way."""

    id: str
    tenant: str
    name: str
    uri: str
    version: int | None
    error: Mapping[str, Any] | None  # an envelope, see PolyadaptError
    created: int  # unix seconds


class ImportBook:
    """Owns the imports of one Database. Thread-safe."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    def begin(self, tenant: str, name: str, uri: str) -> Import:
        """Note that a source is being fetched."""
        now = int(self._clock())
        made = Import(f"import-{secrets.token_hex(12)}", tenant, name, uri, None, None, now)
        with self._database.note() as connection:
            connection.execute(imports.delete().where(imports.c.created < now - _KEPT_S))
            connection.execute(
                imports.insert().values(
                    id=made.id, tenant=tenant, name=name, uri=uri, created=now, seen=now
                )
            )
        return made

    def renew(self, import_ids: Collection[str]) -> None:
        """Note that these are still waited for or worked at. Raises Unavailable."""
        mine = imports.c.id.in_(import_ids)
        with self._database.note() as connection:
            connection.execute(imports.update().where(mine).values(seen=int(self._clock())))

    def finish(self, import_id: str, version: int) -> None:
        """Note which version it became."""
        self._set(import_id, version=version)

    def fail(self, import_id: str, envelope: Mapping[str, Any]) -> None:
        """Note why it failed."""
        self._set(import_id, error=msgspec.json.encode(envelope).decode())

    def get(self, tenant: str, import_id: str) -> Import:
        """Return one; raises NotFound also for another tenant's."""
        query = sa.select(imports).where(imports.c.id == import_id, imports.c.tenant == tenant)
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise NotFound(f"no import {import_id[:100]!r}; they are kept for a day")
        error = None if row.error is None else msgspec.json.decode(row.error)
        if row.version is None and error is None and row.seen < self._clock() - _LOST_AFTER_S:
            error = Unavailable("the server that fetched it ended; ask for it again").envelope()
        return Import(row.id, row.tenant, row.name, row.uri, row.version, error, row.created)

    def _set(self, import_id: str, **values: object) -> None:
        with self._database.note() as connection:
            connection.execute(imports.update().where(imports.c.id == import_id).values(**values))
