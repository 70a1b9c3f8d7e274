"""Routes for operators: is it alive, is it ready, what is it, how is it doing."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response
from prometheus_client import CONTENT_TYPE_LATEST

import polyadapt
from polyadapt.api.replies import json_reply
from polyadapt.api.routing import add_route
from polyadapt.api.schemas.ops import HealthReply, ReadyReply, VersionReply
from polyadapt.api.services import Services, services_of
from polyadapt.errors import EngineUnavailable, Unavailable

Has = Annotated[Services, Depends(services_of)]
_PROMETHEUS = {"text/plain": {"schema": {"type": "string"}}}


def add_routes(router: APIRouter) -> None:
    """Add this module's routes."""
    add_route(router, "GET", "/health", health, needs="public", reply=HealthReply, errors=(503,))
    add_route(router, "GET", "/ready", ready, needs="public", reply=ReadyReply, errors=(503,))
    add_route(router, "GET", "/version", version, needs="public", reply=VersionReply)
    # The names of adapters are in it: whoever may list them may scrape.
    add_route(
        router, "GET", "/metrics", metrics,
        needs="adapters:read", reply=None, content=_PROMETHEUS,
    )  # fmt: skip


async def health(services: Has) -> Response:
    """Answer 200 while the engine's steps advance or it is idle; restart the server otherwise."""
    if not services.engine.is_alive:
        raise EngineUnavailable("the engine is dead or hangs", retry_after_s=5)
    return json_reply(HealthReply())


async def ready(services: Has) -> Response:
    """Answer 200 while requests are taken; send them elsewhere otherwise."""
    if services.lifecycle.is_leaving:
        raise Unavailable("the server is shutting down", retry_after_s=5)
    info = services.engine.info
    if info is None or not services.is_ready():
        raise EngineUnavailable("the engine is starting", retry_after_s=2)
    return json_reply(ReadyReply(model=info.base.name))


async def version(services: Has) -> Response:
    """Say what is running."""
    info = services.engine.info
    return json_reply(
        VersionReply(
            version=polyadapt.__version__,
            model=None if info is None else info.base.name,
            base_digest=None if info is None else info.base.digest,
            device=None if info is None else info.device,
            dtype=None if info is None else info.dtype,
            strategy=None if info is None else info.strategy,
        )
    )


async def metrics(services: Has) -> Response:
    """Return Prometheus' text format."""
    return Response(services.metrics.render(), media_type=CONTENT_TYPE_LATEST)
