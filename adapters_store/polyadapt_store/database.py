"""The registry's database: tables, connections, transactions. SQLite or PostgreSQL. Knows no rules
about what rows mean.

A table that is added or changed here needs a revision in migrations/versions.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from polyadapt.errors import InvalidRequest, StartupError, Unavailable
from polyadapt_store.migrations import HEAD, migrate

logger = logging.getLogger(__name__)

# What SQLite files carried before there were revisions; 4 says: the table alembic_version tells.
SCHEMA_VERSION = 4

# Names are ordered by their bytes everywhere, whatever language the database was made for.
Text = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")

_POOL_SIZE = 8
_MAX_OVERFLOW = 56
_POSTGRESQL_SETTINGS = {
    "lock_timeout": "10s",
    "statement_timeout": "30s",
    # A writer that stopped half-way may not hold up every replica.
    "idle_in_transaction_session_timeout": "60s",
    "synchronous_commit": "on",  # an acknowledged upload survives a power cut
}
# Any number that nothing else on the server takes: who migrates this registry.
_MIGRATION_LOCK = 0x706F6C7961646170

metadata = sa.MetaData()

# A name and the version it stands for. Rows stay for ever, so that a version number is never given
# twice.
adapters = sa.Table(
    "adapters",
    metadata,
    sa.Column("tenant", Text, primary_key=True),
    sa.Column("name", Text, primary_key=True),
    sa.Column("current_version", sa.Integer),  # null: the name has no live version
    sa.Column("last_version", sa.Integer, nullable=False),
)

versions = sa.Table(
    "adapter_versions",
    metadata,
    sa.Column("id", Text, primary_key=True),
    sa.Column("tenant", Text, nullable=False),
    sa.Column("name", Text, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("digest", Text, nullable=False, index=True),
    sa.Column("base_digest", Text, nullable=False),
    sa.Column("status", Text, nullable=False),
    sa.Column("created", sa.Integer, nullable=False),
    sa.Column("description", Text, nullable=False),
    sa.Column("manifest", Text, nullable=False),  # JSON of AdapterManifest
    sa.UniqueConstraint("tenant", "name", "version"),
    sa.ForeignKeyConstraint(["tenant", "name"], ["adapters.tenant", "adapters.name"]),
    sa.CheckConstraint("status IN ('ready', 'revoked', 'deleted')"),
)

tags = sa.Table(
    "adapter_tags",
    metadata,
    sa.Column("version_id", Text, sa.ForeignKey("adapter_versions.id"), primary_key=True),
    sa.Column("tag", Text, primary_key=True),
)

# Named ways of answering with several generations; rows of deleted ones stay for their versions.
workflows = sa.Table(
    "workflows",
    metadata,
    sa.Column("tenant", Text, primary_key=True),
    sa.Column("name", Text, primary_key=True),
    sa.Column("id", Text, nullable=False, unique=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("created", sa.Integer, nullable=False),
    sa.Column("updated", sa.Integer, nullable=False),
    sa.Column("description", Text, nullable=False),
    sa.Column("definition", Text),  # JSON of its kind; null: deleted
)

# What a name is for, learned from examples; goes with the name's last live version.
profiles = sa.Table(
    "adapter_profiles",
    metadata,
    sa.Column("tenant", Text, primary_key=True),
    sa.Column("name", Text, primary_key=True),
    sa.Column("space", Text, nullable=False),  # digest of what the vectors were made with
    sa.Column("base_digest", Text, nullable=False),
    sa.Column("examples", Text, nullable=False),  # JSON list
    sa.Column("num_centroids", sa.Integer, nullable=False),
    sa.Column("centroids", sa.LargeBinary, nullable=False),  # float32, little endian
    sa.Column("own_scores", Text, nullable=False),  # JSON list
    sa.Column("created", sa.Integer, nullable=False),
    sa.ForeignKeyConstraint(["tenant", "name"], ["adapters.tenant", "adapters.name"]),
)

# Vectors that belong to no adapter and cost time to make.
spaces = sa.Table(
    "profile_spaces",
    metadata,
    sa.Column("space", Text, primary_key=True),
    sa.Column("content", sa.LargeBinary, nullable=False),  # float32, little endian
)

# The versions that every request of a tenant is served through.
policies = sa.Table(
    "policies",
    metadata,
    sa.Column("tenant", Text, primary_key=True),
    sa.Column("created", sa.Integer, nullable=False),
)

policy_adapters = sa.Table(
    "policy_adapters",
    metadata,
    sa.Column("tenant", Text, sa.ForeignKey("policies.tenant"), primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("version_id", Text, sa.ForeignKey("adapter_versions.id"), nullable=False, index=True),
    sa.Column("scale", sa.Float, nullable=False),
    sa.Column("rank", sa.Integer),
    sa.Column("options", Text, nullable=False),  # JSON object
)

# Which branches of a mark tell a user. Rows stay for ever: what leaked may be of any of them.
signatures = sa.Table(
    "signatures",
    metadata,
    sa.Column("digest", Text, primary_key=True),  # of the mark's adapter
    sa.Column("user", Text, primary_key=True),
    sa.Column("generation", sa.Integer, primary_key=True),  # counted from 1; the last one acts
    sa.Column("bits", Text, nullable=False),  # sealed; an older release's are characters 0 and 1
    sa.Column("issued_at", sa.Integer, nullable=False),
    sa.Column("revoked_at", sa.Integer),
)

# What is secret of a mark, sealed. Rows stay when the adapter leaves: its signatures open by them.
marks = sa.Table(
    "marks",
    metadata,
    sa.Column("digest", Text, primary_key=True),  # of the mark's adapter
    sa.Column("row_key", Text),  # sealed: the key of its signatures; null: none was issued
    sa.Column("config", Text),  # JSON of the bundle's config; null: an adapter without secrets
    sa.Column("secrets", Text),  # sealed: what the bundle came with
    sa.Column("created", sa.Integer, nullable=False),
)

# Keys of the registry itself, each sealed.
sealed_keys = sa.Table(
    "sealed_keys",
    metadata,
    sa.Column("name", Text, primary_key=True),  # files: what marks' files are sealed under
    sa.Column("sealed", Text, nullable=False),
    sa.Column("created", sa.Integer, nullable=False),
)

# How a tenant's texts are marked. Rows stay for ever: a text may be marked as any of them said.
text_policies = sa.Table(
    "text_policies",
    metadata,
    sa.Column("tenant", Text, primary_key=True),
    sa.Column("generation", sa.Integer, primary_key=True),  # counted from 1; the last one acts
    sa.Column("is_required", sa.Integer, nullable=False),
    sa.Column("settings", Text, nullable=False),  # JSON list of MarkSettings
    sa.Column("created", sa.Integer, nullable=False),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", Text, primary_key=True),
    sa.Column("hash", sa.LargeBinary, nullable=False, unique=True),  # sha256 of the secret
    sa.Column("tenant", Text, nullable=False),
    sa.Column("label", Text, nullable=False),
    sa.Column("scopes", Text, nullable=False),  # sorted, separated by spaces
    sa.Column("created", sa.Integer, nullable=False),
)

# One row: how often the registry was written. Its lock is the writers' queue on PostgreSQL.
store_state = sa.Table(
    "store_state",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),  # always 1
    sa.Column("generation", sa.BigInteger, nullable=False),
    sa.CheckConstraint("id = 1"),
)

# Bytes in a shared object store that no version names, or not yet.
blob_leftovers = sa.Table(
    "blob_leftovers",
    metadata,
    sa.Column("digest", Text, primary_key=True),
    sa.Column("since", sa.BigInteger, nullable=False),  # unix seconds
)

# Servers that share the registry: see replicas.py.
replicas = sa.Table(
    "replicas",
    metadata,
    sa.Column("id", Text, primary_key=True),
    sa.Column("started", sa.BigInteger, nullable=False),  # unix seconds
    sa.Column("seen", sa.BigInteger, nullable=False),  # unix seconds of the last heartbeat
    sa.Column("num_writes", sa.BigInteger, nullable=False),  # that it has seen
)

replica_adapters = sa.Table(
    "replica_adapters",
    metadata,
    sa.Column("replica", Text, sa.ForeignKey("replicas.id"), primary_key=True),
    sa.Column("digest", Text, primary_key=True, index=True),
    sa.Column("tier", Text, nullable=False),
)

# Adapters that are fetched from a source, and what came of it, for a while.
imports = sa.Table(
    "imports",
    metadata,
    sa.Column("id", Text, primary_key=True),
    sa.Column("tenant", Text, nullable=False),
    sa.Column("name", Text, nullable=False),
    sa.Column("uri", Text, nullable=False),
    sa.Column("version", sa.Integer),  # once it is an adapter
    sa.Column("error", Text),  # JSON of the error's envelope, once it failed
    sa.Column("created", sa.BigInteger, nullable=False, index=True),  # unix seconds
    # Unix seconds of when the server that fetches it said so last.
    sa.Column("seen", sa.BigInteger, nullable=False, server_default="0"),
)

# Answers to calls with an Idempotency-Key, for a while.
idempotency = sa.Table(
    "idempotency",
    metadata,
    sa.Column("tenant", Text, primary_key=True),
    sa.Column("key", Text, primary_key=True),
    sa.Column("fingerprint", Text, nullable=False),  # of what was asked
    sa.Column("status", sa.Integer),  # null: under way
    sa.Column("body", Text),  # null: not to be shown again
    sa.Column("created", sa.BigInteger, nullable=False, index=True),  # unix seconds
)


class Database:
    """Owns the connections to one registry. Thread-safe.

    Writers take turns: SQLite lets only one begin, on PostgreSQL all begin by counting in the one
    row of store_state. So what a writing transaction reads stays true until it ends.
    """

    def __init__(self, where: Path | str) -> None:
        """Open the registry, and bring its tables to this release's form.

        where: a SQLite file, or the URL of one (sqlite:///FILE) or of a PostgreSQL database
        (postgresql://USER:PASSWORD@HOST/NAME). Raises StartupError for anything else, a registry
        that a newer release wrote, a damaged one, and a server that cannot be reached.
        """
        url = _read_url(where)
        self._name = _describe(url)
        is_sqlite = url.get_backend_name() == "sqlite"
        try:
            self._engine = sa.create_engine(
                url,
                pool_size=_POOL_SIZE,
                max_overflow=_MAX_OVERFLOW,
                pool_pre_ping=not is_sqlite,
                connect_args={} if is_sqlite else {"connect_timeout": 5},
            )
        except ImportError:
            raise StartupError(
                "a PostgreSQL registry needs psycopg; pip install 'polyadapt[postgres]'"
            ) from None
        if is_sqlite:
            sa.event.listen(self._engine, "connect", _configure_sqlite)
            sa.event.listen(self._engine, "begin", _begin_sqlite)
            self._writer = self._engine.execution_options(begin="BEGIN IMMEDIATE")
            self._reader = self._engine
        else:
            sa.event.listen(self._engine, "connect", _configure_postgresql)
            self._writer = self._engine.execution_options(isolation_level="READ COMMITTED")
            self._reader = self._engine.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )
        self._count_lock = threading.Lock()
        self._num_writes = 0
        try:
            self._migrate()
            self.refresh()
        except sa.exc.DatabaseError as error:
            self.close()
            fix = "restore it from a backup" if is_sqlite else "see that it runs and may be used"
            raise StartupError(
                f"the registry {self._name} cannot be opened: {_first_line(error)}; {fix}"
            ) from error
        except (StartupError, Unavailable) as error:
            self.close()
            raise StartupError(error.message) from error

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A transaction that sees one state of the database and never waits for a writer. Raises
        Unavailable when the database cannot be had.
        """
        with self._guarded(), self._reader.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """The one transaction that writes now; committed at the end of the block, durable when it
        returns. Raises Unavailable when the database cannot be had.
        """
        with self._guarded(), self._writer.connect() as connection, connection.begin():
            counted = store_state.update().values(generation=store_state.c.generation + 1)
            connection.execute(counted)
            written = connection.execute(sa.select(store_state.c.generation)).scalar_one()
            yield connection
        self._see(written)

    @contextmanager
    def note(self) -> Iterator[sa.Connection]:
        """A transaction for rows that nobody follows, such as heartbeats: it is not counted and on
        PostgreSQL waits for no writer. Raises like write().
        """
        with self._guarded(), self._writer.connect() as connection, connection.begin():
            yield connection

    @property
    def num_writes(self) -> int:
        """How many transactions anybody has written, as far as this process has seen: its own at
        once, those of others at the next refresh(). What was read after a look at this number is
        still so while it does not change, but for what others wrote since that refresh.
        """
        return self._num_writes

    def refresh(self) -> int:
        """Look how often anybody has written, and return it. Raises Unavailable."""
        with self.read() as connection:
            found = self.count(connection)
        self._see(found)
        return self._num_writes

    def count(self, connection: sa.Connection) -> int:
        """Return how often anybody has written, as of a transaction."""
        found: int = connection.execute(sa.select(store_state.c.generation)).scalar_one()
        return found

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def _see(self, num_writes: int) -> None:
        with self._count_lock:
            self._num_writes = max(self._num_writes, num_writes)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.DataError as error:
            # PostgreSQL knows no NUL in a text and no larger numbers than its columns hold.
            raise InvalidRequest(
                "a text holds a NUL character, or a number is too large, to be stored or found"
            ) from error
        except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError) as error:
            logger.error("the registry %s: %s", self._name, _first_line(error))
            raise Unavailable(
                "the registry's database cannot be used now; try again shortly", retry_after_s=2
            ) from error

    def _migrate(self) -> None:
        """One process at a time: the others wait, and find nothing to do."""
        with self._writer.connect() as connection, connection.begin():
            is_sqlite = connection.dialect.name == "sqlite"
            if is_sqlite:
                found = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
                if found > SCHEMA_VERSION:
                    raise self._newer(f"schema {found}", f"{SCHEMA_VERSION}")
            else:
                for setting in ("lock_timeout", "statement_timeout"):
                    connection.exec_driver_sql(f"SET LOCAL {setting} = '120s'")
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            unknown = migrate(connection)
            if unknown is not None:
                raise self._newer(f"revision {unknown}", HEAD)
            if is_sqlite:
                connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _newer(self, found: str, known: str) -> StartupError:
        return StartupError(
            f"the registry {self._name} has {found}, this release knows {known}; "
            "start the release that wrote it, or a newer one"
        )


def insert(connection: sa.Connection, table: sa.Table) -> postgresql.Insert | sqlite.Insert:
    """Return an INSERT that can say what becomes of a row that is there already."""
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table)
    return sqlite.insert(table)


