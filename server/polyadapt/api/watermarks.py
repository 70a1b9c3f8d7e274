"""Routes about per-user marks: whose signature is which, and who is served through one."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Body, Depends, Path, Request, Response

from polyadapt.api.replies import json_reply
from polyadapt.api.routing import add_route
from polyadapt.api.schemas.watermarks import (
    SignatureList,
    SignatureObject,
    SignatureRequest,
    WatermarkPolicyObject,
    WatermarkPolicyRequest,
)
from polyadapt.api.services import Services, principal_of, services_of
from polyadapt.errors import NotFound
from polyadapt_store.signatures import no_signature

Has = Annotated[Services, Depends(services_of)]
Mark = Annotated[str, Path(max_length=200, description="the mark's adapter")]
User = Annotated[str, Path(max_length=200, description="the id of the user's API key")]
_USERS = "/v1/watermarks/{mark}/users"


def add_routes(router: APIRouter) -> None:
    """Add this module's routes."""
    add_route(
        router, "PUT", f"{_USERS}/{{user}}", issue,
        needs="watermarks", reply=SignatureObject, also=201, errors=(404, 409), has_body=True,
    )  # fmt: skip
    add_route(
        router, "GET", f"{_USERS}/{{user}}", get_user,
        needs="watermarks", reply=SignatureObject, errors=(400, 404),
    )  # fmt: skip
    add_route(
        router, "DELETE", f"{_USERS}/{{user}}", revoke,
        needs="watermarks", reply=SignatureObject, errors=(400, 404),
    )  # fmt: skip
    add_route(
        router, "GET", _USERS, list_users,
        needs="watermarks", reply=SignatureList, errors=(400, 404),
    )  # fmt: skip
    add_route(
        router, "PUT", "/v1/watermarks/{mark}/policy", put_policy,
        needs="admin", reply=WatermarkPolicyObject, errors=(404,), has_body=True,
    )  # fmt: skip


async def issue(
    request: Request,
    services: Has,
    mark: Mark,
    user: User,
    body: Annotated[SignatureRequest, Body()],
) -> Response:
    """Give a user its bits, from its next request on (201); the same once more change nothing
    (200).
    """
    caller = principal_of(request)
    keys = await asyncio.to_thread(services.keys.list)
    if user not in {key.id for key in keys}:
        raise NotFound(
            f"no API key {user!r}; a signature is issued to one, GET /v1/keys lists them"
        )
    found, is_new = await services.directory.issue_signature(
        caller.tenant, mark, user, body.signature
    )
    reply = SignatureObject.of(mark, found, has_bits=caller.may("admin"))
    return json_reply(reply, status=201 if is_new else 200)


async def get_user(request: Request, services: Has, mark: Mark, user: User) -> Response:
    """Return a user's last signature, be it revoked."""
    caller = principal_of(request)
    found = [
        one
        for one in await services.directory.list_signatures(caller.tenant, mark)
        if one.user == user
    ]
    if not found:
        raise no_signature(user)
    return json_reply(SignatureObject.of(mark, found[-1], has_bits=caller.may("admin")))


async def revoke(request: Request, services: Has, mark: Mark, user: User) -> Response:
    """Take a user's signature back: where marks are required its next request is refused."""
    caller = principal_of(request)
    found = await services.directory.revoke_signature(caller.tenant, mark, user)
    return json_reply(SignatureObject.of(mark, found, has_bits=caller.may("admin")))


async def list_users(request: Request, services: Has, mark: Mark) -> Response:
    """List every signature that was ever issued under the mark."""
    caller = principal_of(request)
    found = await services.directory.list_signatures(caller.tenant, mark)
    has_bits = caller.may("admin")
    data = [SignatureObject.of(mark, one, has_bits=has_bits) for one in found]
    return json_reply(SignatureList(data=data))


async def put_policy(
    request: Request, services: Has, mark: Mark, body: Annotated[WatermarkPolicyRequest, Body()]
) -> Response:
    """Have every request of a tenant served through its user's branches, or refused; or no more."""
    await services.directory.require_mark(
        principal_of(request).tenant, mark, body.tenant, is_required=body.required
    )
    return json_reply(
        WatermarkPolicyObject(watermark=mark, tenant=body.tenant, required=body.required)
    )
