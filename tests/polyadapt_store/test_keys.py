"""API keys: shown once, stored as hashes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.polyadapt_store.support import open_store

from polyadapt.errors import InvalidRequest, NotFound, Unauthenticated
from polyadapt_store.keys import SCOPES, KeyRing


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[KeyRing]:
    with open_store(tmp_path) as store:
        yield store.keys


def test_a_key_opens_what_it_was_made_for(keys: KeyRing) -> None:
    assert not keys.has_keys()
    key, secret = keys.create("a", ["infer", "adapters:read"], "laptop")
    assert secret.startswith("sk-")
    assert keys.authenticate(secret) == key
    assert (key.tenant, key.label) == ("a", "laptop")
    assert key.scopes == {"infer", "adapters:read"}
    assert keys.has_keys()


@pytest.mark.parametrize("secret", ["", "sk-", "sk-" + "x" * 43, "\ud800", "x" * 100_000])
def test_an_unknown_secret_is_unauthenticated(secret: str, keys: KeyRing) -> None:
    keys.create("a", SCOPES)
    with pytest.raises(Unauthenticated):
        keys.authenticate(secret)


def test_a_deleted_key_opens_nothing(keys: KeyRing) -> None:
    key, secret = keys.create("a", ["infer"])
    keys.delete(key.id)
    with pytest.raises(Unauthenticated):
        keys.authenticate(secret)
    with pytest.raises(NotFound):
        keys.delete(key.id)


def test_no_secret_lies_on_the_disk(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        _, secret = store.keys.create("a", ["infer"])
        body = secret.removeprefix("sk-").encode()
        files = [path for path in tmp_path.iterdir() if path.is_file()]
        assert files
        assert not any(body in path.read_bytes() for path in files)


@pytest.mark.parametrize("scopes", [[], ["everything"], ["infer", "root"]])
def test_unknown_scopes_are_refused(scopes: list[str], keys: KeyRing) -> None:
    with pytest.raises(InvalidRequest, match="scopes"):
        keys.create("a", scopes)


def test_keys_are_listed_by_tenant(keys: KeyRing) -> None:
    one, _ = keys.create("a", ["infer"])
    two, _ = keys.create("b", ["infer"])
    assert set(keys.list()) == {one, two}
    assert keys.list("b") == (two,)
