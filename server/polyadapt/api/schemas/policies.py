"""What every request of a tenant is served through, on the wire."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from polyadapt.api.schemas.base import Body, Reply
from polyadapt.api.schemas.generation import AdapterChoice
from polyadapt.types import MAX_ADAPTERS
from polyadapt_store.policies import Policy


class PolicyRequest(Body):
    """The adapters of a tenant's policy, in place of those that it had."""

    adapters: list[AdapterChoice] = Field(
        min_length=1,
        max_length=MAX_ADAPTERS,
        description="as the tenant's requests would write them; a name without `@version` is the "
        "version that it stands for now",
    )


class PolicyAdapterObject(Reply):
    """One mandatory adapter: a version, which stays what it is when the name moves on."""

    name: str
    version: int
    digest: str
    tenant: str = Field(description="whose adapter it is")
    scale: float
    rank: int | None
    options: dict[str, Any]


class PolicyObject(Reply):
    """What every request of a tenant is served through besides its own adapters."""

    object: Literal["policy"] = "policy"
    tenant: str
    adapters: list[PolicyAdapterObject]
    created: int

    @classmethod
    def of(cls, policy: Policy) -> PolicyObject:
        """Return the wire form of a policy."""
        return cls(
            tenant=policy.tenant,
            adapters=[
                PolicyAdapterObject(
                    name=entry.record.name,
                    version=entry.record.version,
                    digest=entry.record.digest,
                    tenant=entry.record.tenant,
                    scale=entry.scale,
                    rank=entry.rank,
                    options=dict(entry.options),
                )
                for entry in policy.entries
            ],
            created=policy.created,
        )


class PolicyList(Reply):
    """Policies by tenant; the next page begins `after` `last_id`, a tenant's name."""

    object: Literal["list"] = "list"
    data: list[PolicyObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class DeletedPolicy(Reply):
    """A policy that is gone: the tenant's next requests are served as they ask."""

    object: Literal["policy.deleted"] = "policy.deleted"
    tenant: str
    deleted: Literal[True] = True
