"""Servers that share a registry see each other, as long as they live."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from tests.polyadapt_store.support import open_store, registry_of, upload

from polyadapt.errors import ModelNotFound, Unauthenticated
from polyadapt_store.database import Database, replica_adapters, replicas
from polyadapt_store.keys import KeyRing
from polyadapt_store.registry import Registry
from polyadapt_store.replicas import EXPIRES_S, MAX_ADAPTERS, ReplicaBoard


@pytest.fixture
def databases(tmp_path: Path) -> Iterator[list[Database]]:
    opened = [Database(registry_of(tmp_path)) for _ in range(2)]
    yield opened
    for database in opened:
        database.close()


def tiers(board: ReplicaBoard, digest: str) -> dict[str, str]:
    return {state.id: state.tier for state in board.states(digest)}


def test_each_server_is_seen_with_its_tier(databases: list[Database]) -> None:
    one, other = map(ReplicaBoard, databases)
    one.beat({"d1": "device", "d2": "host"})
    other.beat({"d2": "device"})
    assert tiers(one, "d1") == {one.id: "device", other.id: "store"}
    assert tiers(other, "d2") == {one.id: "host", other.id: "device"}
    one.beat({"d2": "device"})
    assert tiers(other, "d1") == {one.id: "store", other.id: "store"}
    assert tiers(other, "d2") == {one.id: "device", other.id: "device"}
    other.leave()
    assert tiers(one, "d2") == {one.id: "device"}


def test_a_server_is_current_when_it_has_seen_the_last_write(databases: list[Database]) -> None:
    one, other = map(ReplicaBoard, databases)
    with databases[0].write():
        pass
    one.beat({})
    other.beat({})
    assert {state.id: state.is_current for state in one.states("d")} == {
        one.id: True,
        other.id: False,
    }
    databases[1].refresh()
    other.beat({})
    assert all(state.is_current for state in one.states("d"))


def test_a_silent_server_is_forgotten_and_comes_back(
    databases: list[Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = map(ReplicaBoard, databases)
    one.beat({"d": "device"})
    other.beat({"d": "host"})
    age(databases[0], one.id, EXPIRES_S + 5)
    assert tiers(other, "d") == {other.id: "host"}
    age(databases[0], one.id, 100 * EXPIRES_S)
    other.beat({"d": "host"})
    with databases[1].read() as connection:
        assert connection.execute(sa.select(replicas.c.id)).scalars().all() == [other.id]
        left = connection.execute(sa.select(replica_adapters.c.replica)).scalars().all()
    assert left == [other.id], "nothing is kept of what is gone"
    one.beat({"d": "device"})
    assert tiers(other, "d") == {one.id: "device", other.id: "host"}


def age(database: Database, replica: str, seconds: int) -> None:
    with database.note() as connection:
        connection.execute(
            replicas.update().where(replicas.c.id == replica).values(seen=replicas.c.seen - seconds)
        )


def test_what_one_server_tells_is_bounded(databases: list[Database]) -> None:
    board = ReplicaBoard(databases[0])
    board.beat({f"h{i}": "host" for i in range(MAX_ADAPTERS)} | {"last": "device"})
    assert tiers(board, "last") == {board.id: "device"}
    with databases[0].read() as connection:
        query = sa.select(sa.func.count()).select_from(replica_adapters)
        assert connection.execute(query).scalar_one() == MAX_ADAPTERS


def test_heartbeats_are_no_writes(databases: list[Database]) -> None:
    before = databases[0].refresh()
    ReplicaBoard(databases[0]).beat({"d": "device"})
    assert databases[1].refresh() == before


def test_what_is_kept_at_hand_is_read_again_when_others_have_written(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        upload(store)
        key, secret = store.keys.create("a", ["infer"])
        elsewhere = Database(registry_of(tmp_path))
        assert store.resolve("a", "poet").version == 1
        assert store.keys.authenticate(secret) == key
        KeyRing(elsewhere).delete(key.id)
        Registry(elsewhere).delete("a", "poet")
        assert store.resolve("a", "poet").version == 1, "it has not looked"
        store.refresh()
        with pytest.raises(Unauthenticated):
            store.keys.authenticate(secret)
        with pytest.raises(ModelNotFound):
            store.resolve("a", "poet")
        elsewhere.close()


def test_names_at_hand_need_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(tmp_path) as store:
        record, _ = upload(store)
        _, secret = store.keys.create("a", ["infer"])
        store.resolve("a", "poet")
        store.keys.authenticate(secret)
        monkeypatch.setattr(Database, "read", None)
        assert store.resolve("a", "poet") == record
        assert store.keys.authenticate(secret).tenant == "a"
