"""Commands and outputs as MessagePack: the only format that crosses the process border. Never
pickle.
"""

from __future__ import annotations

from typing import Any

import msgspec

from polyadapt.engine.output import Call, Cancel, Command, Reply, StepOutput, Submit
from polyadapt.types import (
    Embedded,
    EngineInfo,
    EngineStats,
    Event,
    Failed,
    Finished,
    PromptScored,
    Residency,
    Started,
    Tokens,
)


class _Envelope(msgspec.Struct):
    """One message to or from the engine; at most one of its kinds is filled in each direction.

    msgspec tells dataclasses apart by field, not by tag, hence a list per kind. Within a request
    the order of kinds is the order of its life, so that merging the lists keeps every order that
    counts.
    """

    submit: list[Submit] = []
    cancel: list[Cancel] = []
    call: list[Call] = []
    started: list[Started] = []
    scored: list[PromptScored] = []
    tokens: list[Tokens] = []
    embedded: list[Embedded] = []
    finished: list[Finished] = []
    failed: list[Failed] = []
    replies: list[Reply] = []
    residencies: list[Residency] = []
    gone: list[str] = []
    stats: EngineStats | None = None
    num_rows: int = 0
    info: EngineInfo | None = None
    startup_error: str | None = None


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(_Envelope)
_KINDS: dict[type[Any], str] = {
    Submit: "submit",
    Cancel: "cancel",
    Call: "call",
    Started: "started",
    PromptScored: "scored",
    Tokens: "tokens",
    Embedded: "embedded",
    Finished: "finished",
    Failed: "failed",
}


def encode_command(command: Command) -> bytes:
    """One command, edge to engine."""
    return _ENCODER.encode({_KINDS[type(command)]: [command]})


def decode_command(message: bytes) -> Command:
    """The inverse of encode_command."""
    envelope = _DECODER.decode(message)
    commands: list[Command] = [*envelope.submit, *envelope.cancel, *envelope.call]
    (command,) = commands
    return command


def encode_output(output: StepOutput) -> bytes:
    """One step's output, engine to edge."""
    body: dict[str, Any] = {
        "replies": output.replies,
        "stats": output.stats,
        "num_rows": output.num_rows,
    }
    if output.residencies or output.gone:
        body |= {"residencies": output.residencies, "gone": output.gone}
    for event in output.events:
        body.setdefault(_KINDS[type(event)], []).append(event)
    return _ENCODER.encode(body)


def encode_info(info: EngineInfo) -> bytes:
    """The engine's first message when it could start."""
    return _ENCODER.encode({"info": info})


def encode_startup_error(message: str) -> bytes:
    """The engine's only message when it could not start."""
    return _ENCODER.encode({"startup_error": message})


def decode_output(message: bytes) -> StepOutput | EngineInfo | str:
    """A step's output, or what the engine is, or why it could not start."""
    envelope = _DECODER.decode(message)
    if envelope.info is not None:
        return envelope.info
    if envelope.startup_error is not None:
        return envelope.startup_error
    events: list[Event] = [
        *envelope.started,
        *envelope.scored,
        *envelope.tokens,
        *envelope.embedded,
        *envelope.finished,
        *envelope.failed,
    ]
    return StepOutput(
        events,
        envelope.replies,
        envelope.residencies,
        envelope.gone,
        envelope.stats,
        envelope.num_rows,
    )
