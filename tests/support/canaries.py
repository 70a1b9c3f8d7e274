"""Where something that must not lie in the clear does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def files_with(roots: Sequence[Path], patterns: Sequence[bytes]) -> list[str]:
    """Return every file below the roots that holds any of the patterns."""
    files = (path for root in roots for path in sorted(root.rglob("*")) if path.is_file())
    return [str(file) for file in files if any(p in file.read_bytes() for p in patterns)]
