"""Packed adapters in files beside their blobs, so that a load is a copy of memory.

A file holds what a family made of a blob: ranks and biases of the sites, then the weights in the
arena's layout. It may be removed at any time and is made again. Knows no family and no device. Only
the reading threads of one engine write here, in turns; files are as private as the blobs.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import secrets
import stat
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch

from polyadapt import __version__
from polyadapt.adapters.adapter import Traits
from polyadapt.adapters.pace import Pace
from polyadapt.adapters.packing import Layout, PackedAdapter, num_behind
from polyadapt.adapters.registry import FAMILIES
from polyadapt.types import BaseSpec
from polyadapt_store.blobs import BlobStore

logger = logging.getLogger(__name__)

_MAGIC = b"PAPACKED"
# magic, key, elements, sites, largest rank, bytes of the traits, crc32 of the weights; then int64
# [sites, 3] of (rank, parts, routing), the traits as JSON, the crc32 of all that, and the weights
# at the next multiple of _ALIGN.
_HEAD = struct.Struct("<8s32sQIIII")
_CRC = struct.Struct("<I")
_SITE_BYTES = 24
_ALIGN = 64
_PAGE = 4096  # bytes; of the memory, at least
_CHUNK = 1 << 19  # bytes that are summed between two pauses
# Mapped from here on; below, reading is as quick, and a process may hold only so many mappings.
_MAPPED_FROM = 1 << 18
_TEMPORARY = ".tmp"
_PACKAGE = Path(__file__).parents[1]


class PackedCache:
    """Owns the files of `blobs.derived_root`, at most `capacity_bytes` of them together."""

    def __init__(
        self,
        blobs: BlobStore,
        base: BaseSpec,
        base_dtype: torch.dtype,
        dtype: torch.dtype,
        capacity_bytes: int,
        pace: Pace,
    ) -> None:
        """base_dtype: the precision that the base is served in; dtype: the arena's."""
        self._blobs = blobs
        self._base = base
        self._dtype = dtype
        self._capacity = capacity_bytes
        self._pace = pace
        families = sorted(family.name for family in FAMILIES)
        sites = [(s.path, s.kind, s.in_features, s.out_features, s.has_bias) for s in base.sites]
        code = _code_digest(_PACKAGE)
        context = [code, __version__, families, base.digest, str(base_dtype), str(dtype), sites]
        self._context = hashlib.sha256(json.dumps(context).encode()).hexdigest()
        self._layout = Layout(base)
        for unfinished in self._files(_TEMPORARY):
            _remove(unfinished)
        self._sound: dict[str, tuple[int, int]] = {}  # files whose every byte was seen: inode, size
        self._nbytes = 0  # of all files; too large when files left with their blobs
        self._trim()

    def get(self, digest: str) -> PackedAdapter | None:
        """Return the packed form, its weights mapped from the file; None when there is none.

        A file that is not what was written is removed with a warning. The weights stay readable
        when their file is removed.
        """
        path = self._path(digest)
        try:
            packed = self._load(digest, path)
        except FileNotFoundError:
            return None
        except (_BrokenError, OSError) as error:
            logger.warning("the packed form of %s is made again: %s", digest, error)
            _remove(path)
            self._sound.pop(digest, None)
            return None
        try:
            os.utime(path)  # the oldest leave first
        except FileNotFoundError:  # it left with its blob
            return None
        except OSError as error:
            logger.warning("the packed form of %s cannot be marked as used: %s", digest, error)
        self._pace.breathe()
        return packed

    def put(self, digest: str, packed: PackedAdapter) -> None:
        """Write the packed form, and remove the oldest files when there are too many bytes.

        A file that cannot be written is a warning: the adapter is served all the same.
        """
        parts = self._encode(self._key(digest), packed)
        nbytes = sum(map(len, parts))
        if nbytes > self._capacity:
            return
        path = self._path(digest)
        temporary = path.with_name(secrets.token_hex(8) + _TEMPORARY)
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            # Not synced: what a crash tears, the checksums find.
            with open(
                os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb"
            ) as file:
                for part in parts:
                    file.write(part)
            os.replace(temporary, path)
        except OSError as error:
            logger.warning("the packed form of %s cannot be kept: %s", digest, error)
            _remove(temporary)
            return
        if not self._blobs.path(digest).exists():  # deleted meanwhile: nothing may outlive it
            _remove(path)
            with contextlib.suppress(OSError):  # gone, or somebody writes there
                path.parent.rmdir()
            return
        self._nbytes += nbytes
        if self._nbytes > self._capacity:
            self._trim()

    # ------------------------------------------------------------------ names
    def _key(self, digest: str) -> bytes:
        return hashlib.sha256(json.dumps([digest, self._context]).encode()).digest()

    def _path(self, digest: str) -> Path:
        return self._blobs.derived(digest) / f"{self._key(digest).hex()}.packed"

    def _files(self, suffix: str) -> Iterator[Path]:
        return self._blobs.derived_root.glob(f"*/*{suffix}")

    def _trim(self) -> None:
        """Count anew and remove the files that were used longest ago, a little more than needed.

        Files that cannot be looked at or removed are a warning.
        """
        found = []
        try:
            for path in self._files(".packed"):
                with contextlib.suppress(FileNotFoundError):  # it left with its blob
                    status = path.lstat()
                    found.append((status.st_mtime_ns, status.st_size, path))
        except OSError as error:
            logger.warning("the packed forms cannot be counted: %s", error)
        self._nbytes = sum(nbytes for _, nbytes, _ in found)
        if self._nbytes <= self._capacity:
            return
        for _, nbytes, path in sorted(found):
            if _remove(path):
                self._nbytes -= nbytes
            if self._nbytes <= self._capacity - self._capacity // 8:
                return

    # ------------------------------------------------------------------ the file
    def _encode(self, key: bytes, packed: PackedAdapter) -> list[bytes | memoryview]:
        weights = packed.weights.view(torch.uint8).numpy().data
        ranks = torch.where(packed.cells[:, 0] >= 0, packed.cells[:, 1], -1)
        sites = torch.cat([ranks[:, None], packed.cells[:, 2:]], dim=1).numpy().tobytes()
        traits = msgspec.json.encode(packed.traits)
        head = _HEAD.pack(
            _MAGIC, key, packed.weights.numel(), len(packed.cells), packed.rank, len(traits),
            self._checksum(weights),
        )  # fmt: skip
        head += sites + traits
        start = head + _CRC.pack(zlib.crc32(head))
        return [start.ljust(_weights_begin(len(packed.cells), len(traits)), b"\0"), weights]

    def _load(self, digest: str, path: Path) -> PackedAdapter:
        status = path.lstat()
        num_sites = len(self._base.sites)
        least = _weights_begin(num_sites, 0)
        if not stat.S_ISREG(status.st_mode) or status.st_size <= least:
            raise _BrokenError(
                f"it has {status.st_size} bytes, expected a file of more than {least}"
            )
        data = _map(path, status.st_size)
        magic, found, num_elements, count, rank, traits_size, weights_sum = _HEAD.unpack_from(
            data[: _HEAD.size].numpy().tobytes()
        )
        begin = _weights_begin(num_sites, traits_size)
        if status.st_size < begin:
            raise _BrokenError(f"it has {status.st_size} bytes, its header announces more")
        start = data[:begin].numpy().tobytes()
        checked = _HEAD.size + _SITE_BYTES * num_sites + traits_size
        (checksum,) = _CRC.unpack_from(start, checked)
        if zlib.crc32(start[:checked]) != checksum:
            raise _BrokenError("the checksum of its header is wrong")
        if (magic, found, count) != (_MAGIC, self._key(digest), num_sites):
            raise _BrokenError("it is the packed form of something else")
        sites = torch.frombuffer(
            bytearray(start), dtype=torch.int64, count=3 * num_sites, offset=_HEAD.size
        ).view(num_sites, 3)
        cells, laid_out = self._layout.cells(*sites.unbind(1))
        traits = msgspec.json.decode(start[checked - traits_size : checked], type=Traits)
        expected = begin + num_elements * self._dtype.itemsize
        if laid_out + num_behind(traits) != num_elements or status.st_size != expected:
            raise _BrokenError(f"it has {status.st_size} bytes, its header announces {expected}")
        weights = data[begin:]
        # Summed once in this process: files are replaced and removed, never changed. Either way the
        # file comes into memory on this thread and not on the engine's.
        identity = (status.st_ino, status.st_size)
        if self._sound.get(digest) == identity:
            weights[::_PAGE].sum()
        elif self._checksum(weights.numpy().data) == weights_sum:
            self._sound[digest] = identity
        else:
            raise _BrokenError("the checksum of its weights is wrong")
        return PackedAdapter(
            weights.view(self._dtype),
            cells,
            rank=rank,
            traits=traits,
        )

    def _checksum(self, data: memoryview) -> int:
        checksum = 0
        for start in range(0, len(data), _CHUNK):
            checksum = zlib.crc32(data[start : start + _CHUNK], checksum)
            self._pace.breathe()
        return checksum


