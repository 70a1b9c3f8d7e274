"""Renders a model's chat template in a sandbox, with the helpers that published templates use.

Knows no tokens and no requests; the template is the operator's, the messages are a stranger's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from polyadapt.errors import InvalidRequest, StartupError


class ChatTemplate:
    """One compiled template. Whitespace and helpers as transformers renders templates
    (huggingface/transformers:src/transformers/utils/chat_template_utils.py)."""

    def __init__(self, source: str, *, named_tokens: Mapping[str, str]) -> None:
        """Compile `source`; raises StartupError when it is not a template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise StartupError(f"the model's chat template does not compile: {error}") from None
        self._named_tokens = dict(named_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """Return the conversation as text; raises InvalidRequest when the template refuses it."""
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._named_tokens,
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError, OverflowError) as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from None


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it only prints them."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares a mutable set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes HTML; prompts are no HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
