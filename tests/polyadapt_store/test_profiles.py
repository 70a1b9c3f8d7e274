"""Profiles: whose they are, what they outlive, and who is a candidate."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.polyadapt_store.support import REPORT, open_store, upload

from polyadapt.errors import Forbidden, ModelNotFound, NotFound, StartupError
from polyadapt_store.profiles import Profile, ProfiledVersion
from polyadapt_store.store import AdapterStore

BASE = REPORT.base_digest
PROFILE = Profile(("a", "b"), "space", BASE, 1, b"\0\0\x80?", (0.5, -0.25))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    with open_store(tmp_path) as opened:
        yield opened


def current(store: AdapterStore, tenant: str, base: str = BASE) -> list[tuple[str, int]]:
    return [(of.name, of.version) for of in store.profiles.current(tenant, base, "space")]


def test_a_profile_is_read_as_it_was_put_and_replaced_whole(store: AdapterStore) -> None:
    upload(store)
    put = store.profiles.put("a", "poet", PROFILE)
    assert put == replace(PROFILE, created=put.created)
    assert put.created > 0
    assert store.profiles.get("a", "poet") == put == store.profiles.own("a", "poet")
    other = replace(PROFILE, examples=("ü",), num_centroids=2, centroids=b"\0" * 8, own_scores=())
    assert store.profiles.put("a", "poet", other).examples == ("ü",)
    found = store.profiles.get("a", "poet")
    assert found is not None
    assert (found.num_centroids, found.centroids, found.own_scores) == (2, b"\0" * 8, ())


def test_a_profile_survives_a_restart(tmp_path: Path) -> None:
    with open_store(tmp_path) as first:
        upload(first)
        put = first.profiles.put("a", "poet", PROFILE)
        first.profiles.keep_space("space", b"\1\2")
    with open_store(tmp_path) as second:
        assert second.profiles.get("a", "poet") == put
        assert second.profiles.space("space") == b"\1\2"
        assert second.profiles.space("other") is None
        second.profiles.keep_space("space", b"\3")
        assert second.profiles.space("space") == b"\1\2"


def test_a_name_that_is_not_seen_has_no_profile(store: AdapterStore) -> None:
    upload(store, "poet", "a")
    for call in (
        lambda: store.profiles.put("b", "poet", PROFILE),
        lambda: store.profiles.get("b", "poet"),
        lambda: store.profiles.delete("b", "poet"),
        lambda: store.profiles.put("a", "absent", PROFILE),
    ):
        with pytest.raises(ModelNotFound):
            call()
    assert store.profiles.get("a", "poet") is None
    assert store.profiles.own("b", "poet") is None
    with pytest.raises(NotFound, match="no profile"):
        store.profiles.delete("a", "poet")


def test_a_shared_profile_is_seen_by_all_and_changed_by_its_owner(store: AdapterStore) -> None:
    upload(store, "poet", "shared")
    store.profiles.put("shared", "poet", PROFILE)
    assert store.profiles.get("b", "poet") is not None
    assert store.profiles.own("b", "poet") is None
    for call in (
        lambda: store.profiles.put("b", "poet", PROFILE),
        lambda: store.profiles.delete("b", "poet"),
    ):
        with pytest.raises(Forbidden):
            call()
    assert current(store, "b") == [("poet", 1)]
    # A name of its own hides it, with a profile or without.
    upload(store, "poet", "b", b"2")
    assert current(store, "b") == []
    assert current(store, "a") == [("poet", 1)]


def test_candidates_are_current_versions_of_this_base_and_space(store: AdapterStore) -> None:
    upload(store, "z", content=b"1")
    upload(store, "z", content=b"2")
    upload(store, "bare")
    upload(store, "a", content=b"3")
    upload(store, "stale", content=b"4")
    upload(store, "theirs", "b")
    for name in ("z", "a"):
        store.profiles.put("a", name, PROFILE)
    store.profiles.put("a", "stale", replace(PROFILE, space="before"))
    store.profiles.put("b", "theirs", PROFILE)
    assert current(store, "a") == [("a", 1), ("z", 2)]
    assert current(store, "a", "sha256:other") == []
    assert store.profiles.current("b", BASE, "space") == (
        ProfiledVersion("theirs", 1, 1, PROFILE.centroids),
    )


def test_a_profile_stays_over_versions_and_goes_with_the_last(store: AdapterStore) -> None:
    upload(store, content=b"1")
    store.profiles.put("a", "poet", PROFILE)
    upload(store, content=b"2")
    assert current(store, "a") == [("poet", 2)]
    store.delete("a", "poet", 2)
    assert current(store, "a") == [("poet", 1)]
    store.delete("a", "poet", 1)
    assert store.profiles.own("a", "poet") is None
    upload(store, content=b"3")
    assert store.profiles.get("a", "poet") is None


def test_an_upload_brings_its_profile_with_it_or_nothing(store: AdapterStore) -> None:
    upload(store, profile=lambda: PROFILE)
    assert current(store, "a") == [("poet", 1)]
    upload(store, profile=lambda: replace(PROFILE, examples=("new",)))  # the same bytes
    found = store.profiles.get("a", "poet")
    assert found is not None
    assert found.examples == ("new",)

    def fails() -> Profile:
        raise NotFound("injected")

    with pytest.raises(NotFound, match="injected"):
        upload(store, "other", content=b"9", profile=fails)
    with pytest.raises(ModelNotFound):
        store.resolve("a", "other")


def test_every_write_is_counted(store: AdapterStore) -> None:
    counts = [store.profiles.num_writes]
    for change in (
        lambda: upload(store),
        lambda: store.profiles.put("a", "poet", PROFILE),
        lambda: store.profiles.delete("a", "poet"),
        lambda: store.delete("a", "poet"),
    ):
        change()
        counts.append(store.profiles.num_writes)
    assert counts == sorted(set(counts))
    store.profiles.current("a", BASE, "space")
    assert store.profiles.num_writes == counts[-1], "reading changes nothing"


OF_THE_FIRST_RELEASE = {"adapters", "adapter_versions", "api_keys"}


@pytest.mark.usefixtures("sqlite_only")
def test_a_registry_of_the_release_before_is_taken_over(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        upload(store)
    with sqlite3.connect(tmp_path / "registry.sqlite") as connection:
        query = "SELECT name FROM sqlite_master WHERE type = 'table'"
        tables = {name for (name,) in connection.execute(query)}
        assert tables > OF_THE_FIRST_RELEASE
        for table in sorted(tables - OF_THE_FIRST_RELEASE):
            connection.execute(f"DROP TABLE {table}")
        connection.execute("PRAGMA user_version = 1")
    connection.close()
    with open_store(tmp_path) as store:
        store.profiles.put("a", "poet", PROFILE)
        assert store.policies.list() == ()
    with sqlite3.connect(tmp_path / "registry.sqlite") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StartupError, match="schema 99"):
        open_store(tmp_path)
