"""LoRID: an intuitive and a deep reasoner sample until their sets of answers meet.

Li et al., "Can Large Models Teach Student Models to Solve Mathematical Problems Like Human Beings?
A Reasoning Distillation Method via Multi-LoRA Interaction", arXiv 2508.13037;
Xinhe-Li/LoRID:src/predict.py. In every iteration IR answers the question, KG writes knowledge down,
and DR answers with question and knowledge. The sets of answers accumulate over the iterations, and
nothing else is carried from one to the next. Where the publication has no answer, because the sets
never met, this takes the majority and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from polyadapt.tasks.workflows.base import (
    MAX_ITERATIONS,
    Definition,
    Instruction,
    MaxTokens,
    Member,
    Outcome,
    Sample,
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

_WORDS = words_of("lorid")
_SAMPLING = _WORDS["sampling"]


class LoridSampling(Sampling):
    """The publication's: temperature, then top_k, then top_p."""

    temperature: Temperature = _SAMPLING["temperature"]
    top_p: TopP = _SAMPLING["top_p"]
    top_k: TopK = _SAMPLING["top_k"]
    max_tokens: MaxTokens = _SAMPLING["max_tokens"]


class IntuitiveReasoner(Member):
    """IR: answers the bare question."""

    instruction: Instruction = _WORDS["ir"]["instruction"]
    template: Template = _WORDS["ir"]["template"]


class KnowledgeGenerator(Member):
    """KG: writes down what is needed to answer the question."""

    instruction: Instruction = _WORDS["kg"]["instruction"]
    template: Template = _WORDS["kg"]["template"]


class DeepReasoner(Member):
    """DR: answers with the question and KG's text, which takes the place of {knowledge}."""

    placeholders: ClassVar[tuple[str, ...]] = ("question", "knowledge")

    instruction: Instruction = _WORDS["dr"]["instruction"]
    template: Template = _WORDS["dr"]["template"]


class LoridDefinition(Definition):
    """Three adapters that sample until IR and DR have given the same answer."""

    kind: Literal["lorid"]
    ir: IntuitiveReasoner
    kg: KnowledgeGenerator
    dr: DeepReasoner
    max_iterations: int = Field(20, ge=1, le=MAX_ITERATIONS)
    sampling: LoridSampling = LoridSampling()

    @property
    def members(self) -> Mapping[str, Member]:
        """The three roles."""
        return {"ir": self.ir, "kg": self.kg, "dr": self.dr}

    async def run(self, question: str, sample: Sampler) -> Outcome:
        """Iterate until an answer of IR's is one of DR's, at most max_iterations times.

        When two answers meet in the same iteration, DR's of that iteration is taken. When none
        ever does, the answer that was given most often is, DR's before IR's, then the earlier one.
        """

        async def deep(round_id: int) -> Sample:
            prompt = self.kg.prompt(question=question)
            knowledge = await sample("kg", prompt, round_id=round_id, has_answer=False)
            prompt = self.dr.prompt(question=question, knowledge=knowledge.text)
            return await sample("dr", prompt, round_id=round_id)

        intuitive: list[str] = []
        considered: list[str] = []
        everything: list[str] = []
        for round_id in range(1, self.max_iterations + 1):
            prompt = self.ir.prompt(question=question)
            ir, dr = await together(sample("ir", prompt, round_id=round_id), deep(round_id))
            for answers, found in ((intuitive, ir.answer), (considered, dr.answer)):
                if found is not None:
                    answers.append(found)
                    everything.append(found)
            # Before this iteration the sets were disjoint: only its own answers can meet.
            met = [a for a in (dr.answer, ir.answer) if a in intuitive and a in considered]
            if met and met[0] is not None:
                candidates = tuple(dict.fromkeys(a for a in met if a is not None))
                return Outcome(candidates[0], True, "agreement", candidates, round_id)
        tied = most_common(everything, preferred=considered)
        if not tied:
            return Outcome(None, False, "none", (), self.max_iterations)
        return Outcome(tied[0], False, "majority", tied, self.max_iterations)
