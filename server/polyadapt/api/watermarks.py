"""Routes about per-user marks: what there is, whose signature is which, who is served through one,
and whose copy answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Body, Depends, Path, Request, Response
from starlette.datastructures import UploadFile

from polyadapt.api.access import Principal
from polyadapt.api.replies import json_reply
from polyadapt.api.routing import add_route
from polyadapt.api.schemas.watermarks import (
    DeletedWatermark,
    Queries,
    QueriesRequest,
    ReadingObject,
    SignatureBatchRequest,
    SignatureList,
    SignatureObject,
    SignatureRequest,
    TraceObject,
    TraceRequest,
    VerifyRequest,
    WatermarkList,
    WatermarkObject,
    WatermarkPolicyObject,
    WatermarkPolicyRequest,
)
from polyadapt.api.services import Services, principal_of, services_of
from polyadapt.api.stream import until_disconnect
from polyadapt.errors import Forbidden, InvalidRequest, NotFound, UnsupportedField
from polyadapt.tasks.directory import UploadedFile
from polyadapt.tasks.mandatory import is_tenant_user, tenant_user
from polyadapt.tasks.marks import Sample
from polyadapt.watermark.endpoint import EndpointLimits
from polyadapt_store.signatures import Signature, no_signature
from polyadapt_store.store import check_name

Has = Annotated[Services, Depends(services_of)]
Mark = Annotated[str, Path(max_length=200, description="the mark's adapter")]
User = Annotated[str, Path(max_length=200, description="the id of the user's API key")]
_ROOT = "/v1/watermarks"
_ONE = f"{_ROOT}/{{mark}}"
_USERS = f"{_ONE}/users"
# A part of these paths is a text mark's; no mark may be called so.
_RESERVED = "text"
_UPLOAD = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["name", "files"],
                "properties": {
                    "name": {"type": "string", "description": "of the mark's adapter"},
                    "files": {
                        "type": "array",
                        "items": {"type": "string", "format": "binary"},
                        "description": "config.json, branches.safetensors, triggers.enc",
                    },
                },
            }
        }
    },
}


def add_routes(router: APIRouter) -> None:
    """Add this module's routes."""
    add_route(
        router, "POST", _ROOT, register,
        needs="watermarks", reply=WatermarkObject, status=201, also=200,
        errors=(400, 409, 413, 415, 422), request_body=_UPLOAD,
    )  # fmt: skip
    add_route(router, "GET", _ROOT, list_marks, needs="watermarks", reply=WatermarkList)
    add_route(
        router, "GET", _ONE, get_mark,
        needs="watermarks", reply=WatermarkObject, errors=(400, 404),
    )  # fmt: skip
    add_route(
        router, "DELETE", _ONE, delete_mark,
        needs="watermarks", reply=DeletedWatermark, errors=(400, 404, 409),
    )  # fmt: skip
    add_route(
        router, "PUT", f"{_USERS}/{{user}}", issue,
        needs="watermarks", reply=SignatureObject, also=201, errors=(404, 409), has_body=True,
    )  # fmt: skip
    add_route(
        router, "POST", _USERS, issue_all,
        needs="watermarks", reply=SignatureList, errors=(404, 409), has_body=True,
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
        router, "PUT", f"{_ONE}/policy", put_policy,
        needs="admin", reply=WatermarkPolicyObject, errors=(404,), has_body=True,
    )  # fmt: skip
    add_route(
        router, "POST", f"{_ONE}/queries", make_queries,
        needs="admin", reply=Queries, errors=(404, 409), has_body=True,
    )  # fmt: skip
    add_route(
        router, "POST", f"{_ONE}/verify", verify,
        needs="watermarks", reply=ReadingObject, errors=(404, 409, 499), has_body=True,
    )  # fmt: skip
    add_route(
        router, "POST", f"{_ONE}/trace", trace,
        needs="watermarks", reply=TraceObject, errors=(404, 409), has_body=True,
    )  # fmt: skip


