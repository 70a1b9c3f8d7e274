"""C3A: the update is made of circulant blocks, each of one stored vector.

Formats and rules: huggingface/peft:src/peft/tuners/c3a/{config,model,layer,utils}.py, version
0.21.2. arXiv 2407.19342.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import SiteBase, without_low_rank
from polyadapt.adapters.peft_config import ConfigReader, is_rank
from polyadapt.adapters.peft_family import MisfitError, Module, PeftFamily, TensorForm
from polyadapt.adapters.peft_modules import DottedPatternTable, PatternTable
from polyadapt.ops import cells
from polyadapt.types import BaseSpec, SiteSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a config says about the numbers."""

    block_size: int
    block_sizes: PatternTable

    def block(self, site: SiteSpec) -> int:
        """Rows and columns of this module's blocks."""
        found = self.block_sizes.find(site.path)
        return self.block_size if found is None else found


class C3a(PeftFamily[_Settings]):
    """The family `c3a`."""

    name = "c3a"
    peft_types = frozenset({"C3A"})
    summary = "its circulant blocks written out: holds a dense matrix per module"
    overrides = cells.DENSE
    forms: ClassVar = {"kernel": TensorForm("c3a_kernel", ("rows", "columns", "block"))}
    read_keys = frozenset({"block_size", "block_size_pattern"})
    training_keys = frozenset({"init_weights"})

    def settings(self, reader: ConfigReader, base: BaseSpec) -> _Settings:
        """See PeftFamily.settings."""
        return _Settings(
            reader.rank("block_size", 256),
            reader.table("block_size_pattern", is_rank, "block sizes", DottedPatternTable),
        )

    def shape(self, role: str, site: SiteSpec, settings: _Settings) -> tuple[int | str, ...]:
        """See PeftFamily.shape."""
        block = settings.block(site)
        return site.out_features // block, site.in_features // block, block

    def cell(self, module: Module, settings: _Settings) -> tuple[int, int]:
        """See PeftFamily.cell."""
        site, block = module.site, settings.block(module.site)
        if site.in_features % block or site.out_features % block:
            raise MisfitError(
                f"W of {site.out_features} rows and {site.in_features} columns does not fall into "
                f"blocks of {block}"
            )
        return 0, cells.DENSE

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: _Settings,
        base: SiteBase,
    ) -> Delta:
        """See PeftFamily.delta: block (m, n) holds w[m, n, (j - k) mod b] in row k, column j, and
        everything is divided by the number of inputs.
        """
        import torch

        site, kernel = module.site, tensors["kernel"]  # [rows, columns, b]
        at = torch.arange(kernel.shape[-1])
        blocks = kernel[:, :, (at[None, :] - at[:, None]) % kernel.shape[-1]]
        dense = blocks.transpose(1, 2).reshape(site.out_features, site.in_features)
        return without_low_rank(site, dense=dense / site.in_features)
