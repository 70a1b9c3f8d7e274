"""Every test of the store runs on a registry in a file and on one in a real PostgreSQL; those that
ask for `bucket` keep the bytes in S3.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.polyadapt_store.support import BUCKET_VARIABLE, DATABASE_VARIABLE
from tests.support.postgres import MISSING, Postgres, find_binaries, running_postgres
from tests.support.s3 import MISSING_WEED, S3Server, find_weed, running_moto, running_seaweed


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    binaries = find_binaries()
    if binaries is None:
        pytest.skip(MISSING)
    with running_postgres(binaries) as server:
        yield server


@pytest.fixture(autouse=True, params=["sqlite", "postgresql"])
def registry(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where support.open_store keeps names, also in processes that the test starts."""
    if request.param == "postgresql":
        server: Postgres = request.getfixturevalue("postgres")
        monkeypatch.setenv(DATABASE_VARIABLE, server.url)
    else:
        monkeypatch.delenv(DATABASE_VARIABLE, raising=False)
    kind: str = request.param
    return kind


@pytest.fixture
def sqlite_only(registry: str) -> None:
    """For tests that look into the file."""
    if registry != "sqlite":
        pytest.skip("looks into SQLite's file")


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    with running_moto() as server:
        yield server


@pytest.fixture(scope="session")
def seaweed() -> Iterator[S3Server]:
    weed = find_weed()
    if weed is None:
        pytest.skip(MISSING_WEED)
    with running_seaweed(weed) as server:
        yield server


@pytest.fixture
def bucket(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have support.open_store keep bytes in S3, also in processes that the test starts."""
    return use_bucket(moto, "store-tests", monkeypatch)


def use_bucket(server: S3Server, name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for variable, value in server.environment().items():
        monkeypatch.setenv(variable, value)
    url = server.new_bucket(name)
    monkeypatch.setenv(BUCKET_VARIABLE, url)
    return url
