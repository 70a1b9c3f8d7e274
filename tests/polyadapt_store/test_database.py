"""The registry's tables are what the revisions make, whoever made them and in whatever order."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from tests.polyadapt_store.support import open_store, registry_of, upload

import polyadapt_store.migrations
from polyadapt.errors import InvalidRequest, StartupError, Unavailable
from polyadapt_store.database import Database, metadata
from polyadapt_store.migrations import HEAD

ROOT = Path(__file__).parents[2]
SCHEMA_3 = Path(__file__).parent / "registry_schema_3.sql"  # as the release before wrote it


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(registry_of(tmp_path))
    yield opened
    opened.close()


def differences(database: Database) -> list[object]:
    with database.read() as connection:
        return list(compare_metadata(MigrationContext.configure(connection), metadata))


def test_the_revisions_make_exactly_the_tables_that_the_code_reads(database: Database) -> None:
    assert differences(database) == []


def test_a_missing_revision_would_be_seen(database: Database) -> None:
    with database.write() as connection:
        connection.exec_driver_sql("DROP TABLE signatures")
    assert differences(database) != []


def test_there_is_one_last_revision_and_the_code_names_it() -> None:
    scripts = ScriptDirectory(str(Path(polyadapt_store.migrations.__file__).parent))
    assert scripts.get_heads() == [HEAD]


def test_every_text_is_ordered_by_bytes() -> None:
    for table in metadata.tables.values():
        for column in table.columns:
            if isinstance(column.type, sa.Text):
                on_server = column.type.dialect_impl(sa.dialects.postgresql.dialect())
                assert on_server.collation == "C", f"{table.name}.{column.name} is not Text"


def test_names_are_listed_in_the_same_order_on_both(tmp_path: Path) -> None:
    names = ["b-a", "ba", "B", "a.b", "a_b", "ab", "Z9", "a"]
    with open_store(tmp_path) as store:
        for name in names:
            upload(store, name)
        assert [record.name for record in store.list("a").records] == sorted(names)


@pytest.mark.usefixtures("sqlite_only")
@pytest.mark.parametrize("missing", [(), ("signatures",), ("workflows", "signatures")])
def test_a_home_of_before_the_revisions_is_kept(missing: tuple[str, ...], tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "registry.sqlite")) as old:
        old.executescript(SCHEMA_3.read_text())
        old.execute("INSERT INTO adapters VALUES ('a', 'poet', NULL, 7)")
        old.execute("INSERT INTO api_keys VALUES ('key-1', x'00', 'a', 'old', 'infer', 5)")
        for table in missing:
            old.execute(f"DROP TABLE {table}")
        old.execute(f"PRAGMA user_version = {3 - len(missing)}")
        old.commit()
    with open_store(tmp_path) as store:
        assert [key.label for key in store.keys.list()] == ["old"]
        assert upload(store)[0].version == 8
    database = Database(tmp_path / "registry.sqlite")
    assert differences(database) == []
    database.close()


def test_many_processes_that_start_at_once_migrate_once(tmp_path: Path) -> None:
    where = registry_of(tmp_path)
    program = (
        "import sys, pathlib; from polyadapt_store.database import Database\n"
        "where = sys.argv[1]\n"
        "Database(where if '://' in where else pathlib.Path(where)).close()"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(where)], stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    for process in processes:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said.decode()
    database = Database(where)
    assert differences(database) == []
    database.close()


def test_a_revision_of_a_newer_release_stops_the_start(tmp_path: Path) -> None:
    where = registry_of(tmp_path)
    database = Database(where)
    with database.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    database.close()
    with pytest.raises(StartupError, match="revision 9999"):
        Database(where)


def test_writes_are_counted_by_all_who_share_the_registry(tmp_path: Path) -> None:
    one, other = Database(registry_of(tmp_path)), Database(registry_of(tmp_path))
    before = other.refresh()
    with one.write():
        pass
    assert one.num_writes == before + 1
    assert other.num_writes == before, "it has not looked yet"
    assert other.refresh() == other.num_writes == before + 1
    with pytest.raises(KeyError), one.write():
        raise KeyError
    with one.note():
        pass
    assert other.refresh() == before + 1
    one.close()
    other.close()


def test_what_a_writer_reads_stays_true_until_it_ends(tmp_path: Path) -> None:
    """Two that check and then insert: only one of them may find nothing."""
    databases = [Database(registry_of(tmp_path)) for _ in range(2)]
    barrier = threading.Barrier(2)
    find = "SELECT count(*) FROM profile_spaces"

    def insert_once(database: Database) -> int:
        barrier.wait(10)
        with database.write() as connection:
            found = int(connection.exec_driver_sql(find).scalar_one())
            barrier_free.wait(0.05)
            connection.execute(
                metadata.tables["profile_spaces"].insert().values(space=str(found), content=b"")
            )
        return found

    barrier_free = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(insert_once, databases)) == [0, 1]
    for database in databases:
        database.close()


def test_a_reader_sees_one_state(tmp_path: Path) -> None:
    one, other = Database(registry_of(tmp_path)), Database(registry_of(tmp_path))
    count = sa.select(sa.func.count()).select_from(metadata.tables["profile_spaces"])
    with one.read() as reading:
        assert reading.execute(count).scalar_one() == 0
        with other.write() as writing:
            writing.execute(
                metadata.tables["profile_spaces"].insert().values(space="x", content=b"")
            )
        assert reading.execute(count).scalar_one() == 0
    with one.read() as reading:
        assert reading.execute(count).scalar_one() == 1
    one.close()
    other.close()


@pytest.mark.parametrize(
    "url", ["", "mysql://a:hunter2@b/c", "sqlite://", "hunter2", "postgresql", "sqlite:///:memory:"]
)
def test_other_databases_are_refused_without_showing_the_url(url: str) -> None:
    with pytest.raises(StartupError, match="postgresql://") as caught:
        Database(url)
    assert "hunter2" not in caught.value.message


def test_a_server_that_is_not_there_stops_the_start_in_one_line() -> None:
    with pytest.raises(StartupError, match="cannot be opened") as caught:
        Database("postgresql://someone:hunter2@127.0.0.1:1/none")
    assert "hunter2" not in caught.value.message
    assert "\n" not in caught.value.message


def test_a_database_that_fails_later_is_unavailable(database: Database) -> None:
    for use in (database.read, database.write, database.note):
        with pytest.raises(Unavailable, match="try again"), use():
            raise sa.exc.OperationalError("SELECT 1", {}, Exception("gone"))


@pytest.mark.parametrize("registry", ["postgresql"], indirect=True)
def test_a_connection_that_is_lost_is_replaced(database: Database) -> None:
    others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"

    def read_on_a_lost_one() -> None:
        with database.write() as killer, database.read() as connection:
            killer.exec_driver_sql(others)
            connection.exec_driver_sql("SELECT 1")

    with pytest.raises(Unavailable):
        read_on_a_lost_one()
    database.refresh()
    with database.write():
        pass


@pytest.mark.parametrize("registry", ["postgresql"], indirect=True)
def test_a_writer_that_waits_too_long_is_told_to_try_again(database: Database) -> None:
    def write_impatiently() -> None:
        with database.note() as connection:
            connection.exec_driver_sql("SET LOCAL lock_timeout = '50ms'")
            connection.exec_driver_sql("UPDATE store_state SET generation = generation")

    with database.write(), pytest.raises(Unavailable):
        write_impatiently()


@pytest.mark.parametrize("registry", ["postgresql"], indirect=True)
def test_what_the_database_cannot_hold_is_the_callers_error(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        upload(store)
        for call in (
            lambda: store.resolve("a", "po\0et"),
            lambda: store.resolve("a", "poet", 1 << 40),
            lambda: store.list("a", tag="\0"),
            lambda: store.keys.create("a", ["infer"], "\0"),
        ):
            with pytest.raises(InvalidRequest, match="NUL"):
                call()


def test_the_engine_does_not_learn_the_password() -> None:
    source = (ROOT / "server" / "polyadapt" / "engine" / "process.py").read_text()
    assert re.search(r'_SECRETS = \(.*"DATABASE_URL"', source)
