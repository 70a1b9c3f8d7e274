"""Self-consistency: many samples of one adapter, and the answer that most of them come to.

Wang et al., "Self-Consistency Improves Chain of Thought Reasoning in Language Models", arXiv
2203.11171. Samples are taken some at a time, and no further once the rest cannot change what is
reported; so the result is that of all of them, for fewer tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from polyadapt.tasks.workflows.base import (
    MAX_ROUND_SAMPLES,
    MAX_SAMPLES,
    Definition,
    Instruction,
    MaxTokens,
    Member,
    Outcome,
    Sampler,
    Sampling,
    Temperature,
    Template,
    TopK,
    TopP,
    most_common,
    together,
    words_of,
)

_WORDS = words_of("self_consistency")
_SAMPLING = _WORDS["sampling"]


class ConsistencySampling(Sampling):
    """Diverse enough to disagree where the model is not sure."""

    temperature: Temperature = _SAMPLING["temperature"]
    top_p: TopP = _SAMPLING["top_p"]
    top_k: TopK = _SAMPLING["top_k"]
    max_tokens: MaxTokens = _SAMPLING["max_tokens"]


class Reasoner(Member):
    """Who is asked again and again."""

    instruction: Instruction = _WORDS["reasoner"]["instruction"]
    template: Template = _WORDS["reasoner"]["template"]


class SelfConsistencyDefinition(Definition):
    """One adapter, or the base, that samples num_samples times."""

    kind: Literal["self_consistency"]
    reasoner: Reasoner
    num_samples: int = Field(16, ge=1, le=MAX_SAMPLES)
    samples_per_round: int = Field(
        4, ge=1, le=MAX_ROUND_SAMPLES, description="samples that run at once"
    )
    threshold: float = Field(
        0.5,
        gt=0.0,
        le=1.0,
        description="the share of num_samples that must give the answer for `agreed`",
    )
    sampling: ConsistencySampling = ConsistencySampling()

    @property
    def members(self) -> Mapping[str, Member]:
        """The one role."""
        return {"reasoner": self.reasoner}

    async def run(self, question: str, sample: Sampler) -> Outcome:
        """Sample in rounds and take the majority; of equally frequent answers the first given.

        Samples without an answer count for nobody, and against `agreed`.
        """
        prompt = self.reasoner.prompt(question=question)
        answers: list[str] = []
        num_taken = num_rounds = 0
        while num_taken < self.num_samples and not self._is_settled(answers, num_taken):
            num_rounds += 1
            last = min(num_taken + self.samples_per_round, self.num_samples)
            samples = await together(
                *(
                    sample("reasoner", prompt, round_id=num_rounds, number=number)
                    for number in range(num_taken, last)
                )
            )
            answers += [found.answer for found in samples if found.answer is not None]
            num_taken = last
        tied = most_common(answers)
        if not tied:
            return Outcome(None, False, "none", (), num_rounds)
        agreed = self._is_enough(answers.count(tied[0]))
        return Outcome(tied[0], agreed, "agreement" if agreed else "majority", tied, num_rounds)

    def _is_enough(self, count: int) -> bool:
        return count / self.num_samples >= self.threshold

    def _is_settled(self, answers: Sequence[str], num_taken: int) -> bool:
        """Whether the samples that are left can change neither the answer, nor whether it is
        agreed, nor what it is tied with.
        """
        left = self.num_samples - num_taken
        counts = [count for _, count in Counter(answers).most_common(2)]
        most, second = [*counts, 0, 0][:2]
        is_ahead = most > second + left
        return is_ahead and (self._is_enough(most) or not self._is_enough(most + left))
