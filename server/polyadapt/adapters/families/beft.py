"""BEFT: one vector added to what a linear gives, whether or not the base has a bias there.

Formats and rules: huggingface/peft:src/peft/tuners/beft/{config,layer}.py, version 0.21.2. arXiv
2509.15974.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import SiteBase, without_low_rank
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import Module, PeftFamily, TensorForm
from polyadapt.ops import cells
from polyadapt.types import BaseSpec

if TYPE_CHECKING:
    import torch


class Beft(PeftFamily[None]):
    """The family `beft`."""

    name = "beft"
    peft_types = frozenset({"BEFT"})
    summary = "one vector added per module"
    forms: ClassVar = {"bias": TensorForm("beft_bias", (1, "out"))}
    training_keys = frozenset({"init_weights"})

    def settings(self, reader: ConfigReader, base: BaseSpec) -> None:
        """See PeftFamily.settings: there are none."""

    def cell(self, module: Module, settings: None) -> tuple[int, int]:
        """See PeftFamily.cell."""
        return 0, cells.BIAS

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: None,
        base: SiteBase,
    ) -> Delta:
        """See PeftFamily.delta."""
        return without_low_rank(module.site, bias=tensors["bias"].flatten())
