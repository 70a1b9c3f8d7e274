"""What FourierFT and WaveFT have in common: coefficients at places of W that follow from a seed.

huggingface/peft:src/peft/tuners/{fourierft,waveft}/{config,layer}.py, version 0.21.2. No family by
itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from polyadapt.adapters.deltas import random_positions
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import MisfitError, Module, PeftFamily
from polyadapt.adapters.peft_modules import PatternTable
from polyadapt.ops import cells
from polyadapt.types import SiteSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class SpectralSettings:
    """What a config says about the numbers."""

    count: int | None  # of coefficients; None: the tensors tell
    counts: PatternTable
    scaling: float
    seed: int
    is_transformed: bool = True
    # Modules of one size have their coefficients at the same places: (elements, count) -> places.
    places: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def spectrum(self, site: SiteSpec, values: torch.Tensor) -> torch.Tensor:
        """Zeros [out, in] with the values at their places."""
        import torch

        flat = torch.zeros(site.out_features * site.in_features)
        key = flat.numel(), values.numel()
        if key not in self.places:
            self.places[key] = random_positions(*key, self.seed)
        flat[self.places[key]] = values
        return flat.view(site.out_features, site.in_features)


class Spectral(PeftFamily[SpectralSettings]):
    """A family with one tensor `spectrum` per module."""

    overrides = cells.DENSE
    training_keys = frozenset({"init_weights"})

    def read_spectral(
        self,
        reader: ConfigReader,
        *,
        count: int,
        scaling: float,
        patterns: type[PatternTable] = PatternTable,
    ) -> SpectralSettings:
        """Read the keys that both have; count and scaling stand for those that are left out."""
        reader.flag("fan_in_fan_out")
        counts = reader.table(
            "n_frequency_pattern",
            lambda v: type(v) is int and v > 0,
            "whole numbers from 1",
            patterns,
        )
        return SpectralSettings(
            count=reader.whole("n_frequency", count, least=1),
            counts=counts,
            scaling=reader.number("scaling", scaling),
            seed=reader.whole("random_loc_seed", 777),
        )

    def shape(self, role: str, site: SiteSpec, settings: SpectralSettings) -> tuple[int | str, ...]:
        """See PeftFamily.shape."""
        if settings.count is None:
            return ("count",)
        found = settings.counts.find(site.path)
        return (settings.count if found is None else found,)

    def cell(self, module: Module, settings: SpectralSettings) -> tuple[int, int]:
        """See PeftFamily.cell."""
        (count,) = self.shape("spectrum", module.site, settings)
        count = module.sizes["count"] if isinstance(count, str) else count
        num_elements = module.site.in_features * module.site.out_features
        if count > num_elements:
            raise MisfitError(
                f"{count} coefficients are more than the {num_elements} elements of W"
            )
        return 0, cells.DENSE
