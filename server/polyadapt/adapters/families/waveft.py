"""WaveFT: the update is the inverse wavelet transform of a few stored coefficients, or they
themselves.

Formats and rules: huggingface/peft:src/peft/tuners/waveft/{config,model,layer,waverec2d}.py,
version 0.21.2. arXiv 2505.12532. Of the wavelets only Haar's, PEFT's default, is served.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import SiteBase, without_low_rank
from polyadapt.adapters.families.spectral import Spectral, SpectralSettings
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import Module, TensorForm
from polyadapt.types import BaseSpec
from polyadapt_store.strict_json import shown

if TYPE_CHECKING:
    import torch


class WaveFt(Spectral):
    """The family `waveft`."""

    name = "waveft"
    peft_types = frozenset({"WAVEFT"})
    summary = "its coefficients, through Haar's wavelets or not: holds a dense matrix per module"
    forms: ClassVar = {"spectrum": TensorForm("waveft_spectrum", ("count",))}
    read_keys = frozenset(
        {
            *("n_frequency", "n_frequency_pattern", "proportional_parameters", "scaling"),
            *("random_loc_seed", "use_idwt", "wavelet_family", "fan_in_fan_out"),
        }
    )

    def settings(self, reader: ConfigReader, base: BaseSpec) -> SpectralSettings:
        """See PeftFamily.settings."""
        is_transformed = reader.flag("use_idwt", True)
        wavelet = reader.config.get("wavelet_family", "db1")
        if is_transformed and wavelet != "db1":
            reader.refuse(
                "wavelet_family",
                f"wavelet_family {shown(wavelet)} is not served: of the wavelets only 'db1' is",
            )
        settings = self.read_spectral(reader, count=2592, scaling=25.0)
        # Proportional parameters share n_frequency out by the sizes of all that was selected.
        is_shared_out = reader.flag("proportional_parameters")
        count = None if is_shared_out else settings.count
        return replace(settings, count=count, is_transformed=is_transformed)

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: SpectralSettings,
        base: SiteBase,
    ) -> Delta:
        """See PeftFamily.delta."""
        values = tensors["spectrum"] * settings.scaling
        spectrum = settings.spectrum(module.site, values)
        dense = _from_haar(spectrum) if settings.is_transformed else spectrum
        return without_low_rank(module.site, dense=dense.contiguous())


def _from_haar(spectrum: torch.Tensor) -> torch.Tensor:
    """One level of Haar's inverse transform in two dimensions.

    The quarters hold averages, and differences by row, by column and by both; every 2 x 2 of the
    result is made of one number of each. An odd side ends in a row or column of zeros.
    """
    import torch

    num_rows, num_columns = spectrum.shape
    padded = torch.nn.functional.pad(spectrum, (0, num_columns % 2, 0, num_rows % 2))
    top, bottom = padded.chunk(2)
    (average, by_row), (by_column, by_both) = top.chunk(2, 1), bottom.chunk(2, 1)
    result = torch.empty_like(padded)
    for row, row_sign in ((0, 1.0), (1, -1.0)):
        for column, column_sign in ((0, 1.0), (1, -1.0)):
            result[row::2, column::2] = 0.5 * (
                average
                + column_sign * by_column
                + row_sign * by_row
                + row_sign * column_sign * by_both
            )
    return result[:num_rows, :num_columns]
