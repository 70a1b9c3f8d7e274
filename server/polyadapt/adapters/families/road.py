"""RoAd: the output turned and scaled in pairs of columns, bias included.

Formats and rules: huggingface/peft:src/peft/tuners/road/{config,layer}.py, version 0.21.2. arXiv
2409.00119, equation 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import SiteBase, without_low_rank
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import MisfitError, Module, PeftFamily, TensorForm
from polyadapt.ops import cells
from polyadapt.types import BaseSpec, SiteSpec

if TYPE_CHECKING:
    import torch

_HALVES = {"road_1": 1, "road_2": 2, "road_4": 4}  # variant -> halves of `out` that are stored


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a config says about the numbers."""

    variant: str
    group: int  # column i is the partner of column i + group / 2 of the same group


class Road(PeftFamily[_Settings]):
    """The family `road`."""

    name = "road"
    peft_types = frozenset({"ROAD"})
    summary = "two factors per output: of itself and of its partner, bias included"
    scaling = "no"
    overrides = cells.SWAP
    forms: ClassVar = {
        "theta": TensorForm("road_theta", ("stored",)),
        "alpha": TensorForm("road_alpha", ("stored",)),
    }
    read_keys = frozenset({"variant", "group_size"})
    training_keys = frozenset({"init_weights"})

    def settings(self, reader: ConfigReader, base: BaseSpec) -> _Settings:
        """See PeftFamily.settings."""
        group = reader.whole("group_size", 64, least=2)
        if group % 2:
            reader.invalid("group_size", group, "an even number")
        return _Settings(reader.choice("variant", _HALVES, "road_1"), group)

    def shape(self, role: str, site: SiteSpec, settings: _Settings) -> tuple[int | str, ...]:
        """See PeftFamily.shape."""
        return (site.out_features * _HALVES[settings.variant] // 2,)

    def cell(self, module: Module, settings: _Settings) -> tuple[int, int]:
        """See PeftFamily.cell."""
        if module.site.out_features % settings.group:
            raise MisfitError(
                f"{module.site.out_features} outputs do not fall into groups of {settings.group}"
            )
        return 0, cells.SWAP | settings.group << cells.GROUP_SHIFT

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: _Settings,
        base: SiteBase,
    ) -> Delta:
        """See PeftFamily.delta.

        With v = W x + b, y1 = c1 v1 - s1 v2 and y2 = c2 v2 + s2 v1 for the pair (1, 2); c = alpha
        cos(theta), s = alpha sin(theta).
        """
        import torch

        group = settings.group
        theta, alpha = tensors["theta"], tensors["alpha"]
        if settings.variant == "road_1":  # one angle for both of a pair
            theta = theta.reshape(-1, 1, group // 2).expand(-1, 2, -1).flatten()
            alpha = alpha.reshape(-1, 1, group // 2).expand(-1, 2, -1).flatten()
        if settings.variant == "road_4":  # of each group first what cosines need, then sines
            theta, alpha = theta.reshape(-1, 2, group), alpha.reshape(-1, 2, group)
            cosine, sine = alpha[:, 0] * theta[:, 0].cos(), alpha[:, 1] * theta[:, 1].sin()
        else:
            cosine, sine = alpha * theta.cos(), alpha * theta.sin()
        sine = sine.reshape(-1, 2, group // 2) * torch.tensor([-1.0, 1.0])[:, None]
        return without_low_rank(
            module.site, swap=torch.stack([cosine.flatten() - 1.0, sine.flatten()]), group=group
        )
