"""AdaLoRA as PEFT writes it: y = W x + s B diag(E) A x, with as many components per module as
training left.

Format and rules: huggingface/peft:src/peft/tuners/adalora/{config,model,layer}.py, version 0.21.2.
Paper: arXiv 2303.10512.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import SiteBase, low_rank
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import Module, PeftFamily, TensorForm
from polyadapt.errors import Problem
from polyadapt.types import BaseSpec
from polyadapt_store.strict_json import shown

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a config says about the numbers."""

    first_rank: int  # every module's before training took components away
    alpha: float
    ranks: Mapping[str, int]  # path -> components that are left

    def rank(self, path: str) -> int:
        """How many components the module has in the checkpoint."""
        return self.ranks.get(path, self.first_rank)

    def scale(self, rank: int) -> float:
        """alpha / r with the rank before training, which PEFT keeps when it takes components away.

        An alpha of zero or less stands for the rank that is left.
        """
        return (self.alpha if self.alpha > 0 else float(rank)) / (self.first_rank + 1e-5)


class AdaLora(PeftFamily[_Settings]):
    """The family `adalora`."""

    name = "adalora"
    peft_types = frozenset({"ADALORA"})
    summary = "low rank: the components that training left, B times E and alpha / init_r"
    forms: ClassVar = {
        "a": TensorForm("lora_A", ("rank", "in")),
        "b": TensorForm("lora_B", ("out", "rank")),
        "e": TensorForm("lora_E", ("rank", 1)),
    }
    read_keys = frozenset({"init_r", "lora_alpha", "rank_pattern", "fan_in_fan_out"})
    # The second line: PEFT's AdaLoRA layers do not look at these keys, which LoRA's config has.
    training_keys = frozenset(
        {
            *("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"),
            *("r", "use_rslora", "alpha_pattern", "init_lora_weights", "lora_bias", "use_qalora"),
            *("total_step", "lora_dropout", "eva_config", "corda_config", "lora_ga_config"),
            *("megatron_core", "qalora_group_size"),
        }
    )
    refused_keys: ClassVar = {
        "target_parameters": "it adapts bare parameters such as fused experts, not modules",
        "layer_replication": "it repeats layers, so it needs another base model",
        "ensure_weight_tying": "it is served with LoRA alone",
        "use_dora": "PEFT's AdaLoRA has no magnitudes",
        "loftq_config": "it took components out of the base when training began",
        "alora_invocation_tokens": "it is served with LoRA alone",
        "use_bdlora": "it is served with LoRA alone",
        "arrow_config": "it routes tokens between several adapters",
        "kasa_config": "it is served with LoRA alone",
        "monteclora_config": "it stores a sampler beside A and B",
        "velora_config": "it stores projections beside A and B",
        "megatron_config": "it needs Megatron's parallel layers as the base",
    }
    may_be_empty = True

    def _bias_names(self) -> tuple[str, ...]:
        return ("lora", self.name)

    def settings(self, reader: ConfigReader, base: BaseSpec) -> _Settings:
        """See PeftFamily.settings. PEFT's defaults stand for keys that are left out."""
        return _Settings(
            first_rank=reader.rank("init_r", 12),
            alpha=reader.number("lora_alpha", 8),
            ranks=_read_ranks(reader),
        )

    def cell(self, module: Module, settings: _Settings) -> tuple[int, int]:
        """See PeftFamily.cell."""
        return module.sizes["rank"], 0

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: _Settings,
        base: SiteBase,
    ) -> Delta:
        """See PeftFamily.delta."""
        scale = tensors["e"][:, 0] * settings.scale(module.sizes["rank"])
        return low_rank(tensors["a"], tensors["b"] * scale)

    def check(
        self,
        modules: Mapping[int, Module],
        settings: _Settings,
        base: BaseSpec,
        problems: list[Problem],
        notes: list[str],
    ) -> None:
        """See PeftFamily.check."""
        for _, module in sorted(modules.items()):
            rank, path = module.sizes.get("rank"), module.site.path
            if rank is not None and rank != settings.rank(path):
                problems.append(
                    Problem(
                        "rank_mismatch",
                        f"{path} has rank {rank} in the checkpoint and {settings.rank(path)} by "
                        "init_r and rank_pattern",
                        path,
                    )
                )


def _read_ranks(reader: ConfigReader) -> dict[str, int]:
    """rank_pattern is, unlike LoRA's, "<path>.lora_E" -> whether each first component is left."""
    given: Any = reader.config.get("rank_pattern") or {}
    expected = 'an object of "<module>.lora_E" and lists of true and false'
    ranks: dict[str, int] = {}
    for name, kept in given.items() if isinstance(given, dict) else ():
        path, _, ending = name.removesuffix(".default").rpartition(".")
        if ending != "lora_E" or not isinstance(kept, list) or {type(k) for k in kept} - {bool}:
            reader.invalid(f"rank_pattern[{shown(name)}]", kept, expected)
        else:
            ranks[path] = sum(kept)
    if not isinstance(given, dict):
        reader.invalid("rank_pattern", given, expected)
    return ranks
