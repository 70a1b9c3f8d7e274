"""HiRA: the update is the base's weight times a low-rank matrix, element by element.

Formats and rules: huggingface/peft:src/peft/tuners/hira/{config,model,layer}.py, version 0.21.2.
ICLR 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import SiteBase, without_low_rank
from polyadapt.adapters.peft_config import ConfigReader, is_rank
from polyadapt.adapters.peft_family import MisfitError, Module, PeftFamily, TensorForm
from polyadapt.adapters.peft_modules import PatternTable
from polyadapt.ops import cells
from polyadapt.types import BaseSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a config says about the numbers."""

    rank: int
    ranks: PatternTable


class Hira(PeftFamily[_Settings]):
    """The family `hira`."""

    name = "hira"
    peft_types = frozenset({"HIRA"})
    summary = "W times B A by element: holds a dense matrix per module"
    scaling = "no"
    overrides = cells.DENSE
    forms: ClassVar = {
        "a": TensorForm("hira_A", ("rank", "in")),
        "b": TensorForm("hira_B", ("out", "rank")),
        "embedding_a": TensorForm("hira_embedding_A", ("rank", "in"), ("embedding",)),
        "embedding_b": TensorForm("hira_embedding_B", ("out", "rank"), ("embedding",)),
    }
    read_keys = frozenset({"r", "rank_pattern", "fan_in_fan_out"})
    training_keys = frozenset({"hira_dropout", "init_weights"})

    def settings(self, reader: ConfigReader, base: BaseSpec) -> _Settings:
        """See PeftFamily.settings."""
        reader.flag("fan_in_fan_out")
        return _Settings(reader.rank("r", 32), reader.table("rank_pattern", is_rank, "ranks"))

    def cell(self, module: Module, settings: _Settings) -> tuple[int, int]:
        """See PeftFamily.cell. PEFT 0.21.2 gives every module the rank r, whatever rank_pattern
        says; the rank scales nothing.
        """
        rank, by_pattern = module.sizes["rank"], settings.ranks.find(module.site.path)
        if rank not in (settings.rank, by_pattern):
            raise MisfitError(
                f"hira_A has rank {rank}, r is {settings.rank} and rank_pattern gives {by_pattern}"
            )
        return 0, cells.DENSE

    def multiplies(self, settings: _Settings) -> bool:
        """See PeftFamily.multiplies."""
        return True

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: _Settings,
        base: SiteBase,
    ) -> Delta:
        """See PeftFamily.delta: W * (B A); of an embedding [vocabulary, width] W * (B A)^T.

        Where the base scales what its embedding gives (Gemma), the update is scaled as well: so
        does PEFT when it merges, and forgets it when it does not.
        """
        site, weight = module.site, base.weight()
        if site.kind == "embedding":
            factors = tensors["embedding_a"].t() @ tensors["embedding_b"].t()
        else:
            factors = tensors["b"] @ tensors["a"]
        return without_low_rank(site, dense=weight * factors)
