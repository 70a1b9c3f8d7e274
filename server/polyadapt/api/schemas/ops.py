"""Health, readiness and version."""

from __future__ import annotations

from typing import Literal

from polyadapt.api.schemas.base import Reply


class HealthReply(Reply):
    """The engine's steps advance, or it is idle."""

    status: Literal["ok"] = "ok"


class ReadyReply(Reply):
    """Requests are taken."""

    status: Literal["ready"] = "ready"
    model: str


class VersionReply(Reply):
    """What is running."""

    version: str
    model: str | None
    base_digest: str | None
    device: str | None
    dtype: str | None
    strategy: str | None
