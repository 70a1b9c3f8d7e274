"""A request's life in the engine: the group of its sequences, and one sequence's tokens and pages.

Torch-free. Knows no names: adapters are digests here.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from polyadapt.adapters.gates import GatedAdapter
from polyadapt.engine.prompt_lookup import NgramIndex, PromptLookup
from polyadapt.errors import PolyadaptError
from polyadapt.types import AppliedAdapter, Request, TokenLogprob

if TYPE_CHECKING:
    import numpy as np


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
    slots: tuple[int, ...] = ()  # device slots of the group's adapters while running
    state: SequenceState = SequenceState.WAITING
    companions: tuple[Sequence, ...] = ()
    is_companion: bool = False
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # of prompt tokens 1..
    is_scored: bool = False  # the prompt's logprobs are complete
    page_keys: list[bytes] = field(default_factory=list)  # of the first full pages of token_ids
    num_shareable: int = 0
    lookup: PromptLookup | None = None  # where its drafts come from, once it speculates
    is_embedded: bool = False  # its prompt is the whole work: nothing is sampled
    hidden_sum: np.ndarray | None = None  # of an embedded one's computed rows, float64 [width]

    @property
    def unit(self) -> tuple[Sequence, ...]:
        """The sequence and its companions: what is admitted and preempted as one."""
        return (self, *self.companions)

    @property
    def wants_hidden(self) -> bool:
        """Whether the final hidden states of its rows are used."""
        return self.is_companion or self.is_embedded

    @property
    def needs_every_row(self) -> bool:
        """Whether every row of its prompt has to run, whatever the prefix cache holds."""
        is_scored = self.group.request.sampling.num_prompt_logprobs is not None
        return self.is_embedded or (is_scored and not self.is_scored)

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
    """One request and its n sequences.

    `adapters` are what it is served with: the request's, or what its when_cold names instead. The
    first admission of a sequence settles that for all of them and puts the adapters into the order
    of the plan's lanes.
    """

    request: Request
    arrived: float  # monotonic seconds
    adapters: tuple[AppliedAdapter, ...] = ()
    lanes: tuple[GatedAdapter, ...] | None = None  # beside `adapters`; None: not settled yet
    is_gated: bool = False  # whether any of them is
    token_cost: int = 1  # what a token takes of a step's budget, with its costliest adapter
    has_turned: bool = False  # from its own adapters to those of when_cold
    refusal: PolyadaptError | None = None  # why it cannot be served, found before its first row
    sequences: list[Sequence] = field(default_factory=list)
    is_started: bool = False
    root_key: bytes | None = None  # what every page's key of the request hangs on, once admitted
    key_turns: dict[int, bytes] = field(default_factory=dict)  # see PageKeys.turns
    order: int = 0  # of arrival; given by the scheduler
    num_overtaken: int = 0  # admissions before it, or at its cost, of requests that came later
    was_too_heavy: bool = False  # it waited for others' heavy adapters to end
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

    def has_waited_enough(self, now: float) -> bool:
        """Whether its when_cold applies from now on, if its adapters are not on the device."""
        wait_ms = self.request.when_cold.wait_ms
        is_open = self.lanes is None and not self.has_turned
        return is_open and wait_ms is not None and now >= self.arrived + wait_ms / 1e3

    def turn(self) -> None:
        """Be served with what the request names instead of its own adapters, from now on."""
        assert self.lanes is None, "a request that runs keeps its adapters"
        assert self.request.when_cold.instead is not None
        self.adapters, self.has_turned = self.request.when_cold.instead, True

    def reopen(self, adapters: tuple[AppliedAdapter, ...], has_turned: bool) -> None:
        """Undo what was decided for an admission that did not come about."""
        self.adapters, self.has_turned = adapters, has_turned
        self.lanes, self.is_gated, self.token_cost = None, False, 1
        self.root_key, self.key_turns = None, {}

    def settle(self, lanes: tuple[GatedAdapter, ...]) -> None:
        """Fix the adapters, which are `lanes` in another order, for all of its sequences."""
        self.lanes = lanes
        self.adapters = tuple(lane.applied for lane in lanes)
        self.is_gated = any(lane.is_gated for lane in lanes)
        self.token_cost = max((lane.token_cost for lane in lanes), default=1)

    @classmethod
    def of(cls, request: Request, arrived: float) -> RequestGroup:
        """Make the group with its n sequences, all waiting."""
        group = cls(request, arrived, request.adapters)
        group.sequences = [
            Sequence(group, index, list(request.prompt_ids), len(request.prompt_ids))
            for index in range(request.n)
        ]
        for sequence in group.sequences:
            sequence.is_embedded = request.kind == "embed"
        return group
