"""What one step of the engine tells the outside, and the commands it takes in. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from polyadapt.types import EngineStats, Event, Request, Residency

CallName = Literal["prepare", "load", "unload", "cancel_adapter"]


@dataclass(frozen=True, slots=True)
class Submit:
    """Take a request."""

    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    """Forget a request whose caller is gone."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Call:
    """A command that is answered by a Reply with the same id."""

    id: int
    name: CallName
    digest: str
    is_pinned: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """The outcome of a Call: a residency, a count, nothing, or an error."""

    id: int
    residency: Residency | None = None
    count: int = 0
    error_code: str | None = None
    error_message: str = ""
    problems: tuple[tuple[str, str, str | None], ...] = ()


@dataclass(slots=True)
class StepOutput:
    """Everything that happened since the last one, in order, in one message."""

    events: list[Event] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    residencies: list[Residency] = field(default_factory=list)  # of adapters that have changed
    gone: list[str] = field(default_factory=list)  # digests that left every tier
    stats: EngineStats | None = None
    num_rows: int = 0  # rows of the forward; 0 when there was none


Command = Submit | Cancel | Call
