"""Read one stored adapter into its packed host form. Runs in the pool's loader thread."""

from __future__ import annotations

from pathlib import Path

import torch

from polyadapt.adapters.adapter import BaseWeights
from polyadapt.adapters.pace import Pace
from polyadapt.adapters.packing import PackedAdapter, pack
from polyadapt.adapters.registry import family_of, read_config
from polyadapt.errors import AdapterUnavailable
from polyadapt.types import BaseSpec
from polyadapt_store.blobs import BlobStore
from polyadapt_store.checkpoint import Checkpoint, RawTensor


class AdapterReader:
    """Callable: digest -> PackedAdapter; raises AdapterRejected or AdapterUnavailable."""

    def __init__(
        self,
        blob_root: Path,
        base: BaseSpec,
        weights: BaseWeights,
        dtype: torch.dtype,
        pace: Pace,
    ) -> None:
        self._blobs = BlobStore(blob_root)
        self._base = base
        self._weights = weights
        self._dtype = dtype
        self._pace = pace

    def __call__(self, digest: str) -> PackedAdapter:
        """Verify nothing twice: uploads were validated, the family checks what only weights can
        tell.
        """
        self._pace.begin()
        directory = self._blobs.path(digest)
        try:
            config = read_config(directory / "adapter_config.json")
            checkpoint = _PacedCheckpoint(directory / "adapter_model.safetensors", self._pace)
        except OSError as error:
            raise AdapterUnavailable(
                f"the stored files of {digest} cannot be read ({error.strerror}); upload it again"
            ) from error
        with checkpoint:
            family = family_of(config)
            # Checked again: a store may outlive the base that it was filled for.
            plan = family.plan(config, checkpoint.header, self._base)
            modules = family.read(config, checkpoint, self._base, self._weights)
        is_scalable = family.is_scalable and plan.is_scalable
        return pack(
            modules,
            self._base,
            self._dtype,
            is_scalable=is_scalable,
            is_kv_neutral=plan.is_kv_neutral,
        )


class _PacedCheckpoint(Checkpoint):
    """Gives way between two tensors."""

    def __init__(self, path: Path, pace: Pace) -> None:
        super().__init__(path)
        self._pace = pace

    def take(self, key: str) -> RawTensor:
        """See Checkpoint.take."""
        self._pace.breathe()
        return super().take(key)
