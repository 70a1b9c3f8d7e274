"""Policies: versions that stay what they are, and cannot be deleted while they are named."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.polyadapt_store.support import open_store, upload

from polyadapt.errors import Conflict, Forbidden, ModelNotFound, NotFound
from polyadapt_store.manifest import AdapterRecord
from polyadapt_store.policies import PolicyEntry
from polyadapt_store.store import AdapterStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    with open_store(tmp_path) as opened:
        yield opened


def test_policies_are_listed_as_they_were_put_in_order_and_survive_a_restart(
    tmp_path: Path,
) -> None:
    with open_store(tmp_path) as store:
        poet, _ = upload(store, "poet", "a")
        guard, _ = upload(store, "guard", "shared", b"2")
        options = (("task", "x"), ("bits", ("0", "1")), ("k", 3), ("on", True), ("t", 0.5))
        entries = [PolicyEntry(guard, -0.5), PolicyEntry(poet, options=options)]
        second = store.policies.put("b", [PolicyEntry(guard)])
        first = store.policies.put("a", entries)
        assert first.entries == tuple(entries)
        assert store.policies.list() == (first, second)
    with open_store(tmp_path) as store:
        assert store.policies.list() == (first, second)
        changed = store.policies.put("a", [PolicyEntry(poet)])
        assert store.policies.list() == (changed, second)
        store.policies.delete("a")
        assert store.policies.list() == (second,)
        with pytest.raises(NotFound, match="no policy"):
            store.policies.delete("a")


def test_a_named_version_cannot_be_deleted_and_others_can(store: AdapterStore) -> None:
    upload(store, content=b"1")
    named, _ = upload(store, content=b"2")
    upload(store, content=b"3")
    store.policies.put("b", [PolicyEntry(named)])
    for version in (None, 2):
        with pytest.raises(Conflict, match=r"poet@2 is mandatory .* tenant 'b'"):
            store.delete("a", "poet", version)
    assert [record.version for record in store.versions("a", "poet")] == [3, 2, 1]
    store.delete("a", "poet", 3)
    store.delete("a", "poet", 1)
    (policy,) = store.policies.list()
    assert policy.entries[0].record.version == 2
    store.policies.delete("b")
    assert store.delete("a", "poet")


def test_whoever_may_not_delete_learns_nothing_of_policies(store: AdapterStore) -> None:
    guard, _ = upload(store, "guard", "shared")
    store.policies.put("b", [PolicyEntry(guard)])
    with pytest.raises(Forbidden):
        store.delete("a", "guard")


def test_a_version_that_is_gone_cannot_be_named(store: AdapterStore) -> None:
    poet, _ = upload(store)
    other, _ = upload(store, "other", content=b"2")
    kept = store.policies.put("a", [PolicyEntry(other)])
    store.delete("a", "poet")
    with pytest.raises(ModelNotFound, match="poet@1"):
        store.policies.put("a", [PolicyEntry(other), PolicyEntry(poet)])
    assert store.policies.list() == (kept,), "the policy before it still holds"


def test_changes_at_once_lose_nothing(store: AdapterStore) -> None:
    records = [upload(store, f"guard{i}", content=b"%d" % i)[0] for i in range(8)]

    def add(record: AdapterRecord) -> None:
        store.policies.change("a", lambda before: [*before, PolicyEntry(record)])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, records))
    (policy,) = store.policies.list()
    assert {entry.record for entry in policy.entries} == set(records)


def test_a_change_that_leaves_nothing_removes_and_one_that_raises_changes_nothing(
    store: AdapterStore,
) -> None:
    poet, _ = upload(store)
    store.policies.change("a", lambda before: before)
    assert store.policies.list() == ()
    kept = store.policies.put("a", [PolicyEntry(poet)])

    def refuse(before: tuple[PolicyEntry, ...]) -> list[PolicyEntry]:
        assert before == (PolicyEntry(poet),)
        raise NotFound("no")

    with pytest.raises(NotFound):
        store.policies.change("a", refuse)
    assert store.policies.list() == (kept,)
    store.policies.change("a", lambda before: ())
    with pytest.raises(NotFound, match="no policy"):
        store.policies.delete("a")
