"""What a text request means: prompts to token ids, an engine request each, events to text.

Torch-free. Knows no HTTP and no wire format; `tasks.directory` knows the adapters' names.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from polyadapt.config import LimitsConfig
from polyadapt.engine.client import EngineClient
from polyadapt.errors import (
    ContextLengthExceeded,
    EngineUnavailable,
    InternalError,
    InvalidRequest,
    PolyadaptError,
    RequestCancelled,
    by_code,
)
from polyadapt.tasks.choice import Choice
from polyadapt.tasks.directory import AdapterDirectory, AdapterRef, Lease, OnCold
from polyadapt.tasks.sequence_text import SequenceText, TextDelta
from polyadapt.tasks.text_marks import TextMarks
from polyadapt.tasks.tokenizer import Tokenizer
from polyadapt.types import (
    EngineInfo,
    Event,
    Failed,
    Finished,
    PromptScored,
    Request,
    SamplingParams,
    ServedAdapter,
    Started,
    TextMark,
    Timeline,
    TokenLogprob,
    Tokens,
)

logger = logging.getLogger(__name__)

DEFAULT_COMPLETION_TOKENS = 16  # what OpenAI's completions generate when nobody says
# Shorter texts are tokenised on the event loop: it takes less than handing them to a thread.
_INLINE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A complete prompt as text; special tokens in it are parsed."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A complete prompt as token ids."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation for the model's chat template."""

    messages: tuple[Mapping[str, Any], ...]


Prompt = TextPrompt | TokenPrompt | ChatPrompt


class Trace(Protocol):
    """Where a traced request's times are noted."""

    @property
    def traceparent(self) -> str:
        """The span that the engine's belong below, as W3C's trace context writes it."""

    def note(self, generation: str, timeline: Timeline) -> None:
        """Keep what the engine says of one of the request's generations; the latest counts."""


@dataclass(frozen=True, slots=True)
class TextRequest:
    """One caller's request: every prompt is answered by `n` sequences.

    `max_tokens` None means what fits (chat) or 16 (completions); `sampling.max_tokens` is ignored.
    """

    id: str
    tenant: str
    model: str
    prompts: tuple[Prompt, ...]
    sampling: SamplingParams
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    adapters: tuple[AdapterRef, ...] | None = None  # replaces what `model` would choose
    on_cold: OnCold | None = None  # None: wait for them
    cache_salt: str | None = None  # parts the tenant's cached prefixes
    priority: int = 0  # lower is served earlier
    speculative_tokens: int | None = None  # None: the engine's own
    user: str | None = None  # who asks, as policies that mark answers tell users apart
    trace: Trace | None = None  # None: it is not traced


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request is valid and its adapters are counted as used; nothing has been generated yet."""

    lease: Lease
    prompt_ids: tuple[tuple[int, ...], ...]
    prompt_texts: tuple[str | None, ...]  # as the caller wrote it; None for ids and chats
    choice: Choice | None = None  # where the model was `auto`
    is_text_marked: bool = False  # its tokens carry the caller's text mark


@dataclass(frozen=True, slots=True)
class Queued:
    """The engine has taken the request; `served` says where its adapters lay."""

    served: tuple[ServedAdapter, ...]


@dataclass(frozen=True, slots=True)
class PromptScores:
    """The logprobs of prompt `prompt_index`'s tokens 1..."""

    prompt_index: int
    scores: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Completed:
    """Every sequence has ended."""

    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int = 0  # of the prompts'


TextEvent = Accepted | Queued | PromptScores | TextDelta | Completed


@dataclass(slots=True, eq=False)
class _Run:
    """One prompt's engine request and its sequences."""

    request: Request
    sequences: list[SequenceText]
    is_scored: bool = False
    is_started: bool = False
    num_cached_tokens: int = 0
    is_over: bool = False
    pump: asyncio.Task[None] | None = None

    @property
    def has_ended(self) -> bool:
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    @property
    def is_cut(self) -> bool:
        return any(sequence.is_cut for sequence in self.sequences)


@dataclass(frozen=True, slots=True)
class _Arrival:
    """What a run's stream brought: an event, an error, or None for its end."""

    run_id: int
    item: Event | PolyadaptError | None


@dataclass(slots=True)
class _Prepared:
    ids: list[tuple[int, ...]] = field(default_factory=list)
    texts: list[str | None] = field(default_factory=list)


