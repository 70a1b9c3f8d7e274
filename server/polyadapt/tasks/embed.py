"""Prompts to vectors: an engine request each, a few at a time. Torch-free; knows no HTTP, no names
and no text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

from polyadapt.config import LimitsConfig
from polyadapt.engine.client import EngineClient
from polyadapt.errors import RequestCancelled, by_code
from polyadapt.types import (
    AppliedAdapter,
    Embedded,
    Failed,
    Request,
    SamplingParams,
    WhenCold,
)

_AT_ONCE = 8  # of one caller's prompts: the others' requests are queued behind them
_NOTHING = SamplingParams(max_tokens=0)


class Embedder:
    """Embeds with one engine."""

    def __init__(self, engine: EngineClient, limits: LimitsConfig) -> None:
        self._engine = engine
        self._limits = limits

    async def embed(
        self,
        request_id: str,
        prompts: Sequence[tuple[int, ...]],
        *,
        adapters: tuple[AppliedAdapter, ...] = (),
        when_cold: WhenCold = WhenCold(),  # noqa: B008 - frozen
        cache_salt: tuple[str, ...] = (),
        priority: int = 0,
    ) -> list[Embedded]:
        """Return what the engine makes of every prompt, in order; see Embedded.

        Prompts have at least one token and at most the context's. Raises a PolyadaptError.
        Cancelling this cancels what still runs.
        """
        requests = [
            Request(
                id=f"{request_id}-{number}",
                prompt_ids=ids,
                sampling=_NOTHING,
                adapters=adapters,
                timeout_s=self._limits.request_timeout_s,
                cache_salt=cache_salt,
                priority=priority,
                when_cold=when_cold,
                kind="embed",
            )
            for number, ids in enumerate(prompts)
        ]
        if len(requests) == 1:
            return [await self._run(requests[0])]
        places = asyncio.Semaphore(_AT_ONCE)

        async def run(request: Request) -> Embedded:
            async with places:
                return await self._run(request)

        tasks = [asyncio.create_task(run(request)) for request in requests]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, request: Request) -> Embedded:
        found: Embedded | None = None
        async with aclosing(self._engine.submit(request)) as events:
            async for event in events:
                if isinstance(event, Embedded):
                    found = event
                elif isinstance(event, Failed):
                    raise by_code(event.code, event.message, event.param)
        if found is None:
            raise RequestCancelled("the request was cancelled before it ended")
        return found
