"""DeLoRA as PEFT writes it: y = W x + sum_i l / (r |a_i| |b_i|) b_i a_i^T (w * x), where w holds
the norms of W's columns when training began.

Format and rules: huggingface/peft:src/peft/tuners/delora/{config,layer,model}.py, version 0.21.2.
Paper: arXiv 2503.18225.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import SiteBase, low_rank
from polyadapt.adapters.peft_config import ConfigReader, is_rank
from polyadapt.adapters.peft_family import Module, PeftFamily, TensorForm
from polyadapt.adapters.peft_modules import PatternTable
from polyadapt.types import BaseSpec, SiteSpec

if TYPE_CHECKING:
    import torch

_LEAST_NORM = 1e-4  # PEFT's, of a component of A or B


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a config says about the numbers."""

    rank: int
    ranks: PatternTable

    def site_rank(self, site: SiteSpec) -> int:
        """The rank that PEFT gives this module."""
        found = self.ranks.find(site.path)
        return self.rank if found is None else found


class Delora(PeftFamily[_Settings]):
    """The family `delora`."""

    name = "delora"
    peft_types = frozenset({"DELORA"})
    summary = "low rank: A times the stored norms of W's columns, B normalised and times lambda / r"
    forms: ClassVar = {
        "a": TensorForm("delora_A", ("rank", "in")),
        "b": TensorForm("delora_B", ("out", "rank")),
        "bound": TensorForm("delora_lambda", (1,)),
        "norms": TensorForm("delora_w_norm", ("in",)),
    }
    read_keys = frozenset({"r", "rank_pattern"})
    # lambda starts from these; what training made of it is in the checkpoint.
    training_keys = frozenset({"delora_lambda", "lambda_pattern", "module_dropout", "init_weights"})

    def settings(self, reader: ConfigReader, base: BaseSpec) -> _Settings:
        """See PeftFamily.settings. PEFT's defaults stand for keys that are left out."""
        return _Settings(reader.rank("r"), reader.table("rank_pattern", is_rank, "ranks"))

    def shape(self, role: str, site: SiteSpec, settings: _Settings) -> tuple[int | str, ...]:
        """See PeftFamily.shape."""
        rank = settings.site_rank(site)
        return tuple(rank if word == "rank" else word for word in self.forms[role].shape)

    def cell(self, module: Module, settings: _Settings) -> tuple[int, int]:
        """See PeftFamily.cell."""
        return settings.site_rank(module.site), 0

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: _Settings,
        base: SiteBase,
    ) -> Delta:
        """See PeftFamily.delta."""
        a, b = tensors["a"], tensors["b"]
        norms = a.norm(dim=1).clamp(min=_LEAST_NORM) * b.norm(dim=0).clamp(min=_LEAST_NORM)
        scale = tensors["bound"] / settings.site_rank(module.site) / norms
        return low_rank(a * tensors["norms"], b * scale)
