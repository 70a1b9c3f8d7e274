"""API keys: who may do what. Stored as hashes, shown once, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from polyadapt.errors import InvalidRequest, NotFound, Unauthenticated
from polyadapt_store.database import Database, api_keys
from polyadapt_store.since_write import SinceWrite

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # it is a part of paths
SCOPES = frozenset({"infer", "adapters:read", "adapters:write", "watermarks", "admin"})


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its secret."""

    id: str
    tenant: str
    label: str
    scopes: frozenset[str]
    created: int  # unix seconds


class KeyRing:
    """Owns the key rows of one Database. Thread-safe."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock
        self._known: SinceWrite[bytes, ApiKey] = SinceWrite(lambda: database.num_writes)

    @property
    def num_writes(self) -> int:
        """See Database: what was read is still so while this does not change."""
        return self._database.num_writes

    def create(self, tenant: str, scopes: Iterable[str], label: str = "") -> tuple[ApiKey, str]:
        """Make a key; return it with its secret "sk-...", which cannot be shown again. Raises
        InvalidRequest for what is no tenant's name or no scope.
        """
        secret = f"sk-{secrets.token_urlsafe(32)}"
        return self._insert(secret, tenant, scopes, label), secret

    def authenticate(self, secret: str) -> ApiKey:
        """Return the key with this secret, as of the last write that was seen; raises
        Unauthenticated.
        """

        def read() -> ApiKey:
            key = self._find(secret)
            if key is None:
                raise Unauthenticated(
                    "the API key is not known here; send 'Authorization: Bearer sk-…'"
                )
            return key

        return self._known.get(_hash(secret), read)

    def list(self, tenant: str | None = None) -> tuple[ApiKey, ...]:
        """Return all keys, or one tenant's, oldest first."""
        query = sa.select(api_keys).order_by(api_keys.c.created, api_keys.c.id)
        if tenant is not None:
            query = query.where(api_keys.c.tenant == tenant)
        with self._database.read() as connection:
            return tuple(_key(row) for row in connection.execute(query))

    def delete(self, key_id: str) -> None:
        """Delete a key at once; raises NotFound."""
        with self._database.write() as connection:
            found = connection.execute(api_keys.delete().where(api_keys.c.id == key_id)).rowcount
        if found == 0:
            raise NotFound(f"no API key {key_id!r}")

    def has_keys(self) -> bool:
        """Whether any key exists; without one every caller is the local admin."""
        with self._database.read() as connection:
            return connection.execute(sa.select(api_keys.c.id).limit(1)).first() is not None

    def _insert(self, secret: str, tenant: str, scopes: Iterable[str], label: str) -> ApiKey:
        if _TENANT.fullmatch(tenant) is None:
            raise InvalidRequest(
                f"the tenant {tenant[:100]!r} is no name; expected 1 to 64 letters, digits, '.', "
                "'_' and '-', the first a letter or digit",
                param="tenant",
            )
        wanted = frozenset(scopes)
        unknown = sorted(wanted - SCOPES)
        if unknown or not wanted:
            raise InvalidRequest(
                f"scopes are {sorted(wanted)}, expected some of {sorted(SCOPES)}", param="scopes"
            )
        key = ApiKey(f"key-{secrets.token_hex(8)}", tenant, label, wanted, int(self._clock()))
        with self._database.write() as connection:
            connection.execute(
                api_keys.insert().values(
                    id=key.id,
                    hash=_hash(secret),
                    tenant=tenant,
                    label=label,
                    scopes=" ".join(sorted(wanted)),
                    created=key.created,
                )
            )
        return key

    def _find(self, secret: str) -> ApiKey | None:
        # The index finds a hash: what its timing tells of a 256-bit digest helps nobody to a
        # secret.
        wanted = _hash(secret)
        with self._database.read() as connection:
            row = connection.execute(
                sa.select(api_keys).where(api_keys.c.hash == wanted)
            ).one_or_none()
        if row is None or not hmac.compare_digest(row.hash, wanted):
            return None
        return _key(row)


def _hash(secret: str) -> bytes:
    # Plain SHA-256 is enough: a secret has 256 random bits, so there is nothing to guess slowly.
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def _key(row: sa.Row[Any]) -> ApiKey:
    return ApiKey(row.id, row.tenant, row.label, frozenset(row.scopes.split()), row.created)
