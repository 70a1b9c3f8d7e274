"""Pure ASGI middleware: the request's id and log line, and the cap on bodies. Knows no routes."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polyadapt.api.errors import error_response, unexpected
from polyadapt.errors import PayloadTooLarge
from polyadapt.logs import REQUEST_ID, fields

if TYPE_CHECKING:
    from polyadapt.api.tracing import Tracing

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
CLIENT_GONE = 499

# Called at the end of a request with its method, route, status and seconds.
Observer = Callable[[str, str, int, float], None]


class RequestContext:
    """Outermost: gives every request an id, every reply the id, every fault an envelope.

    The id is the caller's `x-request-id` when that is a plain token, else a new one. It is put into
    `scope["state"]["request_id"]`, and beside it into "trace" the request's trace, None unless it
    is traced. What a route puts into "about" is called when the reply is complete, for the fields
    of the request's log line. While the server is leaving every reply closes its connection: one
    that is kept alive would bring the next request here.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        observe: Observer,
        is_leaving: Callable[[], bool],
        tracing: Tracing | None = None,
    ) -> None:
        self._app = app
        self._observe = observe
        self._is_leaving = is_leaving
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        trace = None if self._tracing is None else self._tracing.begin(scope)
        scope.setdefault("state", {}).update(request_id=request_id, trace=trace)
        context = REQUEST_ID.set(request_id)
        status = 0
        began = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if self._is_leaving():
                    headers["connection"] = "close"
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            # Nobody is left to be answered.
            status = CLIENT_GONE
        except Exception:
            logger.exception("request %s failed", request_id)
            if status:
                status = 500
                raise  # a reply that has begun can only be cut off
            await error_response(unexpected(request_id))(scope, receive, send_with_id)
        finally:
            self._report(scope, status, time.perf_counter() - began)
            REQUEST_ID.reset(context)

    def _report(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unknown")
        self._observe(scope["method"], route, status, seconds)
        state = scope["state"]
        method = scope["method"] if scope["method"].isalpha() else "other"
        about: dict[str, Any] = {
            "request_id": state["request_id"],
            "duration_ms": round(1000 * seconds, 1),
            "tenant": getattr(state.get("principal"), "tenant", None),
            **(state["about"]() if "about" in state else {}),
        }
        logger.info("%s %s %d", method, route, status, extra=fields(**about))
        if state["trace"] is not None:
            state["trace"].end(method, route, status, about)


class BodyLimit:
    """Refuses bodies over the cap: by Content-Length before anything is read, else while reading.

    `max_bytes_of(method, path)` gives the cap.
    """

    def __init__(self, app: ASGIApp, *, max_bytes_of: Callable[[str, str], int]) -> None:
        self._app = app
        self._max_bytes_of = max_bytes_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        max_bytes = self._max_bytes_of(scope["method"], scope["path"])
        error = PayloadTooLarge(f"the body is larger than {max_bytes} bytes; send a smaller one")
        length = Headers(scope=scope).get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:20]) > max_bytes:
            await error_response(error)(scope, receive, send)
            return
        num_read = 0

        async def receive_counted() -> Message:
            nonlocal num_read
            message = await receive()
            num_read += len(message.get("body", b""))
            if num_read > max_bytes:
                raise error
            return message

        await self._app(scope, receive_counted, send)
