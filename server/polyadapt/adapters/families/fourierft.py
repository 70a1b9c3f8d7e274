"""FourierFT: the update is the inverse Fourier transform of a few stored coefficients.

Formats and rules: huggingface/peft:src/peft/tuners/fourierft/{config,model,layer}.py, version
0.21.2. arXiv 2405.03003.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import SiteBase, without_low_rank
from polyadapt.adapters.families.spectral import Spectral, SpectralSettings
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import Module, TensorForm
from polyadapt.adapters.peft_modules import DottedPatternTable
from polyadapt.types import BaseSpec

if TYPE_CHECKING:
    import torch


class FourierFt(Spectral):
    """The family `fourierft`."""

    name = "fourierft"
    peft_types = frozenset({"FOURIERFT"})
    summary = "the transform of its coefficients: holds a dense matrix per module"
    forms: ClassVar = {"spectrum": TensorForm("fourierft_spectrum", ("count",))}
    read_keys = frozenset(
        {"n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed", "fan_in_fan_out"}
    )

    def settings(self, reader: ConfigReader, base: BaseSpec) -> SpectralSettings:
        """See PeftFamily.settings."""
        return self.read_spectral(reader, count=1000, scaling=150.0, patterns=DottedPatternTable)

    def _bias_names(self) -> tuple[str, ...]:
        return self.name, "fourier"

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: SpectralSettings,
        base: SiteBase,
    ) -> Delta:
        """See PeftFamily.delta."""
        import torch

        spectrum = settings.spectrum(module.site, tensors["spectrum"])
        dense = torch.fft.ifft2(spectrum).real * settings.scaling
        return without_low_rank(module.site, dense=dense.contiguous())
