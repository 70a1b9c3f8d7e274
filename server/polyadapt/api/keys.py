"""Routes about API keys; only for admins."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Body, Depends, Path, Query, Request, Response

from polyadapt.api.idempotency import once
from polyadapt.api.replies import json_reply, page_of
from polyadapt.api.routing import add_route
from polyadapt.api.schemas.keys import DeletedKey, KeyList, KeyObject, KeyRequest, NewKeyObject
from polyadapt.api.services import Services, principal_of, services_of

Has = Annotated[Services, Depends(services_of)]


def add_routes(router: APIRouter) -> None:
    """Add this module's routes."""
    add_route(
        router, "POST", "/v1/keys", create_key,
        needs="admin", reply=NewKeyObject, status=201, errors=(409,), has_body=True,
    )  # fmt: skip
    add_route(router, "GET", "/v1/keys", list_keys, needs="admin", reply=KeyList, errors=(400,))
    add_route(
        router, "DELETE", "/v1/keys/{key_id}", delete_key,
        needs="admin", reply=DeletedKey, errors=(404,),
    )  # fmt: skip


async def create_key(
    request: Request, body: Annotated[KeyRequest, Body()], services: Has
) -> Response:
    """Make a key, for the caller's tenant or another; its secret is in this answer and nowhere
    else.
    """

    async def make() -> Response:
        tenant = body.tenant or principal_of(request).tenant
        key, secret = await asyncio.to_thread(services.keys.create, tenant, body.scopes, body.label)
        made = NewKeyObject(**KeyObject.of(key).model_dump(), secret=secret)
        return json_reply(made, status=201, headers={"cache-control": "no-store"})

    async def fingerprint() -> str:
        return body.model_dump_json()

    return await once(request, services, fingerprint, make, is_secret=True)


async def list_keys(
    request: Request,
    services: Has,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    after: Annotated[str | None, Query(max_length=200)] = None,
    tenant: Annotated[
        str | None, Query(max_length=64, description="whose; the caller's own without it")
    ] = None,
) -> Response:
    """List a tenant's keys without their secrets, oldest first."""
    keys = await asyncio.to_thread(services.keys.list, tenant or principal_of(request).tenant)
    data, has_more = page_of(keys, lambda key: key.id, limit=limit, after=after)
    return json_reply(
        KeyList(
            data=[KeyObject.of(key) for key in data],
            has_more=has_more,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
        )
    )


async def delete_key(services: Has, key_id: Annotated[str, Path(max_length=200)]) -> Response:
    """Delete a key; it stops working at once, at other servers of the registry within seconds."""
    await asyncio.to_thread(services.keys.delete, key_id)
    return json_reply(DeletedKey(id=key_id))