class TextService:
    """Answers text requests with one engine, one tokenizer and one directory of adapters."""

    def __init__(
        self,
        engine: EngineClient,
        directory: AdapterDirectory,
        text_marks: TextMarks,
        tokenizer: Tokenizer,
        limits: LimitsConfig,
        prefix_pools: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """prefix_pools: by name, tenants that share cached prefixes; each of them in one pool."""
        pools = (prefix_pools or {}).items()
        self._pool_of = {tenant: pool for pool, tenants in pools for tenant in tenants}
        self._engine = engine
        self._directory = directory
        self._text_marks = text_marks
        self._limits = limits
        self._decoder = _SkippingDecoder(tokenizer)
        # Tokenising a long text holds a core; a few at a time leave some for the engine.
        self._tokenise_slots = asyncio.Semaphore(2)
        self.tokenizer = tokenizer

    def cache_salt(self, request: TextRequest) -> tuple[str, ...]:
        """What requests have in common that may share cached prefixes: their tenant, or the pool
        that the operator put it in, and their own salt.
        """
        pool = self._pool_of.get(request.tenant)
        # That first: no salt of a caller's reaches the prefixes of others.
        owner = ("tenant", request.tenant) if pool is None else ("pool", pool)
        return owner if request.cache_salt is None else (*owner, request.cache_salt)

    async def generate(
        self, request: TextRequest, held: Lease | None = None
    ) -> AsyncGenerator[TextEvent, None]:
        """Yield Accepted, then Queued, PromptScores and TextDelta as they come, then Completed.

        The index of a sequence is prompt index * n + its number. `held` is a lease of the caller's
        whose adapters serve the request in place of those that it names. Raises a PolyadaptError:
        before Accepted when the request is wrong, later when the engine refuses or fails it.
        Closing the generator cancels what still runs. The lease of this request is released exactly
        once, however it ends.
        """
        info = self.info()
        asked = request.tenant, request.model, request.adapters, request.on_cold, request.user
        await self._text_marks.warm()
        if held is None:
            await self._directory.warm(*asked)
            lease = self._directory.acquire(*asked)
        else:
            lease = self._directory.again(held)
        try:
            # Here, where every text is made: whatever is asked for, nobody gets round a policy.
            mark = self._text_marks.of(request.tenant, request.user, request.sampling)
            prepared = await self._prepare(request, info)
            runs = self._plan(request, lease, prepared, info, mark)
            ids, texts = tuple(prepared.ids), tuple(prepared.texts)
            yield Accepted(lease, ids, texts, is_text_marked=mark is not None)
            async with aclosing(self._follow(request, runs)) as events:
                async for event in events:
                    yield event
        finally:
            lease.release()

    def info(self) -> EngineInfo:
        """Return what the engine is; raises EngineUnavailable while it cannot take requests."""
        info = self._engine.info
        if info is None or not self._engine.is_ready:
            raise EngineUnavailable("the engine is starting; try again shortly", retry_after_s=2)
        return info

    async def encode(
        self, prompt: Prompt, *, add_special_tokens: bool = True, add_generation_prompt: bool = True
    ) -> tuple[int, ...]:
        """Return a prompt's ids, off the event loop when it is long; raises InvalidRequest."""
        info = self.info()
        if isinstance(prompt, TokenPrompt):
            _check_ids(prompt.ids, info)
            return prompt.ids
        nbytes = _nbytes(prompt)
        param = "messages" if isinstance(prompt, ChatPrompt) else "prompt"
        if nbytes > self._limits.max_prompt_bytes:
            raise InvalidRequest(
                f"the prompt has {nbytes} bytes, expected at most {self._limits.max_prompt_bytes}",
                param=param,
            )

        def encode() -> list[int]:
            if isinstance(prompt, ChatPrompt):
                return self.tokenizer.encode_chat(
                    prompt.messages, add_generation_prompt=add_generation_prompt
                )
            return self.tokenizer.encode(prompt.text, add_special_tokens=add_special_tokens)

        if nbytes <= _INLINE_BYTES:
            return tuple(encode())
        async with self._tokenise_slots:
            return tuple(await asyncio.to_thread(encode))

    async def _prepare(self, request: TextRequest, info: EngineInfo) -> _Prepared:
        prepared = _Prepared()
        for prompt in request.prompts:
            if isinstance(prompt, TextPrompt) and not prompt.text:
                raise InvalidRequest("the prompt is empty; send at least one token", param="prompt")
            self._check_size(prompt, request.max_tokens, info)
            ids = await self.encode(prompt)
            if not ids:
                param = "messages" if isinstance(prompt, ChatPrompt) else "prompt"
                raise InvalidRequest("the prompt is empty; send at least one token", param=param)
            prepared.ids.append(ids)
            prepared.texts.append(prompt.text if isinstance(prompt, TextPrompt) else None)
        return prepared

    def _check_size(self, prompt: Prompt, wanted: int | None, info: EngineInfo) -> None:
        """Refuse a text that cannot fit without spending the time to tokenise it."""
        if not isinstance(prompt, TextPrompt):  # a chat template may leave parts of a chat out
            return
        num_tokens = self.tokenizer.min_tokens(prompt.text)
        if num_tokens >= info.base.max_model_len:
            raise _too_long(f"at least {num_tokens}", wanted or 1, prompt, info)

    def _plan(
        self,
        request: TextRequest,
        lease: Lease,
        prepared: _Prepared,
        info: EngineInfo,
        mark: TextMark | None,
    ) -> list[_Run]:
        """Check every bound that depends on the model and return one run for each prompt."""
        sampling = request.sampling
        _check_vocabulary("stop_token_ids", sampling.stop_token_ids, info)
        _check_vocabulary("logit_bias", [token_id for token_id, _ in sampling.logit_bias], info)
        seed = request.seed if request.seed is not None else secrets.randbits(63)
        runs: list[_Run] = []
        for i, (prompt, ids) in enumerate(zip(request.prompts, prepared.ids, strict=True)):
            max_tokens = _max_tokens(request.max_tokens, prompt, len(ids), info)
            if sampling.min_tokens > max_tokens:
                raise InvalidRequest(
                    f"min_tokens is {sampling.min_tokens}, expected at most {max_tokens}",
                    param="min_tokens",
                )
            engine_request = Request(
                id=f"{request.id}-{i}",
                prompt_ids=ids,
                # Prompts of one call draw different numbers, like the n sequences of one prompt.
                sampling=replace(sampling, max_tokens=max_tokens, seed=(seed + i) % (1 << 63)),
                adapters=lease.applied,
                n=request.n,
                timeout_s=self._limits.request_timeout_s,
                cache_salt=self.cache_salt(request),
                priority=request.priority,
                speculative_tokens=request.speculative_tokens,
                when_cold=lease.when_cold,
                text_mark=mark,
                traceparent=None if request.trace is None else request.trace.traceparent,
            )
            sequences = [
                SequenceText(
                    i * request.n + j,
                    self._decoder,
                    stop=request.stop,
                    min_tokens=sampling.min_tokens,
                )
                for j in range(request.n)
            ]
            runs.append(_Run(engine_request, sequences))
        return runs

    async def _follow(
        self, request: TextRequest, runs: list[_Run]
    ) -> AsyncGenerator[TextEvent, None]:
        """Submit every run and yield what comes until all have ended; cancels what is left."""
        num_open = len(runs)
        has_queued = False
        # A single stream needs no task of its own, which would be woken for every token.
        source = self._events(0, runs[0].request) if len(runs) == 1 else self._merged(runs)
        async with aclosing(source) as arrivals:
            while num_open:
                arrival = await anext(arrivals)
                run = runs[arrival.run_id]
                if run.is_over:
                    continue
                item = arrival.item
                if isinstance(item, PolyadaptError):
                    raise item
                if isinstance(item, Failed):
                    _note(request.trace, item)
                    raise by_code(item.code, item.message, item.param)
                if isinstance(item, Started):
                    _note(request.trace, item)
                    run.is_started = True
                    run.num_cached_tokens = item.num_cached_tokens
                    if not has_queued:
                        has_queued = True
                        yield Queued(item.served)
                elif isinstance(item, PromptScored):
                    if not run.is_scored:  # every sequence has the same prompt
                        run.is_scored = True
                        yield PromptScores(arrival.run_id, item.logprobs)
                elif isinstance(item, Tokens):
                    delta = run.sequences[item.index].take(item)
                    if delta is not None:
                        yield delta
                is_last = item is None or isinstance(item, Finished)
                if isinstance(item, Finished):
                    _note(request.trace, item)
                if run.has_ended and (is_last or run.is_cut):
                    # When stop strings ended it, the engine is still busy: closing cancels it.
                    run.is_over = True
                    num_open -= 1
                    if run.pump is not None:
                        run.pump.cancel()
                elif isinstance(item, Finished) and item.is_cancelled:
                    raise RequestCancelled("the request was cancelled before it ended")
                elif is_last:
                    logger.error("request %s: the engine ended it with open sequences", request.id)
                    raise InternalError("the engine ended this request early; please report it")
        yield Completed(
            sum(len(run.request.prompt_ids) for run in runs),
            sum(sequence.num_tokens for run in runs for sequence in run.sequences),
            sum(run.num_cached_tokens for run in runs),
        )

    async def _events(self, run_id: int, request: Request) -> AsyncGenerator[_Arrival, None]:
        """Yield what one request's stream brings, and how it ended; closing this cancels the
        request.
        """
        end: PolyadaptError | None = None
        try:
            async with aclosing(self._engine.submit(request)) as events:
                async for event in events:
                    yield _Arrival(run_id, event)
        except PolyadaptError as error:
            end = error
        except Exception:
            logger.exception("request %s: the engine's stream broke", request.id)
            end = InternalError("an internal error ended this request")
        yield _Arrival(run_id, end)

    async def _merged(self, runs: list[_Run]) -> AsyncGenerator[_Arrival, None]:
        """Yield what all runs' streams bring, in the order in which it comes, without an end."""
        arrivals: asyncio.Queue[_Arrival] = asyncio.Queue()
        for i, run in enumerate(runs):
            run.pump = asyncio.create_task(self._pump(i, run.request, arrivals))
        try:
            while True:
                yield await arrivals.get()
        finally:
            pumps = [run.pump for run in runs if run.pump is not None]
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, run_id: int, request: Request, arrivals: asyncio.Queue[_Arrival]) -> None:
        """Move one request's arrivals into `arrivals`; cancelling this cancels the request."""
        async with aclosing(self._events(run_id, request)) as events:
            async for arrival in events:
                arrivals.put_nowait(arrival)


