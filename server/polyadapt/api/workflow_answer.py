"""Chats and completions whose `model` is a workflow: what they may ask, and their reply."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from polyadapt.api.access import Principal
from polyadapt.api.chat import Head
from polyadapt.api.collect import served_objects, usage_of
from polyadapt.api.replies import json_reply
from polyadapt.api.schemas.chat import AssistantMessage, ChatChoice, ChatReply, ChatRequest
from polyadapt.api.schemas.completions import CompletionChoice, CompletionReply, CompletionRequest
from polyadapt.api.schemas.generation import GenerationRequest
from polyadapt.api.schemas.workflows import WorkflowRun
from polyadapt.api.services import Services, principal_of
from polyadapt.api.stream import until_disconnect
from polyadapt.api.watch import GenerationWatch, describe
from polyadapt.errors import InvalidRequest, PolyadaptError, UnsupportedField
from polyadapt.tasks.text import TextPrompt
from polyadapt.tasks.workflows.library import Workflow
from polyadapt.tasks.workflows.runner import WorkflowRequest, WorkflowResult

_OWN = "of its members a request may choose max_tokens, seed and sampling alone"
_ONE = "a workflow gives one answer that several texts led to"
_WHOLE = "a workflow's answer is known when its last round has ended"
# Fields that cannot mean here what they mean elsewhere, why, and the values that mean nothing.
_REFUSED: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("stream", _WHOLE, (None, False)),
    ("n", _ONE, (None, 1)),
    ("best_of", _ONE, (None, 1)),
    ("logprobs", _ONE, (None, False)),
    ("top_logprobs", _ONE, (None,)),
    ("prompt_logprobs", _ONE, (None,)),
    ("return_token_ids", _ONE, (None, False)),
    ("echo", _ONE, (None, False)),
    ("adapters", "a workflow has its own adapters", (None,)),
    ("on_cold", "a workflow waits for its adapters", (None, "wait")),
    ("cold_timeout_ms", "a workflow waits for its adapters", (None,)),
    ("stop", _OWN, (None, [])),
    ("stop_token_ids", _OWN, (None, [])),
    ("ignore_eos", _OWN, (None, False)),
    ("min_tokens", _OWN, (None, 0)),
    ("logit_bias", _OWN, (None, {})),
)
_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


async def answer(
    request: Request,
    services: Services,
    body: ChatRequest | CompletionRequest,
    workflow: Workflow,
    head: Head,
) -> Response:
    """Run the workflow for a request and reply with its answer and how it came about.

    Raises UnsupportedField for what a workflow cannot do, and what a member failed with. When the
    caller goes away every member is cancelled.
    """
    _check(body, workflow)
    task = _workflow_request(body, workflow, head, principal_of(request))
    if request.state.trace is not None:
        task = replace(task, trace=request.state.trace)
    result = await _measured(request, services, task)
    usage = usage_of(result.used)
    run = WorkflowRun.of(workflow, result, usage)
    text = result.outcome.answer or ""
    about: dict[str, Any] = {
        "id": head.id,
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.system_fingerprint,
        "usage": usage,
        "adapters": served_objects(result.served),
        "workflow": run,
    }
    reply: ChatReply | CompletionReply
    if isinstance(body, ChatRequest):
        choice = ChatChoice(
            index=0, message=AssistantMessage(content=text), logprobs=None, finish_reason="stop"
        )
        reply = ChatReply(choices=[choice], **about)
    else:
        plain = CompletionChoice(index=0, text=text, logprobs=None, finish_reason="stop")
        reply = CompletionReply(choices=[plain], **about)
    digests = ",".join(served.adapter.digest for served in result.served)
    return json_reply(reply, headers={"x-adapter-digest": digests} if digests else {})


async def _measured(request: Request, services: Services, task: WorkflowRequest) -> WorkflowResult:
    """Run the workflow and count it, however it ends."""
    metrics, kind = services.metrics, task.workflow.definition.kind
    watches: list[GenerationWatch] = []
    request.state.about = lambda: describe(watches)

    def new_watch() -> GenerationWatch:
        name, trace = task.workflow.name, request.state.trace
        watches.append(GenerationWatch(metrics, name, trace, is_sample=True))
        return watches[-1]

    outcome = "failed"
    try:
        result = await until_disconnect(
            request.receive,
            services.workflow_runner.run(task, new_watch),
        )
        outcome = result.outcome.rule
    except (ClientDisconnect, asyncio.CancelledError):
        outcome = "cancelled"
        raise
    except PolyadaptError as error:
        metrics.failed_generations.labels(error.code).inc()
        raise
    finally:
        metrics.workflow_runs.labels(kind, outcome).inc()
    metrics.workflow_rounds.labels(kind).inc(result.outcome.num_rounds)
    return result


def _check(body: GenerationRequest, workflow: Workflow) -> None:
    """Raise UnsupportedField for the first field that a workflow cannot serve."""
    for name, why, harmless in _REFUSED:
        value = getattr(body, name, None)
        if not any(value == other and type(value) is type(other) for other in harmless):
            raise UnsupportedField(
                f"{name}: {workflow.name!r} is a workflow: {why}; leave {name} out",
                param=name,
            )


def _workflow_request(
    body: ChatRequest | CompletionRequest, workflow: Workflow, head: Head, caller: Principal
) -> WorkflowRequest:
    """Return what a request asks of a workflow; raises InvalidRequest unless it is one question."""
    earlier: tuple[dict[str, Any], ...] = ()
    if isinstance(body, ChatRequest):
        param = "messages"
        *turns, last = body.messages
        if last.role != "user":
            raise InvalidRequest(
                f"a workflow answers the last message, of role 'user'; its role is {last.role!r}",
                param=param,
            )
        question = last.content or ""
        earlier = tuple(turn.for_template() for turn in turns)
        max_tokens = body.max_completion_tokens or body.max_tokens
    else:
        param = "prompt"
        prompts = body.prompts
        if len(prompts) != 1 or not isinstance(prompts[0], TextPrompt):
            raise InvalidRequest(
                "a workflow puts the question into its own prompts; send one string", param=param
            )
        question = prompts[0].text
        max_tokens = body.max_tokens
    if not question.strip():
        raise InvalidRequest("the question is empty; send some text", param=param)
    return WorkflowRequest(
        id=head.id,
        tenant=caller.tenant,
        user=caller.user,
        workflow=workflow,
        question=question,
        param=param,
        earlier=earlier,
        sampling=dict(_given(body, max_tokens)),
        seed=body.unsigned_seed,
        cache_salt=body.cache_salt,
        priority=body.priority or 0,
        speculative_tokens=body.speculative_tokens,
    )


def _given(body: GenerationRequest, max_tokens: int | None) -> Iterator[tuple[str, float | int]]:
    """Yield the sampling that the request has values of its own for."""
    for name in _SAMPLING:
        if (value := getattr(body, name)) is not None:
            yield name, value
    if max_tokens is not None:
        yield "max_tokens", max_tokens
