"""What a server's refusals become.

ApiError
├── NotFound           404
├── AdapterRejected    422  with every problem of the files
└── Unavailable        429 and 503  with the seconds after which to try again
"""

from __future__ import annotations

from dataclasses import dataclass

import httpx


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with an uploaded adapter."""

    code: str
    message: str
    where: str | None


class ApiError(Exception):
    """The server answered with an error."""

    def __init__(
        self, message: str, *, status: int, code: str, param: str | None, request_id: str | None
    ) -> None:
        super().__init__(f"{message} ({status} {code})")
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.request_id = request_id


class NotFound(ApiError):
    """No such adapter, version or path."""


class AdapterRejected(ApiError):
    """The server cannot serve this adapter exactly."""

    problems: tuple[Problem, ...] = ()


class Unavailable(ApiError):
    """Not now; `retry_after_s` is what the server asked for."""

    retry_after_s: float | None = None


_BY_STATUS: dict[int, type[ApiError]] = {
    404: NotFound,
    422: AdapterRejected,
    429: Unavailable,
    503: Unavailable,
}


def error_of(reply: httpx.Response) -> ApiError:
    """Return the error that a reply with a status of 400 or more stands for."""
    try:
        detail = reply.json()["error"]
        message, code, param = str(detail["message"]), str(detail["code"]), detail.get("param")
        problems = tuple(
            Problem(p["code"], p["message"], p.get("where")) for p in detail.get("problems", ())
        )
    except (ValueError, KeyError, TypeError):
        # A proxy in between answers in its own words.
        message, code, param, problems = reply.text[:500] or reply.reason_phrase, "http", None, ()
    error = _BY_STATUS.get(reply.status_code, ApiError)(
        message,
        status=reply.status_code,
        code=code,
        param=param,
        request_id=reply.headers.get("x-request-id"),
    )
    if isinstance(error, AdapterRejected):
        error.problems = problems
    if isinstance(error, Unavailable):
        wait = reply.headers.get("retry-after", "")
        error.retry_after_s = float(wait) if wait.isdigit() else None
    return error
