"""Idempotency-Key: a call that makes something is carried out once, however often it is sent."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterable

from fastapi import Request
from starlette.responses import Response

from polyadapt.api.services import Services, principal_of
from polyadapt.errors import Conflict, InvalidRequest
from polyadapt_store.idempotency import Answer

HEADER = "idempotency-key"
_REPLAYED = "idempotent-replayed"
_MAX_KEY = 255


def fingerprint_of(parts: Iterable[str]) -> str:
    """Return what tells one request from another: a hash over its parts and their lengths."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(data) + data)
    return digest.hexdigest()


async def once(
    request: Request,
    services: Services,
    fingerprint: Callable[[], Awaitable[str]],
    make: Callable[[], Awaitable[Response]],
    *,
    is_secret: bool = False,
) -> Response:
    """Answer by `make`, or as it was answered to the same key; without a key always by `make`.

    fingerprint: of what is asked, awaited only if there is a key. is_secret: the answer may not be
    shown twice, and is not kept. Raises InvalidRequest for a bad key, Conflict for one of another
    request, of one under way, or of a secret. What failed is not kept and may be tried again.
    """
    key = request.headers.get(HEADER)
    if key is None:
        return await make()
    if not 0 < len(key) <= _MAX_KEY or not key.isascii() or not key.isprintable():
        raise InvalidRequest(
            f"Idempotency-Key has {len(key)} characters, expected 1 to {_MAX_KEY} printable ones",
            param="Idempotency-Key",
        )
    tenant, book = principal_of(request).tenant, services.answers
    asked = fingerprint_of((request.method, request.url.path, await fingerprint()))
    answer = await asyncio.to_thread(book.begin, tenant, key, asked)
    if answer is not None:
        if answer.body is None:
            raise Conflict("that was made by the first such call, and its secret is shown once")
        return Response(
            answer.body,
            answer.status,
            headers={_REPLAYED: "true"},
            media_type="application/json",
        )
    try:
        made = await make()
        body = None if is_secret else bytes(made.body).decode()
        await asyncio.to_thread(book.finish, tenant, key, Answer(made.status_code, body))
    except BaseException:
        await asyncio.shield(asyncio.to_thread(book.forget, tenant, key))
        raise
    return made
