"""Every test of the store runs on a registry in a file and on one in a real PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.polyadapt_store.support import DATABASE_VARIABLE
from tests.support.postgres import MISSING, Postgres, find_binaries, running_postgres


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
