"""(IA)3: learned factors of what a linear gives, or, in the feed-forward part, of what it takes.

Formats and rules: huggingface/peft:src/peft/tuners/ia3/{config,model,layer}.py, version 0.21.2.
arXiv 2205.05638.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import SiteBase, without_low_rank
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import Module, PeftFamily, TensorForm
from polyadapt.adapters.peft_modules import compile_pattern
from polyadapt.ops import cells
from polyadapt.types import BaseSpec, SiteSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Settings:
    """Which modules scale their input: those whose path ends with a name, or matches a pattern."""

    names: tuple[str, ...]
    pattern: Any = None  # compiled

    def is_feedforward(self, site: SiteSpec) -> bool:
        """Whether the factors stand before the weight. PEFT asks for no dot before a name."""
        if self.pattern is not None:
            return bool(self.pattern.fullmatch(site.path))
        return site.path.endswith(self.names)


class Ia3(PeftFamily[_Settings]):
    """The family `ia3`."""

    name = "ia3"
    peft_types = frozenset({"IA3"})
    summary = "one scale per output, bias included, or per input of a feed-forward module"
    scaling = "no"
    overrides = cells.TRANSFORM
    forms: ClassVar = {"factors": TensorForm("ia3_l", ("out", 1))}
    read_keys = frozenset({"feedforward_modules", "fan_in_fan_out"})
    training_keys = frozenset({"init_ia3_weights"})

    def settings(self, reader: ConfigReader, base: BaseSpec) -> _Settings:
        """See PeftFamily.settings."""
        reader.flag("fan_in_fan_out")
        given = reader.config.get("feedforward_modules")
        if isinstance(given, str) and given:
            return _Settings((), compile_pattern(given, "feedforward_modules", reader.problems))
        if given is None:
            reader.invalid("feedforward_modules", given, "a list of module names or a pattern")
        return _Settings(reader.words("feedforward_modules"))

    def shape(self, role: str, site: SiteSpec, settings: _Settings) -> tuple[int | str, ...]:
        """See PeftFamily.shape."""
        return (1, "in") if settings.is_feedforward(site) else self.forms[role].shape

    def cell(self, module: Module, settings: _Settings) -> tuple[int, int]:
        """See PeftFamily.cell."""
        if settings.is_feedforward(module.site):
            return 0, cells.TRANSFORM | 1 << cells.GROUP_SHIFT
        return 0, cells.OUT_SCALE

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: _Settings,
        base: SiteBase,
    ) -> Delta:
        """See PeftFamily.delta: y = l * (W x + b), or W (l * x) + b."""
        factors = tensors["factors"].flatten()
        if settings.is_feedforward(module.site):
            return without_low_rank(module.site, transform=factors.reshape(-1, 1, 1))
        return without_low_rank(module.site, out_scale=factors - 1.0)
