"""Small helpers that every module of routes uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from fastapi import Response
from pydantic import BaseModel

from polyadapt.errors import InvalidRequest

T = TypeVar("T")


def json_reply(
    body: BaseModel, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a body as JSON; optional fields that are absent are left out by the body itself."""
    return Response(body.model_dump_json(), status, headers=headers, media_type="application/json")


def page_of(
    items: Sequence[T], id_of: Callable[[T], str], *, limit: int | None, after: str | None
) -> tuple[Sequence[T], bool]:
    """Return the items behind the one with id `after`, at most `limit`, and whether more follow."""
    first = 0
    if after is not None:
        ids = [id_of(item) for item in items]
        if after not in ids:
            raise InvalidRequest(
                "after is no id of this list; pass the last_id of the page before", param="after"
            )
        first = ids.index(after) + 1
    rest = items[first:]
    if limit is None:
        return rest, False
    return rest[:limit], len(rest) > limit
