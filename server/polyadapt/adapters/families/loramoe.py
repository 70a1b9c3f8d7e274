"""LoRAMoE as MoE-PEFT writes it: several LoRAs beside each linear of the MLP, all of them weighed.

p = softmax(G x) over all experts, one G for each linear; y = W x + s * sum_e p_e B_e A_e x, with
s = alpha / r or alpha / sqrt(r). Linears of the attention have one ordinary LoRA.

arXiv 2312.09979; TUDB-Labs/MoE-PEFT:moe_peft/adapters/loramoe/{config,model}.py, moe_peft/model.py
(names and which linears have experts), moe_peft/common/{config,lora_linear}.py. The original leaves
the dropout of its experts on when it is not training; here it is off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from polyadapt.adapters.adapter import AdapterPlan, BaseWeights, Delta, layer_of
from polyadapt.adapters.deltas import SiteBase, low_rank
from polyadapt.adapters.peft_config import ConfigReader, is_rank
from polyadapt.adapters.peft_family import MisfitError, Module, PeftFamily, TensorForm
from polyadapt.errors import Problem
from polyadapt.ops import cells
from polyadapt.ops.cells import Router, Routing
from polyadapt.types import BaseSpec, SiteSpec
from polyadapt_store.checkpoint import Checkpoint, TensorInfo
from polyadapt_store.strict_json import shown

if TYPE_CHECKING:
    import torch

MAX_EXPERTS = 64  # of one linear: a tensor's name holds the number

_LISTED = 4  # names in a message


@dataclass(frozen=True, slots=True)
class PerLayer:
    """One number for all decoder layers, or one for each."""

    values: tuple[int, ...]

    def of(self, site: SiteSpec) -> int:
        """The number of the layer that the module lies in."""
        placed = layer_of(site.path)
        assert placed is not None  # `places` names nothing else
        return self.values[placed[1] if len(self.values) > 1 else 0]


@dataclass(frozen=True, slots=True)
class MoeSettings:
    """What a config says about the numbers."""

    ranks: PerLayer
    alpha: float
    is_rank_stabilised: bool
    num_experts: PerLayer
    top_k: PerLayer  # 0: all

    def scale(self, site: SiteSpec) -> float:
        """alpha / r, or alpha / sqrt(r) if rank-stabilised."""
        rank = self.ranks.of(site)
        return float(self.alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank))


def _expert_forms() -> dict[str, TensorForm]:
    """Of each expert, and of the router; which of them a module needs, the config's number says."""
    forms = {}
    for expert in range(MAX_EXPERTS):
        for role, name, shape in (
            ("a", "lora_A", ("rank", "in")), ("b", "lora_B", ("out", "rank")),
        ):  # fmt: skip
            form = TensorForm(f"experts.{expert}.{name}.weight", shape, is_optional=True)
            forms[f"{role}{expert}"] = form
    return forms | {"router": TensorForm("moe_gate.weight", ("experts", "in"), is_optional=True)}


EXPERT_FORMS: Mapping[str, TensorForm] = _expert_forms()


