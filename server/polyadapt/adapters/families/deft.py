"""DEFT and PaRa as PEFT writes them: W' = (I - Q P^T) W + s Q R, where Q and P come of one stored
matrix; PaRa has no R.

Format and rules: huggingface/peft:src/peft/tuners/deft/{config,layer}.py, version 0.21.2. PaRa:
arXiv 2406.05641.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import SiteBase, low_rank
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import Module, PeftFamily, TensorForm
from polyadapt.errors import Problem
from polyadapt.types import BaseSpec, SiteSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a config says about the numbers."""

    rank: int
    alpha: float  # 0: no scale
    is_orthonormalised: bool
    is_removal: bool  # PaRa

    def site_rank(self, site: SiteSpec) -> int:
        """PEFT gives no module more rank than it has outputs."""
        return min(self.rank, site.out_features)


class Deft(PeftFamily[_Settings]):
    """The family `deft`."""

    name = "deft"
    peft_types = frozenset({"DEFT"})
    summary = "low rank: what is put in minus what is taken out of the base, computed at load"
    scaling = "no"
    forms: ClassVar = {
        "p": TensorForm("deft_P", ("out", "rank")),
        "r": TensorForm("deft_R", ("rank", "in"), is_optional=True),
    }
    read_keys = frozenset({"r", "alpha", "para", "decomposition_method", "fan_in_fan_out"})
    training_keys = frozenset({"deft_dropout", "init_weights", "init_scale"})

    def settings(self, reader: ConfigReader, base: BaseSpec) -> _Settings:
        """See PeftFamily.settings. PEFT's defaults stand for keys that are left out."""
        has_alpha = reader.config.get("alpha") is not None
        return _Settings(
            rank=reader.rank("r"),
            alpha=reader.number("alpha", 0) if has_alpha else 0.0,
            is_orthonormalised=reader.choice("decomposition_method", ("relu", "qr"), "relu")
            == "qr",
            is_removal=reader.flag("para"),
        )

    def shape(self, role: str, site: SiteSpec, settings: _Settings) -> tuple[int | str, ...]:
        """See PeftFamily.shape."""
        rank = settings.site_rank(site)
        return tuple(rank if word == "rank" else word for word in self.forms[role].shape)

    def cell(self, module: Module, settings: _Settings) -> tuple[int, int]:
        """See PeftFamily.cell."""
        return settings.site_rank(module.site), 0

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
        """See PeftFamily.delta: A = s R - P^T W, B = Q."""
        import torch

        q = tensors["p"]
        p = torch.relu(q)
        if settings.is_orthonormalised:
            q = p = torch.linalg.qr(q)[0]
        a = -p.t() @ base.weight()
        if not settings.is_removal:
            scale = settings.alpha / settings.site_rank(module.site) if settings.alpha else 1.0
            a = a + tensors["r"] * scale
        return low_rank(a, q)

    def check(
        self,
        modules: Mapping[int, Module],
        settings: _Settings,
        base: BaseSpec,
        problems: list[Problem],
        notes: list[str],
    ) -> None:
        """See PeftFamily.check."""
        for _, module in sorted(modules.items()):
            if module.has_own and ("r" in module.keys) == settings.is_removal:
                problems.append(
                    Problem(
                        "config_mismatch",
                        f"para is {settings.is_removal} and the checkpoint holds "
                        f"{'a' if settings.is_removal else 'no'} deft_R of {module.site.path}",
                        "para",
                    )
                )
