"""The strictness that every body shares, and the objects that many replies hold."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from polyadapt.tasks.choice import Choice
from polyadapt.types import ServedAdapter

MAX_NAME = 400  # characters of `model`: base, separator, adapter and version


def is_none(value: object) -> bool:
    """Whether an optional field of a reply is left out."""
    return value is None


class Body(BaseModel):
    """A request body: unknown fields and other types than declared are refused."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, frozen=True, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        if not _is_unicode(value):
            raise PydanticCustomError("not_text", "a string holds half of a surrogate pair")
        return value


class Reply(BaseModel):
    """A response body."""

    model_config = ConfigDict(protected_namespaces=())


class ErrorDetail(Reply):
    """What went wrong; `code` comes from a closed catalogue."""

    message: str
    type: str
    code: str
    param: str | None
    problems: list[ProblemObject] | None = Field(None, exclude_if=is_none)


class ProblemObject(Reply):
    """One thing wrong with an uploaded adapter."""

    code: str
    message: str
    where: str | None


class ErrorReply(Reply):
    """OpenAI's error envelope."""

    error: ErrorDetail


class PromptTokensDetails(Reply):
    """How many of the prompt's tokens did not have to be computed."""

    cached_tokens: int


class Usage(Reply):
    """Tokens of one request, over all its prompts and sequences."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ServedObject(Reply):
    """An adapter that a reply was made with; `tier` is where it lay when the request began."""

    name: str
    version: int
    digest: str
    tier: Literal["device", "host", "store"]
    load_ms: float
    mandatory: Literal[True] | None = Field(
        None, exclude_if=is_none, description="the policy of the caller's tenant names it"
    )
    approximate: Literal[True] | None = Field(
        None,
        exclude_if=is_none,
        description="the request chose not to be served with what the adapter itself computes",
    )

    @classmethod
    def of(cls, served: ServedAdapter) -> ServedObject:
        """Return the wire form of what the engine reported."""
        adapter = served.adapter
        return cls(
            name=adapter.name,
            version=adapter.version,
            digest=adapter.digest,
            tier=served.tier,
            load_ms=round(served.load_ms, 3),
            mandatory=True if served.is_mandatory else None,
            approximate=True if served.is_approximate else None,
        )


class CandidateObject(Reply):
    """An adapter that could have been chosen, and how near the request is to its examples."""

    name: str
    score: float


class ChoiceObject(Reply):
    """What `model: "auto"` chose: an adapter's name, or null for the base."""

    adapter: str | None
    reason: Literal["best", "below_threshold", "no_profiles", "empty_prompt"]
    score: float | None = Field(description="of the best candidate; from -1 to 1")
    threshold: float = Field(description="the least score at which an adapter is chosen")
    candidates: list[CandidateObject] = Field(description="the best few, the best first")

    @classmethod
    def of(cls, choice: Choice | None) -> ChoiceObject | None:
        """Return the wire form of a choice; None where there was none to make."""
        if choice is None:
            return None
        return cls(
            adapter=choice.adapter,
            reason=choice.reason,
            score=None if choice.score is None else round(choice.score, 4),
            threshold=choice.threshold,
            candidates=[
                CandidateObject(name=candidate.name, score=round(candidate.score, 4))
                for candidate in choice.candidates
            ],
        )


class StreamOptions(Body):
    """`include_usage` adds a last chunk with the token counts."""

    include_usage: bool = False
    include_obfuscation: bool | None = Field(None, description="accepted; streams have no padding")


def _is_unicode(value: Any) -> bool:
    """Whether every string in a JSON value can be written as UTF-8."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
        return True
    if isinstance(value, list):
        return all(map(_is_unicode, value))
    if isinstance(value, dict):
        return all(map(_is_unicode, value)) and all(map(_is_unicode, value.values()))
    return True


def unsupported(message: str) -> PydanticCustomError:
    """Return the error of a known field that is not served."""
    return PydanticCustomError("unsupported_field", "{message}", {"message": message})


def wrong(param: str, message: str) -> PydanticCustomError:
    """Return the error of fields that do not agree, blamed on `param`."""
    return PydanticCustomError("wrong_field", "{message}", {"message": message, "param": param})


def only(allowed: tuple[Any, ...], what: str) -> Any:
    """Return a validator that lets `allowed` values pass and calls every other one unsupported."""

    def check(value: Any) -> Any:
        if any(value is item or (type(value) is type(item) and value == item) for item in allowed):
            return value
        raise unsupported(what)

    return check
