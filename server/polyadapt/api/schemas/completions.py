"""/v1/completions: OpenAI's request and reply; a chunk of its stream has the reply's shape."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from polyadapt.api.schemas.base import (
    ChoiceObject,
    Reply,
    ServedObject,
    Usage,
    is_none,
    only,
    wrong,
)
from polyadapt.api.schemas.chat import PromptLogprob
from polyadapt.api.schemas.generation import MAX_LOGPROBS, GenerationRequest
from polyadapt.api.schemas.workflows import WorkflowRun
from polyadapt.tasks.text import Prompt, TextPrompt, TokenPrompt

MAX_PROMPTS = 128
MAX_PROMPT_IDS = 1 << 20
_EXPECTED = "expected a string, a list of strings, a list of token ids or a list of such lists"


def _prompts(value: Any) -> tuple[Prompt, ...]:
    """Return the prompts in OpenAI's four forms as a tuple."""
    if isinstance(value, str):
        return (TextPrompt(value),)
    if not isinstance(value, list):
        raise ValueError(_EXPECTED)
    if not value:
        raise ValueError("the prompt is empty; send at least one token")
    if _is_ids(value):
        return (TokenPrompt(tuple(value)),)
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"{len(value)} prompts in one call, expected at most {MAX_PROMPTS}")
    prompts: list[Prompt] = []
    for item in value:
        if isinstance(item, str):
            prompts.append(TextPrompt(item))
        elif isinstance(item, list) and _is_ids(item):
            prompts.append(TokenPrompt(tuple(item)))
        else:
            raise ValueError(_EXPECTED)
    return tuple(prompts)


def _is_ids(value: list[Any]) -> bool:
    if len(value) > MAX_PROMPT_IDS:
        raise ValueError(f"{len(value)} token ids, expected at most {MAX_PROMPT_IDS}")
    return all(type(item) is int for item in value)


Prompts = Annotated[
    Any,
    BeforeValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        }
    ),
]


class CompletionRequest(GenerationRequest):
    """Prompts to continue."""

    prompt: Prompts
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, le=128)
    suffix: Annotated[
        str | None,
        BeforeValidator(only((None, ""), "filling in before a suffix is not served")),
    ] = None

    @model_validator(mode="after")
    def _fields_agree(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise wrong("best_of", "best_of is served only when it equals n; leave it out")
        if self.stream and self.prompt_logprobs is not None:
            raise wrong("prompt_logprobs", "prompt_logprobs is not sent in streams")
        if len(self.prompts) > 1 and self.on_cold not in (None, "wait", "fail"):
            raise wrong(
                "on_cold",
                "several prompts could be answered by different adapters, of which a reply names "
                "one list; send them one by one, or with on_cold wait or fail",
            )
        return self

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """The prompts, in order."""
        parsed: tuple[Prompt, ...] = self.prompt
        return parsed


class CompletionLogprobs(Reply):
    """Logprobs in parallel lists; the first token of an echoed prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Reply):
    """One continuation; its index is prompt index * n + its number."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    token_ids: list[int] | None = Field(None, exclude_if=is_none)
    prompt_token_ids: list[int] | None = Field(None, exclude_if=is_none)
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = Field(None, exclude_if=is_none)


class CompletionReply(Reply):
    """A whole reply, or one event of a stream; a stream's last event before [DONE] has
    `adapters`.
    """

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = Field(None, exclude_if=is_none)
    adapters: list[ServedObject] | None = Field(None, exclude_if=is_none)
    workflow: WorkflowRun | None = Field(
        None,
        exclude_if=is_none,
        description="when `model` is a workflow: how it came to its answer",
    )
    choice: ChoiceObject | None = Field(None, exclude_if=is_none)
