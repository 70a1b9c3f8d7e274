"""/v1/chat/completions: OpenAI's request and reply, and the chunks of its stream."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator, model_validator

from polyadapt.api.schemas.base import (
    Body,
    ChoiceObject,
    Reply,
    ServedObject,
    Usage,
    is_none,
    only,
    unsupported,
    wrong,
)
from polyadapt.api.schemas.generation import MAX_LOGPROBS, MAX_TOKENS, GenerationRequest
from polyadapt.api.schemas.workflows import WorkflowRun

MAX_PARTS = 64
_NO_TOOLS = "tools are not served; leave `{}` out"


def _text_content(value: Any) -> Any:
    """Return a message's content as one string; text parts are joined by line breaks."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("expected a string or a list of text parts")
    if len(value) > MAX_PARTS:
        raise ValueError(f"{len(value)} parts, expected at most {MAX_PARTS}")
    texts: list[str] = []
    for part in value:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise ValueError("every part must be an object with a `type`")
        if part["type"] != "text":
            raise unsupported(f"content of type {part['type'][:40]!r} is not served; send text")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError("a text part holds `type` and `text`, nothing else")
        texts.append(part["text"])
    return "\n".join(texts)


_TextContent = Annotated[
    str | None,
    BeforeValidator(_text_content),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "maxItems": MAX_PARTS,
                    "items": {
                        "type": "object",
                        "properties": {
                            "type": {"type": "string", "const": "text"},
                            "text": {"type": "string"},
                        },
                        "required": ["type", "text"],
                        "additionalProperties": False,
                    },
                },
                {"type": "null"},
            ]
        }
    ),
]


class ChatMessage(Body):
    """One turn. The fields after `name` are what clients echo from a reply; they must be empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: _TextContent = None
    name: str | None = Field(None, max_length=256)
    refusal: None = None
    audio: None = None
    annotations: Annotated[
        list[Any] | None, BeforeValidator(only((None, []), "annotations are not served"))
    ] = None
    tool_calls: Annotated[
        list[Any] | None, BeforeValidator(only((None, []), "tool calls are not served"))
    ] = None
    function_call: Annotated[
        None, BeforeValidator(only((None,), "function calls are not served"))
    ] = None

    @field_validator("role", mode="before")
    @classmethod
    def _no_tool_turns(cls, value: Any) -> Any:
        if value in ("tool", "function"):
            raise unsupported(f"tools are not served, so no turns of role {value!r} either")
        return value

    @model_validator(mode="after")
    def _has_content(self) -> ChatMessage:
        if self.content is None:
            raise wrong("messages", "a message has no content")
        return self

    def for_template(self) -> dict[str, Any]:
        """Return the turn as chat templates expect it; `developer` is the newer name of
        `system`.
        """
        role = "system" if self.role == "developer" else self.role
        turn: dict[str, Any] = {"role": role, "content": self.content}
        if self.name is not None:
            turn["name"] = self.name
        return turn


def _check_format(value: Any) -> Any:
    if value is None or value == {"type": "text"}:
        return value
    raise unsupported("response_format serves only {'type': 'text'}; leave it out")


class ChatRequest(GenerationRequest):
    """A conversation to continue."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: Annotated[dict[str, Any] | None, BeforeValidator(_check_format)] = None
    modalities: Annotated[
        list[str] | None,
        BeforeValidator(only((None, ["text"]), "only text is served")),
    ] = None
    tools: Annotated[
        list[Any] | None, BeforeValidator(only((None, []), _NO_TOOLS.format("tools")))
    ] = None
    tool_choice: Annotated[
        str | None, BeforeValidator(only((None, "none"), _NO_TOOLS.format("tool_choice")))
    ] = None
    functions: Annotated[
        list[Any] | None, BeforeValidator(only((None, []), _NO_TOOLS.format("functions")))
    ] = None
    function_call: Annotated[
        str | None, BeforeValidator(only((None, "none"), _NO_TOOLS.format("function_call")))
    ] = None
    # Without tools there are no calls to make in parallel or in turn.
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise wrong("top_logprobs", "top_logprobs needs logprobs: true")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise wrong("max_tokens", "it differs from max_completion_tokens; send one of them")
        if self.stream and self.prompt_logprobs is not None:
            raise wrong("prompt_logprobs", "prompt_logprobs is not sent in streams")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to report for each; None for no logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TopLogprob(Reply):
    """One of the likeliest tokens at a place."""

    token: str
    bytes: list[int]
    logprob: float


class TokenLogprobObject(TopLogprob):
    """The token that was chosen, and the likeliest ones."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    """The logprobs of a reply's tokens."""

    content: list[TokenLogprobObject]
    refusal: None = None


class AssistantMessage(Reply):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Reply):
    """One of the n answers."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    token_ids: list[int] | None = Field(None, exclude_if=is_none)


class PromptLogprob(Reply):
    """One token's logprob at a place of the prompt."""

    logprob: float
    decoded_token: str


class ChatReply(Reply):
    """A whole reply."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    adapters: list[ServedObject]
    choice: ChoiceObject | None = Field(None, exclude_if=is_none)
    prompt_token_ids: list[int] | None = Field(None, exclude_if=is_none)
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = Field(None, exclude_if=is_none)
    workflow: WorkflowRun | None = Field(
        None,
        exclude_if=is_none,
        description="when `model` is a workflow: how it came to its answer",
    )


class Delta(Reply):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | None = Field(None, exclude_if=is_none)
    content: str | None = Field(None, exclude_if=is_none)


class ChatChunkChoice(Reply):
    """What a chunk adds to one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    token_ids: list[int] | None = Field(None, exclude_if=is_none)


class ChatChunk(Reply):
    """One event of a stream; the last one before [DONE] has `adapters` and any `choice`."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = Field(None, exclude_if=is_none)
    adapters: list[ServedObject] | None = Field(None, exclude_if=is_none)
    choice: ChoiceObject | None = Field(None, exclude_if=is_none)
    prompt_token_ids: list[int] | None = Field(None, exclude_if=is_none)
