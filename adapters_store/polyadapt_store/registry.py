"""Names -> versions -> digests, per tenant. Every change is one transaction. Knows no bytes and no
HTTP.

A tenant sees its own names and those of SHARED_TENANT; its own name hides a shared one. A name that
belongs to somebody else and a name that nobody has are answered alike.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import sqlalchemy as sa

from polyadapt.errors import Conflict, Forbidden, InvalidRequest, ModelNotFound
from polyadapt.types import AdapterId
from polyadapt_store.blobs import Failpoint, no_failpoint
from polyadapt_store.database import (
    Database,
    adapters,
    policy_adapters,
    profiles,
    tags,
    versions,
)
from polyadapt_store.leftovers import abandon_unnamed, settle
from polyadapt_store.manifest import AdapterManifest, AdapterRecord
from polyadapt_store.profiles import Profile, put_profile
from polyadapt_store.since_write import SinceWrite
from polyadapt_store.visibility import SHARED_TENANT, find_owner, not_found, visible
from polyadapt_store.workflows import is_workflow

__all__ = ["MAX_PAGE", "SHARED_TENANT", "Page", "Registry"]

MAX_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Page:
    """Some records in order, and whether more follow the last one."""

    records: tuple[AdapterRecord, ...]
    has_more: bool


class Registry:
    """Owns the adapters' rows of one Database. Thread-safe."""

    def __init__(
        self,
        database: Database,
        *,
        keeps_leftovers: bool = False,
        failpoint: Failpoint = no_failpoint,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """keeps_leftovers: see leftovers.py; for bytes that several processes share."""
        self._database = database
        self._keeps_leftovers = keeps_leftovers
        self._failpoint = failpoint
        self._clock = clock
        self._known: SinceWrite[tuple[str, str, int | None], AdapterRecord] = SinceWrite(
            lambda: database.num_writes, keeps=ModelNotFound
        )

    def publish(
        self,
        tenant: str,
        name: str,
        manifest: AdapterManifest,
        *,
        description: str = "",
        tags: Sequence[str] = (),
        profile: Profile | None = None,
    ) -> tuple[AdapterRecord, bool]:
        """Make the manifest the current version of the name; return its record and whether it is
        new.

        Bytes that are a live version of this name already, checked against the same base, are that
        version: nothing changes. Else the next number that was never used is taken. A `profile`
        becomes the name's in either case; None leaves it the one that it has. Raises Conflict when
        the name is a workflow's.
        """
        with self._database.write() as connection:
            _check_free(connection, tenant, name)
            mine = sa.and_(versions.c.tenant == tenant, versions.c.name == name)
            existing = records_of(
                connection,
                sa.select(versions)
                .where(mine, versions.c.digest == manifest.digest, versions.c.status == "ready")
                .where(versions.c.base_digest == manifest.report.base_digest)
                .order_by(versions.c.version.desc())
                .limit(1),
            )
            if existing:
                if profile is not None:
                    put_profile(connection, tenant, name, profile, int(self._clock()))
                if self._keeps_leftovers:
                    settle(connection, manifest.digest)
                return existing[0], False
            if self._keeps_leftovers:  # before a row of this version says that it is named
                settle(connection, manifest.digest)
            row = connection.execute(
                sa.select(adapters.c.last_version).where(
                    adapters.c.tenant == tenant, adapters.c.name == name
                )
            ).one_or_none()
            version = 1 if row is None else row.last_version + 1
            if row is None:
                connection.execute(
                    adapters.insert().values(tenant=tenant, name=name, last_version=version)
                )
            version_id = f"adapter-{secrets.token_hex(12)}"
            connection.execute(
                versions.insert().values(
                    id=version_id,
                    tenant=tenant,
                    name=name,
                    version=version,
                    digest=manifest.digest,
                    base_digest=manifest.report.base_digest,
                    status="ready",
                    created=int(self._clock()),
                    description=description,
                    manifest=msgspec.json.encode(manifest).decode(),
                )
            )
            self._insert_tags(connection, version_id, tags)
            if profile is not None:
                put_profile(connection, tenant, name, profile, int(self._clock()))
            self._failpoint("registry.before_flip")
            connection.execute(
                adapters.update()
                .where(adapters.c.tenant == tenant, adapters.c.name == name)
                .values(current_version=version, last_version=version)
            )
            (record,) = records_of(
                connection, sa.select(versions).where(versions.c.id == version_id)
            )
            self._failpoint("registry.before_commit")
        self._failpoint("registry.after_commit")
        return record, True

    def check_free(self, tenant: str, name: str) -> None:
        """Raise Conflict when the name is a workflow's, as `publish` would."""
        with self._database.read() as connection:
            _check_free(connection, tenant, name)

    def resolve(self, tenant: str, name: str, version: int | None = None) -> AdapterRecord:
        """Return the live version `version` of the name, or its current one, as of the last write
        that was seen; raises ModelNotFound.
        """
        key = tenant, name, version
        return self._known.get(key, lambda: self._find(*key))

    def knows(self, tenant: str, name: str, version: int | None = None) -> bool:
        """Whether `resolve` has its answer in memory."""
        return (tenant, name, version) in self._known

    def _find(self, tenant: str, name: str, version: int | None) -> AdapterRecord:
        with self._database.read() as connection:
            owner = find_owner(connection, tenant, name)
            if owner is not None:
                wanted = versions.c.version == version if version is not None else _is_current()
                found = records_of(connection, _live(owner, name).where(wanted))
                if found:
                    return found[0]
            elif is_workflow(connection, [tenant, SHARED_TENANT], name):
                raise ModelNotFound(
                    f"{name!r} is a workflow and no adapter; only `model` of a chat or completion "
                    "may name it, without a version"
                )
        raise not_found(name, version)

    def versions(self, tenant: str, name: str) -> tuple[AdapterRecord, ...]:
        """Return the live versions of the name, newest first; raises ModelNotFound if there is
        none.
        """
        with self._database.read() as connection:
            owner = find_owner(connection, tenant, name)
            if owner is None:
                raise not_found(name)
            return records_of(connection, _live(owner, name).order_by(versions.c.version.desc()))

    def list(
        self,
        tenant: str,
        *,
        limit: int = 20,
        after: str | None = None,
        status: str | None = None,
        tag: str | None = None,
    ) -> Page:
        """Return the current version of every name that the tenant sees, ordered by name.

        `after` is the id of the last record of the page before; it may have been deleted since.
        Raises InvalidRequest for a limit outside 1..1000 or an `after` that never was an id of this
        tenant's.
        """
        if not 1 <= limit <= MAX_PAGE:
            raise InvalidRequest(f"limit is {limit}, expected 1 to {MAX_PAGE}", param="limit")
        query = (
            sa.select(versions)
            .where(_is_current(), visible(tenant))
            .where(versions.c.status == (status or "ready"))
            .order_by(versions.c.name)
            .limit(limit + 1)
        )
        if tag is not None:
            tagged = sa.exists().where(tags.c.version_id == versions.c.id, tags.c.tag == tag)
            query = query.where(tagged)
        with self._database.read() as connection:
            if after is not None:
                last = connection.execute(
                    sa.select(versions.c.name).where(
                        versions.c.id == after, versions.c.tenant.in_([tenant, SHARED_TENANT])
                    )
                ).scalar_one_or_none()
                if last is None:
                    raise InvalidRequest(
                        "after is no adapter's id; pass the last_id of the page before",
                        param="after",
                    )
                query = query.where(versions.c.name > last)
            records = records_of(connection, query)
        return Page(records[:limit], has_more=len(records) > limit)

    def delete(
        self, tenant: str, name: str, version: int | None = None
    ) -> tuple[AdapterRecord, ...]:
        """Delete one version, or the whole name; return what was live until now. Raises
        ModelNotFound.

        The rows stay as tombstones: their numbers are not given again. If the current version goes,
        the highest that is left becomes current; with the last one goes the name's profile. Bytes
        are not touched. Raises Forbidden for a shared adapter of which the tenant is not the owner,
        and Conflict for a version that a policy names.
        """
        with self._database.write() as connection:
            owner = find_owner(connection, tenant, name)
            query = _live(owner or "", name)
            if version is not None:
                query = query.where(versions.c.version == version)
            doomed = records_of(connection, query)
            if owner is None or not doomed:
                raise not_found(name, version)
            if owner != tenant:
                raise Forbidden(f"{name!r} is a shared adapter; only the operator can delete it")
            _refuse_mandatory(connection, doomed)
            connection.execute(
                versions.update()
                .where(versions.c.id.in_([record.id for record in doomed]))
                .values(status="deleted")
            )
            left = sa.select(sa.func.max(versions.c.version)).where(
                versions.c.tenant == owner, versions.c.name == name, versions.c.status == "ready"
            )
            connection.execute(
                adapters.update()
                .where(adapters.c.tenant == owner, adapters.c.name == name)
                .values(current_version=left.scalar_subquery())
            )
            if self._keeps_leftovers:
                digests = [record.digest for record in doomed]
                abandon_unnamed(connection, digests, int(self._clock()))
            if find_owner(connection, owner, name) != owner:
                connection.execute(
                    profiles.delete().where(profiles.c.tenant == owner, profiles.c.name == name)
                )
            self._failpoint("delete.before_commit")
        self._failpoint("delete.after_commit")
        return doomed

    def is_live(self, digest: str) -> bool:
        """Whether any tenant's live version has this digest."""
        with self._database.read() as connection:
            query = sa.select(versions.c.id).where(
                versions.c.digest == digest, versions.c.status == "ready"
            )
            return connection.execute(query.limit(1)).first() is not None

    def live_ids(self) -> frozenset[AdapterId]:
        """Return what every live version of every tenant is."""
        columns = versions.c.name, versions.c.version, versions.c.digest, versions.c.tenant
        query = sa.select(*columns)
        with self._database.read() as connection:
            rows = connection.execute(query.where(versions.c.status == "ready")).all()
        return frozenset(AdapterId(*row) for row in rows)

    def live_digests(self) -> frozenset[str]:
        """Return the digests of all live versions of all tenants."""
        with self._database.read() as connection:
            query = sa.select(versions.c.digest).where(versions.c.status == "ready").distinct()
            return frozenset(connection.execute(query).scalars())

    def live_marks(self) -> dict[str, tuple[str, ...]]:
        """Return the names of the files of all live versions that are marks, by digest."""
        with self._database.read() as connection:
            query = sa.select(versions.c.digest, versions.c.manifest).where(
                versions.c.status == "ready",
                versions.c.manifest.contains('"bits"'),  # of the many that are no marks, few
            )
            rows = connection.execute(query).all()
        found = {row.digest: row.manifest for row in rows}
        manifests = {
            digest: msgspec.json.decode(text, type=AdapterManifest)
            for digest, text in found.items()
        }
        return {
            digest: tuple(file.name for file in manifest.files)
            for digest, manifest in manifests.items()
            if manifest.report.is_mark
        }

    def _insert_tags(
        self, connection: sa.Connection, version_id: str, wanted: Sequence[str]
    ) -> None:
        rows = [{"version_id": version_id, "tag": tag} for tag in dict.fromkeys(wanted)]
        if rows:
            connection.execute(tags.insert(), rows)


def records_of(connection: sa.Connection, query: sa.Select[Any]) -> tuple[AdapterRecord, ...]:
    """Return the records of a query whose rows are those of `versions`, in its order."""
    rows = connection.execute(query).all()
    by_id: dict[str, list[str]] = {row.id: [] for row in rows}
    if by_id:
        tagged = sa.select(tags.c.version_id, tags.c.tag).where(tags.c.version_id.in_(by_id))
        for version_id, tag in connection.execute(tagged.order_by(tags.c.tag)):
            by_id[version_id].append(tag)
    return tuple(_record(row, by_id[row.id]) for row in rows)


def _refuse_mandatory(connection: sa.Connection, doomed: Sequence[AdapterRecord]) -> None:
    """Raise Conflict if a policy names one of the records."""
    by_id = {record.id: record for record in doomed}
    named = connection.execute(
        sa.select(policy_adapters.c.version_id, policy_adapters.c.tenant)
        .where(policy_adapters.c.version_id.in_(by_id))
        .order_by(policy_adapters.c.tenant)
    ).first()
    if named is not None:
        record = by_id[named.version_id]
        raise Conflict(
            f"{record.name}@{record.version} is mandatory by the policy of tenant "
            f"{named.tenant!r}; change that policy or remove it first: /v1/policies/{named.tenant}"
        )


def _record(row: sa.Row[Any], tag_list: Sequence[str]) -> AdapterRecord:
    manifest = msgspec.json.decode(row.manifest, type=AdapterManifest)
    return AdapterRecord(
        id=row.id,
        name=row.name,
        version=row.version,
        digest=row.digest,
        tenant=row.tenant,
        status=row.status,
        created=row.created,
        description=row.description,
        tags=tuple(tag_list),
        nbytes=manifest.nbytes,
        report=manifest.report,
    )


def _live(owner: str, name: str) -> sa.Select[Any]:
    return sa.select(versions).where(
        versions.c.tenant == owner, versions.c.name == name, versions.c.status == "ready"
    )


def _is_current() -> sa.ColumnElement[bool]:
    """Whether a row of `versions` is the one its name stands for."""
    return sa.exists().where(
        adapters.c.tenant == versions.c.tenant,
        adapters.c.name == versions.c.name,
        adapters.c.current_version == versions.c.version,
    )


def _check_free(connection: sa.Connection, tenant: str, name: str) -> None:
    if is_workflow(connection, [tenant], name):
        raise Conflict(
            f"{name!r} is the name of a workflow; choose another, or delete that first",
            param="name",
        )
