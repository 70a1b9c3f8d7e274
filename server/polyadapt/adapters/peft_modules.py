"""Which modules of the base a PEFT config means, by PEFT's rules and with patterns on RE2. Torch-
free.

Rules: huggingface/peft:src/peft/tuners/tuners_utils.py (check_target_module_exists) and
src/peft/utils/other.py (get_pattern_key), version 0.21.2. A pattern comes from a stranger: Python's
own regular expressions can take exponential time on one, RE2 is linear.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import re2

from polyadapt.errors import Problem
from polyadapt.types import BaseSpec, SiteSpec
from polyadapt_store.strict_json import shown

MAX_PATTERN_CHARS = 8192
MAX_PATTERNS = 2048

_PREFIXES = ("base_model.model.", "base_model.")
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.")


def find_site(path: str, site_ids: Mapping[str, int]) -> int | None:
    """Return the id of the base module that PEFT calls `path`, or None.

    PEFT writes paths behind "base_model.model."; other writers leave the prefix out or stack
    several.
    """
    while path not in site_ids:
        prefix = next((prefix for prefix in _PREFIXES if path.startswith(prefix)), None)
        if prefix is None:
            return None
        path = path.removeprefix(prefix)
    return site_ids[path]


def without_prefixes(name: str) -> str:
    """Return a tensor's name without what PEFT and others put before the base's own path."""
    while (prefix := next((p for p in _PREFIXES if name.startswith(p)), None)) is not None:
        name = name.removeprefix(prefix)
    return name


class PatternTable:
    """A PEFT `rank_pattern` or `alpha_pattern`: pattern -> number; the first that matches a path
    wins.
    """

    _FORM = r"(.*\.)?({})$"

    def __init__(self, key: str, table: Mapping[str, Any], problems: list[Problem]) -> None:
        """Compile the table of config key `key`, adding what is wrong with it to `problems`."""
        self._entries: list[tuple[str, Any, Any]] = []  # pattern, compiled or None if plain, value
        if len(table) > MAX_PATTERNS:
            problems.append(
                Problem(
                    "invalid_config",
                    f"{key} has {len(table)} patterns, at most {MAX_PATTERNS} are accepted",
                    key,
                )
            )
            return
        for pattern, value in table.items():
            compiled = None
            if not _PLAIN.issuperset(pattern):
                compiled = compile_pattern(self._FORM.format(pattern), key, problems)
                if compiled is None:
                    continue
            self._entries.append((pattern, compiled, value))

    def find(self, path: str) -> Any | None:
        """Return the value of the first pattern that matches the whole path or its end behind a
        dot.
        """
        for pattern, compiled, value in self._entries:
            if compiled is None:
                if _plain_match(pattern, path):
                    return value
            elif compiled.match(path):
                return value
        return None


class DottedPatternTable(PatternTable):
    """A PEFT `block_size_pattern` or `n_frequency_pattern`: the first pattern that matches what
    follows a dot of the path wins, then one that is the path.
    """

    _FORM = r".*\.{}$"

    def find(self, path: str) -> Any | None:
        """Return the value that the table gives the module at `path`."""
        for pattern, compiled, value in self._entries:
            if compiled is None:
                if len(pattern) < len(path) and _plain_match(pattern, path):
                    return value
            elif compiled.match(path):
                return value
        return next((value for pattern, _, value in self._entries if pattern == path), None)


@dataclass(frozen=True, slots=True)
class ModuleTargets:
    """The modules that a config's target_modules, exclude_modules and layers_* select."""

    is_all_linear: bool = False
    pattern: Any = None  # compiled, when target_modules is a pattern
    names: frozenset[str] = field(default_factory=frozenset)
    excluded_pattern: Any = None
    excluded_names: frozenset[str] = field(default_factory=frozenset)
    saved: tuple[str, ...] = ()  # modules_to_save: those and what lies in them are not adapted
    layers: frozenset[int] | None = None  # None: every layer
    layer_patterns: tuple[Any, ...] = ()  # compiled; group `idx` is the layer

    @staticmethod
    def read(config: Mapping[str, Any], problems: list[Problem]) -> ModuleTargets | None:
        """Return the targets of a config, or None with what is wrong added to `problems`."""
        before = len(problems)
        targets = config.get("target_modules")
        excluded = config.get("exclude_modules")
        saved = config.get("modules_to_save")
        layers = config.get("layers_to_transform")
        layer_names = config.get("layers_pattern")
        is_all_linear = isinstance(targets, str) and targets.lower() == "all-linear"
        pattern = excluded_pattern = None
        if isinstance(targets, str) and targets and not is_all_linear:
            pattern = compile_pattern(targets, "target_modules", problems)
        elif not is_all_linear and not _are_names(targets, config):
            _invalid(problems, "target_modules", targets, "a list of module names or a pattern")
        if isinstance(excluded, str) and excluded:
            excluded_pattern = compile_pattern(excluded, "exclude_modules", problems)
        elif excluded and not _are_strings(excluded):
            _invalid(
                problems, "exclude_modules", excluded, "null, a list of module names or a pattern"
            )
        indices = [layers] if type(layers) is int else layers or []
        if not isinstance(indices, list) or any(type(index) is not int for index in indices):
            _invalid(problems, "layers_to_transform", layers, "null, a layer number or a list")
            indices = []
        if indices and isinstance(targets, str):
            _invalid(
                problems, "layers_to_transform", layers, "null when target_modules is a pattern"
            )
        names = [layer_names] if isinstance(layer_names, str) and layer_names else layer_names or []
        if not _are_strings(names):
            _invalid(problems, "layers_pattern", layer_names, "null, a name or a list of names")
            names = []
        # The first numbered component is the layer; a later one is an expert's number.
        forms = [rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\." for name in names]
        layer_patterns = [
            compile_pattern(form, "layers_pattern", problems)
            for form in forms[:MAX_PATTERNS] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        ]
        if len(problems) > before:
            return None
        return ModuleTargets(
            is_all_linear=is_all_linear,
            pattern=pattern,
            names=frozenset() if isinstance(targets, str) else frozenset(targets or ()),
            excluded_pattern=excluded_pattern,
            excluded_names=frozenset(() if isinstance(excluded, str) else excluded or ()),
            saved=tuple(saved) if isinstance(saved, list) and _are_strings(saved) else (),
            layers=frozenset(indices) if indices else None,
            layer_patterns=tuple(layer_patterns),
        )

    def selects(self, site: SiteSpec, base: BaseSpec) -> bool:
        """Whether PEFT would adapt this module of the base."""
        if site.kind == "experts":  # a parameter, which only target_parameters can mean
            return False
        path = site.path
        if any(f".{name}." in f".{path}." for name in self.saved):
            return False
        if self.excluded_pattern is not None and self.excluded_pattern.fullmatch(path):
            return False
        if self.excluded_names and not self.excluded_names.isdisjoint(endings(path)):
            return False
        if self.is_all_linear:
            return site.kind == "linear" and path != base.head_path
        if self.pattern is not None:
            return bool(self.pattern.fullmatch(path))
        if path in self.names:
            return True  # a full path is meant, whatever layers_to_transform says
        if self.names.isdisjoint(endings(path)):
            return False
        return self.layers is None or self._layer(path) in self.layers

    def _layer(self, path: str) -> int | None:
        for pattern in self.layer_patterns:
            match = pattern.match(path)
            if match is not None:
                return int(match.group("idx"))
        return None


def compile_pattern(pattern: str, key: str, problems: list[Problem]) -> Any | None:
    """Return the compiled pattern, or None with a problem that names the config key."""
    if len(pattern) > MAX_PATTERN_CHARS:
        problems.append(
            Problem(
                "invalid_pattern",
                f"{key} holds a pattern of {len(pattern)} characters, "
                f"at most {MAX_PATTERN_CHARS} are accepted",
                key,
            )
        )
        return None
    options = re2.Options()
    options.log_errors = False  # the problem says it; stderr is nobody's to fill
    try:
        return re2.compile(pattern, options)
    except (re2.error, UnicodeEncodeError) as error:
        reason = error.args[0] if error.args else error
        detail = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
        problems.append(
            Problem(
                "invalid_pattern",
                f"{key} holds the pattern {shown(pattern)}, "
                f"which RE2 does not accept: {shown(detail)}",
                key,
            )
        )
        return None


def _plain_match(pattern: str, path: str) -> bool:
    """What `(.*\\.)?(pattern)$` says of a pattern of word characters and dots: a dot is any
    character.
    """
    rest = len(path) - len(pattern)
    if rest < 0 or (rest > 0 and path[rest - 1] != "."):
        return False
    ending = path[rest:]
    return pattern == ending or all(
        wanted in (".", given) for wanted, given in zip(pattern, ending, strict=True)
    )


def endings(path: str) -> Iterable[str]:
    """The path and what follows each of its dots: the names by which a list can mean it."""
    yield path
    while (dot := path.find(".")) >= 0:
        path = path[dot + 1 :]
        yield path


def beginnings(path: str) -> Iterable[str]:
    """The path and those of the modules that it lies in."""
    return accumulate(path.split("."), lambda before, part: f"{before}.{part}")


def _are_names(targets: Any, config: Mapping[str, Any]) -> bool:
    """A list of names, which may be empty or null only where parameters are named instead."""
    is_list = _are_strings([] if targets is None else targets)
    return is_list and bool(targets or config.get("target_parameters"))


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _invalid(problems: list[Problem], key: str, value: Any, expected: str) -> None:
    problems.append(Problem("invalid_config", f"{key} is {shown(value)}, expected {expected}", key))
