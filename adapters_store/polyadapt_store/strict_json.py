"""JSON from strangers: bounded size and depth, no duplicate keys, no NaN or Infinity. Knows no
schema.
"""

from __future__ import annotations

import json
import math
from typing import Any

from polyadapt.errors import Problem

_QUOTE, _BACKSLASH, _COMMA = b'"\\,'
_CLOSING, _SPACE = b"}]", b" \t\r\n"


class StrictJsonError(ValueError):
    """The text is not the JSON that we read; `problem` says why, with a stable code."""

    def __init__(self, code: str, message: str, where: str) -> None:
        super().__init__(message)
        self.problem = Problem(code, message, where)


def parse_object(text: bytes, *, where: str, max_depth: int) -> dict[str, Any]:
    """Return the JSON object in `text` (UTF-8); `where` names the file or part in the error.

    Raises StrictJsonError: `invalid_json`, `duplicate_key`, `non_finite_number` or `json_too_deep`.
    The size must have been bounded by the caller.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        items: dict[str, Any] = {}
        for key, value in pairs:
            if key in items:
                raise StrictJsonError(
                    "duplicate_key", f"{where} holds the key {shown(key)} twice; keep one", where
                )
            items[key] = value
        return items

    def refuse_constant(constant: str) -> Any:
        raise StrictJsonError(
            "non_finite_number",
            f"{where} holds {shown(constant)}; JSON numbers must be finite",
            where,
        )

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            refuse_constant(number)
        return value

    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=refuse_constant,
            parse_float=finite,
        )
    except StrictJsonError:
        raise
    except RecursionError:
        raise StrictJsonError(
            "json_too_deep", f"{where} is nested deeper than {max_depth} levels", where
        ) from None
    except (
        ValueError
    ) as error:  # JSONDecodeError, UnicodeDecodeError, integers of thousands of digits
        raise StrictJsonError(
            "invalid_json", f"{where} is not valid JSON: {error}", where
        ) from None
    if not isinstance(value, dict):
        raise StrictJsonError(
            "invalid_json", f"{where} holds a {type(value).__name__}, expected an object", where
        )
    if _depth(value) > max_depth:
        raise StrictJsonError(
            "json_too_deep", f"{where} is nested deeper than {max_depth} levels", where
        )
    return value


def without_trailing_commas(text: bytes) -> bytes:
    """Return JSON without the commas that stand before a closing bracket, which some writers leave
    there; strings stay as they are. Linear in the text, whatever it holds.
    """
    kept = bytearray()
    comma, is_string, is_escaped = -1, False, False
    for byte in text:
        if is_string:
            is_string = is_escaped or byte != _QUOTE
            is_escaped = not is_escaped and byte == _BACKSLASH
        elif byte not in _SPACE:
            if comma >= 0 and byte in _CLOSING:
                del kept[comma]
            comma = len(kept) if byte == _COMMA else -1
            is_string = byte == _QUOTE
        kept.append(byte)
    return bytes(kept)


def shown(text: object, max_chars: int = 120) -> str:
    """Return a stranger's value as one quoted, escaped line of bounded length for a message."""
    quoted = ascii(text)
    return quoted if len(quoted) <= max_chars else f"{quoted[: max_chars - 3]}..."


def _depth(value: Any) -> int:
    """Nesting of lists and objects; a scalar is 0. Iterative, so that depth cannot exhaust the
    stack.
    """
    deepest, waiting = 0, [(value, 1)]
    while waiting:
        node, depth = waiting.pop()
        children = (
            node.values() if isinstance(node, dict) else node if isinstance(node, list) else None
        )
        if children is None:
            continue
        deepest = max(deepest, depth)
        waiting.extend((child, depth + 1) for child in children)
    return deepest
