"""A safetensors file read header first: take() each tensor once, drained() tells what nobody took.

Format: https://github.com/huggingface/safetensors#format, read more strictly than it is defined: no
duplicate keys, no control characters or ".." in names, floating-point tensors and indices only.
Knows no tensor library.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from polyadapt.errors import AdapterRejected, Problem
from polyadapt_store.limits import StoreLimits
from polyadapt_store.strict_json import StrictJsonError, parse_object, shown

# Eight-bit and quantised forms need a scale that no adapter format of ours carries; F64 would be
# rounded.
ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
# Positions, which a few families store; a reader refuses them where it expects weights.
INTEGER_SIZES = {"U8": 1, "I16": 2, "I32": 4, "I64": 8}
_SIZES = ITEM_SIZES | INTEGER_SIZES

_MAX_NUM_ELEMENTS = 1 << 48  # far beyond any file; keeps products exact and quick
_PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
_METADATA_KEY = "__metadata__"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor's header entry: safetensors dtype name, shape, byte range within the data part."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class RawTensor:
    """One tensor as it lies in the file: row-major, little-endian, read-only.

    `data` is a view of the mapped file that stays valid after the Checkpoint is closed.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


def read_header(path: Path, limits: StoreLimits) -> dict[str, TensorInfo]:
    """Return the header of the safetensors file at `path`, checked completely; the data is not
    read.

    Raises AdapterRejected with every problem: `truncated_file`, `header_too_large`,
    `pickle_refused`, `invalid_header`, `duplicate_key`, `invalid_tensor_name`, `unsupported_dtype`,
    `invalid_shape`, `invalid_offsets`, `too_many_tensors`.
    """
    with path.open("rb") as file:
        header, _ = _read_header(file, os.fstat(file.fileno()).st_size, path.name, limits)
    return header


class Checkpoint:
    """An open safetensors file. Each tensor is taken at most once; what is left over is an error of
    the reader.

    Raises AdapterRejected like read_header. Use as a context manager; not thread-safe.
    """

    def __init__(self, path: Path, limits: StoreLimits | None = None) -> None:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            self._header, self._data_begin = _read_header(
                file, size, path.name, limits or StoreLimits()
            )
            # The mapping keeps its own descriptor, and lives until the last RawTensor is gone.
            self._view: memoryview | None = memoryview(
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            )
        self._left = dict.fromkeys(self._header)

    @property
    def header(self) -> dict[str, TensorInfo]:
        """Name -> TensorInfo of every tensor in the file."""
        return self._header

    def take(self, key: str) -> RawTensor:
        """Return the tensor `key`; raises KeyError if the file lacks it or it was taken before."""
        if self._view is None:
            raise ValueError("the checkpoint is closed")
        if key not in self._left:
            known = "was already taken" if key in self._header else "is not in the checkpoint"
            raise KeyError(f"tensor {key!r} {known}")
        del self._left[key]
        info = self._header[key]
        data = self._view[self._data_begin + info.begin : self._data_begin + info.end]
        return RawTensor(info.dtype, info.shape, data)

    def drained(self) -> list[str]:
        """Return the names that nobody took, sorted; empty when the checkpoint was read
        completely.
        """
        return sorted(self._left)

    def close(self) -> None:
        """Let go of the file; tensors that were taken stay readable."""
        self._view = None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _read_header(
    file: BinaryIO, size: int, name: str, limits: StoreLimits
) -> tuple[dict[str, TensorInfo], int]:
    """Return the checked header and the offset of the data part."""
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if start.startswith(_PICKLE_STARTS) and length > size:
        raise _rejected(
            "pickle_refused",
            f"{name} is a pickle or zip archive, expected safetensors; pickles run code when they "
            "are read, "
            "so convert it with safetensors.torch.save_file",
            name,
        )
    if len(start) < 8 or 8 + min(length, limits.header_bytes) > size:
        raise _rejected(
            "truncated_file",
            f"{name} has {size} bytes and its header alone announces {8 + length}; upload the "
            "whole file",
            name,
        )
    if length > limits.header_bytes:
        raise _rejected(
            "header_too_large",
            f"{name} announces a header of {length} bytes, at most {limits.header_bytes} are "
            "accepted",
            name,
        )
    text = file.read(length)
    if not text.startswith(b"{"):
        raise _rejected("invalid_header", f"the header of {name} does not begin with '{{'", name)
    try:
        entries = parse_object(text, where=f"the header of {name}", max_depth=3)
    except StrictJsonError as error:
        raise AdapterRejected([error.problem]) from None
    return _checked(entries, size - 8 - length, name, limits), 8 + length


