"""What kinds are made of: prompts, samples at once, majorities."""

from __future__ import annotations

import asyncio

import pytest
from pydantic import ValidationError

from polyadapt.errors import QueueFull
from polyadapt.tasks.workflows.base import Member, Sample, most_common, together, words_of
from polyadapt.tasks.workflows.kinds import KINDS, stored_definition
from polyadapt.tasks.workflows.lorid import DeepReasoner, LoridDefinition
from polyadapt.tasks.workflows.self_consistency import SelfConsistencyDefinition

pytestmark = pytest.mark.anyio


def test_a_prompt_is_the_instruction_a_line_break_and_the_filled_template() -> None:
    member = Member(adapter=None, instruction="Solve.", template="Q: {question} {x} }{")
    assert member.prompt(question="why?") == "Solve.\nQ: why? {x} }{"
    assert Member(adapter=None).prompt(question="why?") == "why?"


def test_nothing_inside_a_question_or_knowledge_is_replaced() -> None:
    deep = DeepReasoner(adapter=None, instruction="", template="{question}|{knowledge}|{question}")
    filled = deep.prompt(question="{knowledge}", knowledge="{question} {question.__class__}")
    assert filled == "{knowledge}|{question} {question.__class__}|{knowledge}"


@pytest.mark.parametrize("template", ["", "{ question }", "{knowledge}", "{question} {knowledge}"])
def test_a_template_holds_its_own_placeholders_and_no_others(template: str) -> None:
    with pytest.raises(ValidationError, match=r"must hold \{question\} and no other"):
        Member(adapter=None, template=template)


@pytest.mark.parametrize("template", ["{question}", "{knowledge}", "nothing"])
def test_the_deep_reasoner_needs_the_knowledge_too(template: str) -> None:
    with pytest.raises(ValidationError, match=r"\{question\} and \{knowledge\}"):
        DeepReasoner(adapter=None, template=template)


def test_most_common_prefers_then_takes_the_first() -> None:
    assert most_common([]) == ()
    assert most_common(["a"]) == ("a",)
    assert most_common(["a", "b", "b", "c", "c"]) == ("b", "c")
    assert most_common(["a", "b", "b", "c", "c"], preferred=["c", "a"]) == ("c", "b")
    assert most_common(["a", "a", "b"], preferred=["b"]) == ("a",)


async def test_together_runs_at_once_and_keeps_the_order() -> None:
    met = asyncio.Barrier(3)

    async def sample(name: str) -> Sample:
        await met.wait()
        return Sample(1, name, None, "", None, 0, 0, "stop", 0)

    async with asyncio.timeout(5):
        found = await together(*(sample(name) for name in "abc"))
    assert [one.role for one in found] == ["a", "b", "c"]


async def test_together_ends_the_others_with_the_first_error() -> None:
    ended: list[str] = []

    async def wait(name: str) -> Sample:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            ended.append(name)
        raise AssertionError

    async def fail() -> Sample:
        await asyncio.sleep(0)
        raise QueueFull("full", retry_after_s=7)

    with pytest.raises(QueueFull, match="full") as caught:
        await together(wait("a"), fail(), wait("b"))
    assert caught.value.retry_after_s == 7
    assert sorted(ended) == ["a", "b"]


async def test_together_is_cancelled_as_one() -> None:
    ended: list[int] = []

    async def wait(number: int) -> Sample:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(number)
        raise AssertionError

    task = asyncio.create_task(together(wait(1), wait(2)))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(ended) == [1, 2]


def test_the_list_of_kinds_is_closed_and_complete() -> None:
    made = [
        LoridDefinition.model_validate(
            {"kind": "lorid", **{role: {"adapter": role} for role in ("ir", "kg", "dr")}}
        ),
        SelfConsistencyDefinition.model_validate(
            {"kind": "self_consistency", "reasoner": {"adapter": None}}
        ),
    ]
    assert tuple(definition.kind for definition in made) == KINDS
    for definition in made:
        assert stored_definition.validate_json(definition.model_dump_json()) == definition
        assert set(words_of(definition.kind)) == {"sampling", *definition.members}
        for role, member in definition.members.items():
            assert getattr(definition, role) is member
            assert member.instruction == words_of(definition.kind)[role]["instruction"]
    with pytest.raises(ValidationError, match="does not match any of the expected tags"):
        stored_definition.validate_json('{"kind": "debate"}')


def test_some_sampling_of_ones_own_leaves_the_rest_at_the_kinds() -> None:
    given = {"kind": "lorid", "sampling": {"temperature": 0.5}}
    members = {role: {"adapter": None} for role in ("ir", "kg", "dr")}
    sampling = LoridDefinition.model_validate({**given, **members}).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 50)
    defaults = LoridDefinition.model_validate({"kind": "lorid", **members})
    assert (defaults.sampling.temperature, defaults.sampling.max_tokens) == (1.5, 1024)
    assert defaults.max_iterations == 20
