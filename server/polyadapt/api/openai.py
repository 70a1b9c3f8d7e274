"""OpenAI's inference routes: chat completions, completions, models; and /tokenize, /detokenize."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Iterable
from dataclasses import replace
from typing import Annotated, Any, Protocol, TypeVar

from fastapi import APIRouter, Body, Depends, Path, Query, Request, Response
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from polyadapt.api import chat, completions, workflow_answer
from polyadapt.api.chat import ChatFormat, Head
from polyadapt.api.collect import Generation, collect
from polyadapt.api.completions import CompletionFormat
from polyadapt.api.replies import json_reply, page_of
from polyadapt.api.routing import add_route
from polyadapt.api.schemas.adapters import ModelList, ModelObject
from polyadapt.api.schemas.chat import ChatChunk, ChatReply, ChatRequest
from polyadapt.api.schemas.completions import CompletionReply, CompletionRequest
from polyadapt.api.schemas.tokens import (
    DetokenizeReply,
    DetokenizeRequest,
    TokenizeReply,
    TokenizeRequest,
)
from polyadapt.api.services import Services, principal_of, services_of
from polyadapt.api.stream import (
    DONE,
    EventStream,
    data_frame,
    disconnected,
    error_frame,
    until_disconnect,
)
from polyadapt.api.token_text import token_string
from polyadapt.api.watch import GenerationWatch
from polyadapt.errors import InternalError, InvalidRequest, PolyadaptError, UnsupportedField
from polyadapt.logs import fields
from polyadapt.tasks.model_name import AUTO
from polyadapt.tasks.sequence_text import TextDelta
from polyadapt.tasks.text import (
    Accepted,
    ChatPrompt,
    Completed,
    PromptScores,
    Queued,
    TextEvent,
    TextPrompt,
    TextRequest,
    TokenPrompt,
)
from polyadapt.tasks.workflows.library import Workflow
from polyadapt.types import AdapterId, EngineInfo, ServedAdapter
from polyadapt_store.manifest import AdapterRecord

logger = logging.getLogger(__name__)

ChunkT = TypeVar("ChunkT", bound=BaseModel)
Has = Annotated[Services, Depends(services_of)]
_MODEL_PAGE = 1000

_GENERATION_ERRORS = (404, 410, 429, 499, 504)
_DIGEST_HEADER = {
    "x-adapter-digest": {
        "schema": {"type": "string"},
        "description": "the digests of the adapters that answered, separated by commas, in the "
        "request's order; absent when the base did, and in a stream that had to begin before "
        "on_cold was decided (its last event says what was served)",
    }
}


class Format(Protocol[ChunkT]):
    """How one kind of request is answered; see ChatFormat and CompletionFormat."""

    def reply(self, accepted: Accepted, generation: Generation) -> BaseModel: ...

    def opening(self, accepted: Accepted) -> Iterable[ChunkT]: ...

    def scored(self, accepted: Accepted, scores: PromptScores) -> Iterable[ChunkT]: ...

    def plain(self, delta: TextDelta) -> bytes | None: ...

    def piece(self, delta: TextDelta) -> ChunkT | None: ...

    def usage(self, completed: Completed) -> ChunkT: ...

    def sign(
        self, chunk: ChunkT, accepted: Accepted, served: tuple[ServedAdapter, ...]
    ) -> None: ...


def add_routes(router: APIRouter) -> None:
    """Add this module's routes."""
    for path, endpoint, reply, chunk in (
        ("/v1/chat/completions", create_chat_completion, ChatReply, ChatChunk),
        ("/v1/completions", create_completion, CompletionReply, CompletionReply),
    ):
        add_route(
            router, "POST", path, endpoint,
            needs="infer", reply=reply, errors=_GENERATION_ERRORS, has_body=True,
            content={"text/event-stream": {"schema": {"type": "string", "description": (
                f"events whose data is a {chunk.__name__}, then [DONE]; or an `error` event"
            )}}},
            headers=_DIGEST_HEADER,
        )  # fmt: skip
    add_route(
        router, "GET", "/v1/models", list_models, needs="infer", reply=ModelList, errors=(400,)
    )
    add_route(
        router, "GET", "/v1/models/{model:path}", get_model,
        needs="infer", reply=ModelObject, errors=(404,),
    )  # fmt: skip
    add_route(
        router, "POST", "/tokenize", tokenize,
        needs="infer", reply=TokenizeReply, errors=(404,), has_body=True,
    )  # fmt: skip
    add_route(
        router, "POST", "/detokenize", detokenize,
        needs="infer", reply=DetokenizeReply, errors=(404,), has_body=True,
    )  # fmt: skip


