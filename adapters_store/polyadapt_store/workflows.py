"""The workflows' rows: name -> definition, per tenant, in the namespace of the adapters' names.

Knows no kinds: a definition is a text. Names of one tenant are one namespace, so every change here
and Registry.publish look at both tables within their transaction.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from polyadapt.errors import Conflict, NotFound
from polyadapt_store.database import Database, adapters, workflows

MAX_WORKFLOWS = 1000  # of one tenant


@dataclass(frozen=True, slots=True)
class WorkflowRecord:
    """One workflow as it is now; a change makes the next version."""

    id: str  # opaque, stable for this name of this tenant
    tenant: str
    name: str
    version: int
    created: int  # unix seconds, of the first version
    updated: int  # unix seconds, of this version
    description: str
    definition: str


class WorkflowShelf:
    """Owns the workflows' rows of one Database. Thread-safe."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    def put(
        self, tenant: str, name: str, definition: str, description: str = "", *, may_replace: bool
    ) -> tuple[WorkflowRecord, bool]:
        """Store a definition under a name; return the record and whether the name is new.

        The same definition and description again change nothing. Raises Conflict when the name is
        an adapter's of this tenant, is a workflow's and may not be replaced, or is one too many.
        """
        mine = sa.and_(workflows.c.tenant == tenant, workflows.c.name == name)
        with self._database.write() as connection:
            if _is_adapter(connection, tenant, name):
                raise Conflict(
                    f"{name!r} is the name of an adapter; choose another, or delete that first",
                    param="name",
                )
            row = connection.execute(sa.select(workflows).where(mine)).one_or_none()
            is_new = row is None or row.definition is None
            if not is_new and not may_replace:
                raise Conflict(
                    f"there is a workflow {name!r}; PUT /v1/workflows/{name} replaces it",
                    param="name",
                )
            if row is not None and (row.definition, row.description) == (definition, description):
                return _record(row), False
            if is_new:
                self._check_room(connection, tenant)
            now = int(self._clock())
            values: dict[str, Any] = {
                "version": 1 if row is None else row.version + 1,
                "definition": definition,
                "description": description,
                "updated": now,
            }
            if is_new:
                values["created"] = now
            if row is None:
                key = {"tenant": tenant, "name": name, "id": f"workflow-{secrets.token_hex(12)}"}
                connection.execute(workflows.insert().values(**key, **values))
            else:
                connection.execute(workflows.update().where(mine).values(**values))
            stored = connection.execute(sa.select(workflows).where(mine)).one()
        return _record(stored), is_new

    def delete(self, tenant: str, name: str) -> WorkflowRecord:
        """Delete a workflow of this tenant and return it; raises NotFound.

        Its row stays without a definition, so that no version number is given twice.
        """
        mine = sa.and_(workflows.c.tenant == tenant, workflows.c.name == name)
        with self._database.write() as connection:
            row = connection.execute(
                sa.select(workflows).where(mine, workflows.c.definition.is_not(None))
            ).one_or_none()
            if row is None:
                raise NotFound(f"no workflow {name!r}; GET /v1/workflows lists what there is")
            connection.execute(workflows.update().where(mine).values(definition=None))
        return _record(row)

    def all(self) -> tuple[WorkflowRecord, ...]:
        """Return every workflow of every tenant, by tenant and name."""
        query = (
            sa.select(workflows)
            .where(workflows.c.definition.is_not(None))
            .order_by(workflows.c.tenant, workflows.c.name)
        )
        with self._database.read() as connection:
            return tuple(_record(row) for row in connection.execute(query))

    def _check_room(self, connection: sa.Connection, tenant: str) -> None:
        query = sa.select(sa.func.count()).where(
            workflows.c.tenant == tenant, workflows.c.definition.is_not(None)
        )
        if connection.execute(query).scalar_one() >= MAX_WORKFLOWS:
            raise Conflict(f"there are {MAX_WORKFLOWS} workflows, the most; delete one first")


def is_workflow(connection: sa.Connection, tenants: list[str], name: str) -> bool:
    """Whether one of the tenants has a workflow of this name."""
    query = sa.select(workflows.c.id).where(
        workflows.c.name == name,
        workflows.c.tenant.in_(tenants),
        workflows.c.definition.is_not(None),
    )
    return connection.execute(query.limit(1)).first() is not None


def _is_adapter(connection: sa.Connection, tenant: str, name: str) -> bool:
    query = sa.select(adapters.c.name).where(
        adapters.c.tenant == tenant,
        adapters.c.name == name,
        adapters.c.current_version.is_not(None),
    )
    return connection.execute(query).first() is not None


def _record(row: sa.Row[Any]) -> WorkflowRecord:
    return WorkflowRecord(
        id=row.id,
        tenant=row.tenant,
        name=row.name,
        version=row.version,
        created=row.created,
        updated=row.updated,
        description=row.description,
        definition=row.definition,
    )
