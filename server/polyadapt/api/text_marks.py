"""Routes about marks in texts: whose texts are marked how, and whose a text is."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Body, Depends, Request, Response

from polyadapt.api.access import Principal
from polyadapt.api.replies import json_reply
from polyadapt.api.routing import add_route
from polyadapt.api.schemas.text_marks import (
    TextDetectRequest,
    TextFindingObject,
    TextPolicyList,
    TextPolicyObject,
    TextPolicyRequest,
    TextTraceRequest,
)
from polyadapt.api.services import Services, principal_of, services_of
from polyadapt.errors import Forbidden, InvalidRequest, NotFound
from polyadapt.watermark.text_reading import read_text, sign_finding

Has = Annotated[Services, Depends(services_of)]
_POLICY = "/v1/watermarks/text/policy"


def add_routes(router: APIRouter) -> None:
    """Add this module's routes; before those that take any mark's name for `text`."""
    add_route(
        router, "PUT", _POLICY, put_policy,
        needs="admin", reply=TextPolicyObject, has_body=True,
    )  # fmt: skip
    add_route(router, "GET", _POLICY, list_policies, needs="watermarks", reply=TextPolicyList)
    for name, endpoint in (("detect", detect), ("trace", trace)):
        add_route(
            router, "POST", f"/v1/watermarks/text/{name}", endpoint,
            needs="watermarks", reply=TextFindingObject, errors=(404,), has_body=True,
        )  # fmt: skip


async def put_policy(services: Has, body: Annotated[TextPolicyRequest, Body()]) -> Response:
    """Have every text of a tenant marked as its user's, or refused; or no more."""
    marks = services.text_marks
    policy = await asyncio.to_thread(
        lambda: marks.put(body.tenant, body.settings(), is_required=body.required)
    )
    return json_reply(TextPolicyObject.of(policy))


async def list_policies(request: Request, services: Has) -> Response:
    """List the policies that hold: an admin sees every tenant's, others their own."""
    caller = principal_of(request)
    tenant = None if caller.may("admin") else caller.tenant
    found = await asyncio.to_thread(services.text_marks.list, tenant)
    return json_reply(TextPolicyList(data=[TextPolicyObject.of(policy) for policy in found]))


async def detect(
    request: Request, services: Has, body: Annotated[TextDetectRequest, Body()]
) -> Response:
    """Say whether one user's key marked a text, and how sure that is."""
    caller = principal_of(request)
    tenant = _tenant(caller, body.tenant)
    user = body.user or caller.user
    if user is None:
        raise InvalidRequest(
            "the caller has no API key of its own; say whose key is meant", param="user"
        )
    await _check_users(services, caller, tenant, [user], "user")
    return await _answer(services, tenant, [user], body.text, body.alpha)


async def trace(
    request: Request, services: Has, body: Annotated[TextTraceRequest, Body()]
) -> Response:
    """Say which of all users' keys marked a text, and how sure that is; "nobody" is an answer."""
    caller = principal_of(request)
    tenant = _tenant(caller, body.tenant)
    users = body.users
    if users is None:
        users = await _users_of(services, tenant)
    else:
        await _check_users(services, caller, tenant, users, "users")
    if not users:
        raise NotFound(f"the tenant {tenant!r} has no API keys; name users", param="users")
    return await _answer(services, tenant, users, body.text, body.alpha)


def _tenant(caller: Principal, wanted: str | None) -> str:
    if wanted is not None and wanted != caller.tenant and not caller.may("admin"):
        raise Forbidden("only an admin may read another tenant's marks", param="tenant")
    return wanted or caller.tenant


async def _check_users(
    services: Services, caller: Principal, tenant: str, users: Sequence[str], param: str
) -> None:
    """Raise NotFound for a user who is none of the tenant's; an admin may name anybody."""
    if caller.may("admin"):
        return
    unknown = sorted(set(users) - set(await _users_of(services, tenant)))
    if unknown:
        raise NotFound(
            f"no API key {unknown[0][:200]!r} in this tenant; an admin may name deleted ones",
            param=param,
        )


async def _users_of(services: Services, tenant: str) -> list[str]:
    return [key.id for key in await asyncio.to_thread(services.keys.list, tenant)]


async def _answer(
    services: Services, tenant: str, users: Sequence[str], text: str, alpha: float
) -> Response:
    marks = services.text_marks
    info = services.text.info()

    def work() -> TextFindingObject:
        settings = marks.settings_of(tenant)
        tokens = services.text.tokenizer.encode(text, add_special_tokens=False)
        found = read_text(marks.master, settings, users, tokens, alpha=alpha)
        return TextFindingObject.of(
            found, sign_finding(marks.master, found, text, info.base.digest)
        )

    # One at a time: all users' keys against a long text hold a core for a while.
    async with services.readings:
        return json_reply(await asyncio.to_thread(work))