# ----------------------------------------------------------------------------- marks
async def register(request: Request, services: Has) -> Response:
    """Register a mark's bundle for its base: 201, or 200 when these branches are known."""
    async with services.uploads, request.form(max_files=8, max_fields=4) as form:
        name, files = "", []
        for field, value in form.multi_items():
            if field == "files" and isinstance(value, UploadFile):
                files.append(UploadedFile(value.filename or "", value.file))
            elif field == "name" and isinstance(value, str):
                name = value
            else:
                raise UnsupportedField(
                    f"the form field {field[:64]!r} is not known; expected name, files",
                    param=field[:64],
                )
        check_name(name)
        if name == _RESERVED:
            raise InvalidRequest(f"no mark may be called {name!r}; choose another", param="name")
        tenant = principal_of(request).tenant
        stored, is_new = await services.marks.register(tenant, name, files)
    return json_reply(WatermarkObject.of(stored), status=201 if is_new else 200)


async def list_marks(request: Request, services: Has) -> Response:
    """List the marks that the caller's tenant sees."""
    found = await services.marks.list_all(principal_of(request).tenant)
    return json_reply(WatermarkList(data=[WatermarkObject.of(one) for one in found]))


async def get_mark(request: Request, services: Has, mark: Mark) -> Response:
    """Return a mark; never its secrets."""
    found = await services.marks.get(principal_of(request).tenant, mark)
    return json_reply(WatermarkObject.of(found))


async def delete_mark(request: Request, services: Has, mark: Mark) -> Response:
    """Delete a mark and its secrets; 409 while it is required for somebody."""
    records = await services.marks.delete(principal_of(request).tenant, mark)
    return json_reply(
        DeletedWatermark(id=mark, versions=sorted(record.version for record in records))
    )


# ----------------------------------------------------------------------------- signatures
async def issue(
    request: Request,
    services: Has,
    mark: Mark,
    user: User,
    body: Annotated[SignatureRequest | None, Body()] = None,
) -> Response:
    """Give a user its bits, from its next request on (201); the same once more change nothing
    (200).
    """
    caller = principal_of(request)
    tenant = None if caller.may("admin") else caller.tenant
    keys = await asyncio.to_thread(services.keys.list, tenant)
    if user not in {key.id for key in keys}:
        raise NotFound(
            f"no API key {user!r}; a signature is issued to one, GET /v1/keys lists them"
        )
    if body is None or body.signature is None:
        found, is_new = (await services.marks.issue(caller.tenant, mark, [user]))[user]
    else:
        found, is_new = await services.policies.issue_signature(
            caller.tenant, mark, user, body.signature
        )
    reply = SignatureObject.of(mark, found, has_bits=caller.may("admin"))
    return json_reply(reply, status=201 if is_new else 200)


async def issue_all(
    request: Request,
    services: Has,
    mark: Mark,
    body: Annotated[SignatureBatchRequest | None, Body()] = None,
) -> Response:
    """Give every key of a tenant its row of the codebook, all of them or none."""
    caller = principal_of(request)
    tenant = caller.tenant if body is None or body.tenant is None else body.tenant
    if tenant != caller.tenant and not caller.may("admin"):
        raise Forbidden("only an admin issues signatures to another tenant's keys")
    keys = await asyncio.to_thread(services.keys.list, tenant)
    issued = await services.marks.issue(caller.tenant, mark, [key.id for key in keys])
    has_bits = caller.may("admin")
    data = [SignatureObject.of(mark, one, has_bits=has_bits) for one, _ in issued.values()]
    return json_reply(SignatureList(data=data))


async def get_user(request: Request, services: Has, mark: Mark, user: User) -> Response:
    """Return a user's last signature, be it revoked."""
    caller = principal_of(request)
    found = [one for one in await _signatures(services, caller, mark) if one.user == user]
    if not found:
        raise no_signature(user)
    return json_reply(SignatureObject.of(mark, found[-1], has_bits=caller.may("admin")))


async def revoke(request: Request, services: Has, mark: Mark, user: User) -> Response:
    """Take a user's signature back: where marks are required its next request is refused."""
    caller = principal_of(request)
    if (await _foreign(services, caller))(user):
        raise no_signature(user)
    found = await services.policies.revoke_signature(caller.tenant, mark, user)
    return json_reply(SignatureObject.of(mark, found, has_bits=caller.may("admin")))


