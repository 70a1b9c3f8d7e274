"""Routes about what adapters are for: the profiles that `model: "auto"` chooses by."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Depends, Path, Request, Response

from polyadapt.api.replies import json_reply
from polyadapt.api.routing import add_route
from polyadapt.api.schemas.profiles import DeletedProfile, ProfileObject, ProfileRequest
from polyadapt.api.services import Services, principal_of, services_of
from polyadapt_store.profiles import Profile

Has = Annotated[Services, Depends(services_of)]
Name = Annotated[str, Path(max_length=200, description="an adapter's name, without a version")]
_PATH = "/v1/adapters/{name}/profile"


def add_routes(router: APIRouter) -> None:
    """Add this module's routes."""
    add_route(
        router, "PUT", _PATH, put_profile,
        needs="adapters:write", reply=ProfileObject, errors=(404, 429, 499, 504), has_body=True,
    )  # fmt: skip
    add_route(
        router, "GET", _PATH, get_profile,
        needs="adapters:read", reply=ProfileObject, errors=(404,),
    )  # fmt: skip
    add_route(
        router, "DELETE", _PATH, delete_profile,
        needs="adapters:write", reply=DeletedProfile, errors=(404,),
    )  # fmt: skip


async def put_profile(
    request: Request,
    services: Has,
    name: Name,
    body: Annotated[ProfileRequest | None, Body()] = None,
) -> Response:
    """Say by examples what a name is for; without any, make its profile anew."""
    examples = None if body is None else body.examples
    async with services.uploads:  # it costs the engine about as much as an upload
        profile = await services.auto.put(principal_of(request).tenant, name, examples)
    return json_reply(_object(services, name, profile))


async def get_profile(request: Request, services: Has, name: Name) -> Response:
    """Return the profile of a name."""
    profile = await services.auto.get(principal_of(request).tenant, name)
    return json_reply(_object(services, name, profile))


async def delete_profile(request: Request, services: Has, name: Name) -> Response:
    """Forget what a name is for: `auto` does not choose it any more."""
    await services.auto.delete(principal_of(request).tenant, name)
    return json_reply(DeletedProfile(name=name))


def _object(services: Services, name: str, profile: Profile) -> ProfileObject:
    auto = services.auto
    return ProfileObject.of(
        name, profile, is_fresh=auto.is_fresh(profile), threshold=auto.threshold
    )
