"""MoLA: several LoRAs beside each linear, of which a row takes the k that its input scores best.

p = softmax(G x) over all experts, one G for each linear; the k largest are kept, of equal ones the
first, and divided by their sum; y = W x + s * sum_e p_e B_e A_e x, with s = alpha / r or
alpha / sqrt(r). The number of experts may be another one in every layer.

arXiv 2402.08562; TUDB-Labs/MoE-PEFT:moe_peft/adapters/mola/{config,model}.py, whose names and
config are read; GCYZSL/MoLA:src/mola_lora_hacked.py, whose files `polyadapt convert` reads and
whose r, experts and k are lists by layer, which the keys r, num_experts and top_k may be here too.
MoE-PEFT leaves the dropout of its experts on when it is not training; here it is off.
"""

from __future__ import annotations

from typing import ClassVar

from polyadapt.adapters.families.loramoe import EXPERT_FORMS, LoraMoe, PerLayer
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import Module
from polyadapt.types import BaseSpec


class Mola(LoraMoe):
    """The family `mola`."""

    name = "mola"
    peft_types = frozenset({"MOLA"})
    summary = "low rank, routed: each row takes the k best of several LoRAs, weights summing to one"
    forms: ClassVar = {**EXPERT_FORMS}
    read_keys = LoraMoe.read_keys | {"top_k"}
    may_layers_differ: ClassVar = True
    renormalises: ClassVar = True

    def _top_k(self, reader: ConfigReader, base: BaseSpec) -> PerLayer:
        kept = self._per_layer(reader, "top_k", base, default=2)
        experts = self._per_layer(ConfigReader(reader.config, [], []), "num_experts", base)
        longest = max(len(kept.values), len(experts.values))
        spread = (v.values * (longest // len(v.values)) for v in (kept, experts))
        if any(top_k > num_experts for top_k, num_experts in zip(*spread, strict=False)):
            reader.invalid("top_k", reader.config.get("top_k", 2), "at most num_experts")
        return kept

    def _wanted(self, module: Module) -> set[str] | None:
        return None
