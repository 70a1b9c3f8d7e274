"""Self-consistency: what is reported is that of all samples, and no sample is taken for nothing."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
from tests.tasks.workflows.support import ScriptedSampler, saying

from polyadapt.tasks.workflows.self_consistency import SelfConsistencyDefinition

pytestmark = pytest.mark.anyio


def definition(**fields: Any) -> SelfConsistencyDefinition:
    reasoner = {"adapter": "a", "instruction": "", "template": "Q {question}"}
    return SelfConsistencyDefinition.model_validate(
        {"kind": "self_consistency", "reasoner": reasoner, **fields}
    )


def report(draws: Sequence[str | None], threshold: float) -> tuple[Any, ...]:
    """Count all of them: the answer, whether it is agreed, and what it is tied with."""
    answers = [answer for answer in draws if answer is not None]
    if not answers:
        return None, False, []
    most = max(answers.count(answer) for answer in answers)
    tied = [a for i, a in enumerate(answers) if answers.count(a) == most and a not in answers[:i]]
    return tied[0], most / len(draws) >= threshold, tied


async def run(
    draws: Sequence[str | None], **fields: Any
) -> tuple[tuple[Any, ...], ScriptedSampler, Any]:
    def script(role: str, prompt: str, round_id: int, number: int) -> str:
        assert (role, prompt) == ("reasoner", "Q why?")
        return saying(draws[number])

    sampler = ScriptedSampler(script, random.Random(len(draws)))
    outcome = await definition(num_samples=len(draws), **fields).run("why?", sampler)
    return (outcome.answer, outcome.agreed, list(outcome.candidates)), sampler, outcome


async def test_the_report_is_that_of_all_samples() -> None:
    rng = random.Random(3)
    num_early = 0
    for _ in range(1000):
        num_answers, length = rng.choice([1, 2, 3, 9]), rng.randint(1, 12)
        draws = [
            None if rng.random() < 0.2 else str(rng.randrange(num_answers)) for _ in range(length)
        ]
        threshold = rng.choice([0.05, 0.3, 0.5, 0.75, 1.0])
        per_round = rng.randint(1, 5)
        found, sampler, outcome = await run(draws, threshold=threshold, samples_per_round=per_round)
        assert found == report(draws, threshold)
        rule = "none" if found[0] is None else "agreement" if found[1] else "majority"
        assert outcome.rule == rule
        numbers = [number for _, _, number, _ in sampler.asked]
        assert sorted(numbers) == list(range(len(numbers))), "samples are taken in their order"
        assert outcome.num_rounds == -(-len(numbers) // per_round)
        num_early += len(numbers) < length
    assert num_early > 150


@pytest.mark.parametrize("threshold", [0.25, 0.5, 0.8, 1.0])
async def test_it_stops_exactly_when_the_rest_can_change_nothing(threshold: float) -> None:
    """By trying every way in which the samples could go on, new answers included."""
    length = 5
    for draws in itertools.product(["1", "2", None], repeat=length):
        _, sampler, _ = await run(draws, threshold=threshold, samples_per_round=1)
        taken = len(sampler.asked)
        for num in range(1, taken + 1):
            known = draws[:num]
            ways = itertools.product(["1", "2", "new", None], repeat=length - num)
            reports = {repr(report([*known, *rest], threshold)) for rest in ways}
            assert (len(reports) == 1) == (num == taken), (draws, num, taken)


async def test_samples_of_a_round_run_at_once() -> None:
    sampler = ScriptedSampler(lambda role, prompt, r, n: saying(str(n)), random.Random(2))
    most = 0
    original = sampler.script

    def script(role: str, prompt: str, round_id: int, number: int) -> str:
        nonlocal most
        most = max(most, len(sampler.running))
        return original(role, prompt, round_id, number)

    sampler.script = script
    await definition(num_samples=10, samples_per_round=4).run("why?", sampler)
    assert most == 4
    assert [r for r, *_ in sampler.asked] == [1] * 4 + [2] * 4 + [3] * 2


async def test_texts_without_an_answer_count_against_agreement() -> None:
    found, _, _ = await run(["7", None, None, None], threshold=0.5)
    assert found == ("7", False, ["7"])
    found, _, _ = await run(["7", None, None, "7"], threshold=0.5)
    assert found == ("7", True, ["7"])
