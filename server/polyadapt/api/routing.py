"""A route that declares who may call it and everything it can answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from polyadapt.api.access import RequiredScope
from polyadapt.api.schemas.base import ErrorReply
from polyadapt.errors import Forbidden

SCOPE_KEY = "x-required-scope"

_MEANING = {
    400: "the request is malformed, out of range, or asks for what is not served",
    401: "no API key, or an unknown one",
    403: "the key lacks the scope; or a keyless server was called with a foreign Origin or Host",
    404: "no such model, adapter, workflow or object",
    405: "the path does not take this method",
    409: "the object is in a state that does not allow this, or the name is taken",
    410: "the adapter was deleted with mode=now",
    413: "the body is too large",
    415: "the body's content type is not read here",
    422: "the adapter was refused; `problems` lists every reason",
    429: "the queue is full; see retry-after",
    499: "the request was cancelled",
    500: "a fault of this server; the log has it under the x-request-id",
    503: "not now: starting, restarting or draining; see retry-after",
    504: "the request's time limit passed",
}
_ALWAYS = (401, 403, 500)
_WITH_BODY = (400, 413, 415)
_ERROR_CONTENT = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorReply"}}}


class ScopedRoute(APIRoute):
    """Authenticates and checks the declared scope before a byte of the body is read."""

    @property
    def required_scope(self) -> str | None:
        """The scope that a caller needs; None means that nobody may call (and a test fails)."""
        return (self.openapi_extra or {}).get(SCOPE_KEY)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request if its sender may; raises Unauthenticated or Forbidden."""
        if self.required_scope == "public":
            await super().handle(scope, receive, send)
            return
        services = scope["app"].state.services
        principal = await services.authenticator.authenticate(
            Headers(scope=scope).get("authorization")
        )
        if self.required_scope is None or not principal.may(self.required_scope):
            raise Forbidden(f"this call needs a key with the scope {self.required_scope!r}")
        scope.setdefault("state", {})["principal"] = principal
        services.lifecycle.enter()
        try:
            await super().handle(scope, receive, send)
        finally:
            services.lifecycle.leave()


def add_route(
    router: APIRouter,
    method: str,
    path: str,
    endpoint: Callable[..., Any],
    *,
    needs: RequiredScope,
    reply: type[BaseModel] | None,
    status: int = 200,
    also: int | None = None,
    errors: tuple[int, ...] = (),
    has_body: bool = False,
    content: Mapping[str, Any] | None = None,
    headers: Mapping[str, Any] | None = None,
    request_body: Mapping[str, Any] | None = None,
    more: Mapping[int, type[BaseModel]] | None = None,
) -> None:
    """Add one route, which answers `status` with a `reply`, and sometimes `also` with the same.

    `errors` are the statuses beside those that every route of its kind has,
    `more` are successes with another reply, `content` adds media types to the success reply,
    `request_body` describes a body that the endpoint reads by itself.
    """
    statuses = {*errors, *(_WITH_BODY if has_body else ())}
    if needs == "public":
        statuses |= {403, 500}
    else:
        statuses |= {*_ALWAYS, 503}
    success: dict[str, Any] = {"description": "success"}
    if reply is not None:
        success["model"] = reply
    if content:
        success["content"] = dict(content)
    success["headers"] = {
        "x-request-id": {
            "schema": {"type": "string"},
            "description": "the caller's id, or a new one",
        },
        **(headers or {}),
    }
    # Errors are JSON also where the framework would give them the success reply's type.
    error: dict[str, Any] = (
        {"model": ErrorReply} if reply is not None else {"content": _ERROR_CONTENT}
    )
    extra: dict[str, Any] = {SCOPE_KEY: needs}
    if request_body is not None:
        extra["requestBody"] = dict(request_body)
    if needs == "public":
        extra["security"] = []
    router.add_api_route(
        path,
        endpoint,
        methods=[method],
        status_code=status,
        response_model=None,
        response_class=JSONResponse if reply is not None else PlainTextResponse,
        responses={
            status: success,
            **({} if also is None else {also: success}),
            **{code: success | {"model": model} for code, model in (more or {}).items()},
            **{code: {"description": _MEANING[code], **error} for code in sorted(statuses)},
        },
        openapi_extra=extra,
        route_class_override=ScopedRoute,
    )