async def create_chat_completion(
    request: Request, body: Annotated[ChatRequest, Body()], services: Has
) -> Response:
    """Continue a conversation; with `stream` the reply is server-sent events."""
    limits = services.config.limits
    if len(body.messages) > limits.max_messages:
        raise InvalidRequest(
            f"{len(body.messages)} messages, expected at most {limits.max_messages}",
            param="messages",
        )
    head = _head("chatcmpl", body.model, services)
    tenant = principal_of(request).tenant
    await services.directory.warm(tenant, body.model)
    workflow = services.workflows.find(tenant, body.model)
    if workflow is not None:
        _check_priority(body.priority or 0, services)
        return await workflow_answer.answer(request, services, body, workflow, head)
    task = chat.text_request(body, head.id, principal_of(request))
    form = ChatFormat(body, head, services.text.tokenizer)
    options = body.stream_options
    return await _answer(
        request, services, task, form, is_stream=bool(body.stream),
        has_usage=options is not None and options.include_usage,
    )  # fmt: skip


async def create_completion(
    request: Request, body: Annotated[CompletionRequest, Body()], services: Has
) -> Response:
    """Continue one or more prompts; with `stream` the reply is server-sent events."""
    limits = services.config.limits
    num_sequences = len(body.prompts) * (body.n or 1)
    if len(body.prompts) > limits.max_prompts:
        raise InvalidRequest(
            f"{len(body.prompts)} prompts, expected at most {limits.max_prompts}", param="prompt"
        )
    if num_sequences > limits.max_n:
        raise InvalidRequest(
            f"{len(body.prompts)} prompts with n {body.n} make {num_sequences} sequences, "
            f"expected at most {limits.max_n}",
            param="n",
        )
    head = _head("cmpl", body.model, services)
    tenant = principal_of(request).tenant
    await services.directory.warm(tenant, body.model)
    workflow = services.workflows.find(tenant, body.model)
    if workflow is not None:
        _check_priority(body.priority or 0, services)
        return await workflow_answer.answer(request, services, body, workflow, head)
    task = completions.text_request(body, head.id, principal_of(request))
    form = CompletionFormat(body, head, services.text.tokenizer)
    options = body.stream_options
    return await _answer(
        request, services, task, form, is_stream=bool(body.stream),
        has_usage=options is not None and options.include_usage,
    )  # fmt: skip


async def _answer(
    request: Request,
    services: Services,
    task: TextRequest,
    form: Format[Any],
    *,
    is_stream: bool,
    has_usage: bool,
) -> Response:
    """Generate and answer, whole or as a stream; what fails before the first event has a status."""
    if task.n > services.config.limits.max_n:
        raise InvalidRequest(
            f"n is {task.n}, expected at most {services.config.limits.max_n}", param="n"
        )
    trace = request.state.trace
    if trace is not None:
        task = replace(task, trace=trace)
    watch = GenerationWatch(services.metrics, task.model, trace)
    request.state.about = watch.about
    _check_priority(task.priority, services)
    logger.info("generation %s begins", task.id, extra=fields(generation=task.id))
    events = _watched(services, task, watch)
    try:
        if task.model == AUTO:  # to choose takes a while, in which the caller may go
            accepted = await until_disconnect(request.receive, anext(events))
        else:
            accepted = await anext(events)
        assert isinstance(accepted, Accepted)
        if not is_stream:
            generation = await until_disconnect(request.receive, collect(events, accepted, task.n))
            headers = _digest_header(served.adapter for served in generation.served)
            return json_reply(form.reply(accepted, generation), headers=headers)
        first = await _first_event(request, services, events)
        headers = _digest_header(_answering(accepted, first))
    except BaseException:
        await events.aclose()
        raise
    frames = _frames(task, form, accepted, events, first, has_usage=has_usage)
    return EventStream(frames, heartbeat_s=services.config.server.heartbeat_s, headers=headers)


