"""Names, versions and tenants."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.polyadapt_store.support import open_store, upload

from polyadapt.errors import Forbidden, InvalidRequest, ModelNotFound
from polyadapt.types import AdapterId
from polyadapt_store.store import AdapterStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    with open_store(tmp_path) as opened:
        yield opened


def names(store: AdapterStore, tenant: str, **options: object) -> list[str]:
    return [record.name for record in store.list(tenant, **options).records]  # type: ignore[arg-type]


def test_a_record_gives_the_identity_that_requests_carry(store: AdapterStore) -> None:
    record, _ = upload(store)
    assert record.adapter_id == AdapterId("poet", 1, record.digest, "a")


def test_a_foreign_name_and_an_absent_one_are_answered_alike(store: AdapterStore) -> None:
    upload(store, "poet", "a")
    answers = set()
    for name in ("poet", "absent"):
        for call in (store.resolve, store.versions, store.delete):
            with pytest.raises(ModelNotFound) as caught:
                call("b", name)
            answers.add(caught.value.message.replace(name, "NAME"))
            assert caught.value.envelope()["error"]["code"] == "model_not_found"
    assert len(answers) == 1


def test_a_tenant_sees_its_own_and_the_shared_names(store: AdapterStore) -> None:
    upload(store, "mine", "a")
    upload(store, "theirs", "b")
    upload(store, "everybody", "shared")
    assert names(store, "a") == ["everybody", "mine"]
    assert names(store, "b") == ["everybody", "theirs"]
    assert names(store, "shared") == ["everybody"]
    assert store.resolve("a", "everybody").tenant == "shared"


def test_an_own_name_hides_a_shared_one_until_it_is_deleted(store: AdapterStore) -> None:
    upload(store, "poet", "shared", b"1")
    upload(store, "poet", "a", b"2")
    assert store.resolve("a", "poet").tenant == "a"
    assert store.resolve("b", "poet").tenant == "shared"
    assert [record.tenant for record in store.list("a").records] == ["a"]
    store.delete("a", "poet")
    assert store.resolve("a", "poet").tenant == "shared"
    assert [record.tenant for record in store.list("a").records] == ["shared"]


def test_a_shared_adapter_is_deleted_by_its_owner_alone(store: AdapterStore) -> None:
    upload(store, "poet", "shared")
    with pytest.raises(Forbidden):
        store.delete("a", "poet")
    assert store.delete("shared", "poet")


def test_an_unknown_version_is_not_found(store: AdapterStore) -> None:
    upload(store)
    for version in (0, 2, -1, 10**9):
        with pytest.raises(ModelNotFound, match=f"poet@{version}"):
            store.resolve("a", "poet", version)


def test_deleting_the_current_version_brings_back_the_one_before(store: AdapterStore) -> None:
    for content in (b"1", b"2", b"3"):
        upload(store, content=content)
    (gone,) = store.delete("a", "poet", 3)
    assert gone.version == 3
    assert store.resolve("a", "poet").version == 2
    store.delete("a", "poet", 1)
    assert store.resolve("a", "poet").version == 2
    with pytest.raises(ModelNotFound):
        store.delete("a", "poet", 3)


def test_a_version_number_is_never_given_twice(store: AdapterStore) -> None:
    upload(store, content=b"1")
    upload(store, content=b"2")
    assert len(store.delete("a", "poet")) == 2
    assert names(store, "a") == []
    with pytest.raises(ModelNotFound):
        store.resolve("a", "poet")
    record, is_new = upload(store, content=b"2")
    assert is_new
    assert record.version == 3


def test_pages_cover_everything_once(store: AdapterStore) -> None:
    expected = [f"n{i:02d}" for i in range(7)]
    for name in reversed(expected):
        upload(store, name, "shared" if name == "n03" else "a")
    seen: list[str] = []
    after = None
    while True:
        page = store.list("a", limit=3, after=after)
        seen += [record.name for record in page.records]
        if not page.has_more:
            break
        after = page.records[-1].id
        store.delete(page.records[-1].tenant, page.records[-1].name)  # a page's end may go away
    assert seen == expected


def test_a_page_of_exactly_the_rest_says_that_no_more_follow(store: AdapterStore) -> None:
    for name in ("x", "y"):
        upload(store, name)
    assert not store.list("a", limit=2).has_more
    assert store.list("a", limit=1).has_more


def test_a_bad_page_request_is_refused(store: AdapterStore) -> None:
    theirs, _ = upload(store, "theirs", "b")
    for limit in (0, -1, 1001):
        with pytest.raises(InvalidRequest) as caught:
            store.list("a", limit=limit)
        assert caught.value.param == "limit"
    for after in ("nonsense", theirs.id):
        with pytest.raises(InvalidRequest) as caught:
            store.list("a", after=after)
        assert caught.value.param == "after"


def test_lists_are_filtered_by_tag_and_status(store: AdapterStore) -> None:
    upload(store, "x", tags=["red", "red"])
    upload(store, "y", tags=["blue"])
    assert names(store, "a", tag="red") == ["x"]
    assert names(store, "a", tag="green") == []
    assert names(store, "a", status="ready") == ["x", "y"]
    assert names(store, "a", status="revoked") == []


def test_hostile_texts_are_only_data(store: AdapterStore) -> None:
    upload(store, description="'); DROP TABLE adapters; --", tags=["' OR 1=1 --"])
    assert names(store, "a", tag="' OR 1=1 --") == ["poet"]
    assert names(store, "a' OR '1'='1") == []
    assert store.resolve("a", "poet").description == "'); DROP TABLE adapters; --"
