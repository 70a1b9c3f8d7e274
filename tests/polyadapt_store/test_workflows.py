"""The workflows' rows: versions, one namespace with the adapters, tenants, restarts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.polyadapt_store.support import open_store, upload

import polyadapt_store.workflows
from polyadapt.errors import Conflict, ModelNotFound, NotFound
from polyadapt_store.store import AdapterStore
from polyadapt_store.workflows import WorkflowRecord


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    with open_store(tmp_path) as opened:
        yield opened


def put(
    store: AdapterStore,
    name: str = "solver",
    definition: str = "{}",
    tenant: str = "a",
    description: str = "",
    *,
    may_replace: bool = False,
) -> tuple[WorkflowRecord, bool]:
    return store.workflows.put(tenant, name, definition, description, may_replace=may_replace)


def test_a_workflow_survives_a_restart(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        made, is_new = put(store, description="adds")
        assert is_new
        assert (made.version, made.definition, made.description) == (1, "{}", "adds")
    with open_store(tmp_path) as store:
        assert store.workflows.all() == (made,)


def test_a_change_makes_a_version_and_the_same_again_does_not(store: AdapterStore) -> None:
    made, _ = put(store)
    assert put(store, may_replace=True) == (made, False)
    changed, is_new = put(store, definition="{1}", may_replace=True)
    assert not is_new
    assert (changed.id, changed.version, changed.created) == (made.id, 2, made.created)
    assert put(store, definition="{1}", description="x", may_replace=True)[0].version == 3


def test_a_name_that_is_there_is_replaced_only_on_purpose(store: AdapterStore) -> None:
    put(store)
    for definition in ("{}", "{1}"):
        with pytest.raises(Conflict, match="PUT /v1/workflows/solver") as caught:
            put(store, definition=definition)
        assert caught.value.param == "name"
    assert [record.version for record in store.workflows.all()] == [1]


def test_a_deleted_workflow_is_gone_and_its_versions_go_on(store: AdapterStore) -> None:
    made, _ = put(store)
    assert store.workflows.delete("a", "solver") == made
    assert store.workflows.all() == ()
    for _ in range(2):
        with pytest.raises(NotFound):
            store.workflows.delete("a", "solver")
    again, is_new = put(store)
    assert is_new
    assert again.version == 2


def test_names_of_adapters_and_workflows_are_one_namespace(store: AdapterStore) -> None:
    upload(store, "poet")
    with pytest.raises(Conflict, match="name of an adapter"):
        put(store, "poet", may_replace=True)
    put(store, "solver")
    with pytest.raises(Conflict, match="name of a workflow"):
        upload(store, "solver")
    store.delete("a", "poet")
    put(store, "poet")
    store.workflows.delete("a", "solver")
    assert upload(store, "solver")[0].version == 1


def test_an_upload_to_a_workflows_name_is_refused_before_it_is_judged(tmp_path: Path) -> None:
    def judge(directory: Path) -> None:
        raise AssertionError("validated for nothing")

    with open_store(tmp_path, judge) as store:  # type: ignore[arg-type]
        put(store)
        with pytest.raises(Conflict):
            upload(store, "solver")


def test_tenants_do_not_share_names(store: AdapterStore) -> None:
    upload(store, "poet", "b")
    put(store, "poet", tenant="a")
    put(store, "poet", tenant="c")
    with pytest.raises(NotFound):
        store.workflows.delete("b", "poet")
    assert [record.tenant for record in store.workflows.all()] == ["a", "c"]
    assert store.resolve("b", "poet").tenant == "b"


def test_an_adapters_call_says_that_a_name_is_a_workflows(store: AdapterStore) -> None:
    put(store, "solver")
    put(store, "everybody", tenant="shared")
    for name in ("solver", "everybody"):
        with pytest.raises(ModelNotFound, match="is a workflow and no adapter"):
            store.resolve("a", name)
    with pytest.raises(ModelNotFound, match="no model or adapter 'solver'"):
        store.resolve("b", "solver")


def test_of_a_workflow_and_an_adapter_made_at_once_one_gets_the_name(store: AdapterStore) -> None:
    def make(kind: str, name: str, barrier: threading.Barrier) -> bool:
        barrier.wait()
        try:
            put(store, name) if kind == "workflow" else upload(store, name)
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        for attempt in range(5):
            barrier = threading.Barrier(2)
            made = [
                pool.submit(make, kind, f"name{attempt}", barrier)
                for kind in ("workflow", "adapter")
            ]
            assert sorted(task.result() for task in made) == [False, True]


def test_there_are_so_many_workflows_and_no_more(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polyadapt_store.workflows, "MAX_WORKFLOWS", 2)
    put(store, "one")
    put(store, "two")
    with pytest.raises(Conflict, match="delete one first"):
        put(store, "three")
    put(store, "two", "{2}", may_replace=True)
    put(store, "three", tenant="b")
    store.workflows.delete("a", "one")
    put(store, "three")
