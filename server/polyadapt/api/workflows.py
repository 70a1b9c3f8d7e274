"""Routes about workflows: make, replace, look, delete. api/workflow_answer.py runs them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Depends, Path, Query, Request, Response

from polyadapt.api.access import RequiredScope
from polyadapt.api.idempotency import once
from polyadapt.api.replies import json_reply, page_of
from polyadapt.api.routing import add_route
from polyadapt.api.schemas.workflows import (
    DeletedWorkflow,
    NewWorkflow,
    WorkflowBody,
    WorkflowList,
    WorkflowObject,
)
from polyadapt.api.services import Services, principal_of, services_of
from polyadapt_store.manifest import NAME_PATTERN

Has = Annotated[Services, Depends(services_of)]
WorkflowPath = Annotated[str, Path(max_length=200, description="a workflow's name")]
NewWorkflowPath = Annotated[
    str, Path(max_length=128, pattern=NAME_PATTERN, description="a workflow's name")
]


def add_routes(router: APIRouter) -> None:
    """Add this module's routes."""
    write: RequiredScope = "adapters:write"
    read: RequiredScope = "adapters:read"
    add_route(
        router, "POST", "/v1/workflows", create_workflow,
        needs=write, reply=WorkflowObject, status=201, errors=(404, 409), has_body=True,
    )  # fmt: skip
    add_route(
        router, "GET", "/v1/workflows", list_workflows,
        needs=read, reply=WorkflowList, errors=(400,),
    )  # fmt: skip
    add_route(
        router, "GET", "/v1/workflows/{name}", get_workflow,
        needs=read, reply=WorkflowObject, errors=(400, 404),
    )  # fmt: skip
    add_route(
        router, "PUT", "/v1/workflows/{name}", put_workflow,
        needs=write, reply=WorkflowObject, also=201, errors=(404, 409), has_body=True,
    )  # fmt: skip
    add_route(
        router, "DELETE", "/v1/workflows/{name}", delete_workflow,
        needs=write, reply=DeletedWorkflow, errors=(400, 404),
    )  # fmt: skip


async def create_workflow(
    request: Request, body: Annotated[NewWorkflow, Body()], services: Has
) -> Response:
    """Make a workflow under a name that nothing has; its members' adapters must be there."""

    async def make() -> Response:
        workflow, _ = await services.workflows.put(
            principal_of(request).tenant, body.name, body.definition, body.description,
            may_replace=False, user=principal_of(request).user,
        )  # fmt: skip
        return json_reply(WorkflowObject.of(workflow), status=201)

    async def fingerprint() -> str:
        return body.model_dump_json()

    return await once(request, services, fingerprint, make)


async def put_workflow(
    request: Request, body: Annotated[WorkflowBody, Body()], services: Has, name: NewWorkflowPath
) -> Response:
    """Make a workflow (201) or replace the one of this name (200); runs under way go on as they
    began.
    """
    workflow, is_new = await services.workflows.put(
        principal_of(request).tenant, name, body.definition, body.description,
        may_replace=True, user=principal_of(request).user,
    )  # fmt: skip
    return json_reply(WorkflowObject.of(workflow), status=201 if is_new else 200)


async def list_workflows(
    request: Request,
    services: Has,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    after: Annotated[str | None, Query(max_length=200)] = None,
) -> Response:
    """List the workflows that the caller may use, by name."""
    found = await services.workflows.list(principal_of(request).tenant)
    data, has_more = page_of(found, lambda item: item.record.id, limit=limit, after=after)
    return json_reply(
        WorkflowList(
            data=[WorkflowObject.of(workflow) for workflow in data],
            has_more=has_more,
            first_id=data[0].record.id if data else None,
            last_id=data[-1].record.id if data else None,
        )
    )


async def get_workflow(request: Request, services: Has, name: WorkflowPath) -> Response:
    """Return a workflow."""
    tenant = principal_of(request).tenant
    await services.directory.warm(tenant, name)
    workflow = services.workflows.get(tenant, name)
    return json_reply(WorkflowObject.of(workflow))


async def delete_workflow(request: Request, services: Has, name: WorkflowPath) -> Response:
    """Delete a workflow; runs under way go on to their end, and no adapter is touched."""
    await services.workflows.delete(principal_of(request).tenant, name)
    return json_reply(DeletedWorkflow(name=name))
