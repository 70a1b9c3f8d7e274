"""DyLoRA: one LoRA whose first b components are an adapter of their own, for every rank b.

y = W x + alpha / b * B[:, :b] A[:b] x, b chosen by each request. Stored is B * alpha / r_max; what
is left, the gate r_max / b on the first b components, is the engine's (Traits.nested_rank).

arXiv 2210.07558; huawei-noah/Efficient-NLP:DyLoRA/loralib/{DyLoRA,layers}.py multiplies both
factors by sqrt(r_max / b) beside alpha / r_max, hence alpha / b. The directory is PEFT's for LoRA
with the keys nested, rank_min, rank_max and scale; `polyadapt convert` makes it of a state_dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import SiteBase, low_rank
from polyadapt.adapters.families.lora import Lora
from polyadapt.adapters.peft_config import ConfigReader, is_number, is_rank
from polyadapt.adapters.peft_family import Module, PeftFamily
from polyadapt.adapters.peft_modules import PatternTable
from polyadapt.errors import Problem
from polyadapt.types import BaseSpec, SiteSpec

if TYPE_CHECKING:
    import torch

SCALE = "alpha/b"  # the only value of `scale`

_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal")


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a config says about the numbers."""

    rank: int  # r_max
    min_rank: int
    alpha: float
    ranks: PatternTable
    alphas: PatternTable

    def site_rank(self, site: SiteSpec) -> int:
        """The rank that the config gives this module."""
        found = self.ranks.find(site.path)
        return self.rank if found is None else found

    def scale(self, site: SiteSpec) -> float:
        """alpha / r_max, with the module's own alpha."""
        found = self.alphas.find(site.path)
        return float((self.alpha if found is None else found) / self.rank)


class DyLora(PeftFamily[_Settings]):
    """The family `dylora`."""

    name = "dylora"
    peft_types = frozenset({"LORA"})
    summary = (
        "nested LoRA: each request chooses a rank b and gets the first b components, alpha / b"
    )
    forms: ClassVar = {role: Lora.forms[role] for role in ("a", "b", "embedding_a", "embedding_b")}
    read_keys = frozenset(
        {
            *("nested", "rank_min", "rank_max", "scale", "r", "lora_alpha", "rank_pattern"),
            *("alpha_pattern", "init_lora_weights", "fan_in_fan_out"),
            *("megatron_core", "qalora_group_size"),
        }
    )
    training_keys = Lora.training_keys
    refused_keys: ClassVar = Lora.refused_keys | {
        "use_rslora": "a nested adapter acts with alpha / b, not alpha / sqrt(r)",
        "use_dora": "its row norms belong to one rank, and every rank b would need its own",
        "lora_bias": "a bias of B is no part of any component, so no rank b has a share of it",
        "alora_invocation_tokens": "a nested adapter acts on every token",
        "use_bdlora": "its components are cut into blocks, so that the first b are not nested",
        "trainable_token_indices": "a replaced token is a component that no rank b may leave out",
        "ensure_weight_tying": "a nested adapter of a tied head must be stored by itself",
    }
    foreign: ClassVar = Lora.foreign | {
        "lora_magnitude_vector": "it belongs to DoRA, which is not nested",
        "trainable_tokens_delta": "a replaced token is a component that no rank b may leave out",
    }

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether it is a LoRA that calls itself nested."""
        return super().claims(config) and bool(config.get("nested"))

    def settings(self, reader: ConfigReader, base: BaseSpec) -> _Settings:
        """See PeftFamily.settings. `scale` must be given: alpha / r is the common mistake."""
        for key in ("nested", "fan_in_fan_out"):
            reader.flag(key)
        rank = reader.rank("r")
        largest, smallest = reader.rank("rank_max", rank), reader.rank("rank_min", 1)
        if largest != rank:
            reader.invalid("rank_max", largest, f"r, which is {rank}")
        elif smallest > rank:
            reader.invalid("rank_min", smallest, f"a rank of at most rank_max, which is {rank}")
        if reader.config.get("scale") != SCALE:
            reader.invalid("scale", reader.config.get("scale"), repr(SCALE))
        init = reader.config.get("init_lora_weights", True)
        if not any(init is plain or init == plain for plain in _PLAIN_INITS):
            reader.invalid(
                "init_lora_weights", init, "true, false or a random start: others change the base"
            )
        return _Settings(
            rank=rank,
            min_rank=smallest,
            alpha=reader.number("lora_alpha", 8),
            ranks=reader.table("rank_pattern", is_rank, "ranks"),
            alphas=reader.table("alpha_pattern", is_number, "finite numbers"),
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
        """See PeftFamily.delta: of rank r_max, at which the gate is one."""
        kind = "embedding_" if module.site.kind == "embedding" else ""
        return low_rank(tensors[f"{kind}a"], tensors[f"{kind}b"] * settings.scale(module.site))

    def traits(self, settings: _Settings) -> dict[str, Any]:
        """See PeftFamily.traits."""
        return {"nested_rank": settings.rank, "min_nested_rank": settings.min_rank}

    def check(
        self,
        modules: Mapping[int, Module],
        settings: _Settings,
        base: BaseSpec,
        problems: list[Problem],
        notes: list[str],
    ) -> None:
        """See PeftFamily.check: one gate serves every module, so all have the same components."""
        for _, module in sorted(modules.items()):
            rank, path = module.sizes.get("rank"), module.site.path
            if rank is None:
                continue
            if settings.site_rank(module.site) != settings.rank:
                problems.append(
                    Problem(
                        "unsupported_config",
                        f"rank_pattern gives {path} rank {settings.site_rank(module.site)} and r "
                        f"is {settings.rank}: a nested adapter has one rank everywhere, as a "
                        "request chooses one b for all of it",
                        "rank_pattern",
                    )
                )
            elif rank != settings.rank:
                problems.append(
                    Problem(
                        "rank_mismatch",
                        f"{path} has rank {rank} in the checkpoint, r and rank_max are "
                        f"{settings.rank}",
                        path,
                    )
                )

    def _bias_names(self) -> tuple[str, ...]:
        return ("lora",)  # as PEFT writes it: bias = "lora_only"