async def list_users(request: Request, services: Has, mark: Mark) -> Response:
    """List every signature that was ever issued under the mark, but to other tenants' keys: those
    are shown to admins alone.
    """
    caller = principal_of(request)
    found = await _signatures(services, caller, mark)
    data = [SignatureObject.of(mark, one, has_bits=caller.may("admin")) for one in found]
    return json_reply(SignatureList(data=data))


async def _signatures(services: Services, caller: Principal, mark: str) -> list[Signature]:
    """Return what the caller may see of all signatures, with bits for an admin."""
    is_foreign = await _foreign(services, caller)
    found = await services.policies.list_signatures(
        caller.tenant, mark, has_bits=caller.may("admin")
    )
    return [one for one in found if not is_foreign(one.user)]


async def _foreign(services: Services, caller: Principal) -> Callable[[str], bool]:
    """Return whether a user is another tenant's, which only an admin may see or change. A key that
    was deleted is nobody's any more.
    """
    if caller.may("admin"):
        return lambda user: False
    keys = await asyncio.to_thread(services.keys.list)
    others = {key.id for key in keys if key.tenant != caller.tenant}
    own = tenant_user(caller.tenant)
    return lambda user: user in others or (is_tenant_user(user) and user != own)


async def put_policy(
    request: Request, services: Has, mark: Mark, body: Annotated[WatermarkPolicyRequest, Body()]
) -> Response:
    """Have every request of a tenant served through its user's branches, or refused; or no more."""
    await services.policies.require_mark(
        principal_of(request).tenant, mark, body.tenant, is_required=body.required
    )
    return json_reply(
        WatermarkPolicyObject(watermark=mark, tenant=body.tenant, required=body.required)
    )


# ----------------------------------------------------------------------------- whose copy
async def make_queries(
    request: Request,
    services: Has,
    mark: Mark,
    body: Annotated[QueriesRequest | None, Body()] = None,
) -> Response:
    """Return fresh questions for a suspect that only others can ask; `verify` takes the replies."""
    num = QueriesRequest().per_bit if body is None else body.per_bit
    messages = await services.marks.queries(principal_of(request).tenant, mark, num)
    return json_reply(Queries(messages=messages), headers={"cache-control": "no-store"})


async def verify(
    request: Request, services: Has, mark: Mark, body: Annotated[VerifyRequest, Body()]
) -> Response:
    """Read the bits of a suspect: by asking an endpoint that the operator has listed, which takes a
    while and ends when the caller goes, or from samples.
    """
    tenant = principal_of(request).tenant
    if body.samples is not None:
        if body.endpoint is not None or body.model is not None or body.api_key is not None:
            raise InvalidRequest("samples say what was answered; leave the endpoint out")
        samples = [Sample(one.message, one.reply) for one in body.samples]
        signed = await services.marks.verify_samples(tenant, mark, samples, body.alpha, "samples")
        return json_reply(ReadingObject.of(mark, signed))
    if body.endpoint is None or body.model is None:
        raise InvalidRequest("name the endpoint and its model, or give samples", param="endpoint")
    limits = EndpointLimits(max_queries=body.max_queries, timeout_s=body.timeout_s)
    reading = services.marks.verify_endpoint(
        tenant, mark, body.endpoint, body.model, body.api_key, body.alpha, limits
    )
    return json_reply(ReadingObject.of(mark, await until_disconnect(request.receive, reading)))


async def trace(
    request: Request, services: Has, mark: Mark, body: Annotated[TraceRequest, Body()]
) -> Response:
    """Say whose bits were read, among all who ever had a signature, but for other tenants' keys
    where no admin asks; "nobody" is an answer.
    """
    if (body.bits is None) == (body.reading is None):
        raise InvalidRequest("give bits, or a reading, one of the two", param="bits")
    reading = {"bits": body.bits} if body.reading is None else body.reading
    caller = principal_of(request)
    is_foreign = await _foreign(services, caller)
    traced = await services.marks.trace(
        caller.tenant, mark, reading, body.alpha, among=lambda user: not is_foreign(user)
    )
    return json_reply(TraceObject.of(mark, traced))