class _SkippingDecoder:
    """The tokenizer as incremental decoding sees it: special tokens have no text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.is_special = tokenizer.is_special
        self.is_byte_fallback = tokenizer.is_byte_fallback
        self.lone_text = tokenizer.lone_text

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)


def _note(trace: Trace | None, event: Started | Finished | Failed) -> None:
    """Keep the engine's times of a traced request."""
    if trace is not None and event.timeline is not None:
        trace.note(event.request_id, event.timeline)


def _texts(prompt: TextPrompt | ChatPrompt) -> list[str]:
    """Return what the caller wrote, piece by piece."""
    if isinstance(prompt, TextPrompt):
        return [prompt.text]
    return [
        value for message in prompt.messages for value in message.values() if isinstance(value, str)
    ]


def _nbytes(prompt: TextPrompt | ChatPrompt) -> int:
    return sum(len(text.encode()) for text in _texts(prompt))


def _max_tokens(wanted: int | None, prompt: Prompt, num_prompt: int, info: EngineInfo) -> int:
    """Return how many tokens may be generated; raises ContextLengthExceeded."""
    room = info.base.max_model_len - num_prompt
    is_chat = isinstance(prompt, ChatPrompt)
    if wanted is None and room >= 1:
        return room if is_chat else min(DEFAULT_COMPLETION_TOKENS, room)
    if wanted is None or wanted > room:
        raise _too_long(str(num_prompt), wanted or 1, prompt, info)
    return wanted


def _too_long(
    num_prompt: str, wanted: int, prompt: Prompt, info: EngineInfo
) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        f"the context is {info.base.max_model_len} tokens; the prompt has {num_prompt} and "
        f"max_tokens asks for {wanted}; shorten one of them",
        param="messages" if isinstance(prompt, ChatPrompt) else "prompt",
    )


def _check_ids(ids: Sequence[int], info: EngineInfo) -> None:
    for token_id in ids:
        if not 0 <= token_id < info.base.vocab_size:
            raise InvalidRequest(
                f"prompt holds token id {token_id}, expected 0 to {info.base.vocab_size - 1}",
                param="prompt",
            )


def _check_vocabulary(name: str, ids: Sequence[int], info: EngineInfo) -> None:
    for token_id in ids:
        if not 0 <= token_id < info.base.vocab_size:
            raise InvalidRequest(
                f"{name} holds token id {token_id}, expected 0 to {info.base.vocab_size - 1}",
                param=name,
            )
