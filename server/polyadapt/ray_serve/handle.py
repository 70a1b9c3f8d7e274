"""A Ray Serve handle as Calls: bytes out, bytes back, Ray's errors as ReplicaGone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from polyadapt.ray_serve.fleet import ReplicaGone


class HandleCalls:
    """Calls the engine deployment; the first argument is for EngineRouter."""

    def __init__(self, handle: Any) -> None:
        self._describe = handle.options(method_name="describe")
        self._call = handle.options(method_name="call")
        self._submit = handle.options(method_name="submit", stream=True)

    async def describe(self, replica: str) -> bytes:
        """See Calls."""
        return await _answer(self._describe.remote(replica))

    async def call(self, replica: str, message: bytes) -> bytes:
        """See Calls."""
        return await _answer(self._call.remote(replica, message))

    async def submit(
        self, replica: str, message: bytes, edge: str, num_tokens: int
    ) -> AsyncGenerator[bytes, None]:
        """See Calls."""
        messages = self._submit.remote(replica, message, edge, num_tokens)
        is_over = False
        try:
            async for each in messages:
                yield each
            is_over = True
        except (RayError, RayServeException) as error:
            is_over = True
            raise ReplicaGone(_short(error)) from error
        finally:
            if not is_over:
                messages.cancel()


async def _answer(response: Any) -> bytes:
    try:
        answer = await response
    except (RayError, RayServeException) as error:
        raise ReplicaGone(_short(error)) from error
    except asyncio.CancelledError:
        response.cancel()
        raise
    assert isinstance(answer, bytes)
    return answer


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else 'no reason'}"
