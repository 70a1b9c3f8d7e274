"""Runs a workflow: its samples are ordinary text requests, which share steps with everybody's.

Holds the adapters of all roles from the first sample to the last, so that replacing or deleting a
name changes no run that has begun. Knows no wire format and no kind.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from polyadapt.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    PolyadaptError,
    RequestTimeout,
    located,
)
from polyadapt.tasks.directory import Lease
from polyadapt.tasks.sequence_text import TextDelta
from polyadapt.tasks.text import (
    Accepted,
    ChatPrompt,
    Completed,
    Prompt,
    Queued,
    TextEvent,
    TextPrompt,
    TextRequest,
    TextService,
    TokenPrompt,
    Trace,
)
from polyadapt.tasks.workflows.answers import extract
from polyadapt.tasks.workflows.base import Outcome, Sample
from polyadapt.tasks.workflows.library import Workflow, WorkflowLibrary
from polyadapt.types import AdapterId, FinishReason, SamplingParams, ServedAdapter

# Entered for each sample: gives what is shown the sample's events.
NewWatch = Callable[[], contextlib.AbstractContextManager[Callable[[TextEvent], None]]]

_SEED_BITS = 52  # whole numbers that JSON readers keep exact


@dataclass(frozen=True, slots=True)
class WorkflowRequest:
    """One question to a workflow.

    `earlier` are the turns before the question, for members in chat format. `sampling` holds the
    fields of the definition's sampling that the caller gave other values. `param` is the field that
    the question came in.
    """

    id: str
    tenant: str
    workflow: Workflow
    question: str
    param: str
    earlier: tuple[Mapping[str, Any], ...] = ()
    sampling: Mapping[str, float | int] = field(default_factory=dict)
    seed: int | None = None
    cache_salt: str | None = None
    priority: int = 0
    speculative_tokens: int | None = None
    user: str | None = None
    trace: Trace | None = None


@dataclass(frozen=True, slots=True)
class WorkflowResult:
    """What came out, how, and what it took. `served` lists each adapter version once, as the
    samples were asked for.
    """

    outcome: Outcome
    trace: tuple[Sample, ...]  # by round, in the order in which they were asked for
    served: tuple[ServedAdapter, ...]
    used: Completed


class WorkflowRunner:
    """Answers questions with workflows."""

    def __init__(
        self, text: TextService, library: WorkflowLibrary, timeout_s: float | None = None
    ) -> None:
        """timeout_s: so long may a run take; None: until it ends."""
        self._text = text
        self._library = library
        self._timeout_s = timeout_s

    async def run(self, request: WorkflowRequest, new_watch: NewWatch) -> WorkflowResult:
        """Run the workflow to its outcome; each sample has a watch of its own, which is shown every
        event.

        Two runs with the same seed and the same adapters draw the same samples. Raises
        InvalidRequest for earlier turns that no member can be shown, RequestTimeout, and what a
        member fails with, which names its role; then, and when this is cancelled, nothing is left
        running.
        """
        definition = request.workflow.definition
        if request.earlier and definition.format != "chat":
            raise InvalidRequest(
                f"the members of {request.workflow.name!r} read plain text, which has no turns; "
                "send one message",
                param=request.param,
            )
        await self._library.warm(request.tenant, definition.members.values(), request.user)
        with contextlib.ExitStack() as held:
            leases: dict[str, Lease] = {}
            for role, member in definition.members.items():
                leases[role] = self._library.hold(request.tenant, role, member, request.user)
                held.callback(leases[role].release)
            run = _Run(self._text, request, leases, new_watch)
            try:
                async with asyncio.timeout(self._timeout_s):
                    outcome = await definition.run(request.question, run.sample)
            except TimeoutError:
                raise RequestTimeout(
                    f"the workflow {request.workflow.name!r} did not end within "
                    f"{self._timeout_s:g} s; {len(run.trace)} of its samples did"
                ) from None
        trace = sorted(run.trace.items())
        return WorkflowResult(
            outcome, tuple(sample for _, sample in trace), run.all_served(), run.used
        )


class _Run:
    """One run's Sampler, and what it has used so far."""

    def __init__(
        self,
        text: TextService,
        request: WorkflowRequest,
        leases: Mapping[str, Lease],
        new_watch: NewWatch,
    ) -> None:
        self.trace: dict[int, Sample] = {}  # by the order of asking
        self.served: dict[int, tuple[ServedAdapter, ...]] = {}  # likewise
        self.used = Completed(0, 0, 0)
        self._text = text
        self._request = request
        self._leases = leases
        self._new_watch = new_watch
        self._seed = secrets.randbits(63) if request.seed is None else request.seed
        self._num_asked = 0
        given = request.workflow.definition.sampling.model_dump() | dict(request.sampling)
        self._max_tokens = int(given.pop("max_tokens"))
        given["top_k"] = max(0, given["top_k"])
        self._sampling = SamplingParams(max_tokens=1, **given)

    def all_served(self) -> tuple[ServedAdapter, ...]:
        """Return each adapter version once, as the first sample that had it was served."""
        found: dict[AdapterId, ServedAdapter] = {}
        for _, served in sorted(self.served.items()):
            for one in served:
                found.setdefault(one.adapter, one)
        return tuple(found.values())

    async def sample(
        self, role: str, prompt: str, *, round_id: int, number: int = 0, has_answer: bool = True
    ) -> Sample:
        """See Sampler; raises the error of the member with its role and round before it."""
        place = self._num_asked
        self._num_asked += 1
        seed = member_seed(self._seed, round_id, role, number)
        try:
            request = await self._text_request(role, prompt, seed, f"{round_id}-{role}-{number}")
            found = await self._generate(request, self._leases[role], place)
        except PolyadaptError as error:
            raise located(error, f"the workflow's {role}, round {round_id}") from None
        has_own = self._request.workflow.definition.members[role].adapter is not None
        # Its own stands before those that are mandatory for the tenant.
        own = self._leases[role].applied[0].adapter if has_own else None
        sample = Sample(
            round=round_id,
            role=role,
            adapter=None if own is None else f"{own.name}@{own.version}",
            text=found.text,
            answer=extract(found.text) if has_answer else None,
            num_prompt_tokens=found.num_prompt_tokens,
            num_tokens=found.num_tokens,
            finish_reason=found.finish_reason,
            seed=seed,
        )
        self.trace[place] = sample
        return sample

    async def _text_request(self, role: str, prompt: str, seed: int, suffix: str) -> TextRequest:
        request = self._request
        try:
            ids = await self._text.encode(self._shown(prompt))
        except InvalidRequest as error:
            raise _blamed(error, request.param) from None
        # The context's end is a limit like max_tokens: how long KG's text gets is nobody's fault.
        length = self._text.info().base.max_model_len
        if len(ids) >= length:
            raise ContextLengthExceeded(
                f"the context is {length} tokens and its prompt has {len(ids)}; shorten the "
                "question, or the workflow's max_tokens if an earlier member wrote too much",
                param=request.param,
            )
        return TextRequest(
            id=f"{request.id}-{suffix}",
            tenant=request.tenant,
            model=request.workflow.definition.members[role].adapter or "",
            prompts=(TokenPrompt(ids),),
            sampling=self._sampling,
            max_tokens=min(self._max_tokens, length - len(ids)),
            seed=seed,
            cache_salt=request.cache_salt,
            priority=request.priority,
            speculative_tokens=request.speculative_tokens,
            user=request.user,
            trace=request.trace,
        )

    def _shown(self, prompt: str) -> Prompt:
        """Return a member's prompt in the format of the workflow."""
        if self._request.workflow.definition.format == "text":
            return TextPrompt(prompt)
        return ChatPrompt((*self._request.earlier, {"role": "user", "content": prompt}))

    async def _generate(self, request: TextRequest, lease: Lease, place: int) -> _Text:
        """Return what one request of one sequence says; counts what it used, as it comes."""
        found = _Text()
        async with contextlib.aclosing(self._text.generate(request, lease)) as events:
            with self._new_watch() as see:
                async for event in events:
                    see(event)
                    if isinstance(event, Accepted):
                        found.num_prompt_tokens = len(event.prompt_ids[0])
                    elif isinstance(event, Queued):
                        self.served[place] = event.served
                    elif isinstance(event, TextDelta):
                        found.pieces.append(event.text)
                        found.num_tokens += len(event.token_ids)
                        found.finish_reason = event.finish_reason or found.finish_reason
                    elif isinstance(event, Completed):
                        self.used = Completed(
                            self.used.num_prompt_tokens + event.num_prompt_tokens,
                            self.used.num_completion_tokens + event.num_completion_tokens,
                            self.used.num_cached_tokens + event.num_cached_tokens,
                        )
        return found


@dataclass(slots=True)
class _Text:
    pieces: list[str] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    finish_reason: FinishReason = "length"

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def member_seed(seed: int, round_id: int, role: str, number: int) -> int:
    """Return the seed of one sample: a pure function that keeps samples of a run independent.

    It is a 52-bit number, so that a trace's seed can be sent back to repeat that sample alone.
    """
    name = f"{seed}:{round_id}:{role}:{number}".encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") >> (64 - _SEED_BITS)


def _blamed(error: InvalidRequest, param: str) -> InvalidRequest:
    """Return the error with another field to blame."""
    return type(error)(error.message, param=param)
