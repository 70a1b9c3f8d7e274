"""The registry's SQLite database: tables, connections, transactions. Knows no rules about what rows
mean.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from polyadapt.errors import StartupError

SCHEMA_VERSION = 3

metadata = sa.MetaData()

# A name and the version it stands for. Rows stay for ever, so that a version number is never given
# twice.
adapters = sa.Table(
    "adapters",
    metadata,
    sa.Column("tenant", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("current_version", sa.Integer),  # null: the name has no live version
    sa.Column("last_version", sa.Integer, nullable=False),
)

versions = sa.Table(
    "adapter_versions",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("digest", sa.Text, nullable=False, index=True),
    sa.Column("base_digest", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("created", sa.Integer, nullable=False),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("manifest", sa.Text, nullable=False),  # JSON of AdapterManifest
    sa.UniqueConstraint("tenant", "name", "version"),
    sa.ForeignKeyConstraint(["tenant", "name"], ["adapters.tenant", "adapters.name"]),
    sa.CheckConstraint("status IN ('ready', 'revoked', 'deleted')"),
)

tags = sa.Table(
    "adapter_tags",
    metadata,
    sa.Column("version_id", sa.Text, sa.ForeignKey("adapter_versions.id"), primary_key=True),
    sa.Column("tag", sa.Text, primary_key=True),
)

# Named ways of answering with several generations; rows of deleted ones stay for their versions.
workflows = sa.Table(
    "workflows",
    metadata,
    sa.Column("tenant", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("created", sa.Integer, nullable=False),
    sa.Column("updated", sa.Integer, nullable=False),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("definition", sa.Text),  # JSON of its kind; null: deleted
)

# What a name is for, learned from examples; goes with the name's last live version.
profiles = sa.Table(
    "adapter_profiles",
    metadata,
    sa.Column("tenant", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("space", sa.Text, nullable=False),  # digest of what the vectors were made with
    sa.Column("base_digest", sa.Text, nullable=False),
    sa.Column("examples", sa.Text, nullable=False),  # JSON list
    sa.Column("num_centroids", sa.Integer, nullable=False),
    sa.Column("centroids", sa.LargeBinary, nullable=False),  # float32, little endian
    sa.Column("own_scores", sa.Text, nullable=False),  # JSON list
    sa.Column("created", sa.Integer, nullable=False),
    sa.ForeignKeyConstraint(["tenant", "name"], ["adapters.tenant", "adapters.name"]),
)

# Vectors that belong to no adapter and cost time to make.
spaces = sa.Table(
    "profile_spaces",
    metadata,
    sa.Column("space", sa.Text, primary_key=True),
    sa.Column("content", sa.LargeBinary, nullable=False),  # float32, little endian
)

# The versions that every request of a tenant is served through.
policies = sa.Table(
    "policies",
    metadata,
    sa.Column("tenant", sa.Text, primary_key=True),
    sa.Column("created", sa.Integer, nullable=False),
)

policy_adapters = sa.Table(
    "policy_adapters",
    metadata,
    sa.Column("tenant", sa.Text, sa.ForeignKey("policies.tenant"), primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column(
        "version_id", sa.Text, sa.ForeignKey("adapter_versions.id"), nullable=False, index=True
    ),
    sa.Column("scale", sa.Float, nullable=False),
    sa.Column("rank", sa.Integer),
    sa.Column("options", sa.Text, nullable=False),  # JSON object
)

# Which branches of a mark tell a user. Rows stay for ever: what leaked may be of any of them.
signatures = sa.Table(
    "signatures",
    metadata,
    sa.Column("digest", sa.Text, primary_key=True),  # of the mark's adapter
    sa.Column("user", sa.Text, primary_key=True),
    sa.Column("generation", sa.Integer, primary_key=True),  # counted from 1; the last one acts
    sa.Column("bits", sa.Text, nullable=False),  # characters 0 and 1
    sa.Column("issued_at", sa.Integer, nullable=False),
    sa.Column("revoked_at", sa.Integer),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("hash", sa.LargeBinary, nullable=False, unique=True),  # sha256 of the secret
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("label", sa.Text, nullable=False),
    sa.Column("scopes", sa.Text, nullable=False),  # sorted, separated by spaces
    sa.Column("created", sa.Integer, nullable=False),
)


class Database:
    """Owns the connections to one SQLite file. Thread-safe."""

    def __init__(self, path: Path) -> None:
        """Open or create the file; raises StartupError if a newer release wrote it or it is
        damaged.
        """
        self._engine = sa.create_engine(
            sa.URL.create("sqlite", database=str(path)), pool_size=8, max_overflow=56
        )
        sa.event.listen(self._engine, "connect", _configure)
        sa.event.listen(self._engine, "begin", _begin)
        self._writer = self._engine.execution_options(begin="BEGIN IMMEDIATE")
        self._count_lock = threading.Lock()
        self._num_writes = 0
        try:
            self._create_schema(path)
        except sa.exc.DatabaseError as error:
            self.close()
            raise StartupError(
                f"the registry {path.name} cannot be opened: {error.orig}; restore it from a backup"
            ) from error
        except StartupError:
            self.close()
            raise

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A transaction that sees one state of the database and never waits for a writer."""
        with self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """The one transaction that writes now; committed at the end of the block, durable when it
        returns.
        """
        with self._writer.connect() as connection, connection.begin():
            yield connection
        with self._count_lock:
            self._num_writes += 1

    @property
    def num_writes(self) -> int:
        """How many transactions this process has written: what was read before is still so while
        this does not change, as only one process writes.
        """
        return self._num_writes

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def _create_schema(self, path: Path) -> None:
        with self.write() as connection:
            found = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            if found > SCHEMA_VERSION:
                raise StartupError(
                    f"the registry {path.name} has schema {found}, this release knows "
                    f"{SCHEMA_VERSION}; "
                    "start the release that wrote it, or a newer one"
                )
            metadata.create_all(connection)
            connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _configure(connection: Any, record: Any) -> None:
    # Transactions are begun by _begin; the driver's own implicit ones start too late for BEGIN
    # IMMEDIATE.
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


def _begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))
