"""DV-LoRA: a LoRA whose two matrices were first trained themselves and then by a vector each.

y = W x + alpha / r * (V * B) (U * A) x, U one factor per component and V one per output, which fold
into A and B when it is read: "dynamic" is the plan of training, and no input decides anything.

arXiv 2405.08672; BeileiCui/EndoDAC:models/backbones/mylora/layers.py (DVLinear, never merged).
Tensors keep the names that they have there; the convolutions and depth heads of that model have no
place in a language model and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import SiteBase, low_rank
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import Module, PeftFamily, TensorForm
from polyadapt.types import BaseSpec, SiteSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a config says about the numbers."""

    rank: int
    alpha: float


class DvLora(PeftFamily[_Settings]):
    """The family `dv_lora`."""

    name = "dv_lora"
    peft_types = frozenset({"DV_LORA"})
    summary = "low rank: U folded into A, V and alpha / r into B"
    forms: ClassVar = {
        "a": TensorForm("lora_A", ("rank", "in")),
        "b": TensorForm("lora_B", ("out", "rank")),
        "u": TensorForm("lora_U", ("rank", 1)),
        "v": TensorForm("lora_V", ("out", 1)),
    }
    read_keys = frozenset({"r", "lora_alpha"})
    training_keys = frozenset({"lora_dropout", "warm_up_step"})

    def settings(self, reader: ConfigReader, base: BaseSpec) -> _Settings:
        """See PeftFamily.settings. Neither key has a default, as the scale depends on both."""
        for key in ("r", "lora_alpha"):
            if reader.config.get(key) is None:
                reader.invalid(key, None, "a number: the scale is lora_alpha / r")
        return _Settings(reader.rank("r"), reader.number("lora_alpha", 1.0))

    def shape(self, role: str, site: SiteSpec, settings: _Settings) -> tuple[int | str, ...]:
        """See PeftFamily.shape: every module has the config's rank."""
        rank = settings.rank
        return tuple(rank if word == "rank" else word for word in self.forms[role].shape)

    def cell(self, module: Module, settings: _Settings) -> tuple[int, int]:
        """See PeftFamily.cell."""
        return settings.rank, 0

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: _Settings,
        base: SiteBase,
    ) -> Delta:
        """See PeftFamily.delta."""
        scale = settings.alpha / settings.rank
        return low_rank(tensors["u"] * tensors["a"], scale * tensors["v"] * tensors["b"])
