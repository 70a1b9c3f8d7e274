"""Whose names a tenant sees: its own and those of SHARED_TENANT; its own name hides a shared one.

A name that belongs to somebody else and a name that nobody has are answered alike.
"""

from __future__ import annotations

import sqlalchemy as sa

from polyadapt.errors import ModelNotFound
from polyadapt_store.database import adapters, versions

SHARED_TENANT = "shared"


def find_owner(connection: sa.Connection, tenant: str, name: str) -> str | None:
    """Return whose name it is for this tenant: its own if that is live, else the shared one, else
    None.
    """
    query = sa.select(adapters.c.tenant).where(
        adapters.c.name == name,
        adapters.c.tenant.in_([tenant, SHARED_TENANT]),
        adapters.c.current_version.is_not(None),
    )
    owners = set(connection.execute(query).scalars())
    return tenant if tenant in owners else next(iter(owners), None)


def owner_of(connection: sa.Connection, tenant: str, name: str) -> str:
    """Return the same; raises ModelNotFound where nobody's name is seen."""
    owner = find_owner(connection, tenant, name)
    if owner is None:
        raise not_found(name)
    return owner


def visible(tenant: str) -> sa.ColumnElement[bool]:
    """Whether a row of `versions` is the tenant's, or shared under a name that it does not hide."""
    own = adapters.alias("own")
    hidden = sa.exists().where(
        own.c.tenant == tenant,
        own.c.name == versions.c.name,
        own.c.current_version.is_not(None),
        versions.c.tenant != tenant,
    )
    return sa.and_(versions.c.tenant.in_([tenant, SHARED_TENANT]), ~hidden)


def not_found(name: str, version: int | None = None) -> ModelNotFound:
    """The error of a name, or a version of it, that the tenant does not see."""
    shown = name if version is None else f"{name}@{version}"
    return ModelNotFound(f"no model or adapter {shown!r}; GET /v1/models lists what there is")
