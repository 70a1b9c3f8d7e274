"""What every command prints with, and how an error ends one. Knows no command."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from polyadapt.errors import InvalidRequest, NotFound, SecretsUnavailable, StartupError

out = Console()
err = Console(stderr=True)


@contextlib.contextmanager
def one_clear_line() -> Iterator[None]:
    """Turn an error that the operator can mend into one line and status 1."""
    try:
        yield
    except (StartupError, InvalidRequest, NotFound, SecretsUnavailable) as error:
        err.print(f"polyadapt: {error.message}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


def make_bars() -> Progress:
    """Return progress bars on standard error, which are not started yet."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=err)
