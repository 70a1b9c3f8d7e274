"""LoRID against a naive simulation of its protocol over random scripts, and its edges by name."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.tasks.workflows.support import ScriptedSampler, saying

from polyadapt.errors import InternalError
from polyadapt.tasks.workflows.base import Outcome
from polyadapt.tasks.workflows.lorid import LoridDefinition

pytestmark = pytest.mark.anyio


def definition(max_iterations: int = 20, **fields: Any) -> LoridDefinition:
    return LoridDefinition.model_validate(
        {
            "kind": "lorid",
            "ir": {"adapter": "ir", "instruction": "", "template": "IR {question}"},
            "kg": {"adapter": "kg", "instruction": "", "template": "KG {question}"},
            "dr": {"adapter": "dr", "instruction": "", "template": "DR {question} <{knowledge}>"},
            "max_iterations": max_iterations,
            **fields,
        }
    )


@dataclass
class Draws:
    """What IR answers in iteration j, and what DR answers to each text of KG's."""

    ir: list[str | None]
    knowledge: list[str]
    dr: dict[str, str | None] = field(default_factory=dict)

    def script(self, role: str, prompt: str, round_id: int, number: int) -> str:
        j = round_id - 1
        assert number == 0
        if role == "ir":
            assert prompt == "IR why?"
            return saying(self.ir[j])
        if role == "kg":
            assert prompt == "KG why?"
            return self.knowledge[j]
        assert prompt == f"DR why? <{self.knowledge[j]}>", "DR reads the text of its own iteration"
        return saying(self.dr[self.knowledge[j]])


def simulate(draws: Draws, max_iterations: int) -> tuple[Any, ...]:
    """The publication's protocol, word by word, with the fallback and the tie rule of ours.

    Returns answer, agreed, how many met, number of iterations.
    """
    ir_set: set[str] = set()
    dr_set: set[str] = set()
    every: list[tuple[str, str]] = []
    for j in range(max_iterations):
        a_ir = draws.ir[j]
        a_dr = draws.dr[draws.knowledge[j]]
        if a_ir is not None:
            ir_set.add(a_ir)
            every.append((a_ir, "ir"))
        if a_dr is not None:
            dr_set.add(a_dr)
            every.append((a_dr, "dr"))
        met = ir_set & dr_set
        if met:
            assert len(met) <= 2
            answer = a_dr if a_dr in met else a_ir
            return answer, True, len(met), j + 1
    best: tuple[int, bool, int] | None = None
    answer = None
    for position, (candidate, _) in enumerate(every):
        count = sum(other == candidate for other, _ in every)
        by_dr = any(other == candidate and who == "dr" for other, who in every)
        rank = (count, by_dr, -position)
        if best is None or rank > best:
            best, answer = rank, candidate
    num_best = len({a for a, _ in every if best and sum(o == a for o, _ in every) == best[0]})
    return answer, False, num_best, max_iterations


def random_draws(rng: random.Random, length: int) -> Draws:
    """Few answers meet soon, many hardly ever; some texts hold none at all."""
    num_answers = rng.choice([1, 2, 3, 8, 40])
    silence = rng.choice([0.0, 0.2, 0.9])

    def answer() -> str | None:
        return None if rng.random() < silence else str(rng.randrange(num_answers))

    if rng.random() < 0.3:  # two camps that never meet
        ir = [None if a is None else f"1{a}" for a in (answer() for _ in range(length))]
        dr = [None if a is None else f"2{a}" for a in (answer() for _ in range(length))]
    else:
        ir, dr = [answer() for _ in range(length)], [answer() for _ in range(length)]
    knowledge = [f"fact {j}: {rng.randrange(10**6)}" for j in range(length)]
    return Draws(ir, knowledge, dict(zip(knowledge, dr, strict=True)))