def _read_url(where: Path | str) -> sa.URL:
    if isinstance(where, Path):
        return sa.URL.create("sqlite", database=str(where))
    try:
        url = sa.make_url(where)
        backend = url.get_backend_name()
    except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError, ValueError):
        backend = ""
    if backend == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if backend == "sqlite" and url.database and url.database != ":memory:":
        return url.set(drivername="sqlite")
    raise StartupError(  # which may hold a password, so it is not shown
        "the database URL is none of sqlite:///FILE and postgresql://USER:PASSWORD@HOST/NAME"
    )


def _describe(url: sa.URL) -> str:
    if url.get_backend_name() == "sqlite":
        return Path(url.database or "").name
    return f"{url.database} on {url.host or url.query.get('host', 'localhost')}"


def _first_line(error: Exception) -> str:
    text = str(error.orig) if isinstance(error, sa.exc.DBAPIError) else str(error)
    return text.strip().partition("\n")[0]


def _configure_sqlite(connection: Any, record: Any) -> None:
    # Transactions are begun by _begin_sqlite; the driver's own implicit ones start too late for
    # BEGIN IMMEDIATE.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (
        "busy_timeout = 10000",
        "journal_mode = WAL",
        "synchronous = FULL",  # an acknowledged upload survives a power cut
        "foreign_keys = ON",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))


def _configure_postgresql(connection: Any, record: Any) -> None:
    with connection.cursor() as cursor:
        for name, value in _POSTGRESQL_SETTINGS.items():
            cursor.execute(f"SET {name} = '{value}'")
    connection.commit()