class _BrokenError(Exception):
    """The file is not what was written."""


@functools.cache
def _code_digest(package: Path) -> str:
    """SHA-256 of the sources that decide what a file holds: the file itself, the arena's layout,
    and what the families make of a checkpoint. `package` is the directory of polyadapt.
    """
    adapters = package / "adapters"
    sources = [*adapters.glob("*.py"), *adapters.glob("families/*.py")]
    digest = hashlib.sha256()
    for path in [*sorted(sources), package / "ops" / "cells.py"]:
        source = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(source)}\n".encode())
        digest.update(source)
    return digest.hexdigest()


def _remove(path: Path) -> bool:
    """Remove the file; whether it is gone. That it cannot be removed is a warning."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("the packed form %s cannot be removed: %s", path, error)
        return False
    return True


def _weights_begin(num_sites: int, traits_size: int) -> int:
    size = _HEAD.size + _SITE_BYTES * num_sites + traits_size + _CRC.size
    return -(-size // _ALIGN) * _ALIGN


def _map(path: Path, nbytes: int) -> torch.Tensor:
    """The file's bytes, uint8 [nbytes]. Files are replaced and removed, never changed, so that a
    mapping keeps what it showed.
    """
    if nbytes < _MAPPED_FROM:
        data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    else:
        # Private and without a descriptor that stays open, unlike Python's own mmap.
        try:
            data = torch.from_file(str(path), shared=False, size=nbytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise _BrokenError(f"it cannot be mapped: {error}") from error
    if len(data) != nbytes:
        raise _BrokenError(f"it has {len(data)} bytes, expected {nbytes}")
    return data
