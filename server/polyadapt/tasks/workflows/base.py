"""What every kind of workflow is made of: its settings, its members, one sample, one outcome.

Knows no engine: a kind asks a Sampler for texts. Its settings are pydantic models because they are
the resource's wire form and its stored form at once.
"""

from __future__ import annotations

import asyncio
import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, field_validator

from polyadapt.types import FinishReason

MAX_ITERATIONS = 64
MAX_SAMPLES = 64
MAX_ROUND_SAMPLES = 16
_MAX_WORDS = 8192  # characters of an instruction or a template
_MAX_ADAPTER = 200  # characters of name@version
_PLACEHOLDER = re.compile(r"\{(question|knowledge)\}")

# How an answer was chosen: the members agreed; most of them said so; nobody gave an answer.
Rule = Literal["agreement", "majority", "none"]


class _Closed(BaseModel):
    """Settings in which nothing unknown passes."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, frozen=True, protected_namespaces=()
    )


Temperature = Annotated[float, Field(ge=0.0, le=2.0)]
TopP = Annotated[float, Field(gt=0.0, le=1.0)]
TopK = Annotated[int, Field(ge=-1, le=2**31 - 1, description="0 or -1: off")]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
MaxTokens = Annotated[
    int,
    Field(ge=1, le=2**31 - 1, description="of one member; the context's end may come first"),
]
Instruction = Annotated[
    str, Field(max_length=_MAX_WORDS, description="the first line of the prompt")
]
Template = Annotated[
    str,
    Field(
        max_length=_MAX_WORDS,
        description="the rest of the prompt; braces that are no placeholder's are plain text",
    ),
]


class Sampling(_Closed):
    """How every member is sampled; a request may give other values for its own run."""

    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100.0)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    max_tokens: MaxTokens = 1024


class Member(_Closed):
    """One role: who speaks, and what it is told."""

    # What the template has to hold, and all that it may hold.
    placeholders: ClassVar[tuple[str, ...]] = ("question",)

    adapter: str | None = Field(
        min_length=1, max_length=_MAX_ADAPTER, description="name or name@version; null is the base"
    )
    instruction: Instruction = ""
    template: Template = "{question}"

    @field_validator("template", mode="after")
    @classmethod
    def _holds_its_placeholders(cls, template: str) -> str:
        found = {match[1] for match in _PLACEHOLDER.finditer(template)}
        expected = set(cls.placeholders)
        if found != expected:
            shown = " and ".join(f"{{{name}}}" for name in cls.placeholders)
            raise ValueError(
                f"the template must hold {shown} and no other placeholder; it holds "
                f"{', '.join(sorted(found)) or 'none'}"
            )
        return template

    def prompt(self, **values: str) -> str:
        """Return the instruction, a line break and the filled template; braces in `values` stay."""
        filled = _PLACEHOLDER.sub(lambda match: values[match[1]], self.template)
        return f"{self.instruction}\n{filled}" if self.instruction else filled


@dataclass(frozen=True, slots=True)
class Sample:
    """One member's generation. `answer` is None where none was looked for, or none was found."""

    round: int  # from 1
    role: str
    adapter: str | None  # name@version; None: the base
    text: str
    answer: str | None
    num_prompt_tokens: int
    num_tokens: int
    finish_reason: FinishReason
    seed: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a workflow came to.

    `candidates` are the answers among which `rule` found no difference, the one that was taken
    first: more than one is a tie. Without an answer there are none.
    """

    answer: str | None
    agreed: bool
    rule: Rule
    candidates: tuple[str, ...]
    num_rounds: int


class Sampler(Protocol):
    """Generates texts for a kind; each call is one ordinary request of the engine."""

    async def __call__(
        self, role: str, prompt: str, *, round_id: int, number: int = 0, has_answer: bool = True
    ) -> Sample:
        """Return one sample of a role; (round_id, role, number) must differ from call to call."""


class Definition(_Closed, ABC):
    """The settings of one kind, which a class attribute `kind` names, and how it runs."""

    format: Literal["chat", "text"] = Field(
        "chat",
        description="chat: a member's prompt is a user's turn in the model's chat template; text: "
        "it is the whole text, in which special tokens are parsed",
    )
    sampling: Sampling = Sampling()

    @property
    @abstractmethod
    def members(self) -> Mapping[str, Member]:
        """The members by role; a role's name is its field's."""

    @abstractmethod
    async def run(self, question: str, sample: Sampler) -> Outcome:
        """Answer the question; raises what `sample` raises, with nothing left running."""


def words_of(kind: str) -> Any:
    """Return the packaged defaults of a kind: our own words, for whoever gives none."""
    text = resources.files(__package__).joinpath("defaults.json").read_text(encoding="utf-8")
    return json.loads(text)[kind]


async def together(*samplings: Coroutine[Any, Any, Sample]) -> list[Sample]:
    """Run them at once and return their samples in the order given.

    The first error ends the others and is raised; when this returns or raises, none is running.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(sampling) for sampling in samplings]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def most_common(answers: Sequence[str], preferred: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the most frequent answers: the preferred ones first, then by first occurrence."""
    counts = Counter(answers)  # in the order of first occurrence
    most = max(counts.values(), default=0)
    tied = [answer for answer, count in counts.items() if count == most]
    return tuple(sorted(tied, key=lambda answer: answer not in preferred))  # a stable sort
