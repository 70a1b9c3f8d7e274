"""VB-LoRA as PEFT writes it: A and B are put together of mixtures of a few vectors that all modules
share, each of the k vectors of the largest logits by their softmax.

Format and rules: huggingface/peft:src/peft/tuners/vblora/{config,layer,model}.py, version 0.21.2.
Paper: arXiv 2405.15179.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import (
    MisfitError,
    Module,
    PeftFamily,
    SiteBase,
    TensorForm,
    low_rank,
)
from polyadapt.types import BaseSpec, SiteSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a config says about the numbers."""

    rank: int
    num_vectors: int
    length: int  # of a vector
    num_mixed: int  # vectors in a mixture


class Vblora(PeftFamily[_Settings]):
    """The family `vblora`."""

    name = "vblora"
    peft_types = frozenset({"VBLORA"})
    summary = "low rank: A and B put together of the shared vectors at load"
    forms: ClassVar = {
        "a": TensorForm("vblora_logits_A", ("rank", "vectors of A", "vectors")),
        "b": TensorForm("vblora_logits_B", ("vectors of B", "rank", "vectors")),
    }
    shared_forms: ClassVar = {"bank": TensorForm("vblora_vector_bank", ("vectors", "length"))}
    read_keys = frozenset({"r", "num_vectors", "vector_length", "topk", "fan_in_fan_out"})
    training_keys = frozenset({"vblora_dropout", "init_vector_bank_bound", "init_logits_std"})
    refused_keys: ClassVar = {
        "save_only_topk_weights": "it stores whole numbers; save with the logits"
    }

    def settings(self, reader: ConfigReader, base: BaseSpec) -> _Settings:
        """See PeftFamily.settings. PEFT's defaults stand for keys that are left out."""
        settings = _Settings(
            rank=reader.rank("r", 4),
            num_vectors=reader.whole("num_vectors", 256, least=1),
            length=reader.whole("vector_length", 256, least=1),
            num_mixed=reader.whole("topk", 2, least=1),
        )
        if settings.num_mixed > settings.num_vectors:
            reader.invalid("topk", settings.num_mixed, f"at most {settings.num_vectors} vectors")
        return settings

    def shape(self, role: str, site: SiteSpec, settings: _Settings) -> tuple[int | str, ...]:
        """See PeftFamily.shape."""
        if role == "a":
            return (settings.rank, site.in_features // settings.length, settings.num_vectors)
        return (site.out_features // settings.length, settings.rank, settings.num_vectors)

    def shared_shape(self, role: str, settings: _Settings) -> tuple[int | str, ...] | None:
        """See PeftFamily.shared_shape."""
        return (settings.num_vectors, settings.length)

    def cell(self, module: Module, settings: _Settings) -> tuple[int, int]:
        """See PeftFamily.cell."""
        site, length = module.site, settings.length
        if site.in_features % length or site.out_features % length:
            raise MisfitError(
                f"vector_length = {length} does not divide {site.out_features} x {site.in_features}"
            )
        return settings.rank, 0

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: _Settings,
        base: SiteBase,
    ) -> Delta:
        """See PeftFamily.delta."""

        def mixed(logits: torch.Tensor) -> torch.Tensor:
            values, places = logits.topk(settings.num_mixed, dim=-1)
            return (values.softmax(-1)[..., None] * shared["bank"][places]).sum(-2)

        a = mixed(tensors["a"])  # [rank, vectors of A, length]
        b = mixed(tensors["b"]).transpose(1, 2)  # [vectors of B, length, rank]
        site, rank = module.site, settings.rank
        return low_rank(a.reshape(rank, site.in_features), b.reshape(site.out_features, rank))
