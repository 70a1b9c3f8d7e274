"""FourierFT: the update is the inverse Fourier transform of a few stored coefficients.

Formats and rules: huggingface/peft:src/peft/tuners/fourierft/{config,model,layer}.py, version
0.21.2. arXiv 2405.03003.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import (
    MisfitError,
    Module,
    PeftFamily,
    SiteBase,
    TensorForm,
    random_positions,
    without_low_rank,
)
from polyadapt.adapters.peft_modules import DottedPatternTable, PatternTable
from polyadapt.ops import cells
from polyadapt.types import BaseSpec, SiteSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a config says about the numbers."""

    count: int  # of coefficients
    counts: PatternTable
    scaling: float
    seed: int
    # Modules of one size have their coefficients at the same places: (elements, count) -> places.
    places: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def site_count(self, site: SiteSpec) -> int:
        """How many coefficients this module has."""
        found = self.counts.find(site.path)
        return self.count if found is None else found


class FourierFt(PeftFamily[_Settings]):
    """The family `fourierft`."""

    name = "fourierft"
    peft_types = frozenset({"FOURIERFT"})
    summary = "the transform of its coefficients: holds a dense matrix per module"
    overrides = cells.DENSE
    forms: ClassVar = {"spectrum": TensorForm("fourierft_spectrum", ("count",))}
    read_keys = frozenset(
        {"n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed", "fan_in_fan_out"}
    )
    training_keys = frozenset({"init_weights"})

    def settings(self, reader: ConfigReader, base: BaseSpec) -> _Settings:
        """See PeftFamily.settings."""
        reader.flag("fan_in_fan_out")
        counts = reader.table(
            "n_frequency_pattern", lambda v: type(v) is int and v > 0, "whole numbers from 1",
            DottedPatternTable,
        )  # fmt: skip
        return _Settings(
            count=reader.whole("n_frequency", 1000, least=1),
            counts=counts,
            scaling=reader.number("scaling", 150.0),
            seed=reader.whole("random_loc_seed", 777),
        )

    def shape(self, role: str, site: SiteSpec, settings: _Settings) -> tuple[int | str, ...]:
        """See PeftFamily.shape."""
        return (settings.site_count(site),)

    def cell(self, module: Module, settings: _Settings) -> tuple[int, int]:
        """See PeftFamily.cell."""
        site, count = module.site, settings.site_count(module.site)
        if count > site.in_features * site.out_features:
            raise MisfitError(
                f"{count} coefficients are more than the {site.in_features * site.out_features} "
                "elements of W"
            )
        return 0, cells.DENSE

    def _bias_names(self) -> tuple[str, ...]:
        return self.name, "fourier"

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: _Settings,
        base: SiteBase,
    ) -> Delta:
        """See PeftFamily.delta."""
        import torch

        site, values = module.site, tensors["spectrum"]
        spectrum = torch.zeros(site.out_features * site.in_features)
        key = spectrum.numel(), values.numel()
        if key not in settings.places:
            settings.places[key] = random_positions(*key, settings.seed)
        spectrum[settings.places[key]] = values
        spectrum = spectrum.view(site.out_features, site.in_features)
        dense = torch.fft.ifft2(spectrum).real * settings.scaling
        return without_low_rank(site, dense=dense.contiguous())
