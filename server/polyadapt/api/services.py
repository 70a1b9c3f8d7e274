"""What the routes work with, and the server's life: starting, ready, draining, stopped."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from fastapi import Request

from polyadapt.api.access import Authenticator, Principal
from polyadapt.config import Config
from polyadapt.engine.client import EngineClient
from polyadapt.errors import Unavailable
from polyadapt.tasks.auto import AutoService
from polyadapt.tasks.directory import AdapterDirectory, Store
from polyadapt.tasks.following import Follower
from polyadapt.tasks.importing import Importer
from polyadapt.tasks.marks import MarkService
from polyadapt.tasks.policy_admin import PolicyAdmin
from polyadapt.tasks.text import TextService
from polyadapt.tasks.text_marks import TextMarks
from polyadapt.tasks.workflows.library import WorkflowLibrary
from polyadapt.tasks.workflows.runner import WorkflowRunner
from polyadapt_store.idempotency import AnswerBook
from polyadapt_store.keys import KeyRing
from polyadapt_store.replicas import ReplicaBoard

if TYPE_CHECKING:
    from polyadapt.api.metrics import Metrics

logger = logging.getLogger(__name__)


class Lifecycle:
    """Whether the server takes work, and how many requests are under way.

    starting -> ready -> leaving (readiness is off, new work is still taken, so that whoever sends
    it has time to see that) -> draining (new work is refused, what runs goes on) -> stopped.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.is_started = False
        self.is_engine_stopped = False
        self.num_open = 0
        self._clock = clock
        self._drains_at: float | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_leaving(self) -> bool:
        """Whether the server's end has begun: readiness is off."""
        return self._drains_at is not None

    @property
    def is_draining(self) -> bool:
        """Whether new work is refused because the server ends."""
        return self._drains_at is not None and self._clock() >= self._drains_at

    @property
    def is_open(self) -> bool:
        """Whether new work is asked for; while the server is leaving it is only tolerated."""
        return self.is_started and not self.is_leaving

    def close(self) -> None:
        """Take no new work from now on."""
        self._drains_at = self._clock()

    async def give_notice(self, notice_s: float) -> None:
        """Turn readiness off; returns when new work is refused, `notice_s` after the first call."""
        if self._drains_at is None:
            self._drains_at = self._clock() + notice_s
            logger.info("leaving: new requests are refused in %g s", notice_s)
        await asyncio.sleep(max(0.0, self._drains_at - self._clock()))
        self._drains_at = min(self._drains_at, self._clock())  # a sleep may end a tick early

    def enter(self) -> None:
        """Count a request in; raises Unavailable when no new work is taken."""
        if self.is_draining:
            raise Unavailable("the server is shutting down; ask another one", retry_after_s=5)
        self.num_open += 1
        self._idle.clear()

    def leave(self) -> None:
        """Count a request out."""
        self.num_open -= 1
        if self.num_open == 0:
            self._idle.set()

    async def drain(self, grace_s: float, *, notice_s: float = 0.0) -> bool:
        """Give notice, then wait for what runs; False when some is left after `grace_s` more."""
        await self.give_notice(notice_s)
        logger.info("draining: %d requests under way, %g s for them", self.num_open, grace_s)
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("%d requests are left after %g s", self.num_open, grace_s)
            return False
        return True


@dataclass(frozen=True, slots=True)
class Services:
    """Everything that a route may use."""

    config: Config
    engine: EngineClient
    store: Store
    keys: KeyRing
    directory: AdapterDirectory
    policies: PolicyAdmin
    text: TextService
    text_marks: TextMarks
    workflows: WorkflowLibrary
    workflow_runner: WorkflowRunner
    marks: MarkService
    auto: AutoService
    authenticator: Authenticator
    replicas: ReplicaBoard
    follower: Follower
    importer: Importer
    answers: AnswerBook
    metrics: Metrics
    lifecycle: Lifecycle
    is_ready: Callable[[], bool]
    uploads: asyncio.Semaphore
    readings: asyncio.Semaphore  # of texts, for marks
    started: int  # unix seconds


def services_of(request: Request) -> Services:
    """Return the services of the app that a request belongs to."""
    return cast("Services", request.app.state.services)


def principal_of(request: Request) -> Principal:
    """Return who calls; only routes with a scope other than `public` have one."""
    return cast("Principal", request.state.principal)
