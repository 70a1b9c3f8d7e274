"""The reference pages of the documentation, made of the code that they describe.

python -m tools.docs_reference NAME    print one: configuration, cli, metrics or errors
"""

from __future__ import annotations

import inspect
import io
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer.main
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from polyadapt import errors
from polyadapt.api.meters import SECTIONS, Meter
from polyadapt.cli import app
from polyadapt.config import ENV_PREFIX, Config

_SPELLED = {"adapters": "adapter", "adapter_roots": "adapter_root", "allowed_hosts": "allowed_host",
            "prefix_pools": "prefix_pool"}  # fmt: skip
_VALUES: dict[Any, str] = {int: "NUMBER", float: "NUMBER", Path: "PATH", list[Path]: "PATH"}


def configuration() -> str:
    """Return the page of all settings."""
    parts = [
        "# Configuration",
        "Every setting can be given on the command line, as an environment variable and in the "
        "YAML file of `--config` (or `POLYADAPT_CONFIG`). The command line wins over the "
        "environment, the environment over the file. A name that is unknown or a value that "
        "cannot be read ends the start with one line that names it.",
        "```yaml\nengine:\n  model: smollm2\n  max_num_seqs: 32\nserver:\n  port: 8080\n```",
    ]
    options = {each.name: each for each in _parameters(_commands()["serve"], "option")}
    top = [(name, field) for name, field in Config.model_fields.items() if not _section(field)]
    parts += ["## Top level", _settings(None, top, Config, options)]
    for name, field in Config.model_fields.items():
        section = _section(field)
        if section is not None:
            about = inspect.getdoc(section) or ""
            fields = section.model_fields.items()
            parts += [f"## `{name}`", about, _settings(name, fields, section, options)]
    return _page(parts)


def cli() -> str:
    """Return the page of all commands."""
    parts = ["# Command line", "`polyadapt COMMAND --help` says the same."]
    for name, command in _commands().items():
        parts.append(f"## `polyadapt {name}`")
        parts.append(inspect.cleandoc(command.help or ""))
        if arguments := " ".join(map(_value, _parameters(command, "argument"))):
            parts.append(f"```\npolyadapt {name} {arguments}\n```")
        rows = [
            (
                ", ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts)),
                "" if option.is_flag else f"`{_value(option)}`",
                option.help or "",
            )
            for option in _parameters(command, "option")
            if not option.hidden
        ]
        if rows:
            parts.append(_table(("option", "value", "meaning"), rows))
    return _page(parts)


def metrics() -> str:
    """Return the page of all metrics."""
    parts = [
        "# Metrics",
        "`GET /metrics` answers in Prometheus' text format to keys with the scope "
        "`adapters:read`; with `--internal-port` a second port does without a key. Counters of "
        "the engine begin at 0 when it is started again. What to watch and what alerts mean is "
        "said in [What to watch](../observability.md).",
    ]
    for section, meters in SECTIONS.items():
        parts.append(f"## {section}")
        parts.append(_table(("name", "kind", "labels", "meaning"), map(_meter, meters)))
    return _page(parts)


def error_catalogue() -> str:
    """Return the page of all errors that the HTTP API answers with."""
    parts = [
        "# Errors",
        'Every error is OpenAI\'s envelope, `{"error": {"message", "type", "code", '
        '"param"}}`: `code` is one of these and stays what it is, `message` is for people and '
        "may change, `param` names the field to blame. 429 and 503 carry `retry-after`. A stream "
        "that has begun ends in an `error` event with the same body and no `[DONE]`.",
    ]
    rows = [
        (str(kind.status), f"`{kind.code}`", f"`{kind.type}`", _sentence(kind))
        for kind in sorted(_error_classes(), key=lambda kind: (kind.status, kind.code))
    ]
    parts.append(_table(("status", "code", "type", "when"), rows))
    return _page(parts)


PAGES: dict[str, Callable[[], str]] = {
    "configuration": configuration,
    "cli": cli,
    "metrics": metrics,
    "errors": error_catalogue,
}


def _commands() -> dict[str, Any]:
    """Return every command by the words that call it; typer has a click of its own."""

    def walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        children = getattr(command, "commands", None)
        if children is None:
            yield " ".join(words), command
            return
        for name, child in children.items():
            yield from walk(child, (*words, name))

    return dict(walk(typer.main.get_command(app), ()))


def _parameters(command: Any, kind: Literal["option", "argument"]) -> list[Any]:
    return [each for each in command.params if each.param_type_name == kind]


def _value(parameter: Any) -> str:
    """Return what stands for the parameter's value."""
    if parameter.metavar or parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    kind = parameter.type_descriptor.annotation
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    return _VALUES.get(kind, "TEXT")


def _settings(
    section: str | None,
    fields: Iterable[tuple[str, FieldInfo]],
    owner: type[BaseModel],
    options: dict[str, Any],
) -> str:
    comments = _comments(owner)
    rows = []
    for name, field in fields:
        option = options.get(_SPELLED.get(name, name))
        flag = "" if option is None else f"`{option.opts[0]}`"
        comment = _capitalised(comments.get(name, ""))
        meaning = comment if option is None else option.help or comment
        key = name if section is None else f"{section}.{name}"
        variable = f"`{ENV_PREFIX}{name.upper()}`"
        rows.append((f"`{key}`", flag, variable, _default(field), meaning))
    return _table(("key", "option", "variable", "default", "meaning"), rows)


def _comments(owner: type[BaseModel]) -> dict[str, str]:
    """Return the comment of every field: behind it, or on the lines before it."""
    lines = inspect.getsource(owner).splitlines(keepends=True)
    found: dict[int, str] = {}
    alone: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO("".join(lines)).readline):
        if token.type == tokenize.COMMENT:
            found[token.start[0]] = token.string.lstrip("# ")
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    comments: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        name = line.strip().partition(":")[0]
        if name not in owner.model_fields or not line.startswith("    ") or line[4] == " ":
            continue
        before: list[str] = []
        above = number - 1
        while above in alone:
            before.insert(0, found[above])
            above -= 1
        behind = [found[number]] if number in found else []
        comments.setdefault(name, " ".join([*before, *behind]))
    return comments


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None or field.default is PydanticUndefined:
        made = field.default_factory() if field.default_factory else None  # type: ignore[call-arg]
        return f"`{made}`" if made == {} else "(computed)"
    value = field.default
    if value is None:
        return ""
    if isinstance(value, SecretStr):
        return "(secret)"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if value == ():
        return "(none)"
    human = getattr(value, "human_readable", None)
    return f"`{human() if human is not None else value}`"


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind: Any = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _meter(meter: Meter) -> tuple[str, ...]:
    labels = ", ".join(f"`{label}`" for label in meter.labels)
    return f"`{meter.sample}`", meter.kind, labels, meter.text


def _error_classes() -> list[type[errors.PolyadaptError]]:
    """Return the classes that a caller can meet over HTTP."""
    return [
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.PolyadaptError)
        and kind not in (errors.PolyadaptError, errors.StartupError)
    ]


def _sentence(kind: type) -> str:
    return " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split())


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    )


def _page(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in PAGES:
        sys.exit(f"expected one of {', '.join(PAGES)}")
    sys.stdout.write(PAGES[sys.argv[1]]())
