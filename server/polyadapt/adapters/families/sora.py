"""SoRA: a LoRA with one trained gate per component, most of which training drove to zero.

y = W x + alpha / r_max * B (g * A x); LayerNorms were trained beside it and are replaced.
Components whose gate is exactly zero are dropped when the adapter is read, which leaves each module
a rank of its own, maybe none; the scale stays that of r_max, the rank that training began with.

arXiv 2311.11696; TsinghuaC3I/SoRA:src/lora.py. Tensors keep the names that they have in its whole-
model state_dict, where the low-rank part is a child `lora` of its linear and norms are themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import SiteBase, low_rank
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import Module, PeftFamily, TensorForm
from polyadapt.errors import Problem
from polyadapt.ops import cells
from polyadapt.types import BaseSpec
from polyadapt_store.strict_json import shown

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a config says about the numbers."""

    rank: int  # r_max
    alpha: float


class Sora(PeftFamily[_Settings]):
    """The family `sora`. Its plan counts every stored component, pruned or not: a gate's number is
    no part of a header, so rank and num_elements are upper bounds.
    """

    name = "sora"
    peft_types = frozenset({"SORA"})
    summary = "gates folded into B with alpha / r_max, components with gate 0 dropped; new norms"
    scaling = "yes, unless norms are replaced"
    overrides = cells.WEIGHT
    forms: ClassVar = {
        "a": TensorForm("lora.lora_A", ("rank", "in")),
        "b": TensorForm("lora.lora_B", ("out", "rank")),
        "gate": TensorForm("lora.gate", (1, "rank")),
    }
    read_keys = frozenset(
        {
            *("r", "lora_r", "lora_alpha", "init_lora_weights", "fan_in_fan_out"),
            *("megatron_core", "qalora_group_size"),
        }
    )
    training_keys = frozenset({"lora_dropout", "sparse_lambda", "unfrozen_modules"})

    def settings(self, reader: ConfigReader, base: BaseSpec) -> _Settings:
        """See PeftFamily.settings. lora_r is the original's word for r; nothing has a default, as
        the scale depends on all of it.
        """
        config = reader.config
        reader.flag("init_lora_weights")
        reader.flag("fan_in_fan_out")
        names = [key for key in ("r", "lora_r") if config.get(key) is not None]
        if not names:
            reader.invalid("r", None, "the rank that training began with")
        if len(names) == 2 and config["r"] != config["lora_r"]:
            reader.invalid("lora_r", config["lora_r"], f"r, which is {shown(config['r'])}")
        if config.get("lora_alpha") is None:
            reader.invalid("lora_alpha", None, "a finite number")
            return _Settings(1, 1.0)
        return _Settings(
            rank=reader.rank(names[0]) if names else 1, alpha=reader.number("lora_alpha", 1.0)
        )

    def replaced_whole(
        self, modules: Mapping[int, Module], settings: _Settings, base: BaseSpec
    ) -> tuple[str, ...]:
        """See PeftFamily.replaced_whole: norms are trained without a word in the config."""
        return tuple(
            module.site.path
            for module in modules.values()
            if module.site.kind == "norm" and "new_weight" in module.keys
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
        gate = tensors["gate"][0]
        is_kept = gate != 0
        scaled = tensors["b"] * (gate * (settings.alpha / settings.rank))
        return low_rank(tensors["a"][is_kept], scaled[:, is_kept])

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
            if rank is not None and rank != settings.rank:
                problems.append(
                    Problem(
                        "rank_mismatch",
                        f"{path} has rank {rank} in the checkpoint and r is {settings.rank}, the "
                        "rank that training began with: store all components, those with gate 0 "
                        "are dropped here",
                        path,
                    )
                )
        notes.append("components with gate 0 are dropped when it is loaded: sizes are upper bounds")
