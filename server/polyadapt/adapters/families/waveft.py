"""WaveFT: the update is the inverse wavelet transform of a few stored coefficients, or they
themselves.

Formats and rules: huggingface/peft:src/peft/tuners/waveft/{config,model,layer,waverec2d}.py,
version 0.21.2. arXiv 2505.12532. Of the wavelets only Haar's, PEFT's default, is served.
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
from polyadapt.adapters.peft_modules import PatternTable
from polyadapt.ops import cells
from polyadapt.types import BaseSpec, SiteSpec
from polyadapt_store.strict_json import shown

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a config says about the numbers."""

    count: int | None  # of coefficients; None: the tensors tell
    counts: PatternTable
    scaling: float
    seed: int
    is_transformed: bool
    # Modules of one size have their coefficients at the same places: (elements, count) -> places.
    places: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)


class WaveFt(PeftFamily[_Settings]):
    """The family `waveft`."""

    name = "waveft"
    peft_types = frozenset({"WAVEFT"})
    summary = "its coefficients, through Haar's wavelets or not: holds a dense matrix per module"
    overrides = cells.DENSE
    forms: ClassVar = {"spectrum": TensorForm("waveft_spectrum", ("count",))}
    read_keys = frozenset(
        {
            *("n_frequency", "n_frequency_pattern", "proportional_parameters", "scaling"),
            *("random_loc_seed", "use_idwt", "wavelet_family", "fan_in_fan_out"),
        }
    )
    training_keys = frozenset({"init_weights"})

    def settings(self, reader: ConfigReader, base: BaseSpec) -> _Settings:
        """See PeftFamily.settings."""
        reader.flag("fan_in_fan_out")
        is_transformed = reader.flag("use_idwt", True)
        wavelet = reader.config.get("wavelet_family", "db1")
        if is_transformed and wavelet != "db1":
            reader.refuse(
                "wavelet_family",
                f"wavelet_family {shown(wavelet)} is not served: of the wavelets only 'db1' is",
            )
        counts = reader.table(
            "n_frequency_pattern", lambda v: type(v) is int and v > 0, "whole numbers from 1"
        )
        # Proportional parameters share n_frequency out by the sizes of all that was selected.
        is_shared_out = reader.flag("proportional_parameters")
        count = reader.whole("n_frequency", 2592, least=1)
        return _Settings(
            count=None if is_shared_out else count,
            counts=counts,
            scaling=reader.number("scaling", 25.0),
            seed=reader.whole("random_loc_seed", 777),
            is_transformed=is_transformed,
        )

    def shape(self, role: str, site: SiteSpec, settings: _Settings) -> tuple[int | str, ...]:
        """See PeftFamily.shape."""
        if settings.count is None:
            return ("count",)
        found = settings.counts.find(site.path)
        return (settings.count if found is None else found,)

    def cell(self, module: Module, settings: _Settings) -> tuple[int, int]:
        """See PeftFamily.cell."""
        (count,) = self.shape("spectrum", module.site, settings)
        count = module.sizes["count"] if isinstance(count, str) else count
        num_elements = module.site.in_features * module.site.out_features
        if count > num_elements:
            raise MisfitError(f"{count} coefficients are more than the {num_elements} of W")
        return 0, cells.DENSE

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
        spectrum[settings.places[key]] = values * settings.scaling
        spectrum = spectrum.view(site.out_features, site.in_features)
        dense = _from_haar(spectrum) if settings.is_transformed else spectrum
        return without_low_rank(site, dense=dense.contiguous())


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
