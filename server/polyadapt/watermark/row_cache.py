"""Rows that were collected once, kept on disk while a mark is trained. Knows no models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from polyadapt.watermark.checkpoints import read_run
from polyadapt.watermark.last_layer import Rows
from polyadapt.watermark.secrets import write_file


class RowCache:
    """Owns one file of rows of one base, found by the prompts that they are of; without a path,
    nothing is kept.
    """

    def __init__(self, path: Path | None, base_hash: str) -> None:
        """Raise StartupError for a file of another base."""
        self._path, self._base_hash = path, base_hash
        self._tensors: dict[str, Tensor] = {}
        if path is not None and path.exists():
            _, self._tensors = read_run(path, base_hash)

    def take(
        self,
        kind: str,
        prompts: Sequence[Sequence[int]],
        collect: Callable[[Sequence[Sequence[int]]], Rows],
    ) -> Rows:
        """Return the rows of these prompts, collected now if they are not there yet. `kind` tells
        apart what else they may be collected as.
        """
        asked = json.dumps([kind, [list(prompt) for prompt in prompts]])
        name = hashlib.sha256(asked.encode()).hexdigest()
        if f"{name}.x" not in self._tensors:
            rows = collect(prompts)
            self._tensors[f"{name}.x"] = rows.x.contiguous()
            self._tensors[f"{name}.hidden"] = rows.hidden.contiguous()
            if self._path is not None:
                write_file(self._path, save(self._tensors, {"run": self._base_hash}))
        return Rows(self._tensors[f"{name}.x"], self._tensors[f"{name}.hidden"])
