"""The seam between the edge and an engine. Torch-free.

Implementations: InProcessEngine (tests, notebooks), EngineProcess (the server), EngineFleet, which
is several of them, and what stands for one on another machine (ray_serve/fleet.py).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Protocol

from polyadapt.types import AdapterId, EngineInfo, EngineStats, Event, Request, Residency


class EngineClient(Protocol):
    """What the edge may ask of an engine."""

    @property
    def info(self) -> EngineInfo | None:
        """What the engine is; None until it was ready for the first time."""

    @property
    def is_ready(self) -> bool:
        """Whether the engine takes requests now."""

    @property
    def is_alive(self) -> bool:
        """Whether the step counter advances or the engine is idle."""

    @property
    def num_restarts(self) -> int:
        """How often the engine was started again after it died or hung."""

    async def start(self) -> EngineInfo:
        """Start the engine and wait until it is ready; raises StartupError."""

    async def stop(self) -> None:
        """End every request with an error, then end the engine."""

    def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        """Yield the request's events, ending with one Finished or Failed.

        Raises QueueFull or EngineUnavailable at the first step of the iteration. Closing the
        iterator early (aclose) cancels the request: it is freed at the next step.
        """

    async def prepare_adapter(self, adapter: AdapterId) -> Residency:
        """Read and check the adapter's weights into host memory; raises AdapterRejected or
        Unavailable.
        """

    async def load_adapter(self, adapter: AdapterId, *, is_pinned: bool) -> Residency:
        """Bring the adapter to the device and set its pin; raises AdapterRejected or
        Unavailable.
        """

    async def unload_adapter(self, digest: str) -> None:
        """Release every tier; returns when no running request uses the digest any more."""

    async def cancel_adapter(self, digest: str) -> int:
        """Fail every request that uses the digest with AdapterDeleted; return their number."""

    def stats(self) -> EngineStats:
        """The newest snapshot that has arrived, its counts on top of what engines that were
        replaced had counted; never waits.
        """

    def residencies(self) -> Mapping[str, Residency]:
        """Digest -> where its weights are, as known from the newest step; an adapter in no tier of
        the engine is not listed, unless a pin is being restored. Never waits, and changes as steps
        arrive.
        """
