"""What every command prints with, and how an error ends one. Knows no command."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from polyadapt.errors import InvalidRequest, NotFound, StartupError, Unavailable

out = Console()
err = Console(stderr=True)


@contextlib.contextmanager
def one_clear_line() -> Iterator[None]:
    """Turn an error that the operator can mend into one line and status 1."""
    try:
        yield
    except (StartupError, InvalidRequest, NotFound, Unavailable) as error:
        err.print(f"polyadapt: {error.message}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


def expect_place(path: Path | None) -> None:
    """Raise StartupError, before what it is to hold is paid for, where a file cannot be written."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise StartupError(f"{path} cannot be written: name a file in a directory that is there")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8; raises StartupError."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StartupError(f"{path} cannot be written: {error.strerror}") from None


def make_bars() -> Progress:
    """Return progress bars on standard error, which are not started yet."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=err)
