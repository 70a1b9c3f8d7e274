"""Bring one stored adapter to its packed host form: from the cache of such forms, else by its
family. Runs in the pool's reading threads, in turns.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from polyadapt.adapters.adapter import BaseWeights
from polyadapt.adapters.pace import Pace
from polyadapt.adapters.packed_cache import PackedCache
from polyadapt.adapters.packing import PackedAdapter, pack
from polyadapt.adapters.registry import FILES, open_adapter
from polyadapt.errors import AdapterUnavailable, InvalidRequest
from polyadapt.types import BaseSpec
from polyadapt_store.blobs import BlobStore
from polyadapt_store.checkpoint import Checkpoint, RawTensor
from polyadapt_store.manifest import list_names, missing_files, weight_files
from polyadapt_store.sealed_files import FileSealer, read_file


class AdapterReader:
    """Callable: digest -> PackedAdapter; raises AdapterRejected, AdapterUnavailable, or
    SecretsUnavailable for a sealed file that there is no key for.
    """

    def __init__(
        self,
        blob_root: Path,
        base: BaseSpec,
        weights: BaseWeights,
        dtype: torch.dtype,
        pace: Pace,
        packed_cache_bytes: int = 0,
        max_elements: int | None = None,
        sealer: FileSealer | None = None,
    ) -> None:
        """packed_cache_bytes: what packed forms may take of the disk beside the blobs; 0: none.
        max_elements: what the device has room for; larger adapters are refused before they are
        made, since a small file may stand for dense matrices. sealer: opens files that lie sealed,
        into this process' memory alone; None: those are unavailable.
        """
        self._max_elements = max_elements
        self._sealer = sealer
        self._blobs = BlobStore(blob_root)
        self._base = base
        self._weights = weights
        self._dtype = dtype
        self._pace = pace
        self._cache: PackedCache | None = None
        if packed_cache_bytes:
            self._cache = PackedCache(
                self._blobs, base, weights.dtype, dtype, packed_cache_bytes, pace
            )

    def __call__(self, digest: str) -> PackedAdapter:
        """Verify nothing twice: uploads were validated, the family checks what only weights can
        tell, and a packed form is what the family once accepted.
        """
        directory = self._blobs.path(digest)
        if self._cache is None or not directory.is_dir():
            return self._read(digest, directory)[0]
        packed = self._cache.get(digest)
        if packed is None:
            packed, is_secret = self._read(digest, directory)
            if not is_secret:  # a packed form lies in the clear
                self._cache.put(digest, packed)
        return packed

    def _read(self, digest: str, directory: Path) -> tuple[PackedAdapter, bool]:
        """Return the packed form, and whether it comes from sealed files."""
        try:
            if missing_files(list_names(directory), FILES):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            family, config = open_adapter(directory)
            files = {
                prefix: self._opened(path, digest, directory)
                for prefix, path in weight_files(directory, family.files).items()
            }
            checkpoint = _PacedCheckpoint(files, self._pace)
        except OSError as error:
            raise AdapterUnavailable(
                f"the stored files of {digest} cannot be read ({error.strerror}); upload it again"
            ) from error
        with checkpoint:
            # Checked again: a store may outlive the base that it was filled for.
            plan = family.plan(config, checkpoint.header, self._base)
            self._check_size(plan.num_elements)
            probe = family.read_probe(config, checkpoint, self._base)
            modules = family.read(config, checkpoint, self._base, self._weights)
        started = time.monotonic()
        packed = pack(modules, self._base, self._dtype, plan.traits, probe)
        is_secret = any(isinstance(file, bytes) for file in files.values())
        return replace(packed, pack_s=time.monotonic() - started), is_secret

    def _opened(self, path: Path, digest: str, directory: Path) -> Path | bytes:
        name = path.relative_to(directory).as_posix()
        plain = read_file(path, digest, name, self._sealer)
        return path if plain is None else plain

    def _check_size(self, num_elements: int) -> None:
        if self._max_elements is not None and num_elements > self._max_elements:
            size = self._dtype.itemsize
            raise InvalidRequest(
                f"the adapter needs {num_elements * size} bytes of device memory, "
                f"--max-adapter-bytes is {self._max_elements * size}; raise it or lower the "
                "adapter's rank",
                param="model",
            )


class _PacedCheckpoint(Checkpoint):
    """Gives way between two tensors."""

    def __init__(self, paths: Mapping[str, Path | bytes], pace: Pace) -> None:
        super().__init__(paths)
        self._pace = pace

    def take(self, key: str) -> RawTensor:
        """See Checkpoint.take."""
        self._pace.breathe()
        return super().take(key)
