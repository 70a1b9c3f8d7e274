"""The fields that chat and plain completions share: sampling, stopping, adapters, bookkeeping.

A field that would change the output is either served or refused by name, never ignored.
"""

from __future__ import annotations

import math
from operator import itemgetter
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from polyadapt.api.schemas.base import MAX_NAME, Body, StreamOptions, only, wrong
from polyadapt.tasks.directory import AdapterRef, OnCold
from polyadapt.types import MAX_ADAPTERS, Options, OptionValue, SamplingParams

MAX_TOKENS = 2**31 - 1
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_IDS = 64
MAX_BIASES = 1024
MAX_LOGPROBS = 20
MAX_METADATA = 16
MAX_PRIORITY = 100
MAX_SPECULATIVE_TOKENS = 16
MAX_RANK = 1 << 16
MAX_OPTIONS = 16
MAX_OPTION_CHARS = 256
MAX_OPTION_WORDS = 256
MAX_COLD_TIMEOUT_MS = 3_600_000
_FALLBACK = "fallback:"
_Action = Literal["wait", "base", "fail"]


def _option(value: Any) -> OptionValue | None:
    """Check one value of `options`; what it means is the adapter's to say."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < 1 << 63:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, str) and len(value) <= MAX_OPTION_CHARS:
        return value
    is_list = isinstance(value, list) and len(value) <= MAX_OPTION_WORDS
    if is_list and all(isinstance(w, str) and len(w) <= MAX_OPTION_CHARS for w in value):
        return tuple(value)
    raise ValueError(
        f"expected a word of at most {MAX_OPTION_CHARS} characters, a number, true or false, or a "
        f"list of at most {MAX_OPTION_WORDS} words"
    )


_OPTION_SCHEMA = {
    "anyOf": [
        {"type": "string", "maxLength": MAX_OPTION_CHARS},
        {"type": "number"},
        {"type": "boolean"},
        {
            "type": "array",
            "items": {"type": "string", "maxLength": MAX_OPTION_CHARS},
            "maxItems": MAX_OPTION_WORDS,
        },
        {"type": "null"},
    ]
}


class AdapterChoice(Body):
    """One adapter of the request; replaces the one that `model` would choose."""

    name: str = Field(min_length=1, max_length=MAX_NAME)
    scale: float = Field(
        1.0, ge=-100.0, le=100.0, description="0 is the base exactly, whatever the adapter"
    )
    rank: int | None = Field(
        None,
        ge=1,
        le=MAX_RANK,
        description="how many components of a nested adapter to use; the default is all",
    )
    options: (
        dict[
            Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")],
            Annotated[Any, AfterValidator(_option), WithJsonSchema(_OPTION_SCHEMA)],
        ]
        | None
    ) = Field(
        None,
        max_length=MAX_OPTIONS,
        description="what else this adapter lets a request choose; one that it does not have is "
        "refused with a list of those that it has",
    )

    def ref(self) -> AdapterRef:
        """Return the adapter as the tasks know it."""
        return AdapterRef(self.name, self.scale, self.rank, _chosen(self.options))


def _stop_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class GenerationRequest(Body):
    """What /v1/chat/completions and /v1/completions have in common."""

    model: str = Field(min_length=1, max_length=MAX_NAME)
    n: int | None = Field(None, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(None, ge=0.0, le=2.0)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    presence_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Annotated[
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
            Field(max_length=MAX_STOPS),
        ]
        | None,
        BeforeValidator(_stop_list, json_schema_input_type=str | list[str] | None),
    ] = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100.0, le=100.0)]] | None = Field(
        None, max_length=MAX_BIASES
    )

    top_k: int | None = Field(None, ge=-1, le=MAX_TOKENS)
    min_p: float | None = Field(None, ge=0.0, le=1.0)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100.0)
    min_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    ignore_eos: bool | None = None
    stop_token_ids: (
        Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOP_IDS)] | None
    ) = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    return_token_ids: bool | None = None

    adapters: list[AdapterChoice] | None = Field(
        None,
        max_length=MAX_ADAPTERS,
        description="served together, without merging, in place of the adapter that `model` would "
        "choose; [] is the base. `model` may name an adapter too, but no other version of one here",
    )
    on_cold: str | None = Field(
        None,
        max_length=len(_FALLBACK) + MAX_NAME,
        pattern=rf"^(wait|base|fail|{_FALLBACK}.+)$",
        description="what is done when an adapter is not on the device: `wait` for it (the "
        "default), answer from the `base`, answer from another adapter with `fallback:<name>` (or "
        "from whichever of them is there first), or `fail` with 503 adapter_cold. The adapter is "
        "loaded all the same, and the reply says what served it",
    )
    cold_timeout_ms: int | None = Field(
        None,
        ge=0,
        le=MAX_COLD_TIMEOUT_MS,
        description="how long the adapters are waited for before on_cold is done: 0 for `base`, "
        "`fallback` and `fail`, without end for `wait`, which fails when a given time is over",
    )

    # Only requests of the same tenant with the same salt share cached prefixes.
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)

    # How soon and how fast; the output is the same.
    priority: int | None = Field(
        None,
        ge=-MAX_PRIORITY,
        le=MAX_PRIORITY,
        description="lower is served earlier; the default is 0",
    )
    speculative_tokens: int | None = Field(
        None,
        ge=0,
        le=MAX_SPECULATIVE_TOKENS,
        description="tokens that one step may guess from the text itself and verify; 0 is off, "
        "the default is the server's",
    )

    # Accepted because they cannot change the output.
    user: str | None = Field(None, max_length=1024)
    safety_identifier: str | None = Field(None, max_length=1024)
    prompt_cache_key: str | None = Field(None, max_length=1024)
    metadata: dict[str, str] | None = Field(None, max_length=MAX_METADATA)
    store: Annotated[
        bool | None,
        BeforeValidator(only((None, False), "replies are not stored; leave `store` out")),
    ] = None
    service_tier: Annotated[
        str | None,
        BeforeValidator(only((None, "auto", "default"), "there is one service tier: 'default'")),
    ] = None

    @field_validator("logit_bias", mode="after")
    @classmethod
    def _bias_keys_are_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or {}:
            if not (key.isascii() and key.isdigit() and len(key) <= 9):
                raise ValueError(f"the key {key[:40]!r} is no token id")
        return value

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options", "stream_options needs stream: true")
        return self

    def adapter_refs(self) -> tuple[AdapterRef, ...] | None:
        """Return the adapters that replace the model's own, or None."""
        if self.adapters is None:
            return None
        return tuple(choice.ref() for choice in self.adapters)

    def cold(self) -> OnCold | None:
        """Return what is done when the adapters are not on the device; None if nothing is asked."""
        if self.on_cold is None and self.cold_timeout_ms is None:
            return None
        asked = self.on_cold or "wait"
        if asked.startswith(_FALLBACK):
            name = asked.removeprefix(_FALLBACK)
            return OnCold("fallback", name, timeout_ms=self.cold_timeout_ms)
        return OnCold(cast("_Action", asked), timeout_ms=self.cold_timeout_ms)

    def sampling(
        self, *, num_logprobs: int | None, num_prompt_logprobs: int | None
    ) -> SamplingParams:
        """Return the sampling of the request with OpenAI's defaults; max_tokens and seed are
        set later.
        """
        return SamplingParams(
            max_tokens=self.max_tokens or 1,
            min_tokens=self.min_tokens or 0,
            temperature=_default(self.temperature, 1.0),
            top_p=_default(self.top_p, 1.0),
            top_k=max(0, self.top_k or 0),
            min_p=_default(self.min_p, 0.0),
            presence_penalty=_default(self.presence_penalty, 0.0),
            frequency_penalty=_default(self.frequency_penalty, 0.0),
            repetition_penalty=_default(self.repetition_penalty, 1.0),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logit_bias=tuple((int(key), bias) for key, bias in (self.logit_bias or {}).items()),
            num_logprobs=num_logprobs,
            num_prompt_logprobs=num_prompt_logprobs,
        )

    @property
    def unsigned_seed(self) -> int | None:
        """The seed as 63 bits; negative ones are folded in."""
        return None if self.seed is None else self.seed % (1 << 63)


def _chosen(options: dict[str, OptionValue | None] | None) -> Options:
    """Null is absent, as in every other field."""
    given = (options or {}).items()
    chosen = [(name, value) for name, value in given if value is not None]
    return tuple(sorted(chosen, key=itemgetter(0)))


def _default(value: float | None, default: float) -> float:
    return default if value is None else value
