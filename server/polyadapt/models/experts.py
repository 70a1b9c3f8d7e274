"""Routed experts whose weights are two parameters, found by structure and proved equal at load.

transformers keeps the experts of a layer as gate_up [experts, 2 inner, hidden] and down [experts,
hidden, inner] in one module that is called with the rows, the chosen experts and their weights
(huggingface/transformers:src/transformers/integrations/moe.py, 5.23). What differs from that in
any way is left as it is, and offers no sites.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from polyadapt.ops.experts import (
    ExpertGroup,
    Pairs,
    experts_matmul_,
    experts_product,
    list_groups,
    sort_pairs,
)
from polyadapt.ops.gated_matmul import Site
from polyadapt.types import SiteSpec

logger = logging.getLogger(__name__)

_NUM_TRACED = 12  # tokens of the reference forward
# Largest difference to the module as loaded, of its largest element: the order of float32 sums,
# and of bfloat16 the roundings between two products.
_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}

Gating = Callable[[torch.Tensor], torch.Tensor]  # [pairs, 2 inner] -> [pairs, inner]


class AdaptedExperts(nn.Module):
    """sum over a row's experts e of weight * down[e] gating(gate_up[e] x), and to both products
    each row's adapter.

    base is the replaced module, which computes every batch whose adapters leave it alone; gate_up
    and down are the names of its parameters.
    """

    def __init__(self, base: nn.Module, gate_up: str, down: str, gating: Gating) -> None:
        super().__init__()
        self.base = base
        self.gate_up = gate_up
        self.down = down
        self.gating = gating
        self.num_experts = self.weight(down).shape[0]
        self.sites: dict[str, Site] = {}  # by the parameter's name; empty before wrapping

    def weight(self, name: str) -> torch.Tensor:
        """The base's parameter [experts, out, in]."""
        weight: torch.Tensor = getattr(self.base, name)
        return weight

    def describe(self, path: str) -> Iterator[SiteSpec]:
        """The sites of the module at `path`, in the order in which the base holds the parameters:
        adapters name them by it.
        """
        for name, weight in self.base.named_parameters(recurse=False):
            num_experts, num_out, num_in = weight.shape
            yield SiteSpec(f"{path}.{name}", "experts", num_in, num_out, False, num_experts)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [rows, hidden], the plan's rows; top_k_index int64 and top_k_weights
        [rows, top k] -> [rows, hidden].
        """
        sites = tuple(self.sites.values())
        if sites and sites[0].plan.adapts(site.id for site in sites):
            pairs = sort_pairs(top_k_index, self.num_experts)
            groups = list_groups(pairs, sites, hidden_states.shape[0])
            if groups:
                return self.by_expert(hidden_states, pairs, top_k_weights, groups)
        y: torch.Tensor = self.base(hidden_states, top_k_index, top_k_weights)
        return y

    def by_expert(
        self,
        hidden_states: torch.Tensor,
        pairs: Pairs,
        top_k_weights: torch.Tensor,
        groups: list[ExpertGroup],
    ) -> torch.Tensor:
        """What forward says, expert by expert. A row's sum is over its own experts, in the order in
        which the router named them.
        """
        x = hidden_states[pairs.rows]
        both = experts_product(x, self.weight(self.gate_up), pairs)
        self._add(self.gate_up, both, x, groups)
        inner = self.gating(both)
        y = experts_product(inner, self.weight(self.down), pairs)
        self._add(self.down, y, inner, groups)
        weighted = y * top_k_weights.reshape(-1, 1)[pairs.order]
        placed = torch.empty_like(weighted)
        placed[pairs.order] = weighted
        total = placed.view(*top_k_weights.shape, -1).sum(1)
        return total.to(hidden_states.dtype)

    def _add(self, name: str, y: torch.Tensor, x: torch.Tensor, groups: list[ExpertGroup]) -> None:
        if groups:
            experts_matmul_(y, x, groups, self.sites[name], self.num_experts)


@torch.inference_mode()
def adapt_experts(model: nn.Module) -> None:
    """Replace in place the experts modules that are proved to compute what AdaptedExperts does.

    The model's attention must be runnable. Each is compared on what one reference forward gave it,
    on large rows, and with every expert in use.
    """
    found = {path: names for path, module in model.named_modules() if (names := _names(module))}
    if not found:
        return
    calls = _trace(model, list(found))
    for path, (gate_up, down) in found.items():
        module = model.get_submodule(path)
        adapted = _proved(module, gate_up, down, calls.get(path))
        if adapted is None:
            logger.info("%s is left as it is: adapters cannot change its experts", path)
            continue
        parent_path, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent_path), name, adapted)


@dataclass(frozen=True, slots=True)
class _Call:
    """What a module was given in the reference forward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _names(module: nn.Module) -> tuple[str, str] | None:
    """The names of gate_up and down, if the module has nothing but these two."""
    own = list(module.named_parameters(recurse=False))
    if len(own) != 2 or len(list(module.parameters())) != 2 or list(module.buffers()):
        return None
    for (gate_up, first), (down, second) in (own, own[::-1]):
        if first.dim() != 3 or second.dim() != 3 or first.dtype != second.dtype:
            continue
        num_experts, hidden, inner = second.shape
        if first.shape == (num_experts, 2 * inner, hidden):
            return gate_up, down
    return None


