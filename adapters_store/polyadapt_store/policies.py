"""The adapters that every request of a tenant is served through. Knows no requests.

A policy names versions, not names: what an operator has looked at is what is served, whatever is
uploaded under the name afterwards. A version that a policy names cannot be deleted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import sqlalchemy as sa

from polyadapt.errors import NotFound
from polyadapt.types import Options, OptionValue
from polyadapt_store.database import Database, policies, policy_adapters, versions
from polyadapt_store.manifest import AdapterRecord
from polyadapt_store.registry import records_of
from polyadapt_store.visibility import not_found


@dataclass(frozen=True, slots=True)
class PolicyEntry:
    """One mandatory adapter and how it is applied, as in a request."""

    record: AdapterRecord
    scale: float = 1.0
    rank: int | None = None
    options: Options = ()


@dataclass(frozen=True, slots=True)
class Policy:
    """What a tenant's requests are served through, in the operator's order."""

    tenant: str
    entries: tuple[PolicyEntry, ...]
    created: int  # unix seconds


class PolicyBook:
    """Owns the policies of one Database. Thread-safe."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    @property
    def num_writes(self) -> int:
        """See Database: what was read is still so while this does not change."""
        return self._database.num_writes

    def put(self, tenant: str, entries: Sequence[PolicyEntry]) -> Policy:
        """Replace the tenant's policy; raises ModelNotFound for a version that is gone."""
        created = int(self._clock())
        with self._database.write() as connection:
            _write(connection, tenant, entries, created)
        return Policy(tenant, tuple(entries), created)

    def change(
        self, tenant: str, new: Callable[[tuple[PolicyEntry, ...]], Sequence[PolicyEntry]]
    ) -> None:
        """Have the tenant's policy name what `new` makes of what it names now; nobody writes in
        between. No entries are no policy. Raises what `new` does, and like put.
        """
        with self._database.write() as connection:
            before = tuple(_read(connection, policy_adapters.c.tenant == tenant).get(tenant, ()))
            entries = tuple(new(before))
            if entries != before:
                _write(connection, tenant, entries, int(self._clock()))

    def list(self) -> tuple[Policy, ...]:
        """Return every tenant's policy, by tenant."""
        with self._database.read() as connection:
            made = connection.execute(sa.select(policies).order_by(policies.c.tenant)).all()
            entries = _read(connection, sa.true())
        return tuple(Policy(row.tenant, tuple(entries[row.tenant]), row.created) for row in made)

    def delete(self, tenant: str) -> None:
        """Remove the tenant's policy; raises NotFound if there is none."""
        with self._database.write() as connection:
            if not _remove(connection, tenant):
                raise no_policy(tenant)


def no_policy(tenant: str) -> NotFound:
    """The error of a tenant without a policy."""
    return NotFound(f"the tenant {tenant[:200]!r} has no policy; GET /v1/policies lists them")


def _read(connection: sa.Connection, where: sa.ColumnElement[bool]) -> dict[str, list[PolicyEntry]]:
    """Return the entries that `where` chooses, by tenant and in order."""
    query = sa.select(policy_adapters).where(where)
    named = connection.execute(
        query.order_by(policy_adapters.c.tenant, policy_adapters.c.position)
    ).all()
    wanted = sa.select(versions).where(versions.c.id.in_({row.version_id for row in named}))
    records = {record.id: record for record in records_of(connection, wanted)}
    entries: dict[str, list[PolicyEntry]] = {}
    for row in named:
        options = msgspec.json.decode(row.options, type=dict[str, OptionValue])
        entries.setdefault(row.tenant, []).append(
            PolicyEntry(records[row.version_id], row.scale, row.rank, tuple(options.items()))
        )
    return entries


def _write(
    connection: sa.Connection, tenant: str, entries: Sequence[PolicyEntry], created: int
) -> None:
    for entry in entries:
        record = entry.record
        live = sa.select(versions.c.id).where(
            versions.c.id == record.id, versions.c.status == "ready"
        )
        if connection.execute(live).first() is None:
            raise not_found(record.name, record.version)
    _remove(connection, tenant)
    if not entries:
        return
    connection.execute(policies.insert().values(tenant=tenant, created=created))
    connection.execute(
        policy_adapters.insert(),
        [
            {
                "tenant": tenant,
                "position": position,
                "version_id": entry.record.id,
                "scale": entry.scale,
                "rank": entry.rank,
                "options": msgspec.json.encode(dict(entry.options)).decode(),
            }
            for position, entry in enumerate(entries)
        ],
    )


def _remove(connection: sa.Connection, tenant: str) -> bool:
    connection.execute(policy_adapters.delete().where(policy_adapters.c.tenant == tenant))
    gone = connection.execute(policies.delete().where(policies.c.tenant == tenant))
    return gone.rowcount > 0
