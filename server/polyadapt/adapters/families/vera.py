"""VeRA as PEFT writes it: y = W x + diag(b) B diag(d) A x, where all modules share A and B.

Format and rules: huggingface/peft:src/peft/tuners/vera/{config,model,layer}.py, version 0.21.2.
Paper: arXiv 2310.11454.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import SiteBase, low_rank
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import Module, PeftFamily, TensorForm
from polyadapt.adapters.peft_modules import ModuleTargets
from polyadapt.types import BaseSpec

if TYPE_CHECKING:
    import torch


# Elements of A or B that are drawn at most: no file of a few bytes may ask for the whole memory.
_DRAWN = 1 << 28


@dataclass(frozen=True, slots=True)
class VeraSettings:
    """What a config says about the numbers."""

    rank: int
    is_stored: bool  # whether A and B are in the checkpoint
    seed: int  # of A and B
    num_in: int  # the largest of the modules that the config selects
    num_out: int


class Vera(PeftFamily[VeraSettings]):
    """The family `vera`."""

    name = "vera"
    peft_types = frozenset({"VERA"})
    summary = "low rank: the shared A and B cut to each module, times its two vectors"
    forms: ClassVar = {
        "b": TensorForm("vera_lambda_b", ("out",)),
        "d": TensorForm("vera_lambda_d", ("rank",)),
    }
    shared_forms: ClassVar = {
        "A": TensorForm("vera_A", ("rank", "largest in")),
        "B": TensorForm("vera_B", ("largest out", "rank")),
    }
    read_keys = frozenset({"r", "projection_prng_key", "save_projection", "fan_in_fan_out"})
    training_keys = frozenset({"vera_dropout", "d_initial", "init_weights"})
    halves: ClassVar = 1  # parts of equal size that A and d have, of which the first is served

    def settings(self, reader: ConfigReader, base: BaseSpec) -> VeraSettings:
        """See PeftFamily.settings. PEFT's defaults stand for keys that are left out."""
        sizes = targeted_sizes(reader, base)
        settings = VeraSettings(
            rank=reader.rank("r", 256),
            is_stored=reader.flag("save_projection", default=True),
            seed=reader.whole("projection_prng_key", 0),
            num_in=max((num_in for num_in, _ in sizes), default=0),
            num_out=max((num_out for _, num_out in sizes), default=0),
        )
        widest = max(settings.num_in, settings.num_out, 1)
        if not settings.is_stored and settings.rank * widest > _DRAWN:
            reader.invalid(
                "r", settings.rank,
                f"at most {_DRAWN // widest}, since A and B are "
                "drawn from projection_prng_key; save them with save_projection",
            )  # fmt: skip
        if not settings.is_stored:
            reader.notes.append(
                "A and B are not in the checkpoint; they are drawn from projection_prng_key as "
                "PEFT draws them on a CPU"
            )
        return settings

    def shape(self, role: str, site: object, settings: VeraSettings) -> tuple[int | str, ...]:
        """See PeftFamily.shape."""
        return (self.halves * settings.rank,) if role == "d" else ("out",)

    def shared_shape(self, role: str, settings: VeraSettings) -> tuple[int | str, ...] | None:
        """See PeftFamily.shared_shape: A and B fit the largest module that the config selects."""
        if not settings.is_stored:
            return None
        if role == "A":
            return (self.halves * settings.rank, settings.num_in)
        return (settings.num_out, settings.rank)

    def complete(
        self, shared: Mapping[str, torch.Tensor], settings: VeraSettings
    ) -> Mapping[str, torch.Tensor]:
        """See PeftFamily.complete: Kaiming-uniform, A before B, from a generator of their own."""
        import torch

        if settings.is_stored:
            return shared
        generator = torch.Generator().manual_seed(settings.seed)

        def draw(rows: int, columns: int) -> torch.Tensor:
            bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
            return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

        rank = settings.rank
        return {
            "A": draw(self.halves * rank, settings.num_in),
            "B": draw(settings.num_out, rank),
        }

    def cell(self, module: Module, settings: VeraSettings) -> tuple[int, int]:
        """See PeftFamily.cell."""
        return settings.rank, 0

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: VeraSettings,
        base: SiteBase,
    ) -> Delta:
        """See PeftFamily.delta."""
        rank, site = settings.rank, module.site
        a = tensors["d"][:rank, None] * shared["A"][:rank, : site.in_features]
        return low_rank(a, tensors["b"][:, None] * shared["B"][: site.out_features])


def targeted_sizes(reader: ConfigReader, base: BaseSpec) -> list[tuple[int, int]]:
    """Inputs and outputs of every linear that the config selects, for tensors that all share."""
    targets = ModuleTargets.read(reader.config, problems=[])  # what is wrong is reported elsewhere
    if targets is None:
        return []
    return [
        (site.in_features, site.out_features)
        for site in base.sites
        if site.kind == "linear" and targets.selects(site, base)
    ]
