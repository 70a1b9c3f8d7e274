"""RandLoRA as PEFT writes it: W plus a sum of random bases of rank r that all modules share, each
with trained scales of its r components and of its shorter side; together they have full rank.

Format and rules: huggingface/peft:src/peft/tuners/randlora/{config,model,layer}.py, version 0.21.2.
Paper: arXiv 2502.00987.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import SiteBase, without_low_rank
from polyadapt.adapters.families.vera import targeted_sizes
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import MisfitError, Module, PeftFamily, TensorForm
from polyadapt.ops import cells
from polyadapt.types import BaseSpec, SiteSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a config says about the numbers."""

    rank: int
    alpha: float
    is_stored: bool  # whether the bases are in the checkpoint
    seed: int  # of the bases
    sparsity: float  # of their elements two in 2 * sparsity are not zero; 0: all
    shorter: int  # side of the bases: of the largest input and output that the config selects
    longer: int

    def num_bases(self, shorter: int) -> int:
        """How many bases of rank r have full rank together."""
        return -(-shorter // self.rank)


class Randlora(PeftFamily[_Settings]):
    """The family `randlora`."""

    name = "randlora"
    peft_types = frozenset({"RANDLORA"})
    summary = "a whole difference: the sum of the scaled bases, which has full rank"
    overrides = cells.DENSE
    forms: ClassVar = {
        "scales": TensorForm("randlora_lambda", ("rank", "bases")),
        "widths": TensorForm("randlora_gamma", ("bases", "shorter")),
        # PEFT stores what the modules share once more with each of them.
        "A": TensorForm("randlora_A", ("rank", 1, "shorter"), is_optional=True),
        "B": TensorForm("randlora_B", ("longer", "bases", "rank"), is_optional=True),
    }
    shared_forms: ClassVar = {
        "A": TensorForm("randlora_A", ("rank", 1, "shorter")),
        "B": TensorForm("randlora_B", ("longer", "bases", "rank")),
    }
    read_keys = frozenset(
        {
            *("r", "randlora_alpha", "projection_prng_key", "save_projection", "fan_in_fan_out"),
            *("sparse", "very_sparse"),
        }
    )
    training_keys = frozenset({"randlora_dropout", "init_weights"})

    def settings(self, reader: ConfigReader, base: BaseSpec) -> _Settings:
        """See PeftFamily.settings. PEFT's defaults stand for keys that are left out."""
        sizes = targeted_sizes(reader, base)
        largest = (max((i for i, _ in sizes), default=0), max((o for _, o in sizes), default=0))
        is_sparse, is_very_sparse = reader.flag("sparse"), reader.flag("very_sparse")
        sparsity = math.sqrt(min(largest)) if is_very_sparse else 3.0 if is_sparse else 0.0
        settings = _Settings(
            rank=reader.rank("r", 32),
            alpha=reader.number("randlora_alpha", 640),
            is_stored=reader.flag("save_projection", default=True),
            seed=reader.whole("projection_prng_key", 0),
            sparsity=sparsity,
            shorter=min(largest),
            longer=max(largest),
        )
        if settings.rank > max(settings.shorter, 1) and sizes:
            reader.invalid(
                "r", settings.rank, f"at most {settings.shorter}, where one basis has full rank"
            )
        if not settings.is_stored:
            reader.notes.append(
                "the bases are not in the checkpoint; they are drawn from projection_prng_key as "
                "PEFT draws them on a CPU"
            )
        return settings

    def shape(self, role: str, site: SiteSpec, settings: _Settings) -> tuple[int | str, ...]:
        """See PeftFamily.shape."""
        if role in ("A", "B"):
            return _shared_shape(role, settings)
        shorter = min(site.in_features, site.out_features)
        num_bases = settings.num_bases(shorter)
        return (settings.rank, num_bases) if role == "scales" else (num_bases, shorter)

    def shared_shape(self, role: str, settings: _Settings) -> tuple[int | str, ...] | None:
        """See PeftFamily.shared_shape: the bases fit the largest module that is selected."""
        return _shared_shape(role, settings) if settings.is_stored else None

    def complete(
        self, shared: Mapping[str, torch.Tensor], settings: _Settings
    ) -> Mapping[str, torch.Tensor]:
        """See PeftFamily.complete."""
        return shared if settings.is_stored else _drawn(settings)

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
        """See PeftFamily.delta.

        PEFT numbers the components of A by rank and then by basis, and those of B by basis and
        then by rank, and multiplies them by these numbers.
        """
        import torch

        site = module.site
        for role in ("A", "B"):
            if role in tensors and not torch.equal(tensors[role], shared[role]):
                raise MisfitError(f"randlora_{role} of {site.path} is not the one that all share")
        shorter, longer = sorted((site.in_features, site.out_features))
        scales, widths = tensors["scales"], tensors["widths"]
        a = scales[:, :, None] * shared["A"][:, :, :shorter] * widths[None]
        b = shared["B"][:longer, : settings.num_bases(shorter)]
        difference = b.flatten(1) @ a.flatten(0, 1) * (settings.alpha / settings.rank)
        if site.in_features != shorter:
            difference = difference.t()
        return without_low_rank(site, dense=difference.contiguous())


def _shared_shape(role: str, settings: _Settings) -> tuple[int | str, ...]:
    if role == "A":
        return (settings.rank, 1, settings.shorter)
    return (settings.longer, settings.num_bases(settings.shorter), settings.rank)


def _drawn(settings: _Settings) -> dict[str, torch.Tensor]:
    """The bases as PEFT draws them on a CPU: A before B, dense ones in bfloat16 basis by basis."""
    import torch

    generator = torch.Generator().manual_seed(settings.seed)
    rank, num_bases = settings.rank, settings.num_bases(settings.shorter)
    if settings.sparsity:
        edge = 1 / (2 * settings.sparsity)

        def signs(*shape: int) -> torch.Tensor:
            drawn = torch.rand(shape, generator=generator)
            return (drawn > 1 - edge).float() - (drawn < edge).float()

        a, b = signs(rank, 1, settings.shorter), signs(settings.longer, num_bases, rank)
    else:

        def kaiming(*shape: int) -> torch.Tensor:
            empty = torch.empty(shape, dtype=torch.bfloat16)
            return torch.nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)

        a = kaiming(rank, 1, settings.shorter)
        b = torch.cat([kaiming(settings.longer, 1, rank) for _ in range(num_bases)], 1)
    return {"A": (a / a.std()).float(), "B": (b / b.std()).float()}