def _check_priority(priority: int, services: Services) -> None:
    least = services.config.limits.min_priority
    if priority < least:
        raise InvalidRequest(
            f"priority is {priority}, expected at least {least} on this server", param="priority"
        )


async def _first_event(
    request: Request, services: Services, events: AsyncGenerator[TextEvent, None]
) -> asyncio.Task[TextEvent]:
    """Wait for the engine's first event, so that a refusal has its own status.

    A request that queues for longer than a heartbeat gets its stream opened meanwhile. Raises what
    the engine raised, or ClientDisconnect.
    """
    first = asyncio.ensure_future(anext(events))
    gone = asyncio.create_task(disconnected(request.receive))
    try:
        await asyncio.wait(
            {first, gone},
            timeout=services.config.server.heartbeat_s,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if first.done():
            first.result()
        elif gone.done():
            raise ClientDisconnect
    except BaseException:
        await _cancel(first)
        raise
    finally:
        await _cancel(gone)
    return first


async def _frames(
    task: TextRequest,
    form: Format[Any],
    accepted: Accepted,
    events: AsyncGenerator[TextEvent, None],
    first: asyncio.Task[TextEvent],
    *,
    has_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """Yield the stream's events; a failure ends it with an `error` event and no [DONE]."""
    num_open = task.n * len(accepted.prompt_ids)
    served: tuple[ServedAdapter, ...] = ()
    try:
        for chunk in form.opening(accepted):
            yield data_frame(chunk.model_dump_json())
        event = await first
        while True:
            if isinstance(event, TextDelta):
                frame = form.plain(event)
                if frame is not None:
                    yield frame
                    event = await anext(events)
                    continue
            chunks: list[Any] = []
            if isinstance(event, Queued):
                served = event.served
            elif isinstance(event, PromptScores):
                chunks += form.scored(accepted, event)
            elif isinstance(event, TextDelta):
                chunk = form.piece(event)
                chunks += [] if chunk is None else [chunk]
                num_open -= event.finish_reason is not None
                if num_open == 0 and not has_usage:
                    form.sign(chunks[-1], accepted, served)
            elif isinstance(event, Completed):
                if has_usage:
                    last = form.usage(event)
                    form.sign(last, accepted, served)
                    yield data_frame(last.model_dump_json())
                yield DONE
                return
            for chunk in chunks:
                yield data_frame(chunk.model_dump_json())
            event = await anext(events)
    except PolyadaptError as error:
        logger.warning("request %s failed in its stream: %s", task.id, error.message)
        yield error_frame(error)
    except Exception:
        logger.exception("request %s broke in its stream", task.id)
        yield error_frame(InternalError("an internal error ended this request"))
    finally:
        await _cancel(first)
        await events.aclose()


async def _watched(
    services: Services, task: TextRequest, watch: GenerationWatch
) -> AsyncGenerator[TextEvent, None]:
    """Pass the task's events on and count them."""
    async with contextlib.aclosing(services.auto.generate(task)) as events:
        with watch as see:
            async for event in events:
                see(event)
                yield event


async def list_models(
    request: Request,
    services: Has,
    limit: Annotated[int | None, Query(ge=1, le=10_000)] = None,
    after: Annotated[str | None, Query(max_length=400)] = None,
) -> Response:
    """List the base model, its adapters and the workflows; without `limit` all of them."""
    info = services.text.info()
    tenant = principal_of(request).tenant

    def read() -> list[AdapterRecord]:
        records: list[AdapterRecord] = []
        last: str | None = None
        while True:
            page = services.store.list(tenant, limit=_MODEL_PAGE, after=last)
            records += [r for r in page.records if r.base_digest == info.base.digest]
            if not page.has_more:
                return records
            last = page.records[-1].id

    models = [_base_object(services, info)]
    models += [_adapter_object(record, info) for record in await asyncio.to_thread(read)]
    workflows = await services.workflows.list(tenant)
    models += [_workflow_object(workflow, info) for workflow in workflows]
    data, has_more = page_of(models, lambda model: model.id, limit=limit, after=after)
    return json_reply(
        ModelList(
            data=list(data),
            has_more=has_more,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
        )
    )


async def get_model(
    request: Request, services: Has, model: Annotated[str, Path(max_length=400)]
) -> Response:
    """Return one model by any name that `model` accepts."""
    info = services.text.info()
    tenant = principal_of(request).tenant
    await services.directory.warm(tenant, model)
    if (workflow := services.workflows.find(tenant, model)) is not None:
        return json_reply(_workflow_object(workflow, info).model_copy(update={"id": model}))
    record = services.directory.find(tenant, model)
    if record is None:
        return json_reply(_base_object(services, info))
    found = _adapter_object(record, info)
    return json_reply(found.model_copy(update={"id": model}))


async def tokenize(
    request: Request, body: Annotated[TokenizeRequest, Body()], services: Has
) -> Response:
    """Return the ids of a text or of a rendered conversation."""
    info = services.text.info()
    if body.model is not None:
        await _check_tokens_of(services, principal_of(request).tenant, body.model)
    if body.messages is not None:
        turns = tuple(message.for_template() for message in body.messages)
        ids = await services.text.encode(
            ChatPrompt(turns), add_generation_prompt=body.add_generation_prompt
        )
    else:
        ids = await services.text.encode(
            TextPrompt(body.prompt or ""), add_special_tokens=body.add_special_tokens is not False
        )
    tokenizer = services.text.tokenizer
    strings: list[str] | None = None
    if body.return_token_strs:
        strings = await asyncio.to_thread(lambda: [token_string(tokenizer, i) for i in ids])
    return json_reply(
        TokenizeReply(
            count=len(ids),
            max_model_len=info.base.max_model_len,
            tokens=list(ids),
            token_strs=strings,
        )
    )


async def detokenize(
    request: Request, body: Annotated[DetokenizeRequest, Body()], services: Has
) -> Response:
    """Return the text of ids, with special tokens shown."""
    if body.model is not None:
        await _check_tokens_of(services, principal_of(request).tenant, body.model)
    try:
        ids = await services.text.encode(TokenPrompt(tuple(body.tokens)))
    except InvalidRequest as error:
        raise InvalidRequest(error.message, param="tokens") from None
    text = await asyncio.to_thread(services.text.tokenizer.decode, ids, skip_special=False)
    return json_reply(DetokenizeReply(prompt=text))


async def _check_tokens_of(services: Services, tenant: str, model: str) -> None:
    """Raise ModelNotFound for what there is not, UnsupportedField for what reads no tokens."""
    await services.directory.warm(tenant, model)
    if services.workflows.find(tenant, model) is not None:
        raise UnsupportedField(
            f"{model[:200]!r} is a workflow, which writes its own prompts; name the base or an "
            "adapter",
            param="model",
        )
    services.directory.find(tenant, model)


def _head(prefix: str, model: str, services: Services) -> Head:
    info = services.text.info()
    return Head(
        id=f"{prefix}-{secrets.token_hex(12)}",
        created=int(time.time()),
        model=model,
        system_fingerprint="fp_" + info.base.digest.removeprefix("sha256:")[:12],
    )


def _answering(accepted: Accepted, first: asyncio.Task[TextEvent]) -> Iterable[AdapterId]:
    """Return the adapters that answer a stream; none while on_cold leaves that open."""
    if first.done() and isinstance(event := first.result(), Queued):
        return [served.adapter for served in event.served]
    lease = accepted.lease
    return [a.adapter for a in lease.applied] if lease.when_cold.instead is None else []


def _digest_header(adapters: Iterable[AdapterId]) -> dict[str, str]:
    digests = [adapter.digest for adapter in adapters]
    return {"x-adapter-digest": ",".join(digests)} if digests else {}


def _base_object(services: Services, info: EngineInfo) -> ModelObject:
    return ModelObject(
        id=info.base.name,
        created=services.started,
        root=info.base.name,
        parent=None,
        max_model_len=info.base.max_model_len,
    )


def _adapter_object(record: AdapterRecord, info: EngineInfo) -> ModelObject:
    return ModelObject(
        id=record.name,
        created=record.created,
        root=info.base.name,
        parent=info.base.name,
        max_model_len=info.base.max_model_len,
    )


def _workflow_object(workflow: Workflow, info: EngineInfo) -> ModelObject:
    return ModelObject(
        id=workflow.name,
        created=workflow.record.created,
        root=info.base.name,
        parent=info.base.name,
        max_model_len=info.base.max_model_len,
        workflow=workflow.definition.kind,
    )


async def _cancel(task: asyncio.Task[Any]) -> None:
    """End a task and wait for it; whoever needs its error has looked."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()