async def test_it_is_the_simulation_over_many_random_scripts() -> None:
    seen: set[tuple[bool, int]] = set()
    rng = random.Random(5)
    for _ in range(1500):
        max_iterations = rng.choice([1, 2, 3, 7])
        draws = random_draws(rng, max_iterations)
        sampler = ScriptedSampler(draws.script, random.Random(rng.random()))
        outcome = await definition(max_iterations).run("why?", sampler)
        answer, agreed, num_candidates, num_rounds = simulate(draws, max_iterations)
        assert outcome.answer == answer
        assert outcome.agreed is agreed
        assert len(outcome.candidates) == num_candidates
        assert outcome.candidates[:1] == (() if answer is None else (answer,))
        assert outcome.num_rounds == num_rounds
        rule = "agreement" if agreed else "none" if answer is None else "majority"
        assert outcome.rule == rule
        asked = [(r, role) for r, role, _, _ in sampler.asked]
        assert sorted(asked) == sorted(
            (r, role) for r in range(1, num_rounds + 1) for role in ("ir", "kg", "dr")
        ), "every iteration takes one sample of each role, and none is taken behind the last"
        seen.add((agreed, num_candidates))
    assert {(True, 1), (True, 2), (False, 0), (False, 1), (False, 2)} <= seen


async def test_ir_runs_beside_kg_and_beside_dr() -> None:
    sampler = ScriptedSampler(lambda role, prompt, r, n: "nothing", random.Random(3))
    await definition(40).run("why?", sampler)
    assert {"ir", "kg"} in sampler.together
    assert {"ir", "dr"} in sampler.together
    assert {"kg", "dr"} not in sampler.together, "DR needs KG's text"


def told(ir: list[str | None], dr: list[str | None]) -> Draws:
    knowledge = [str(j) for j in range(len(ir))]
    return Draws(ir, knowledge, dict(zip(knowledge, dr, strict=True)))


@pytest.mark.parametrize(
    ("ir", "dr", "expected"),
    [
        # at once
        (["7"], ["7"], Outcome("7", True, "agreement", ("7",), 1)),
        # the sets accumulate: DR comes later to what IR said before, and the other way round
        (["7", "8"], ["1", "7"], Outcome("7", True, "agreement", ("7",), 2)),
        (["1", "7"], ["7", "2"], Outcome("7", True, "agreement", ("7",), 2)),
        # two meet at once: DR's of the iteration is taken
        (["1", "2"], ["2", "1"], Outcome("1", True, "agreement", ("1", "2"), 2)),
        # no answer is not an answer on which one could agree
        ([None, None], [None, None], Outcome(None, False, "none", (), 2)),
        # never: the most frequent; of equal ones DR's, then the earlier
        (["1", "1", "3"], ["2", "4", "2"], Outcome("2", False, "majority", ("2", "1"), 3)),
        (["1", "1", "1"], ["2", "4", "2"], Outcome("1", False, "majority", ("1",), 3)),
        (["1", "3"], [None, None], Outcome("1", False, "majority", ("1", "3"), 2)),
        # forms of one answer are one answer
        (["1,000"], ["$1000.00"], Outcome("1000", True, "agreement", ("1000",), 1)),
    ],
)
async def test_the_rules(ir: list[str | None], dr: list[str | None], expected: Outcome) -> None:
    draws = told(ir, dr)
    assert await definition(len(ir)).run("why?", ScriptedSampler(draws.script)) == expected


@pytest.mark.parametrize("role", ["ir", "kg", "dr"])
async def test_a_member_that_fails_ends_the_run_and_the_others(role: str) -> None:
    def script(who: str, prompt: str, round_id: int, number: int) -> str:
        if who == role and round_id == 2:
            raise InternalError(f"{role} is broken")
        return saying("1" if who == "ir" else "2")

    sampler = ScriptedSampler(script, random.Random(1))
    with pytest.raises(InternalError, match=f"{role} is broken"):
        await definition().run("why?", sampler)
    assert not sampler.running
    assert max(r for r, *_ in sampler.asked) == 2
