"""A request's life in the engine: the group of its sequences, and one sequence's tokens and pages.

Torch-free. Knows no names: adapters are digests here.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from polyadapt.engine.prompt_lookup import NgramIndex, PromptLookup
from polyadapt.types import Request, TokenLogprob


class SequenceState(enum.Enum):
    """waiting -> running -> done; running -> waiting by preemption."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    DONE = enum.auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """One row of the batch over time.

    num_computed tokens have keys and values in `pages`; the rest of token_ids is still to be run.
    The first num_shareable of the pages are full and lie under their keys in the prefix cache.
    `companions` are sequences coupled to this one: they are admitted, preempted and freed with it.
    """

    group: RequestGroup
    index: int
    token_ids: list[int]
    num_prompt: int
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    slots: tuple[int, ...] = ()  # device slots of the request's adapters while running
    state: SequenceState = SequenceState.WAITING
    companions: tuple[Sequence, ...] = ()
    is_companion: bool = False
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # of prompt tokens 1..
    is_scored: bool = False  # the prompt's logprobs are complete
    page_keys: list[bytes] = field(default_factory=list)  # of the first full pages of token_ids
    num_shareable: int = 0
    lookup: PromptLookup | None = None  # where its drafts come from, once it speculates

    @property
    def unit(self) -> tuple[Sequence, ...]:
        """The sequence and its companions: what is admitted and preempted as one."""
        return (self, *self.companions)

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens that have no keys and values yet; 1 while decoding."""
        return len(self.token_ids) - self.num_computed


@dataclass(slots=True, eq=False)
class RequestGroup:
    """One request and its n sequences."""

    request: Request
    arrived: float  # monotonic seconds
    sequences: list[Sequence] = field(default_factory=list)
    is_started: bool = False
    root_key: bytes | None = None  # what every page's key of the request hangs on, once admitted
    order: int = 0  # of arrival; given by the scheduler
    num_overtaken: int = 0  # admissions before it, or at its cost, of requests that came later
    prompt_ngrams: NgramIndex | None = None  # of the prompt, shared by its sequences

    @property
    def deadline(self) -> float | None:
        """Monotonic second at which the request times out."""
        timeout = self.request.timeout_s
        return None if timeout is None else self.arrived + timeout

    @property
    def is_done(self) -> bool:
        """Whether every sequence has ended."""
        return all(sequence.state is SequenceState.DONE for sequence in self.sequences)

    @classmethod
    def of(cls, request: Request, arrived: float) -> RequestGroup:
        """Make the group with its n sequences, all waiting."""
        group = cls(request, arrived)
        group.sequences = [
            Sequence(group, index, list(request.prompt_ids), len(request.prompt_ids))
            for index in range(request.n)
        ]
        return group