def _checked(
    entries: dict[str, Any], data_size: int, name: str, limits: StoreLimits
) -> dict[str, TensorInfo]:
    problems: list[Problem] = []
    metadata = entries.pop(_METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        problems.append(
            Problem(
                "invalid_header", f"{_METADATA_KEY} of {name} must map strings to strings", name
            )
        )
    if len(entries) > limits.num_tensors:
        raise _rejected(
            "too_many_tensors",
            f"{name} holds {len(entries)} tensors, at most {limits.num_tensors} are accepted",
            name,
        )
    header: dict[str, TensorInfo] = {}
    for key, entry in entries.items():
        info = _tensor_info(key, entry, limits, problems)
        if info is not None:
            header[key] = info
    # A bad entry leaves a hole: its neighbours' offsets can only be judged when all entries could
    # be read.
    if not problems:
        problems += _offset_problems(header, data_size, name)
    if problems:
        raise AdapterRejected(problems)
    return header


def _tensor_info(
    key: str, entry: Any, limits: StoreLimits, problems: list[Problem]
) -> TensorInfo | None:
    """Return the entry if it is well formed, else None with at least one problem added."""
    label = shown(key)
    before = len(problems)

    def problem(code: str, message: str) -> None:
        problems.append(Problem(code, message, label))

    if not key or len(key) > limits.name_chars or not key.isprintable() or ".." in key:
        problem(
            "invalid_tensor_name",
            f"tensor name {label} must have 1 to {limits.name_chars} printable characters and no "
            "'..'",
        )
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        problem(
            "invalid_header", f"the entry of {label} must have exactly dtype, shape, data_offsets"
        )
        return None
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        problem(
            "unsupported_dtype",
            f"{label} has dtype {shown(dtype)}, expected one of {', '.join(_SIZES)}; convert "
            "the adapter",
        )
    num_elements = 1
    if not _are_sizes(shape) or len(shape) > limits.num_dims:
        problem(
            "invalid_shape",
            f"{label} has shape {shown(shape)}, expected at most {limits.num_dims} sizes of 0 or "
            "more",
        )
    else:
        # Multiplied out before a zero can hide an overflow such as [0, 2**62].
        for size in shape:
            num_elements *= max(size, 1)
            if num_elements > _MAX_NUM_ELEMENTS:
                problem("invalid_shape", f"{label} has an absurd shape {shown(shape)}")
                break
        num_elements = 0 if 0 in shape else num_elements
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        problem(
            "invalid_offsets",
            f"{label} has data_offsets {shown(offsets)}, expected [begin, end] with begin <= end",
        )
    if len(problems) > before:
        return None
    begin, end = offsets
    if end - begin != num_elements * _SIZES[dtype]:
        problem(
            "invalid_offsets",
            f"{label} of shape {list(shape)} and dtype {dtype} needs "
            f"{num_elements * _SIZES[dtype]} bytes, its data_offsets give {end - begin}",
        )
        return None
    return TensorInfo(dtype, tuple(shape), begin, end)


def _offset_problems(header: dict[str, TensorInfo], data_size: int, name: str) -> list[Problem]:
    """Report a gap or overlap between neighbours, and data that is missing or that no
    tensor owns.
    """
    problems = []
    position = 0
    for key, info in sorted(header.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            problems.append(
                Problem(
                    "invalid_offsets",
                    f"{shown(key)} begins at byte {info.begin}, expected {position}: "
                    "tensors must follow each other without gap or overlap",
                    shown(key),
                )
            )
        position = max(position, info.end)
    if position > data_size:
        problems.append(
            Problem(
                "truncated_file",
                f"{name} holds {data_size} bytes of tensors, its header announces {position}; "
                "upload the whole file",
                name,
            )
        )
    elif position < data_size:
        problems.append(
            Problem(
                "invalid_offsets",
                f"{name} holds {data_size} bytes of tensors, its header accounts for {position}",
                name,
            )
        )
    return problems


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _rejected(code: str, message: str, where: str) -> AdapterRejected:
    return AdapterRejected([Problem(code, message, where)])
