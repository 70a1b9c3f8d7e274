"""Routes about policies, which only admins may see or change: adapters that a tenant's requests
cannot do without.
"""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Body, Depends, Path, Query, Response

from polyadapt.api.replies import json_reply, page_of
from polyadapt.api.routing import add_route
from polyadapt.api.schemas.policies import DeletedPolicy, PolicyList, PolicyObject, PolicyRequest
from polyadapt.api.services import Services, services_of

Has = Annotated[Services, Depends(services_of)]
Tenant = Annotated[str, Path(max_length=200, description="the tenant that keys belong to")]
_PATH = "/v1/policies/{tenant}"


def add_routes(router: APIRouter) -> None:
    """Add this module's routes."""
    add_route(
        router, "PUT", _PATH, put_policy,
        needs="admin", reply=PolicyObject, errors=(404,), has_body=True,
    )  # fmt: skip
    add_route(router, "GET", _PATH, get_policy, needs="admin", reply=PolicyObject, errors=(404,))
    add_route(
        router, "DELETE", _PATH, delete_policy, needs="admin", reply=DeletedPolicy, errors=(404,)
    )
    add_route(
        router, "GET", "/v1/policies", list_policies,
        needs="admin", reply=PolicyList, errors=(400,),
    )  # fmt: skip


async def put_policy(
    services: Has, tenant: Tenant, body: Annotated[PolicyRequest, Body()]
) -> Response:
    """Have every request of a tenant served through these adapters, from its next one on."""
    refs = [adapter.ref() for adapter in body.adapters]
    policy = await services.policies.set(tenant, refs)
    return json_reply(PolicyObject.of(policy))


async def get_policy(services: Has, tenant: Tenant) -> Response:
    """Return a tenant's policy."""
    policy = await asyncio.to_thread(services.policies.policies.get, tenant)
    return json_reply(PolicyObject.of(policy))


async def delete_policy(services: Has, tenant: Tenant) -> Response:
    """Let a tenant's next requests be served as they ask."""
    await services.policies.remove(tenant)
    return json_reply(DeletedPolicy(tenant=tenant))


async def list_policies(
    services: Has,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    after: Annotated[str | None, Query(max_length=200)] = None,
) -> Response:
    """List all policies, by tenant."""
    policies = await asyncio.to_thread(services.policies.policies.list)
    data, has_more = page_of(policies, lambda policy: policy.tenant, limit=limit, after=after)
    return json_reply(
        PolicyList(
            data=[PolicyObject.of(policy) for policy in data],
            has_more=has_more,
            first_id=data[0].tenant if data else None,
            last_id=data[-1].tenant if data else None,
        )
    )
