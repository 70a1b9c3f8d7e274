"""What each adapter's name is for: examples and the vectors made of them. Knows no model, and not
what the vectors mean.

A profile belongs to a name and stays with it over its versions; it goes with the last of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import sqlalchemy as sa

from polyadapt.errors import Forbidden, NotFound
from polyadapt_store.database import Database, adapters, profiles, spaces, versions
from polyadapt_store.visibility import owner_of, visible


@dataclass(frozen=True, slots=True)
class Profile:
    """What was learned from some example requests.

    Vectors are float32, little endian. `space` is the digest of all that they were made with:
    vectors of two spaces have nothing to do with each other.
    """

    examples: tuple[str, ...]
    space: str
    base_digest: str
    num_centroids: int
    centroids: bytes  # [num_centroids, width]
    own_scores: tuple[float, ...]  # each example's, when the profile is made of the others
    created: int = 0  # unix seconds; given when it is stored


@dataclass(frozen=True, slots=True)
class ProfiledVersion:
    """The current version of a name that a tenant sees, with what its profile compares by."""

    name: str
    version: int
    num_centroids: int
    centroids: bytes


class ProfileBook:
    """Owns the profiles of one Database. Thread-safe."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    @property
    def num_writes(self) -> int:
        """See Database: what was read is still so while this does not change."""
        return self._database.num_writes

    def put(self, tenant: str, name: str, profile: Profile) -> Profile:
        """Replace the name's profile; raises ModelNotFound, and Forbidden for a shared name of
        which the tenant is not the owner.
        """
        with self._database.write() as connection:
            owner = _writable(connection, tenant, name)
            return put_profile(connection, owner, name, profile, int(self._clock()))

    def get(self, tenant: str, name: str) -> Profile | None:
        """Return the profile of a name that the tenant sees, None if it has none; raises
        ModelNotFound.
        """
        with self._database.read() as connection:
            owner = owner_of(connection, tenant, name)
            row = connection.execute(_select(owner, name)).one_or_none()
        return None if row is None else _profile(row)

    def own(self, tenant: str, name: str) -> Profile | None:
        """Return the profile of the tenant's own name; None also where there is no such name."""
        with self._database.read() as connection:
            row = connection.execute(_select(tenant, name)).one_or_none()
        return None if row is None else _profile(row)

    def delete(self, tenant: str, name: str) -> None:
        """Forget the name's profile; raises NotFound if it has none, and as `put` does."""
        with self._database.write() as connection:
            owner = _writable(connection, tenant, name)
            mine = sa.and_(profiles.c.tenant == owner, profiles.c.name == name)
            if connection.execute(profiles.delete().where(mine)).rowcount == 0:
                raise no_profile(name)

    def current(self, tenant: str, base_digest: str, space: str) -> tuple[ProfiledVersion, ...]:
        """Return what the tenant may be served with on this base and has a profile of this space:
        of each name its current version, by name.
        """
        query = (
            sa.select(
                versions.c.name,
                versions.c.version,
                profiles.c.num_centroids,
                profiles.c.centroids,
            )
            .join(
                adapters,
                sa.and_(
                    adapters.c.tenant == versions.c.tenant,
                    adapters.c.name == versions.c.name,
                    adapters.c.current_version == versions.c.version,
                ),
            )
            .join(
                profiles,
                sa.and_(profiles.c.tenant == versions.c.tenant, profiles.c.name == versions.c.name),
            )
            .where(visible(tenant), versions.c.status == "ready")
            .where(versions.c.base_digest == base_digest, profiles.c.space == space)
            .order_by(versions.c.name)
        )
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        return tuple(ProfiledVersion(*row) for row in rows)

    def space(self, space: str) -> bytes | None:
        """Return the vectors that were kept for a space."""
        query = sa.select(spaces.c.content).where(spaces.c.space == space)
        with self._database.read() as connection:
            found: bytes | None = connection.execute(query).scalar_one_or_none()
        return found

    def keep_space(self, space: str, content: bytes) -> None:
        """Keep a space's vectors; the first ones stay."""
        with self._database.write() as connection:
            known = connection.execute(sa.select(spaces.c.space).where(spaces.c.space == space))
            if known.first() is None:
                connection.execute(spaces.insert().values(space=space, content=content))


def put_profile(
    connection: sa.Connection, owner: str, name: str, profile: Profile, created: int
) -> Profile:
    """Replace the profile of an owner's name inside a transaction; return it as it is stored."""
    connection.execute(profiles.delete().where(profiles.c.tenant == owner, profiles.c.name == name))
    connection.execute(
        profiles.insert().values(
            tenant=owner,
            name=name,
            space=profile.space,
            base_digest=profile.base_digest,
            examples=msgspec.json.encode(profile.examples).decode(),
            num_centroids=profile.num_centroids,
            centroids=profile.centroids,
            own_scores=msgspec.json.encode(profile.own_scores).decode(),
            created=created,
        )
    )
    return replace(profile, created=created)


def no_profile(name: str) -> NotFound:
    """The error of a name without a profile."""
    return NotFound(
        f"the adapter {name!r} has no profile; PUT /v1/adapters/{name}/profile with examples"
    )


def _writable(connection: sa.Connection, tenant: str, name: str) -> str:
    owner = owner_of(connection, tenant, name)
    if owner != tenant:
        raise Forbidden(f"{name!r} is a shared adapter; only the operator can change its profile")
    return owner


def _select(owner: str, name: str) -> sa.Select[Any]:
    return sa.select(profiles).where(profiles.c.tenant == owner, profiles.c.name == name)


def _profile(row: sa.Row[Any]) -> Profile:
    return Profile(
        examples=msgspec.json.decode(row.examples, type=tuple[str, ...]),
        space=row.space,
        base_digest=row.base_digest,
        num_centroids=row.num_centroids,
        centroids=row.centroids,
        own_scores=msgspec.json.decode(row.own_scores, type=tuple[float, ...]),
        created=row.created,
    )
