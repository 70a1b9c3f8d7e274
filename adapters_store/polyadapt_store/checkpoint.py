"""A safetensors file read header first: take() each tensor once, drained() tells what nobody took."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor's header entry: safetensors dtype name, shape, byte range within the data part."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Checkpoint: ...
