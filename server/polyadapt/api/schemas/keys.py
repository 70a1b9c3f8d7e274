"""API keys on the wire: the secret is in the answer that makes a key, and nowhere else."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from polyadapt.api.schemas.base import Body, Reply
from polyadapt_store.keys import ApiKey


class KeyRequest(Body):
    """A key to make."""

    scopes: list[str] = Field(min_length=1, max_length=16)
    label: str = Field("", max_length=200)
    tenant: str | None = Field(
        None,
        min_length=1,
        max_length=64,
        description="whose key it is, the maker's own without it; what a key of `shared` uploads "
        "every tenant sees",
    )


class KeyObject(Reply):
    """A key without its secret."""

    id: str
    object: Literal["api_key"] = "api_key"
    tenant: str
    label: str
    scopes: list[str]
    created: int

    @classmethod
    def of(cls, key: ApiKey) -> KeyObject:
        """Return the wire form of a key."""
        return cls(
            id=key.id,
            tenant=key.tenant,
            label=key.label,
            scopes=sorted(key.scopes),
            created=key.created,
        )


class NewKeyObject(KeyObject):
    """A key with its secret, shown once."""

    secret: str


class KeyList(Reply):
    """A tenant's keys, oldest first."""

    object: Literal["list"] = "list"
    data: list[KeyObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class DeletedKey(Reply):
    """A key that is gone."""

    id: str
    object: Literal["api_key.deleted"] = "api_key.deleted"
    deleted: Literal[True] = True
