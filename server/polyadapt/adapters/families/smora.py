"""SMoRA: every component of a LoRA is an expert, and each row takes k of them at each module.

v = sigmoid(W_r x) + beta, where a score stands for rank_partition components that follow each
other; the k largest v are kept, of equal ones the first, and divided by their sum, which gives g;
y = W x + alpha * B (g * A x). beta, which training moves to spread the load, is in the value and
not only in the choice.

arXiv 2501.15103; StyxXuan/smora:packages/peft/src/peft/tuners/srmole/{config,layer,model}.py, which
multiplies g by k and the sum by alpha / k, hence alpha. Its guard against a sum that is not
positive is ours: the original has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import SiteBase, low_rank
from polyadapt.adapters.families.lora import Lora
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import MisfitError, Module, PeftFamily, TensorForm
from polyadapt.errors import Problem
from polyadapt.ops import cells
from polyadapt.ops.cells import Router, Routing
from polyadapt.types import BaseSpec, SiteSpec

if TYPE_CHECKING:
    import torch

_UNREAD = "SMoRA's own code does not read it, so what it should mean here is open; set it to null"
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal")


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a config says about the numbers."""

    rank: int
    alpha: float
    num_kept: int  # activate_r
    partition: int  # components of one score

    @property
    def num_scores(self) -> int:
        """Rows of the router."""
        return max(self.rank // self.partition, 1)


class Smora(PeftFamily[_Settings]):
    """The family `smora`."""

    name = "smora"
    peft_types = frozenset({"SRMOLE"})
    summary = "low rank, routed: each row takes k components by sigmoid scores of its own input"
    forms: ClassVar = {
        "a": TensorForm("lora_A.weight", ("rank", "in")),
        "b": TensorForm("lora_B.weight", ("out", "rank")),
        "router": TensorForm("lora_router.weight", ("scores", "in")),
        # `check` says why it must be there.
        "biases": TensorForm("lora_biases", ("rank",), is_optional=True),
    }
    read_keys = frozenset(
        {
            *("r", "lora_alpha", "activate_r", "rank_partition", "init_lora_weights"),
            *("fan_in_fan_out", "megatron_core", "qalora_group_size"),
        }
    )
    training_keys = Lora.training_keys | {"epsilon_greedy", "dense_compute"}
    refused_keys: ClassVar = {
        **Lora.refused_keys,
        **dict.fromkeys(
            (
                *("use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern"),
                *("alora_invocation_tokens", "use_bdlora", "kasa_config", "target_parameters"),
                "ensure_weight_tying",
            ),
            _UNREAD,
        ),
        "trainable_token_indices": "a replaced token is a component that no router weighs",
    }
    foreign: ClassVar = {
        "lora_embedding_A": "an embedding has no input that a router could read",
        "lora_embedding_B": "an embedding has no input that a router could read",
        "lora_magnitude_vector": "it belongs to DoRA, which is not routed",
    }

    def settings(self, reader: ConfigReader, base: BaseSpec) -> _Settings:
        """See PeftFamily.settings. The original's defaults stand for keys that are left out."""
        reader.flag("fan_in_fan_out")
        init = reader.config.get("init_lora_weights", True)
        if not any(init is plain or init == plain for plain in _PLAIN_INITS):
            reader.invalid("init_lora_weights", init, "true, false or a random start")
        settings = _Settings(
            rank=reader.rank("r"),
            alpha=reader.number("lora_alpha", 8),
            num_kept=reader.rank("activate_r", 8),
            partition=reader.rank("rank_partition", 1),
        )
        if settings.num_kept > settings.rank:
            reader.invalid("activate_r", settings.num_kept, f"at most r, which is {settings.rank}")
        if settings.rank % settings.partition:
            reader.invalid(
                "rank_partition", settings.partition, f"a divisor of r, which is {settings.rank}"
            )
        return settings

    def shape(self, role: str, site: SiteSpec, settings: _Settings) -> tuple[int | str, ...]:
        """See PeftFamily.shape."""
        return (settings.num_scores, "in") if role == "router" else self.forms[role].shape

    def cell(self, module: Module, settings: _Settings) -> tuple[int, int]:
        """See PeftFamily.cell."""
        rank = module.sizes["rank"]
        if rank > cells.MAX_SCORES:
            raise MisfitError(f"{rank} components, at most {cells.MAX_SCORES} can be routed")
        return rank, cells.ROUTER_BIAS

    def routing(self, module: Module, settings: _Settings) -> Routing | None:
        """See PeftFamily.routing."""
        return Routing(Router.SIGMOID, settings.num_scores, settings.num_kept)

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: _Settings,
        base: SiteBase,
    ) -> Delta:
        """See PeftFamily.delta."""
        biases = tensors["biases"]
        largest = float(biases.topk(settings.num_kept).values.sum())
        if largest + settings.num_kept <= 0:
            raise MisfitError(
                f"{module.site.path}: the {settings.num_kept} largest lora_biases sum up to "
                f"{largest:g}, so that with scores below one no sum of chosen values is positive "
                "and they cannot be divided by it"
            )
        return low_rank(
            tensors["a"], tensors["b"] * settings.alpha,
            routing=self.routing(module, settings), router=tensors["router"], router_bias=biases,
        )  # fmt: skip

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
            if rank is None:
                continue
            if rank != settings.rank:
                problems.append(
                    Problem(
                        "rank_mismatch",
                        f"{path} has rank {rank} in the checkpoint and r is {settings.rank}",
                        path,
                    )
                )
            if "biases" not in module.keys:
                problems.append(
                    Problem(
                        "missing_tensor",
                        f"{path} has no lora_biases: an older version of SMoRA writes the same "
                        "other names for another model, a softmax over the scores and components "
                        "that are chosen and not weighed, which is not served",
                        path,
                    )
                )

    def _bias_names(self) -> tuple[str, ...]:
        return ("lora",)  # as PEFT writes it: bias = "lora_only"
