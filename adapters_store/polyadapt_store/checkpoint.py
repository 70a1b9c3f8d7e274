"""Safetensors files read header first: take() each tensor once, drained() tells what nobody took.

Format: https://github.com/huggingface/safetensors#format, read more strictly than it is defined: no
duplicate keys, no control characters or ".." in names, floating-point tensors and indices only.
Knows no tensor library.
"""

from __future__ import annotations

import io
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from polyadapt.errors import AdapterRejected, Problem
from polyadapt_store.limits import StoreLimits
from polyadapt_store.manifest import WEIGHTS_NAME
from polyadapt_store.sealed_files import begins_sealed
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
    `sealed_file`, `pickle_refused`, `invalid_header`, `duplicate_key`, `invalid_tensor_name`,
    `unsupported_dtype`, `invalid_shape`, `invalid_offsets`, `too_many_tensors`.
    """
    with path.open("rb") as file:
        header, _ = _read_header(file, os.fstat(file.fileno()).st_size, path.name, limits)
    return header


class Checkpoint:
    """Open safetensors files. Each tensor is taken at most once; what is left over is an error of
    the reader.

    Raises AdapterRejected like read_header. Use as a context manager; not thread-safe.
    """

    def __init__(
        self, paths: Path | Mapping[str, Path | bytes], limits: StoreLimits | None = None
    ) -> None:
        """paths: one file, or several, each under what its tensors' names begin with here (see
        manifest.weight_files), as a file or as what is in it; at most limits.num_tensors in all of
        them.
        """
        paths = {"": paths} if isinstance(paths, Path) else paths
        limits = limits or StoreLimits()
        self._header: dict[str, TensorInfo] = {}
        self._place: dict[str, tuple[memoryview, int]] = {}  # the file and where its data begins
        problems: list[Problem] = []
        for prefix, path in paths.items():
            with io.BytesIO(path) if isinstance(path, bytes) else path.open("rb") as file:
                own = WEIGHTS_NAME if isinstance(path, bytes) else path.name
                name = prefix.removesuffix("/") or own
                try:
                    header, data_begin = _read_header(file, _size(path, file), name, limits)
                except AdapterRejected as error:
                    problems += error.problems
                    continue
                if isinstance(path, bytes):
                    view = memoryview(path)
                else:
                    # The mapping keeps its own descriptor, and lives until the last RawTensor is
                    # gone.
                    view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            for key, info in header.items():
                self._header[prefix + key] = info
                self._place[prefix + key] = view, data_begin
        if len(self._header) > limits.num_tensors:
            problems.append(_too_many(len(self._header), "the adapter", limits))
        if problems:
            raise AdapterRejected(problems)
        self._left = dict.fromkeys(self._header)

    @property
    def header(self) -> Mapping[str, TensorInfo]:
        """Name -> TensorInfo of every tensor; byte ranges are those within its own file."""
        return self._header

    def take(self, key: str) -> RawTensor:
        """Return the tensor `key`; raises KeyError if it is in no file or was taken before."""
        if not self._place and self._header:
            raise ValueError("the checkpoint is closed")
        if key not in self._left:
            known = "was already taken" if key in self._header else "is not in the checkpoint"
            raise KeyError(f"tensor {key!r} {known}")
        del self._left[key]
        info, (view, data_begin) = self._header[key], self._place[key]
        data = view[data_begin + info.begin : data_begin + info.end]
        return RawTensor(info.dtype, info.shape, data)

    def drained(self) -> list[str]:
        """Return the names that nobody took, sorted; empty when the checkpoint was read
        completely.
        """
        return sorted(self._left)

    def below(self, prefix: str) -> Checkpoint:
        """The tensors whose names begin with `prefix`, without it: a view of this checkpoint, which
        counts what is taken there.
        """
        return _Part(self, prefix)

    def close(self) -> None:
        """Let go of the files; tensors that were taken stay readable."""
        self._place = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Part(Checkpoint):
    """See Checkpoint.below."""

    def __init__(self, whole: Checkpoint, prefix: str) -> None:
        self._whole = whole
        self._prefix = prefix
        found = (item for item in whole.header.items() if item[0].startswith(prefix))
        self._header = {key.removeprefix(prefix): info for key, info in found}

    def take(self, key: str) -> RawTensor:
        """See Checkpoint.take."""
        return self._whole.take(self._prefix + key)

    def drained(self) -> list[str]:
        """See Checkpoint.drained."""
        left = (key for key in self._whole.drained() if key.startswith(self._prefix))
        return [key.removeprefix(self._prefix) for key in left]

    def close(self) -> None:
        """Nothing: the files are the whole's."""


def _size(path: Path | bytes, file: BinaryIO) -> int:
    return len(path) if isinstance(path, bytes) else os.fstat(file.fileno()).st_size


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
    if begins_sealed(start):
        raise _rejected(
            "sealed_file",
            f"{name} is sealed, as a server keeps the branches of a mark; give the mark's own "
            "directory",
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
        raise AdapterRejected([_too_many(len(entries), name, limits)])
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


def _too_many(count: int, name: str, limits: StoreLimits) -> Problem:
    return Problem(
        "too_many_tensors",
        f"{name} holds {count} tensors, at most {limits.num_tensors} are accepted",
        name,
    )


def _rejected(code: str, message: str, where: str) -> AdapterRejected:
    return AdapterRejected([Problem(code, message, where)])
