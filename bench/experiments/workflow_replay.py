"""The server's own workflows over recorded samples: whether they come to what protocols.py does."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from bench.experiments.protocols import Answer

from polyadapt.tasks.workflows.base import Outcome, Sample
from polyadapt.tasks.workflows.lorid import LoridDefinition
from polyadapt.tasks.workflows.self_consistency import SelfConsistencyDefinition


def lorid(
    intuitive: Sequence[Sequence[Answer]], deep: Sequence[Sequence[Answer]], max_iterations: int
) -> list[Outcome]:
    """Of every question; a role's sample of an iteration is the one of that place."""
    names = {role: {"adapter": role} for role in ("ir", "kg", "dr")}
    definition = LoridDefinition.model_validate(
        {"kind": "lorid", "max_iterations": max_iterations, **names}
    )
    questions = [
        _Recorded({"ir": left, "dr": right}) for left, right in zip(intuitive, deep, strict=True)
    ]
    return asyncio.run(_all(definition, questions))


def self_consistency(answers: Sequence[Sequence[Answer]], num_samples: int) -> list[Outcome]:
    """Of every question, over its first samples."""
    definition = SelfConsistencyDefinition.model_validate(
        {"kind": "self_consistency", "reasoner": {"adapter": "ir"}, "num_samples": num_samples}
    )
    return asyncio.run(_all(definition, [_Recorded({"reasoner": own}) for own in answers]))


class _Recorded:
    """A workflow's sampler that says again what was sampled; knowledge is part of DR's answer."""

    def __init__(self, answers: Mapping[str, Sequence[Answer]]) -> None:
        self._answers = answers

    async def __call__(
        self, role: str, prompt: str, *, round_id: int, number: int = 0, has_answer: bool = True
    ) -> Sample:
        place = number if role == "reasoner" else round_id - 1
        answer = self._answers[role][place] if role in self._answers else Answer(None, 0)
        return Sample(round_id, role, role, "", answer.value, 0, answer.num_tokens, "stop", seed=0)


async def _all(
    definition: LoridDefinition | SelfConsistencyDefinition, questions: Sequence[_Recorded]
) -> list[Outcome]:
    return [await definition.run("a question", recorded) for recorded in questions]
