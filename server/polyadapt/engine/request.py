"""A request's life in the engine: the group of its sequences, and one sequence's tokens and pages.

Torch-free. Knows no names: adapters are digests here.
"""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from polyadapt.adapters.gates import NEVER, GatedAdapter, at_rest
from polyadapt.engine.prompt_lookup import NgramIndex, PromptLookup
from polyadapt.engine.token_counts import TokenCounts
from polyadapt.engine.token_table import TokenTable
from polyadapt.errors import PolyadaptError
from polyadapt.types import AppliedAdapter, Request, Timeline, TokenLogprob

if TYPE_CHECKING:
    from polyadapt.engine.text_marks import TextMarker


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
    The last num_unread of the computed tokens are rows of a step in flight, of which nobody knows
    yet what came of them; then the newest token may be ~row of the tokens that it samples.

    Where a first pass weighs an adapter's experts there are two, with one list of tokens: the
    `scout` makes that pass, samples nothing and runs no token from `horizon` on; its hidden states
    fill `expert_weights` of its `main`, whose token may run in any step after the scout's. Both are
    admitted, preempted and freed as one; the scout leaves as soon as it has nothing left to run.
    """

    group: RequestGroup
    index: int
    token_ids: list[int]
    num_prompt: int
    num_computed: int = 0
    num_unread: int = 0
    pages: list[int] = field(default_factory=list)
    slots: tuple[int, ...] = ()  # device slots of its adapters while running
    lanes: tuple[GatedAdapter, ...] = ()  # beside `slots`, once settled
    state: SequenceState = SequenceState.WAITING
    scout: Sequence | None = None
    main: Sequence | None = None
    horizon: int | None = None  # None: it runs every token
    expert_weights: dict[int, TokenTable] = field(default_factory=dict)  # by lane
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # of prompt tokens 1..
    is_scored: bool = False  # the prompt's logprobs are complete
    root_key: bytes | None = None  # what every page's key hangs on, once it is asked for
    key_turns: dict[int, bytes] = field(default_factory=dict)  # see PageKeys.turns
    page_keys: list[bytes] = field(default_factory=list)  # of the first full pages of token_ids
    num_shareable: int = 0
    lookup: PromptLookup | None = None  # where its drafts come from, once it speculates
    counts: TokenCounts | None = None  # of its tokens, once penalties are applied on a device
    marker: TextMarker | None = None  # of a marked one, once it is sampled
    is_embedded: bool = False  # its prompt is the whole work: nothing is sampled
    hidden_sum: np.ndarray | None = None  # of an embedded one's computed rows, float64 [width]

    @property
    def leader(self) -> Sequence:
        """The one that stands for both in the queue: itself, or its main."""
        return self.main or self

    @property
    def unit(self) -> tuple[Sequence, ...]:
        """What is admitted and preempted as one, the leader first."""
        leader = self.leader
        return (leader,) if leader.scout is None else (leader, leader.scout)

    @property
    def wants_hidden(self) -> bool:
        """Whether the final hidden states of its rows are used."""
        return self.main is not None or self.is_embedded

    @property
    def needs_every_row(self) -> bool:
        """Whether every row of its prompt has to run, whatever the prefix cache holds."""
        is_scored = self.group.request.sampling.num_prompt_logprobs is not None
        return self.is_embedded or (is_scored and not self.leader.is_scored)

    @property
    def token_cost(self) -> int:
        """What a token of it takes of a step's budget; a scout runs without the costly adapters."""
        return 1 if self.main is not None else self.group.token_cost

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens that are still to be run; 1 while decoding."""
        num_tokens = len(self.token_ids)
        if self.horizon is not None:
            num_tokens = min(num_tokens, self.horizon)
        return num_tokens - self.num_computed

    @property
    def num_runnable(self) -> int:
        """Those of the pending tokens that the next step may run: a scout's come first."""
        scout = self.scout
        if scout is None or scout.is_complete:
            return self.num_pending
        return max(min(self.num_pending, scout.num_computed - self.num_computed), 0)

    @property
    def is_complete(self) -> bool:
        """Whether it never runs another token unless it starts over."""
        is_ahead = self.horizon is not None and self.num_computed >= self.horizon
        return is_ahead or self.state is SequenceState.DONE

    def weights_at(self, lane_id: int, start: int, stop: int) -> np.ndarray:
        """What weighs the experts of a lane at these positions, float32 [stop - start, width]."""
        lane = self.lanes[lane_id]
        assert lane.probing is not None
        if lane.is_resting:
            return np.full((stop - start, lane.probing.width), lane.probing.resting, np.float32)
        return self.expert_weights[lane_id].at(start, stop, lane.probing.frozen_from - 1)

    def settle(self, position: int, token_id: int) -> None:
        """Learn the token of a position, whether one was assumed there or not."""
        self.token_ids[position : position + 1] = [token_id]

    def couple(self, lanes: tuple[GatedAdapter, ...], horizon: int | None) -> None:
        """Give it a scout that runs with `lanes` alone."""
        scout = Sequence(self.group, self.index, self.token_ids, self.num_prompt)
        scout.lanes, scout.main, scout.horizon = lanes, self, horizon
        self.scout = scout

    def forget(self) -> None:
        """Be as before its adapters were settled."""
        self.lanes, self.scout = (), None
        self.root_key, self.key_turns = None, {}
        self.page_keys.clear()


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
    is_probed: bool = False  # whether any has its experts weighed in a first pass
    has_turned: bool = False  # from its own adapters to those of when_cold
    refusal: PolyadaptError | None = None  # why it cannot be served, found before its first row
    sequences: list[Sequence] = field(default_factory=list)
    is_started: bool = False
    order: int = 0  # of arrival; given by the scheduler
    num_overtaken: int = 0  # admissions before it, or at its cost, of requests that came later
    was_too_heavy: bool = False  # it waited for others' heavy adapters to end
    prompt_ngrams: NgramIndex | None = None  # of the prompt, shared by its sequences
    timeline: Timeline | None = None  # of a traced request

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
        self.lanes, self.is_gated, self.is_probed, self.token_cost = None, False, False, 1
        for sequence in self.sequences:
            sequence.forget()

    def settle(self, lanes: tuple[GatedAdapter, ...]) -> None:
        """Fix the adapters, which are `lanes` in another order, for all of its sequences."""
        self.lanes = lanes
        self.adapters = tuple(lane.applied for lane in lanes)
        self.is_gated = any(lane.is_gated for lane in lanes)
        self.token_cost = max((lane.token_cost for lane in lanes), default=1)
        probed = [lane.probing for lane in lanes if lane.probing is not None]
        self.is_probed = bool(probed)
        horizon = max((probing.frozen_from for probing in probed), default=0)
        for sequence in self.sequences:
            sequence.lanes = lanes
            if probed:
                sequence.couple(at_rest(lanes), None if horizon == NEVER else horizon)

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
        if request.traceparent is not None:
            group.timeline = Timeline(time.time())
        return group