class LoraMoe(PeftFamily[MoeSettings]):
    """The family `loramoe`; MoLA differs in what is marked with `->`."""

    name = "loramoe"
    peft_types = frozenset({"LORAMOE"})
    summary = "low rank, routed: LoRAs side by side, weighed by a softmax of the row's own input"
    forms: ClassVar = {
        **EXPERT_FORMS,
        "a": TensorForm("lora_A.weight", ("rank", "in"), is_optional=True),
        "b": TensorForm("lora_B.weight", ("out", "rank"), is_optional=True),
    }
    read_keys = frozenset({"r", "lora_alpha", "use_rslora", "num_experts", "routing_strategy"})
    training_keys = frozenset(
        {
            *("lora_dropout", "lora_init", "router_init_range", "router_loss", "name"),
            *("router_aux_loss_coef", "task_name"),
        }
    )
    refused_keys: ClassVar = {
        "use_dora": "its magnitudes are not in the file",
        "modules_to_save": "MoE-PEFT saves no modules of the base",
        "trainable_token_indices": "MoE-PEFT trains no tokens",
        "layers_to_transform": "MoE-PEFT adapts every layer",
        "exclude_modules": "MoE-PEFT adapts all modules that it names",
    }
    foreign: ClassVar = {
        "classifier": "it is a head for classes, and what is served is text",
        "lora_magnitude_vector": "it belongs to DoRA, which is not routed",
    }
    may_layers_differ: ClassVar = False  # -> whether a number may be a list, one for each layer
    renormalises: ClassVar = False  # -> whether the kept weights are divided by their sum

    def plan(
        self, config: Mapping[str, Any], header: Mapping[str, TensorInfo], base: BaseSpec
    ) -> AdapterPlan:
        """See Family.plan."""
        return super().plan(_listed(config), header, base)

    def read(
        self,
        config: Mapping[str, Any],
        checkpoint: Checkpoint,
        base: BaseSpec,
        weights: BaseWeights,
    ) -> dict[int, Delta]:
        """See Family.read."""
        return super().read(_listed(config), checkpoint, base, weights)

    def settings(self, reader: ConfigReader, base: BaseSpec) -> MoeSettings:
        """See PeftFamily.settings. Nothing has a default that the numbers depend on."""
        config = reader.config
        if config.get("bias", "none") not in (None, "none"):
            reader.refuse("bias", "bias is not served: MoE-PEFT trains no biases")
        if config.get("routing_strategy") not in (None, self.name):
            reader.invalid("routing_strategy", config["routing_strategy"], repr(self.name))
        if config.get("lora_alpha") is None:
            reader.invalid("lora_alpha", None, "a finite number")
        settings = MoeSettings(
            ranks=self._per_layer(reader, "r", base),
            alpha=reader.number("lora_alpha", 1.0) if config.get("lora_alpha") is not None else 1.0,
            is_rank_stabilised=reader.flag("use_rslora"),
            num_experts=self._per_layer(reader, "num_experts", base),
            top_k=self._top_k(reader, base),
        )
        if max(settings.num_experts.values) > MAX_EXPERTS:
            reader.invalid(
                "num_experts", config["num_experts"], f"at most {MAX_EXPERTS} experts a linear"
            )
        return settings

    def _top_k(self, reader: ConfigReader, base: BaseSpec) -> PerLayer:
        """-> How many experts a row takes; 0: all."""
        return PerLayer((0,))

    def _per_layer(
        self, reader: ConfigReader, key: str, base: BaseSpec, default: int | None = None
    ) -> PerLayer:
        """A whole number of at least one, or where that is allowed a list of one for each layer."""
        value, num_layers = reader.config.get(key), _stack(base)[1]
        value = default if value is None else value
        is_list = isinstance(value, list) and self.may_layers_differ
        numbers: list[Any] = value if isinstance(value, list) and is_list else [value]
        is_counted = not is_list or not num_layers or len(numbers) == num_layers
        if numbers and is_counted and all(map(is_rank, numbers)):
            return PerLayer(tuple(numbers))
        listed = (
            f", or a list of {num_layers}, one for each layer" if self.may_layers_differ else ""
        )
        reader.invalid(key, value, f"a whole number of at least 1{listed}")
        return PerLayer((1,))

    def places(self, settings: MoeSettings, base: BaseSpec) -> dict[str, int]:
        """See PeftFamily.places: below `<family>.layers.<number>`, whatever the base calls its
        stack.
        """
        stack, _ = _stack(base)
        return {
            f"{self.name}.layers{site.path.removeprefix(stack)}": site_id
            for site_id, site in enumerate(base.sites)
            if stack and site.path.startswith(f"{stack}.") and site.kind != "experts"
        }

    def shape(self, role: str, site: SiteSpec, settings: MoeSettings) -> tuple[int | str, ...]:
        """See PeftFamily.shape."""
        is_router = role == "router" and site.kind == "linear"
        return (settings.num_experts.of(site), "in") if is_router else self.forms[role].shape

    def cell(self, module: Module, settings: MoeSettings) -> tuple[int, int]:
        """See PeftFamily.cell; whether all tensors are there, `check` says."""
        rank = module.sizes.get("rank", 0)
        if "router" not in module.keys:
            return rank, 0
        rank *= settings.num_experts.of(module.site)
        if rank > cells.MAX_ROUTED:
            raise MisfitError(f"{rank} components, at most {cells.MAX_ROUTED} can be routed")
        return rank, 0

    def routing(self, module: Module, settings: MoeSettings) -> Routing | None:
        """See PeftFamily.routing."""
        if "router" not in module.keys:
            return None
        num_experts, top_k = settings.num_experts.of(module.site), settings.top_k.of(module.site)
        return Routing(Router.SOFTMAX, num_experts, top_k, renormalise=self.renormalises)

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: MoeSettings,
        base: SiteBase,
    ) -> Delta:
        """See PeftFamily.delta."""
        import torch

        scale = settings.scale(module.site)
        if "router" not in tensors:
            return low_rank(tensors["a"], tensors["b"] * scale)
        experts = range(settings.num_experts.of(module.site))
        return low_rank(
            torch.cat([tensors[f"a{e}"] for e in experts]),
            torch.cat([tensors[f"b{e}"] for e in experts], 1) * scale,
            routing=self.routing(module, settings), router=tensors["router"],
        )  # fmt: skip

    def check(
        self,
        modules: Mapping[int, Module],
        settings: MoeSettings,
        base: BaseSpec,
        problems: list[Problem],
        notes: list[str],
    ) -> None:
        """See PeftFamily.check."""
        for _, module in sorted(modules.items()):
            if not module.has_own:
                continue
            path, rank, wanted = module.site.path, module.sizes.get("rank"), self._wanted(module)
            if rank not in (None, settings.ranks.of(module.site)):
                problems.append(
                    Problem(
                        "rank_mismatch",
                        f"{path} has rank {rank} in the checkpoint and r is "
                        f"{settings.ranks.of(module.site)}",
                        path,
                    )
                )
            if wanted is None:
                num_experts = settings.num_experts.of(module.site)
                wanted = {"router", *(f"{role}{e}" for role in "ab" for e in range(num_experts))}
            if missing := wanted - set(module.keys):
                problems.append(
                    Problem(
                        "missing_tensor",
                        f"{path} has {shown(next(iter(module.keys.values())))} and no "
                        f"{self._some(missing)}",
                        path,
                    )
                )
            if left := set(module.keys) - wanted:
                problems.append(
                    Problem(
                        "config_mismatch",
                        f"{path} has {self._some(left)} beside the {len(wanted)} tensors of the "
                        f"{settings.num_experts.of(module.site)} experts that num_experts names",
                        path,
                    )
                )

    def _wanted(self, module: Module) -> set[str] | None:
        """-> The roles of a module without experts; None: it has experts."""
        return {"a", "b"} if {"a", "b"} >= set(module.keys) else None

    def _some(self, roles: set[str]) -> str:
        names = sorted(self.forms[role].name if role in self.forms else role for role in roles)
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        return f"{', '.join(names[:_LISTED])}{more}"

    def _bias_names(self) -> tuple[str, ...]:
        return ()


def _listed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with target_modules as a list; MoE-PEFT's may be an object of name and whether."""
    targets = config.get("target_modules")
    if not isinstance(targets, dict) or not all(isinstance(v, bool) for v in targets.values()):
        return config
    return {**config, "target_modules": [name for name, is_meant in targets.items() if is_meant]}


def _stack(base: BaseSpec) -> tuple[str, int]:
    """The path of the base's one stack of numbered layers and its length; "" and 0 if there is not
    exactly one.
    """
    placed = {layer for site in base.sites if (layer := layer_of(site.path)) is not None}
    stacks = {stack for stack, _ in placed}
    if len(stacks) != 1:
        return "", 0
    return stacks.pop(), 1 + max(number for _, number in placed)
