"""LayerNorm tuning: the weights and biases of normalisations are replaced.

Formats and rules: huggingface/peft:src/peft/tuners/ln_tuning/{config,model,layer}.py, version
0.21.2. arXiv 2312.11420.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import SiteBase, without_low_rank
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import Common, Module, PeftFamily, TensorForm
from polyadapt.errors import Problem
from polyadapt.ops import cells
from polyadapt.types import BaseSpec
from polyadapt_store.strict_json import shown

if TYPE_CHECKING:
    import torch

_BIAS = "ln_tuning_layers.bias"


class LnTuning(PeftFamily[None]):
    """The family `ln_tuning`."""

    name = "ln_tuning"
    peft_types = frozenset({"LN_TUNING"})
    summary = "a normalisation's weight and bias, each as a vector of its own"
    scaling = "no"
    overrides = cells.WEIGHT
    forms: ClassVar = {
        "weight": TensorForm("ln_tuning_layers.weight", ("out",), ("norm",)),
        # PeftFamily replaces it as it does those of other families.
        "new_bias": TensorForm(_BIAS, ("out",), ("norm",), is_optional=True),
    }

    def settings(self, reader: ConfigReader, base: BaseSpec) -> None:
        """See PeftFamily.settings: there are none."""

    def _common(self, reader: ConfigReader) -> Common | None:
        common = super()._common(reader)
        # Whatever norm is selected has its bias replaced.
        return None if common is None else replace(common, bias=f"{self.name}_only")

    def cell(self, module: Module, settings: None) -> tuple[int, int]:
        """See PeftFamily.cell."""
        return 0, cells.WEIGHT

    def check(
        self,
        modules: Mapping[int, Module],
        settings: None,
        base: BaseSpec,
        problems: list[Problem],
        notes: list[str],
    ) -> None:
        """See PeftFamily.check: PEFT stores a bias wherever the norm has one, and only so."""
        for _, module in sorted(modules.items()):
            path, bias = module.site.path, module.keys.get("new_bias")
            if module.has_own and module.site.has_bias and bias is None:
                problems.append(
                    Problem("missing_tensor", f"{path} has a new weight and no {_BIAS}", path)
                )
            if bias is None or "new_weight" in module.keys:  # the latter by modules_to_save
                continue
            if not module.has_own or "ln_tuning_layers" not in bias.split("."):
                problems.append(
                    Problem("unread_tensor", f"{shown(bias)} is of no new {_BIAS}", shown(bias))
                )

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: None,
        base: SiteBase,
    ) -> Delta:
        """See PeftFamily.delta."""
        # PEFT loads the weight into a copy of the base's norm, hence its dtype.
        weight = tensors["weight"].to(base.weights.dtype).float()
        return without_low_rank(module.site, weight=weight.contiguous())
