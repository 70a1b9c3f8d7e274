"""An EngineClient without a model: scripted tokens, one step at a time, and scripted failures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace

from polyadapt.errors import AdapterCold, AdapterDeleted, EngineUnavailable, PolyadaptError
from polyadapt.types import (
    AdapterId,
    BaseSpec,
    Embedded,
    EngineInfo,
    EngineStats,
    Event,
    Failed,
    Finished,
    PromptScored,
    Request,
    Residency,
    ServedAdapter,
    Started,
    TokenLogprob,
    Tokens,
)

EOS = 257  # see tests/support/byte_tokenizer.py
BASE_DIGEST = "sha256:" + "b" * 64

# The ids that sequence `index` of a request generates; EOS ends it when it fits into max_tokens.
Reply = Callable[[Request, int], Sequence[int]]


def say(text: str) -> Reply:
    """Return a reply that says `text` in every sequence."""
    return lambda request, index: [*text.encode(), EOS]


def name_the_adapter(request: Request, index: int) -> Sequence[int]:
    """Say which adapters answer, and for n > 1 which sequence it is."""
    who = "+".join(applied.adapter.name for applied in request.adapters) or "base"
    return [*f"I am {who} {index}.".encode(), EOS]


def letters(request: Request) -> Sequence[float]:
    """Embed a prompt of bytes as how often each letter of a to z is in it, and a little more."""
    counts = [request.prompt_ids.count(ord("a") + i) for i in range(26)]
    return [1.0, *(count / len(request.prompt_ids) for count in counts)]


def make_info(*, max_model_len: int = 256, name: str = "fake-base") -> EngineInfo:
    """Return what the fake says of itself."""
    return EngineInfo(
        base=BaseSpec(
            name=name,
            digest=BASE_DIGEST,
            architecture="FakeForCausalLM",
            vocab_size=260,
            max_model_len=max_model_len,
            is_tied=True,
            embedding_path="embed",
            head_path="head",
            sites=(),
        ),
        eos_token_ids=(EOS,),
        device="cpu",
        dtype="float32",
        num_pages=64,
        page_size=16,
        max_num_seqs=8,
        max_waiting=16,
        adapter_bytes=1 << 20,
        strategy="fake",
    )


@dataclass
class FakeEngine:
    """Generates `reply` token by token; every step waits for `gate` when there is one."""

    reply: Reply = name_the_adapter
    embedding: Callable[[Request], Sequence[float]] = letters
    model: EngineInfo = field(default_factory=make_info)
    tokens_per_event: int = 1  # more, as accepted drafts bring
    gate: asyncio.Semaphore | None = None  # one permit a step
    num_cached_tokens: int = 0  # that every prompt finds
    cold: set[str] = field(default_factory=set)  # digests whose loading takes for ever
    refusal: PolyadaptError | None = None  # raised by the first step of submit
    # After so many tokens: code, message and, if any, param.
    failure: tuple[int, str, str] | tuple[int, str, str, str] | None = None
    crash: Exception | None = None  # a bug in the engine's client
    prepare_error: PolyadaptError | None = None
    is_ready: bool = False
    is_alive: bool = True
    num_restarts: int = 0
    info: EngineInfo | None = None
    requests: list[Request] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    prepared: list[AdapterId] = field(default_factory=list)
    unloaded: list[str] = field(default_factory=list)
    running: dict[str, Request] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)
    resident: dict[str, Residency] = field(default_factory=dict)
    num_stops: int = 0
    routing: dict[str, tuple[float, ...]] = field(default_factory=dict)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def start(self) -> EngineInfo:
        self.info = self.model
        self.is_ready = True
        return self.model

    async def stop(self) -> None:
        self.is_ready = False
        self.num_stops += 1
        self.stopped.set()

    async def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        if self.refusal is not None:
            raise self.refusal
        if not self.is_ready:
            raise EngineUnavailable("the fake engine is not started")
        self.requests.append(request)
        self.running[request.id] = request
        is_over = False
        try:
            async for event in self._generate(request):
                is_over = isinstance(event, Finished | Failed)
                yield event
        except EngineUnavailable as error:
            is_over = True
            yield Failed(request.id, error.code, error.message)
        finally:
            del self.running[request.id]
            if not is_over:
                self.cancelled.append(request.id)
            async with self.changed:
                self.changed.notify_all()

    async def _generate(self, request: Request) -> AsyncGenerator[Event, None]:
        await self._step()
        if self.cold & {applied.adapter.digest for applied in request.adapters}:
            if request.when_cold.instead is None:
                yield Failed(request.id, AdapterCold.code, "it is being loaded")
                return
            request = replace(request, adapters=request.when_cold.instead)
        digests = {applied.adapter.digest for applied in request.adapters}
        for applied in request.adapters:
            self._touch(applied.adapter.digest)
        served = tuple(
            ServedAdapter(
                a.adapter, "device", 1.5, a.is_mandatory,
                is_approximate="frozen_after" in dict(a.options),
            )
            for a in request.adapters
        )  # fmt: skip
        yield Started(request.id, served, self.num_cached_tokens)
        if request.kind == "embed":
            if self.failure is not None:
                yield Failed(request.id, *self.failure[1:])
                return
            vector = tuple(map(float, self.embedding(request)))
            yield Embedded(request.id, vector, len(request.prompt_ids))
            yield Finished(request.id)
            return
        if request.sampling.num_prompt_logprobs is not None:
            for index in range(request.n):
                yield PromptScored(
                    request.id, index, tuple(_score(i, 1) for i in request.prompt_ids[1:])
                )
        replies = [list(self.reply(request, index)) for index in range(request.n)]
        limit = request.sampling.max_tokens
        replies = [reply[:limit] for reply in replies]
        size = self.tokens_per_event
        for position in range(0, max(map(len, replies)), size):
            if self.failure is not None and position == self.failure[0]:
                yield Failed(request.id, *self.failure[1:])
                return
            if self.crash is not None:
                raise self.crash
            await self._step()
            if digests & self.deleted:
                yield Failed(request.id, AdapterDeleted.code, "the adapter was deleted")
                return
            for index, reply in enumerate(replies):
                if position >= len(reply):
                    continue
                tokens = tuple(reply[position : position + size])
                is_last = position + size >= len(reply)
                is_eos = tokens[-1] == EOS
                k = request.sampling.num_logprobs
                yield Tokens(
                    request.id,
                    index,
                    tokens,
                    () if k is None else tuple(_score(token, k) for token in tokens),
                    ("stop" if is_eos else "length") if is_last else None,
                    EOS if is_eos else None,
                )
        yield Finished(request.id)

    async def _step(self) -> None:
        """Wait for the next step; raises EngineUnavailable when the engine is stopped instead."""
        if self.gate is None:
            await asyncio.sleep(0)
            return
        step = asyncio.ensure_future(self.gate.acquire())
        stop = asyncio.ensure_future(self.stopped.wait())
        try:
            await asyncio.wait({step, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not step.done():
                raise EngineUnavailable("the server is shutting down")
        finally:
            step.cancel()
            stop.cancel()

    async def until_idle(self) -> None:
        """Return when no request runs."""
        async with self.changed:
            await self.changed.wait_for(lambda: not self.running)

    async def prepare_adapter(self, adapter: AdapterId) -> Residency:
        if self.prepare_error is not None:
            raise self.prepare_error
        self.prepared.append(adapter)
        return Residency(adapter.digest, "host", nbytes=100)

    async def load_adapter(self, adapter: AdapterId, *, is_pinned: bool) -> Residency:
        self._touch(adapter.digest)
        self.resident[adapter.digest] = replace(self.resident[adapter.digest], is_pinned=is_pinned)
        return self.resident[adapter.digest]

    async def unload_adapter(self, digest: str) -> None:
        self.unloaded.append(digest)
        self.resident.pop(digest, None)

    async def cancel_adapter(self, digest: str) -> int:
        self.deleted.add(digest)
        return sum(
            any(applied.adapter.digest == digest for applied in request.adapters)
            for request in self.running.values()
        )

    def stats(self) -> EngineStats:
        return EngineStats(
            num_steps=7,
            num_running=len(self.running),
            num_waiting=2,
            num_used_pages=16,
            num_cached_pages=8,
            num_pages=64,
            adapter_bytes_used=100 * len(self.resident),
            counters={"preemptions": 3},
            routing=self.routing,
        )

    def residencies(self) -> dict[str, Residency]:
        return self.resident

    def _touch(self, digest: str) -> None:
        self.resident.setdefault(
            digest, Residency(digest, "device", last_used=1_700_000_000.0, nbytes=100)
        )


def _score(token_id: int, k: int) -> TokenLogprob:
    top = tuple((i, -0.5 - rank) for rank, i in enumerate([token_id, 65, 66][:k]))
    return TokenLogprob(token_id, -0.5, top)
