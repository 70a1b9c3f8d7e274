"""What LoHa and LoKr have in common in PEFT: r and alpha with patterns, and alpha / r as the scale.

huggingface/peft:src/peft/tuners/lycoris_utils.py, version 0.21.2. No family by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from polyadapt.adapters.peft_config import ConfigReader, is_number, is_rank
from polyadapt.adapters.peft_family import PeftFamily
from polyadapt.adapters.peft_modules import PatternTable
from polyadapt.types import BaseSpec, SiteSpec


@dataclass(frozen=True, slots=True)
class LycorisSettings:
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


class Lycoris(PeftFamily[LycorisSettings]):
    """A family whose tensors are of the module's rank."""

    read_keys = frozenset({"r", "alpha", "rank_pattern", "alpha_pattern"})

    def settings(self, reader: ConfigReader, base: BaseSpec) -> LycorisSettings:
        """See PeftFamily.settings. PEFT's defaults stand for keys that are left out."""
        return LycorisSettings(
            rank=reader.rank("r"),
            alpha=reader.number("alpha", 8),
            ranks=reader.table("rank_pattern", is_rank, "ranks"),
            alphas=reader.table("alpha_pattern", is_number, "finite numbers"),
        )

    def shape(self, role: str, site: SiteSpec, settings: LycorisSettings) -> tuple[int | str, ...]:
        """See PeftFamily.shape."""
        rank = settings.site_rank(site)
        return tuple(rank if word == "rank" else word for word in self.forms[role].shape)
