"""A generation's events gathered for a reply that is sent whole, and what both kinds share."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from polyadapt.api.schemas.base import PromptTokensDetails, ServedObject, Usage
from polyadapt.tasks.sequence_text import ScoredToken, TextDelta
from polyadapt.tasks.text import Accepted, Completed, PromptScores, Queued, TextEvent
from polyadapt.types import FinishReason, ServedAdapter, TokenLogprob


@dataclass(slots=True)
class Answer:
    """One sequence, whole."""

    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    scored: list[ScoredToken] = field(default_factory=list)
    finish_reason: FinishReason = "length"

    @property
    def text(self) -> str:
        """The sequence's text."""
        return "".join(self.pieces)


@dataclass(slots=True)
class Generation:
    """All sequences of one request, whole."""

    answers: list[Answer]
    served: tuple[ServedAdapter, ...] = ()
    prompt_scores: dict[int, tuple[TokenLogprob, ...]] = field(default_factory=dict)
    completed: Completed = field(default_factory=lambda: Completed(0, 0))


async def collect(
    events: AsyncGenerator[TextEvent, None], accepted: Accepted, n: int
) -> Generation:
    """Read the events behind `accepted` to their end; raises what they raise."""
    generation = Generation([Answer() for _ in range(n * len(accepted.prompt_ids))])
    async for event in events:
        if isinstance(event, TextDelta):
            answer = generation.answers[event.index]
            answer.pieces.append(event.text)
            answer.token_ids += event.token_ids
            answer.scored += event.scored
            answer.finish_reason = event.finish_reason or answer.finish_reason
        elif isinstance(event, Queued):
            generation.served = event.served
        elif isinstance(event, PromptScores):
            generation.prompt_scores[event.prompt_index] = event.scores
        elif isinstance(event, Completed):
            generation.completed = event
    return generation


def usage_of(completed: Completed) -> Usage:
    """Return the token counts as OpenAI writes them."""
    return Usage(
        prompt_tokens=completed.num_prompt_tokens,
        completion_tokens=completed.num_completion_tokens,
        total_tokens=completed.num_prompt_tokens + completed.num_completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=completed.num_cached_tokens),
    )


def served_objects(served: tuple[ServedAdapter, ...]) -> list[ServedObject]:
    """Return what a reply says of its adapters."""
    return [ServedObject.of(adapter) for adapter in served]