def _trace(model: nn.Module, paths: list[str]) -> dict[str, _Call]:
    calls: dict[str, _Call] = {}

    def noting(path: str) -> Any:
        def note(_: nn.Module, args: Any, kwargs: Any) -> None:
            calls[path] = _Call(args, kwargs)

        return note

    hooks = [
        model.get_submodule(path).register_forward_pre_hook(noting(path), with_kwargs=True)
        for path in paths
    ]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.arange(_NUM_TRACED, device=embedding.weight.device)
    step = max(1, embedding.weight.shape[0] // _NUM_TRACED)
    try:
        model(input_ids=ids[None] * step, position_ids=ids[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _proved(
    module: nn.Module, gate_up: str, down: str, call: _Call | None
) -> AdaptedExperts | None:
    if call is None or len(call.args) + len(call.kwargs) != 3:
        return None
    for gating in _gatings(module):
        adapted = AdaptedExperts(module, gate_up, down, gating)
        try:
            if _is_equal(adapted, call):
                return adapted
        except Exception:  # whatever an unknown module does when it is tried, it stays as it is
            logger.warning("the experts could not be tried", exc_info=True)
            return None
    return None


def _gatings(module: nn.Module) -> Iterator[Gating]:
    """What may stand between the two products: the module's own gating where it names one, as
    transformers' experts do, else its activation of one half times the other half.
    """
    own = getattr(module, "_apply_gate", None)
    if callable(own):
        yield own
    activation = getattr(module, "act_fn", None)
    if callable(activation):

        def gated(both: torch.Tensor) -> torch.Tensor:
            gate, up = both.chunk(2, -1)
            y: torch.Tensor = activation(gate) * up
            return y

        yield gated


def _is_equal(adapted: AdaptedExperts, call: _Call) -> bool:
    # As the model calls it, by position or by name; another signature is a TypeError.
    x, index, weights = _arguments(*call.args, **call.kwargs)
    num_experts, num_rows, top_k = adapted.num_experts, x.shape[0], index.shape[1]
    times = -(-num_experts // (num_rows * top_k))
    every = torch.arange(times * num_rows * top_k, device=index.device) % num_experts
    tries = (
        (x, index, weights),
        (64.0 * x, index, weights),
        (x.repeat(times, 1), every.view(-1, top_k).to(index.dtype), weights.repeat(times, 1)),
    )
    for rows, chosen, shares in tries:
        expected = adapted.base(rows, chosen, shares)
        pairs = sort_pairs(chosen, num_experts)
        found = adapted.by_expert(rows, pairs, shares, [])
        if found.shape != expected.shape or found.dtype != expected.dtype:
            return False
        largest = float(expected.abs().max())
        difference = float((found.float() - expected.float()).abs().max())
        if not difference <= _TOLERANCE[x.dtype] * largest:  # NaN is no proof either
            return False
    return True


def _arguments(
    hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return hidden_states, top_k_index, top_k_weights
