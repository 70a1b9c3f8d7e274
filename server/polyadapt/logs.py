"""How both processes write their logs: lines for people, or one JSON object a line.

Every line that is written on behalf of an HTTP request carries the request's id. What callers say
and their keys are in no line; tests hold that.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["text", "json"]

# Of the HTTP request that the running task works for; set by the edge's outermost middleware.
REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)

_FIELDS = "fields"  # the attribute of a record that holds what `fields` was given


def configure_logging(level: str, log_format: LogFormat, process: str) -> None:
    """Write this process's lines to standard error; `process` says whose they are."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = JsonFormatter(process) if log_format == "json" else TextFormatter()
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler])


def fields(**values: object) -> dict[str, object]:
    """Return what a logging call takes as `extra` to have these beside the line's message."""
    return {_FIELDS: {name: value for name, value in values.items() if value is not None}}


def fields_of(record: logging.LogRecord) -> Mapping[str, object]:
    """Return what is to stand beside a line's message."""
    found = getattr(record, _FIELDS, {})
    assert isinstance(found, dict)
    return found


class TextFormatter(logging.Formatter):
    """Time, level, logger and message, and fields as name=value behind them."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the line; a fault's traceback follows it."""
        line = super().formatMessage(record)
        behind = " ".join(f"{name}={_text(value)}" for name, value in fields_of(record).items())
        return f"{line} {behind}" if behind else line


class JsonFormatter(logging.Formatter):
    """One object: time (UTC), level, process, logger, message, request_id, fields, exception."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        moment = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, object] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request_id := REQUEST_ID.get()) is not None:
            line["request_id"] = request_id
        line |= fields_of(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def _text(value: object) -> str:
    """Return a value as it stands in a line: strings that could be taken for more are quoted."""
    if isinstance(value, list | tuple):
        return ",".join(map(_text, value)) or "-"
    if isinstance(value, str) and (not value.isprintable() or set(value) & set(' ="')):
        return json.dumps(value)
    return str(value)
