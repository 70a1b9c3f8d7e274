"""LoHa as PEFT writes it: y = W x + s (A1 B1 * A2 B2) x, the product of two low-rank matrices by
elements. Its rank is r^2 at most; where that takes more than the whole difference, this is stored.

Format and rules: huggingface/peft:src/peft/tuners/loha/{config,layer,model}.py, version 0.21.2.
Paper: arXiv 2108.06098.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import SiteBase, is_dense_smaller, low_rank, without_low_rank
from polyadapt.adapters.families.lycoris import Lycoris, LycorisSettings
from polyadapt.adapters.peft_family import Module, TensorForm
from polyadapt.ops import cells

if TYPE_CHECKING:
    import torch


class Loha(Lycoris):
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
    # use_effective_conv2d is about convolutions.
    training_keys = frozenset(
        {"rank_dropout", "module_dropout", "init_weights", "use_effective_conv2d"}
    )
    foreign: ClassVar = {"hada_t1": "it belongs to a convolution"}

    def cell(self, module: Module, settings: LycorisSettings) -> tuple[int, int]:
        """See PeftFamily.cell."""
        rank = settings.site_rank(module.site) ** 2
        return (0, cells.DENSE) if is_dense_smaller(module.site, rank) else (rank, 0)

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: LycorisSettings,
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
