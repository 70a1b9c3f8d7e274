"""Reads an adapter_config.json of PEFT's: every key is read, known to be without effect, or refused
by name. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from polyadapt.adapters.peft_modules import PatternTable
from polyadapt.errors import Problem
from polyadapt_store.strict_json import shown

MAX_RANK = 1 << 16
MAX_NUMBER = 1e30  # keeps a scale times a weight inside float32 for every trained weight

# Keys of every config: where it came from, what it was trained for, and what PEFT does by itself.
_ORIGIN_KEYS = frozenset(
    {
        *("peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode", "revision"),
        *("base_model_name_or_path", "runtime_config"),
    }
)


class ConfigReader:
    """One config; what is wrong with it is added to `problems`, what has no effect to `notes`.

    A method that finds something wrong returns its default, so that all problems are found.
    """

    def __init__(
        self, config: Mapping[str, Any], problems: list[Problem], notes: list[str]
    ) -> None:
        self.config = config
        self.problems = problems
        self.notes = notes

    def judge(
        self,
        *,
        read: Collection[str],
        training: Collection[str] = (),
        refused: Mapping[str, str] | None = None,
    ) -> None:
        """Refuse what would change the output and is not served: `refused` keys (with the reason)
        that are set, and set keys that nobody knows. `training` keys are noted.
        """
        refused = refused or {}
        for key, value in self.config.items():
            if key in refused:
                if value:
                    message = f"{key} is not served: {refused[key]}"
                    self.problems.append(Problem("unsupported_config", message, key))
            elif key in training:
                if value:
                    self.notes.append(f"{key} has no effect when serving")
            elif key not in read and key not in _ORIGIN_KEYS:
                self._judge_unknown(key, value)

    def _judge_unknown(self, key: str, value: Any) -> None:
        if not value:
            self.notes.append(f"unknown config key {shown(key)} is empty and was ignored")
            return
        self.problems.append(
            Problem(
                "unknown_config_key",
                f"config key {shown(key)} = {shown(value)} is unknown and might change the "
                "output; remove it if it does not",
                shown(key),
            )
        )

    def rank(self, key: str = "r", default: int = 8) -> int:
        """A whole number from 1 to MAX_RANK."""
        return int(
            self._checked(key, default, is_rank, f"a whole number from 1 to {MAX_RANK}", default)
        )

    def whole(self, key: str, default: int, least: int = 0) -> int:
        """A whole number of at least `least`."""
        expected = f"a whole number of {least} or more"
        return int(
            self._checked(
                key, default, lambda v: type(v) is int and least <= v < 1 << 63, expected, default
            )
        )

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        return float(self._checked(key, default, is_number, "a finite number", default))

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false; null is `default`."""
        value = self.config.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.invalid(key, value, "true or false")
            return default
        return value

    def choice(self, key: str, allowed: Collection[str], default: str) -> str:
        """One of some words."""
        value = self.config.get(key, default)
        if not isinstance(value, str) or value not in allowed:
            self.invalid(key, value, " or ".join(sorted(allowed)))
            return default
        return value

    def numbers(self, key: str, expected: str = "a list of whole numbers") -> tuple[int, ...]:
        """A list of whole numbers, null being empty."""
        value = self.config.get(key) or []
        if not isinstance(value, list) or any(type(v) is not int or v < 0 for v in value):
            self.invalid(key, value, expected)
            return ()
        return tuple(value)

    def words(self, key: str) -> tuple[str, ...]:
        """A list of strings, null being empty; one string stands for itself."""
        value = self.config.get(key) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or any(not isinstance(v, str) or not v for v in value):
            self.invalid(key, value, "null or a list of names")
            return ()
        return tuple(value)

    def table(
        self,
        key: str,
        is_valid: Callable[[Any], bool],
        expected: str,
        kind: type[PatternTable] = PatternTable,
    ) -> PatternTable:
        """An object of patterns of module names and values."""
        table = self.config.get(key) or {}
        if not isinstance(table, dict):
            self.invalid(key, table, f"an object of patterns and {expected}")
            table = {}
        for pattern, value in table.items():
            if not is_valid(value):
                self.invalid(f"{key}[{shown(pattern)}]", value, f"one of {expected}")
        table = {pattern: value for pattern, value in table.items() if is_valid(value)}
        return kind(key, table, self.problems)

    def refuse(self, key: str, reason: str) -> None:
        """Add the problem that this key's value is not served."""
        self.problems.append(Problem("unsupported_config", reason, key))

    def invalid(self, key: str, value: Any, expected: str) -> None:
        """Add the problem that this key's value is none of those it may have."""
        self.problems.append(
            Problem("invalid_config", f"{key} is {shown(value)}, expected {expected}", key)
        )

    def _checked(
        self, key: str, default: Any, is_valid: Callable[[Any], bool], expected: str, instead: Any
    ) -> Any:
        value = self.config.get(key, default)
        if is_valid(value):
            return value
        self.invalid(key, value, expected)
        return instead


def is_rank(value: Any) -> bool:
    """Whether a value from JSON is a rank."""
    return type(value) is int and 1 <= value <= MAX_RANK


def is_number(value: Any) -> bool:
    """Whether a value from JSON is a number that a weight may be multiplied by."""
    if type(value) not in (int, float) or isinstance(value, bool):
        return False
    return abs(value) <= MAX_NUMBER and math.isfinite(value)
