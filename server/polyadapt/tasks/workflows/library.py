"""Which workflows there are: named, kept in the store, read once and then in memory.

A tenant sees its own workflows and the shared ones, as it does adapters: its own names, of either,
hide shared ones. Knows no engine and no HTTP. Lives on one event loop; memory is what the store
said at the last write that was seen.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from pydantic import ValidationError

from polyadapt.errors import Conflict, ModelNotFound, NotFound, PolyadaptError, by_code
from polyadapt.tasks.directory import AdapterDirectory, AdapterRef, Lease
from polyadapt.tasks.model_name import AUTO, split_base
from polyadapt.tasks.workflows.base import Member
from polyadapt.tasks.workflows.kinds import AnyDefinition, stored_definition
from polyadapt_store.registry import SHARED_TENANT
from polyadapt_store.workflows import WorkflowRecord

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Shelf(Protocol):
    """What this needs of polyadapt_store.WorkflowShelf."""

    def put(
        self, tenant: str, name: str, definition: str, description: str = "", *, may_replace: bool
    ) -> tuple[WorkflowRecord, bool]: ...

    def delete(self, tenant: str, name: str) -> WorkflowRecord: ...

    def all(self) -> tuple[WorkflowRecord, ...]: ...


@dataclass(frozen=True, slots=True)
class Workflow:
    """One workflow that can run."""

    record: WorkflowRecord
    definition: AnyDefinition

    @property
    def name(self) -> str:
        """What `model` calls it."""
        return self.record.name


class WorkflowLibrary:
    """Owns the index of all workflows."""

    def __init__(self, shelf: Shelf, directory: AdapterDirectory) -> None:
        self._shelf = shelf
        self._directory = directory
        self._records: dict[tuple[str, str], WorkflowRecord] = {}
        self._definitions: dict[str, AnyDefinition] = {}  # by record id; not of unreadable ones
        self._writing = asyncio.Lock()
        self._writes: set[asyncio.Task[object]] = set()

    async def read(self) -> int:
        """Learn which workflows there are, at the start and when others have written; return how
        many.
        """
        async with self._writing:
            found = await asyncio.to_thread(self._shelf.all)
            self._records, self._definitions = {}, {}
            for record in found:
                self._remember(record)
        return len(self._records)

    # ----------------------------------------------------------------------------- look
    def find(self, tenant: str, model: str) -> Workflow | None:
        """Return the workflow that `model` names, `name` or `base:name`; None for anything else.

        Raises ModelNotFound for one that another release stored and this one cannot read.
        """
        name = split_base(model, self._directory.base_name)
        record = None if name is None else self._visible(tenant, name)
        return None if record is None else self._readable(record)

    def get(self, tenant: str, name: str) -> Workflow:
        """Return a workflow by its name; raises NotFound, and ModelNotFound as `find` does."""
        record = self._visible(tenant, name)
        if record is None:
            raise NotFound(f"no workflow {name[:200]!r}; GET /v1/workflows lists what there is")
        return self._readable(record)

    async def list(self, tenant: str) -> tuple[Workflow, ...]:
        """Return every workflow that the tenant sees and that can run, by name."""
        for name in [name for owner, name in self._records if owner == SHARED_TENANT]:
            await self._directory.warm(tenant, name)
        names = {name for owner, name in self._records if owner in (tenant, SHARED_TENANT)}
        records = [self._visible(tenant, name) for name in sorted(names)]
        return tuple(
            Workflow(record, self._definitions[record.id])
            for record in records
            if record is not None and record.id in self._definitions
        )

    # ----------------------------------------------------------------------------- change
    async def put(
        self,
        tenant: str,
        name: str,
        definition: AnyDefinition,
        description: str = "",
        *,
        may_replace: bool,
        user: str | None = None,
    ) -> tuple[Workflow, bool]:
        """Store a workflow; return it and whether its name is new.

        Raises Conflict when the name is the base's, `auto`, an adapter's, or a workflow's that may
        not be replaced, and ModelNotFound for a member's adapter that is not there.
        """
        if name == self._directory.base_name:
            raise Conflict(f"{name!r} is the name of the base model; choose another", param="name")
        if name == AUTO:
            raise Conflict(
                f"{name!r} as a model asks for a choice among adapters; choose another",
                param="name",
            )
        await self.warm(tenant, definition.members.values(), user)
        for role, member in definition.members.items():
            param = f"definition.{role}.adapter"
            _lease(self._directory, tenant, role, member, param, user).release()

        def store() -> tuple[WorkflowRecord, bool]:
            text = definition.model_dump_json()
            return self._shelf.put(tenant, name, text, description, may_replace=may_replace)

        async def write() -> tuple[Workflow, bool]:
            record, is_new = await asyncio.to_thread(store)
            self._records[tenant, name] = record
            self._definitions[record.id] = definition
            return Workflow(record, definition), is_new

        return await self._write(write)

    async def delete(self, tenant: str, name: str) -> None:
        """Delete a workflow of the tenant's own; runs that have begun go on. Raises NotFound."""

        async def write() -> None:
            record = await asyncio.to_thread(self._shelf.delete, tenant, name)
            # Another server's of the last second is not known here.
            self._records.pop((tenant, name), None)
            self._definitions.pop(record.id, None)

        await self._write(write)

    async def close(self) -> None:
        """Wait for the changes that are being written."""
        if self._writes:
            await asyncio.wait(self._writes)

    async def warm(self, tenant: str, members: Iterable[Member], user: str | None) -> None:
        """Read what `hold` of these goes by off the event loop, see AdapterDirectory."""
        for member in members:
            await self._directory.warm(tenant, self._directory.base_name, _refs(member), user=user)

    def hold(self, tenant: str, role: str, member: Member, user: str | None = None) -> Lease:
        """Resolve a member's adapter and count its use; raises ModelNotFound, naming the role."""
        return _lease(self._directory, tenant, role, member, "model", user)

    async def _write(self, write: Callable[[], Awaitable[T]]) -> T:
        """Carry a change out to its end, one at a time, even if the caller goes away meanwhile."""

        async def guarded() -> T:
            async with self._writing:
                return await write()

        task = asyncio.create_task(guarded())
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        return await asyncio.shield(task)

    def _visible(self, tenant: str, name: str) -> WorkflowRecord | None:
        if (own := self._records.get((tenant, name))) is not None:
            return own
        shared = self._records.get((SHARED_TENANT, name))
        return None if shared is None or self._directory.owns(tenant, name) else shared

    def _readable(self, record: WorkflowRecord) -> Workflow:
        definition = self._definitions.get(record.id)
        if definition is None:
            raise ModelNotFound(
                f"the workflow {record.name!r} was stored by another release, and this one cannot "
                f"read it; PUT or DELETE /v1/workflows/{record.name}",
                param="model",
            )
        return Workflow(record, definition)

    def _remember(self, record: WorkflowRecord) -> None:
        self._records[record.tenant, record.name] = record
        try:
            self._definitions[record.id] = stored_definition.validate_json(record.definition)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            logger.error("the workflow %s cannot be read: %s: %s", record.name, where, first["msg"])


def _lease(
    directory: AdapterDirectory,
    tenant: str,
    role: str,
    member: Member,
    param: str,
    user: str | None,
) -> Lease:
    try:
        return directory.acquire(tenant, directory.base_name, _refs(member), user=user)
    except PolyadaptError as error:
        found = by_code(error.code, f"the workflow's {role}: {error.message}", param)
        raise found from None


def _refs(member: Member) -> tuple[AdapterRef, ...]:
    return () if member.adapter is None else (AdapterRef(member.adapter),)
