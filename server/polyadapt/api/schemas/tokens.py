"""/tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from polyadapt.api.schemas.base import MAX_NAME, Body, Reply, is_none, wrong
from polyadapt.api.schemas.chat import ChatMessage

MAX_IDS = 1 << 20


class TokenizeRequest(Body):
    """A text, or a conversation for the model's chat template."""

    model: str | None = Field(None, min_length=1, max_length=MAX_NAME)
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise wrong("prompt", "send either prompt or messages")
        if self.messages is not None and self.add_special_tokens:
            raise wrong("add_special_tokens", "a chat template writes its special tokens itself")
        return self


class TokenizeReply(Reply):
    """The ids."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = Field(None, exclude_if=is_none)


class DetokenizeRequest(Body):
    """Token ids to turn into text; special tokens are shown."""

    model: str | None = Field(None, min_length=1, max_length=MAX_NAME)
    tokens: list[Annotated[int, Field(ge=0)]] = Field(max_length=MAX_IDS)


class DetokenizeReply(Reply):
    """The text."""

    prompt: str
