"""The workflow resource on the wire, and what a reply that a workflow made says of its run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from polyadapt.api.schemas.base import Body, Reply, Usage
from polyadapt.tasks.workflows.base import Rule, Sample
from polyadapt.tasks.workflows.kinds import AnyDefinition
from polyadapt.tasks.workflows.library import Workflow
from polyadapt.tasks.workflows.runner import WorkflowResult
from polyadapt_store.manifest import NAME_PATTERN

_MAX_DESCRIPTION = 4096


class WorkflowBody(Body):
    """What a workflow does; what is left out gets its default now, and keeps it."""

    definition: AnyDefinition
    description: str = Field("", max_length=_MAX_DESCRIPTION)


class NewWorkflow(WorkflowBody):
    """A workflow to make."""

    name: str = Field(
        pattern=NAME_PATTERN, description="what `model` will call it; no adapter's, nor the base's"
    )


class WorkflowObject(Reply):
    """One workflow; `definition` can be sent back as it is."""

    id: str
    object: Literal["workflow"] = "workflow"
    name: str
    kind: str
    version: int
    definition: AnyDefinition
    description: str
    tenant: str
    created: int
    updated: int

    @classmethod
    def of(cls, workflow: Workflow) -> WorkflowObject:
        """Return the wire form of a workflow."""
        record = workflow.record
        return cls(
            id=record.id,
            name=record.name,
            kind=workflow.definition.kind,
            version=record.version,
            definition=workflow.definition,
            description=record.description,
            tenant=record.tenant,
            created=record.created,
            updated=record.updated,
        )


class WorkflowList(Reply):
    """One page of workflows by name; the next begins `after` `last_id`."""

    object: Literal["list"] = "list"
    data: list[WorkflowObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class DeletedWorkflow(Reply):
    """A workflow that is gone."""

    name: str
    object: Literal["workflow.deleted"] = "workflow.deleted"
    deleted: Literal[True] = True


class TraceEntry(Reply):
    """One sample of a run. The same prompt with this `seed` and `adapter` gives it again."""

    round: int
    role: str
    adapter: str | None = Field(description="name@version; null is the base")
    text: str
    answer: str | None = Field(description="null where none was looked for, or none was found")
    tokens: int = Field(description="that were generated")
    prompt_tokens: int
    finish_reason: Literal["stop", "length"]
    seed: int

    @classmethod
    def of(cls, sample: Sample) -> TraceEntry:
        """Return the wire form of a sample."""
        return cls(
            round=sample.round,
            role=sample.role,
            adapter=sample.adapter,
            text=sample.text,
            answer=sample.answer,
            tokens=sample.num_tokens,
            prompt_tokens=sample.num_prompt_tokens,
            finish_reason=sample.finish_reason,
            seed=sample.seed,
        )


class WorkflowRun(Reply):
    """How a workflow came to its answer."""

    name: str
    kind: str
    version: int
    answer: str | None = Field(description="null when no member gave one")
    agreed: bool
    rule: Rule = Field(
        description="how the answer was chosen: the members agreed, most of them said so although "
        "they never agreed, or there was no answer"
    )
    candidates: list[str] = Field(
        description="the answers that the rule could not tell apart, the one that was taken first; "
        "more than one is a tie"
    )
    rounds: int
    trace: list[TraceEntry]
    usage: Usage = Field(description="the tokens of all samples")

    @classmethod
    def of(cls, workflow: Workflow, result: WorkflowResult, usage: Usage) -> WorkflowRun:
        """Return the wire form of a result."""
        outcome = result.outcome
        return cls(
            name=workflow.name,
            kind=workflow.definition.kind,
            version=workflow.record.version,
            answer=outcome.answer,
            agreed=outcome.agreed,
            rule=outcome.rule,
            candidates=list(outcome.candidates),
            rounds=outcome.num_rounds,
            trace=[TraceEntry.of(sample) for sample in result.trace],
            usage=usage,
        )
