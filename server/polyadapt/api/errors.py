"""Every error becomes one envelope here, and nowhere else. Knows no routes."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from polyadapt.errors import (
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    PolyadaptError,
    QueueFull,
    Unauthenticated,
    Unavailable,
    UnsupportedField,
    UnsupportedMediaType,
)

logger = logging.getLogger(__name__)

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MAX_SHOWN = 80


def error_response(error: PolyadaptError) -> JSONResponse:
    """Return the envelope with the error's status and the headers that clients act on."""
    headers: dict[str, str] = {}
    if isinstance(error, QueueFull | Unavailable):
        headers["retry-after"] = str(error.retry_after_s)
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error.envelope(), status_code=error.status, headers=headers)


def install_handlers(app: FastAPI) -> None:
    """Register the handlers: ours, validation's and the framework's errors, all to one envelope."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, PolyadaptError)
        return error_response(error)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(_from_validation(request, error.errors(), error.body))

    async def framework(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return error_response(_from_http(request, error))

    app.add_exception_handler(PolyadaptError, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, framework)


def unexpected(request_id: str) -> PolyadaptError:
    """Return the closed message of a fault of ours; the log has the rest under the request's id."""
    return InternalError(f"an internal error ended this request (request id {request_id})")


def _from_http(request: Request, error: HTTPException) -> PolyadaptError:
    if isinstance(error.__cause__, PolyadaptError):
        return error.__cause__  # raised while the framework was reading the body
    if error.status_code == 404:
        return NotFound(f"no path {request.url.path[:200]!r} here; see /openapi.json")
    if error.status_code == 405:
        return MethodNotAllowed(f"{request.url.path[:200]} does not take {request.method[:20]}")
    if error.status_code == 413:
        return PayloadTooLarge("the body is larger than this server accepts")
    if error.status_code == 400:
        return InvalidRequest("the body cannot be read; send well-formed JSON or form data")
    logger.error("the framework raised status %d: %s", error.status_code, error.detail)
    return InternalError("an internal error ended this request")


def _from_validation(request: Request, problems: Sequence[Any], body: Any) -> PolyadaptError:
    """Return one error for the first problem; `param` names the field."""
    first = problems[0]
    kind, location = first["type"], _in_body(tuple(first["loc"]), body)
    content_type = request.headers.get("content-type", "")
    if location == ("body",) and kind != "json_invalid" and not _is_json(content_type):
        if kind == "missing":
            return InvalidRequest("the body is missing; send a JSON object")
        return UnsupportedMediaType(
            f"the body's type is {content_type[:100]!r}, expected application/json"
        )
    if kind == "json_invalid":
        detail = first.get("ctx", {}).get("error", "")
        return InvalidRequest(f"the body is no valid JSON: {detail}")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        location += (str(first["ctx"]["discriminator"]).strip("'"),)
    context = first.get("ctx", {})
    param = context.get("param") or _param(location)
    where = f"{param}: " if param else ""
    if kind == "extra_forbidden":
        return UnsupportedField(
            f"{where}this field is not known here; remove it or correct its name", param=param
        )
    if kind == "unsupported_field":
        return UnsupportedField(f"{where}{first['msg']}", param=param)
    if kind == "missing":
        return InvalidRequest(f"{where}this field is required", param=param)
    message = str(first["msg"]).removeprefix("Value error, ")
    return InvalidRequest(f"{where}{message}{_given(first)}", param=param)


def _in_body(location: tuple[Any, ...], body: Any) -> tuple[Any, ...]:
    """Return a location without the tags that pydantic puts where a `kind` chooses the schema."""
    if location[:1] != ("body",):
        return location
    kept, value = location[:1], body
    for part in location[1:]:
        if isinstance(value, dict):
            if part not in value and part == value.get("kind"):
                continue
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            value = None
        kept += (part,)
    return kept


def _param(location: Sequence[Any]) -> str | None:
    """Return `messages[0].content` for ("body", "messages", 0, "content"); None for the body."""
    text = ""
    for part in location[1:]:
        if isinstance(part, int):
            text += f"[{part}]"
        elif _IDENTIFIER.fullmatch(part) and len(part) <= 64:
            text += f".{part}" if text else part
        elif not text:
            text = part[:64]  # an unknown field with an odd name
    return text or None


def _given(problem: Any) -> str:
    """Return what was given, shortened; never for values that may be long or secret texts."""
    value = problem.get("input")
    if value is None or isinstance(value, dict | list):
        return ""
    shown = json.dumps(value, default=str)
    return f", given {shown if len(shown) <= _MAX_SHOWN else shown[:_MAX_SHOWN] + '...'}"


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (
        kind.startswith("application/") and kind.endswith("+json")
    )
