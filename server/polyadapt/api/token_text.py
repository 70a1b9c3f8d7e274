"""Logprobs in the shapes of OpenAI's chat and completions. Knows no requests."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from polyadapt.api.schemas.chat import (
    ChatLogprobs,
    PromptLogprob,
    TokenLogprobObject,
    TopLogprob,
)
from polyadapt.api.schemas.completions import CompletionLogprobs
from polyadapt.tasks.sequence_text import ScoredToken
from polyadapt.tasks.tokenizer import Tokenizer
from polyadapt.types import TokenLogprob

# JSON has no minus infinity; OpenAI writes this for a token that cannot come.
_IMPOSSIBLE = -9999.0


def token_string(tokenizer: Tokenizer, token_id: int) -> str:
    """Return a token as text; bytes that are no character show as U+FFFD."""
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace")


def chat_logprobs(tokenizer: Tokenizer, scored: Iterable[ScoredToken]) -> ChatLogprobs:
    """Return the chosen tokens with the likeliest ones at each place."""

    def top(token_id: int, logprob: float) -> TopLogprob:
        raw = tokenizer.token_bytes(token_id)
        return TopLogprob(
            token=raw.decode("utf-8", "replace"), bytes=list(raw), logprob=_finite(logprob)
        )

    content: list[TokenLogprobObject] = []
    for token in scored:
        raw = tokenizer.token_bytes(token.score.token_id)
        content.append(
            TokenLogprobObject(
                token=raw.decode("utf-8", "replace"),
                bytes=list(raw),
                logprob=_finite(token.score.logprob),
                top_logprobs=[top(*likely) for likely in token.score.top],
            )
        )
    return ChatLogprobs(content=content)


def completion_logprobs(
    tokenizer: Tokenizer, scored: Sequence[ScoredToken], *, has_top: bool, offset: int = 0
) -> CompletionLogprobs:
    """Return parallel lists; `offset` is the length of an echoed prompt, in characters."""
    return CompletionLogprobs(
        tokens=[token_string(tokenizer, token.score.token_id) for token in scored],
        token_logprobs=[_finite(token.score.logprob) for token in scored],
        top_logprobs=[_top(tokenizer, token.score) for token in scored] if has_top else None,
        text_offset=[offset + token.text_offset for token in scored],
    )


def prompt_completion_logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], scores: Sequence[TokenLogprob], *, has_top: bool
) -> CompletionLogprobs:
    """Return the lists of an echoed prompt; its first token has no logprob."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    offsets: list[int] = []
    num_chars = 0
    for token_id in ids:
        offsets.append(num_chars)
        num_chars += len(decoder.decode(tokenizer.token_bytes(token_id)))
    return CompletionLogprobs(
        tokens=[token_string(tokenizer, token_id) for token_id in ids],
        token_logprobs=[None, *(_finite(score.logprob) for score in scores)],
        top_logprobs=[None, *(_top(tokenizer, score) for score in scores)] if has_top else None,
        text_offset=offsets,
    )


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """Return one after the other."""
    has_top = first.top_logprobs is not None and second.top_logprobs is not None
    return CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=(first.top_logprobs or []) + (second.top_logprobs or []) if has_top else None,
        text_offset=first.text_offset + second.text_offset,
    )


def prompt_logprobs(
    tokenizer: Tokenizer, scores: Sequence[TokenLogprob]
) -> list[dict[str, PromptLogprob] | None]:
    """Return for each prompt token its logprob and the likeliest others by id; None for the first.

    The shape is vLLM's.
    """
    places: list[dict[str, PromptLogprob] | None] = [None]
    for score in scores:
        likely = [(score.token_id, score.logprob), *score.top]
        places.append(
            {
                str(token_id): PromptLogprob(
                    logprob=_finite(logprob), decoded_token=token_string(tokenizer, token_id)
                )
                for token_id, logprob in likely
            }
        )
    return places


def _top(tokenizer: Tokenizer, score: TokenLogprob) -> dict[str, float]:
    return {token_string(tokenizer, token_id): _finite(value) for token_id, value in score.top}


def _finite(logprob: float) -> float:
    return max(logprob, _IMPOSSIBLE)
