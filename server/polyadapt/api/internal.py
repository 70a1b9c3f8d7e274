"""The application of the internal port: metrics and drain without a key, for the machinery around a
server. Whoever reaches that port is trusted; keeping others away from it is the network's task.
"""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from polyadapt.api.errors import error_response
from polyadapt.api.services import Services
from polyadapt.errors import Forbidden

# A web page or a careless scraper cannot set it: browsers ask first, and are not answered.
DRAIN_HEADER = "x-polyadapt-drain"


def build_internal_app(services: Services) -> ASGIApp:
    """Return the application; it has no lifespan and works as long as `services` do."""

    async def metrics(request: Request) -> Response:
        return Response(services.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    async def drain(request: Request) -> Response:
        """Turn readiness off and answer once new work is refused; GET, as a preStop hook sends."""
        if DRAIN_HEADER not in request.headers:
            return error_response(Forbidden(f"a drain needs the header {DRAIN_HEADER}, any value"))
        lifecycle = services.lifecycle
        await lifecycle.give_notice(services.config.server.drain_notice_s)
        return JSONResponse({"status": "draining", "num_requests": lifecycle.num_open})

    return Starlette(routes=[Route("/metrics", metrics), Route("/drain", drain)])
