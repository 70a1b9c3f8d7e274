"""MiSS, once called Bone, as PEFT writes it: y = W x + D^T fold(x), where fold adds up the inputs
whose numbers are equal modulo r; and its variant `bat`, which multiplies blocks of W.

Format and rules: huggingface/peft:src/peft/tuners/miss/{config,layer}.py, version 0.21.2, and
scripts/convert-bone-to-miss.py. Paper: arXiv 2409.15371.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import SiteBase, low_rank, without_low_rank
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import MisfitError, Module, PeftFamily, TensorForm
from polyadapt.ops import cells
from polyadapt.types import BaseSpec, SiteSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a config says about the numbers."""

    rank: int
    variant: Literal["plain", "mini", "bat"]
    width: int  # of a mini block, which is repeated along the outputs


class Miss(PeftFamily[_Settings]):
    """The family `miss`."""

    name = "miss"
    peft_types = frozenset({"MISS", "BONE"})
    summary = "low rank: A adds up every r-th input, B is the stored block; bat: a whole difference"
    scaling = "yes, except bat"
    overrides = cells.DENSE
    forms: ClassVar = {"block": TensorForm("miss_block", ("rank", "out"), aliases=("bone_block",))}
    read_keys = frozenset({"r", "mini_r", "init_weights"})
    training_keys = frozenset({"miss_dropout"})

    def _bias_names(self) -> tuple[str, ...]:
        return (self.name, "MiSS", "bone", "Bone")

    def settings(self, reader: ConfigReader, base: BaseSpec) -> _Settings:
        """See PeftFamily.settings. PEFT's defaults stand for keys that are left out."""
        given = reader.config.get("init_weights", True)
        variants: dict[object, Literal["plain", "mini", "bat"]] = {"mini": "mini", "bat": "bat"}
        if not isinstance(given, bool | None) and given not in variants.values():
            reader.invalid("init_weights", given, 'true, false, "mini" or "bat"')
            given = True
        return _Settings(
            rank=reader.rank("r", 64),
            variant=variants.get(given, "plain"),
            width=reader.whole("mini_r", 1, least=1),
        )

    def shape(self, role: str, site: SiteSpec, settings: _Settings) -> tuple[int | str, ...]:
        """See PeftFamily.shape."""
        if settings.variant == "bat":
            return (site.out_features // settings.rank, settings.rank, settings.rank)
        return (settings.rank, settings.width if settings.variant == "mini" else "out")

    def cell(self, module: Module, settings: _Settings) -> tuple[int, int]:
        """See PeftFamily.cell."""
        num_in, num_out, rank = module.site.in_features, module.site.out_features, settings.rank
        if settings.variant == "bat":
            if num_in % rank or num_out % rank:
                raise MisfitError(f"bat cuts {num_out} x {num_in} into blocks of r = {rank}")
            return 0, cells.DENSE
        if rank > num_in:
            raise MisfitError(f"r = {rank} is more than its {num_in} inputs")
        if settings.variant == "mini" and num_out % settings.width:
            raise MisfitError(f"mini_r = {settings.width} does not divide its {num_out} outputs")
        return rank, 0

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: _Settings,
        base: SiteBase,
    ) -> Delta:
        """See PeftFamily.delta."""
        import torch

        site, block, rank = module.site, tensors["block"], settings.rank
        if settings.variant == "bat":
            return without_low_rank(site, dense=_blockwise(base.weight(), block, rank))
        if settings.variant == "mini":
            block = block.repeat(1, site.out_features // settings.width)
        fold = torch.zeros(rank, site.in_features)
        columns = torch.arange(site.in_features)
        fold[columns % rank, columns] = 1.0
        return low_rank(fold, block.t())

    def multiplies(self, settings: _Settings) -> bool:
        """See PeftFamily.multiplies."""
        return settings.variant == "bat"


def _blockwise(weight: torch.Tensor, block: torch.Tensor, rank: int) -> torch.Tensor:
    """W cut into blocks W_oi of rank x rank; M = block[o]: the difference is W_oi M + M."""
    num_out, num_in = weight.shape
    blocks = weight.reshape(num_out // rank, rank, num_in // rank, rank)  # o, row, i, column
    matrices = block[:, None]  # o, 1, row, column
    difference = blocks.transpose(1, 2) @ matrices + matrices  # o, i, row, column
    return difference.transpose(1, 2).reshape(num_out, num_in)
