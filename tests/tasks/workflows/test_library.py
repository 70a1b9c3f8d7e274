"""Which workflow a name stands for: tenants, clashes, changes, and what another release stored."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.fake_engine import FakeEngine
from tests.tasks.test_directory import Judge, files, upload

from polyadapt.errors import Conflict, ModelNotFound, NotFound
from polyadapt.tasks.directory import AdapterDirectory
from polyadapt.tasks.workflows.kinds import AnyDefinition, stored_definition
from polyadapt.tasks.workflows.library import WorkflowLibrary
from polyadapt_store.store import AdapterStore
from polyadapt_store.workflows import WorkflowRecord, WorkflowShelf

pytestmark = pytest.mark.anyio
TENANT = "default"


def vote(adapter: str | None = None, **fields: Any) -> AnyDefinition:
    return stored_definition.validate_python(
        {"kind": "self_consistency", "reasoner": {"adapter": adapter}, **fields}
    )


class Bench:
    """A library and everything under it."""

    def __init__(self, root: Path) -> None:
        self.engine = FakeEngine()
        self.store = AdapterStore(root / "store", Judge())
        self.directory = AdapterDirectory(self.store, self.engine)
        self.library = WorkflowLibrary(self.store.workflows, self.directory)

    async def put(self, name: str, definition: AnyDefinition | None = None, **options: Any) -> None:
        options = {"tenant": TENANT, "may_replace": False} | options
        await self.library.put(options.pop("tenant"), name, definition or vote(), **options)

    async def names(self, tenant: str = TENANT) -> list[str]:
        return [workflow.name for workflow in await self.library.list(tenant)]


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    await made.engine.start()
    with made.store:
        yield made
        made.directory.check_integrity()


async def test_a_workflow_is_found_by_its_name_and_behind_the_base(bench: Bench) -> None:
    await bench.put("solver")
    for model in ("solver", "fake-base:solver", "fake-base::solver"):
        found = bench.library.find(TENANT, model)
        assert found is not None
        assert (found.name, found.definition) == ("solver", vote())
    for model in ("fake-base", "other", "solver@1", "", "fake-base:other"):
        assert bench.library.find(TENANT, model) is None
    assert bench.library.find("other", "solver") is None
    with pytest.raises(NotFound):
        bench.library.get("other", "solver")


async def test_what_is_stored_is_read_again(bench: Bench) -> None:
    await bench.put("solver", vote(num_samples=3), description="adds")
    await bench.put("vote")
    again = WorkflowLibrary(bench.store.workflows, bench.directory)
    assert await again.read() == 2
    assert await again.list(TENANT) == await bench.library.list(TENANT)
    assert again.get(TENANT, "solver").definition == vote(num_samples=3)


async def test_a_change_is_seen_at_once_and_by_whoever_holds_the_old_one_never(
    bench: Bench,
) -> None:
    await bench.put("solver")
    before = bench.library.get(TENANT, "solver")
    await bench.put("solver", vote(num_samples=3), may_replace=True)
    assert bench.library.get(TENANT, "solver").definition == vote(num_samples=3)
    assert before.definition == vote()
    await bench.library.delete(TENANT, "solver")
    assert bench.library.find(TENANT, "solver") is None
    with pytest.raises(NotFound):
        await bench.library.delete(TENANT, "solver")


async def test_what_another_server_stored_just_now_is_deleted_as_any(bench: Bench) -> None:
    elsewhere = WorkflowLibrary(bench.store.workflows, bench.directory)
    await elsewhere.put(TENANT, "solver", vote(), may_replace=False)
    await bench.library.delete(TENANT, "solver")
    assert bench.store.workflows.all() == ()


class SlowShelf:
    """A shelf whose first change comes back only behind the second, if there is one by then."""

    def __init__(self, shelf: WorkflowShelf) -> None:
        self._shelf = shelf
        self._has_begun = False
        self._has_second = threading.Event()
        self.delete, self.all = shelf.delete, shelf.all

    def put(self, *args: Any, **options: Any) -> tuple[WorkflowRecord, bool]:
        is_first, self._has_begun = not self._has_begun, True
        made = self._shelf.put(*args, **options)
        if is_first:
            self._has_second.wait(0.3)
        else:
            self._has_second.set()
        return made


async def test_changes_at_once_leave_memory_as_the_store_is(bench: Bench) -> None:
    bench.library = WorkflowLibrary(SlowShelf(bench.store.workflows), bench.directory)
    first = asyncio.create_task(bench.put("solver", vote(num_samples=1), may_replace=True))
    while not bench.store.workflows.all():
        await asyncio.sleep(0.001)
    await bench.put("solver", vote(num_samples=2), may_replace=True)
    await first
    (stored,) = bench.store.workflows.all()
    found = bench.library.get(TENANT, "solver")
    assert found.record == stored
    assert found.definition == vote(num_samples=2)


async def test_a_change_is_carried_out_although_its_caller_goes(bench: Bench) -> None:
    task = asyncio.create_task(bench.put("solver"))
    while not bench.library._writes:  # its members are looked for first
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await bench.library.close()
    assert await bench.names() == ["solver"]
    assert [record.name for record in bench.store.workflows.all()] == ["solver"]


async def test_the_bases_name_and_an_adapters_are_taken(bench: Bench) -> None:
    await upload(bench.directory, "poet")
    for name in ("fake-base", "poet"):
        with pytest.raises(Conflict) as caught:
            await bench.put(name, may_replace=True)
        assert caught.value.param == "name"
    await bench.put("solver")
    with pytest.raises(Conflict):
        await upload(bench.directory, "solver")
    assert await bench.names() == ["solver"]


async def test_a_members_adapter_must_be_there(bench: Bench) -> None:
    await upload(bench.directory, "poet")
    for adapter in ("poet", "poet@1", None):
        await bench.put(
            f"with-{str(adapter).partition('@')[0]}{len(await bench.names())}", vote(adapter)
        )
    for adapter in ("nobody", "poet@2", "fake-base", "a b", "with-poet0"):
        with pytest.raises(ModelNotFound, match="the workflow's reasoner: ") as caught:
            await bench.put("solver", vote(adapter))
        assert caught.value.param == "definition.reasoner.adapter"
    assert len(await bench.names()) == 3


async def test_a_tenants_own_names_hide_shared_workflows(bench: Bench) -> None:
    await bench.put("solver", tenant="shared")
    await bench.put("vote", tenant="shared")
    await bench.put("poet", tenant="shared")
    assert await bench.names() == ["poet", "solver", "vote"]
    await bench.put("vote", vote(num_samples=2))
    record, _ = await bench.directory.upload(TENANT, "poet", files("poet"))
    assert await bench.names() == ["solver", "vote"]
    assert await bench.names("other") == ["poet", "solver", "vote"]
    found = bench.library.find(TENANT, "vote")
    assert found is not None
    assert found.record.tenant == TENANT
    assert bench.library.find(TENANT, "poet") is None
    assert bench.directory.find(TENANT, "poet") == record
    with pytest.raises(NotFound):
        await bench.library.delete(TENANT, "solver")
    await bench.library.delete(TENANT, "vote")
    shared = bench.library.find(TENANT, "vote")
    assert shared is not None
    assert shared.record.tenant == "shared"


async def test_what_another_release_stored_is_refused_by_name_until_it_is_replaced(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.store.workflows.put(TENANT, "old", '{"kind": "debate"}', may_replace=False)
    bench.store.workflows.put(TENANT, "older", '{"kind": "lorid", "ir": {}}', may_replace=False)
    assert await bench.library.read() == 2
    assert "the workflow old cannot be read" in caplog.text
    for look in (bench.library.find, bench.library.get):
        with pytest.raises(ModelNotFound, match="another release"):
            look(TENANT, "old")
    assert await bench.names() == []
    await bench.put("old", may_replace=True)
    await bench.library.delete(TENANT, "older")
    assert await bench.names() == ["old"]
