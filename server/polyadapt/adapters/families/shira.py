"""SHiRA: a few elements of the weight are added to, at stored positions.

Formats and rules: huggingface/peft:src/peft/tuners/shira/{config,model,layer}.py, version 0.21.2.
arXiv 2406.13175.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import SiteBase, without_low_rank
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import MisfitError, Module, PeftFamily, TensorForm
from polyadapt.ops import cells
from polyadapt.types import BaseSpec, SiteSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a config says about the numbers."""

    rank: int  # there are as many elements as a LoRA of this rank has


class Shira(PeftFamily[_Settings]):
    """The family `shira`."""

    name = "shira"
    peft_types = frozenset({"SHIRA"})
    summary = "its elements among zeros: holds a dense matrix per module"
    overrides = cells.DENSE
    forms: ClassVar = {
        "values": TensorForm("shira_weight", ("count",)),
        "places": TensorForm("shira_indices", (2, "count"), is_index=True),
    }
    read_keys = frozenset({"r", "fan_in_fan_out"})
    training_keys = frozenset({"mask_type", "random_seed", "init_weights"})  # places are stored

    def settings(self, reader: ConfigReader, base: BaseSpec) -> _Settings:
        """See PeftFamily.settings."""
        reader.flag("fan_in_fan_out")
        return _Settings(reader.rank("r", 32))

    def shape(self, role: str, site: SiteSpec, settings: _Settings) -> tuple[int | str, ...]:
        """See PeftFamily.shape."""
        count = settings.rank * (site.in_features + site.out_features)
        return (count,) if role == "values" else (2, count)

    def cell(self, module: Module, settings: _Settings) -> tuple[int, int]:
        """See PeftFamily.cell."""
        return 0, cells.DENSE

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: _Settings,
        base: SiteBase,
    ) -> Delta:
        """See PeftFamily.delta. Values of one place add up, as in PEFT's sparse matrix."""
        import torch

        site = module.site
        rows, columns = tensors["places"]
        for name, given, size in (
            ("row", rows, site.out_features), ("column", columns, site.in_features),
        ):  # fmt: skip
            if int(given.min()) < 0 or int(given.max()) >= size:
                raise MisfitError(
                    f"shira_indices of {site.path} hold {name}s from {int(given.min())} to "
                    f"{int(given.max())}, W has {size}"
                )
        dense = torch.zeros(site.out_features, site.in_features)
        dense.index_put_((rows, columns), tensors["values"], accumulate=True)
        return without_low_rank(site, dense=dense)
