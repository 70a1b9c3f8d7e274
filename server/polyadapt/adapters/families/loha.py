"""LoHa as PEFT writes it: y = W x + s (A1 B1 * A2 B2) x, the product of two low-rank matrices by
elements. Its rank is r^2 at most; where that takes more than the whole difference, this is stored.

Format and rules: huggingface/peft:src/peft/tuners/loha/{config,layer,model}.py, version 0.21.2.
Paper: arXiv 2108.06098.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.peft_config import ConfigReader, is_number, is_rank
from polyadapt.adapters.peft_family import (
    Module,
    PeftFamily,
    SiteBase,
    TensorForm,
    is_dense_smaller,
    low_rank,
    without_low_rank,
)
from polyadapt.adapters.peft_modules import PatternTable
from polyadapt.ops import cells
from polyadapt.types import BaseSpec, SiteSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a config says about the numbers."""

    rank: int
    alpha: float
    ranks: PatternTable
    alphas: PatternTable

    def site_rank(self, site: SiteSpec) -> int:
        """The rank that PEFT gives this module."""
        found = self.ranks.find(site.path)
        return self.rank if found is None else found

    def scale(self, site: SiteSpec) -> float:
        """alpha / r with the module's own alpha and r."""
        found = self.alphas.find(site.path)
        return float(self.alpha if found is None else found) / self.site_rank(site)


class Loha(PeftFamily[_Settings]):
    """The family `loha`."""

    name = "loha"
    peft_types = frozenset({"LOHA"})
    summary = "low rank r^2, or a whole difference where that takes less"
    overrides = cells.DENSE
    forms: ClassVar = {
        "a1": TensorForm("hada_w1_a", ("out", "rank")),
        "b1": TensorForm("hada_w1_b", ("rank", "in")),
        "a2": TensorForm("hada_w2_a", ("out", "rank")),
        "b2": TensorForm("hada_w2_b", ("rank", "in")),
    }
    read_keys = frozenset({"r", "alpha", "rank_pattern", "alpha_pattern"})
    # use_effective_conv2d is about convolutions.
    training_keys = frozenset(
        {"rank_dropout", "module_dropout", "init_weights", "use_effective_conv2d"}
    )
    foreign: ClassVar = {"hada_t1": "it belongs to a convolution"}

    def settings(self, reader: ConfigReader, base: BaseSpec) -> _Settings:
        """See PeftFamily.settings. PEFT's defaults stand for keys that are left out."""
        return _Settings(
            rank=reader.rank("r"),
            alpha=reader.number("alpha", 8),
            ranks=reader.table("rank_pattern", is_rank, "ranks"),
            alphas=reader.table("alpha_pattern", is_number, "finite numbers"),
        )

    def shape(self, role: str, site: SiteSpec, settings: _Settings) -> tuple[int | str, ...]:
        """See PeftFamily.shape."""
        rank = settings.site_rank(site)
        return tuple(rank if word == "rank" else word for word in self.forms[role].shape)

    def cell(self, module: Module, settings: _Settings) -> tuple[int, int]:
        """See PeftFamily.cell."""
        rank = settings.site_rank(module.site) ** 2
        return (0, cells.DENSE) if is_dense_smaller(module.site, rank) else (rank, 0)

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: _Settings,
        base: SiteBase,
    ) -> Delta:
        """See PeftFamily.delta.

        (A1 B1 * A2 B2)[o, i] = sum over j and k of A1[o, j] A2[o, k] B1[j, i] B2[k, i].
        """
        site, scale = module.site, settings.scale(module.site)
        a1, b1, a2, b2 = (tensors[role] for role in ("a1", "b1", "a2", "b2"))
        if self.cell(module, settings)[1]:
            return without_low_rank(site, dense=(a1 @ b1) * (a2 @ b2) * scale)
        b = a1[:, :, None] * a2[:, None, :] * scale
        a = b1[:, None, :] * b2[None, :, :]
        return low_rank(a.reshape(-1, site.in_features), b.reshape(site.out_features, -1))
