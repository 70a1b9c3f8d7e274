"""The base with one adapter written into its weights, or beside them where each row weighs its
components: plain transformers in float32, none of the engine's modules, ops or kernels. What a
served answer is compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from polyadapt.adapters.adapter import Delta
from polyadapt.offline.dense_mixture import DenseMixture
from polyadapt.ops.cells import Router
from polyadapt.types import BaseSpec, SiteSpec

_WRITTEN = frozenset(
    {"a", "b", "bias", "out_scale", "transform", "swap", "dense", "weight", "group"}
)
_ROUTED = frozenset({"routing", "router", "router_bias"})


class NotDenseError(Exception):
    """The adapter does something that no weights of the base can say; the text says what."""


def load_dense(model_dir: Path) -> nn.Module:
    """Return the model in `model_dir` as transformers computes it by itself, in float32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        model_dir,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
    )
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def logits_of(model: nn.Module, token_ids: list[int]) -> torch.Tensor:
    """Return the logits float32 [tokens, vocabulary] of one sequence."""
    logits: torch.Tensor = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
    return logits.float()


@torch.no_grad()
def write_into(model: nn.Module, deltas: Mapping[int, Delta], base: BaseSpec) -> None:
    """Give every adapted module a weight and a bias of its own, in place, by the formulas of
    adapters/adapter.py; raises NotDenseError. Shared weights are parted.
    """
    mixed = _write_mixtures(model, deltas, base)
    for site_id, delta in deltas.items():
        if site_id in mixed:
            continue
        site = base.sites[site_id]
        written = _WRITTEN | (_ROUTED if site.kind == "linear" else frozenset())
        for field in fields(delta):
            value = getattr(delta, field.name)
            if field.name not in written and value is not None:
                raise NotDenseError(f"it gives {site.path} a {field.name}, which is no weight")
        module = model.get_submodule(site.path)
        if delta.routing is not None:
            _write_linear(module, replace(delta, a=delta.a[:0], b=delta.b[:, :0]))
            parent, _, name = site.path.rpartition(".")
            setattr(model.get_submodule(parent), name, _Routed(module, delta, site))
        elif site.kind == "linear":
            _write_linear(module, delta)
        elif site.kind == "embedding":
            _write_embedding(module, delta, site)
        elif site.kind == "norm":
            _write_norm(module, delta)
        else:
            raise NotDenseError(f"{site.path} is of kind {site.kind}")


def _write_mixtures(
    model: nn.Module, deltas: Mapping[int, Delta], base: BaseSpec
) -> frozenset[int]:
    """Replace the MLPs that have experts, in place; return the sites that are done so."""
    done: set[int] = set()
    for mlp in base.mlps:
        site_ids = (*mlp.inputs, mlp.down)
        first = deltas.get(mlp.inputs[0])
        if first is None or first.routing is None or first.routing.router is not Router.EXPERTS:
            continue
        if not mlp.activations:
            raise NotDenseError(f"{mlp.path} has an activation of no known name")
        linears = [model.get_submodule(base.sites[site_id].path) for site_id in site_ids]
        mixture = DenseMixture(
            linears, [deltas[i] for i in site_ids], is_gated=mlp.is_gated, act=mlp.activations[0]
        )
        parent, _, name = mlp.path.rpartition(".")
        setattr(model.get_submodule(parent), name, mixture)
        done.update(site_ids)
    return frozenset(done)


def _write_linear(module: nn.Module, delta: Delta) -> None:
    is_transposed = isinstance(module, Conv1D)
    stored, bias = module.weight, module.bias
    assert isinstance(stored, torch.Tensor)
    assert bias is None or isinstance(bias, torch.Tensor)
    weight = stored.t() if is_transposed else stored  # [out, in]
    constant = torch.zeros(weight.shape[0]) if bias is None else bias
    if delta.transform is not None:
        # A block of x times M from the right is M transposed times the block.
        blocks = [block.t() for block in delta.transform]
        weight = weight @ torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    if delta.swap is not None:
        order = torch.arange(len(weight)).reshape(-1, 2, delta.group // 2).flip(1).reshape(-1)
        own, other = 1 + delta.swap[0], delta.swap[1]
        weight = own[:, None] * weight + other[:, None] * weight[order]
        constant = own * constant + other * constant[order]
    if delta.out_scale is not None:
        weight = (1 + delta.out_scale)[:, None] * weight
        constant = (1 + delta.out_scale) * constant
    weight = weight + delta.b @ delta.a
    if delta.dense is not None:
        weight = weight + delta.dense
    if delta.bias is not None:
        constant = constant + delta.bias
    weight = weight.t() if is_transposed else weight
    module.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None or bool(constant.any()):
        module.bias = nn.Parameter(constant, requires_grad=False)


class _Routed(nn.Module):
    """A linear with components beside it that each row weighs; see ops/cells.py: Router."""

    def __init__(self, base: nn.Module, delta: Delta, site: SiteSpec) -> None:
        super().__init__()
        assert delta.routing is not None
        is_hinge = delta.routing.router is Router.HINGE
        if not is_hinge and (
            delta.router is None
            or delta.routing.router not in (Router.SOFTMAX, Router.SIGMOID, Router.MAGNITUDE)
        ):
            raise NotDenseError(f"what weighs the components of {site.path} is not its own input")
        self.base, self.delta, self.routing = base, delta, delta.routing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x @ self.delta.a.t()
        is_hinge = self.routing.router is Router.HINGE
        h = self._hinge(h, x) if is_hinge else self._weights(x) * h
        y: torch.Tensor = self.base(x)
        return y + h @ self.delta.b.t()

    def _hinge(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        delta = self.delta
        if delta.router_bias is not None:
            h = h - delta.router_bias
        if delta.router is not None:
            h = h - (self.routing.value - x @ delta.router.t()).relu()
        return h.relu()

    def _weights(self, x: torch.Tensor) -> torch.Tensor:
        """[..., rank]"""
        delta, routing, rank = self.delta, self.routing, len(self.delta.a)
        assert delta.router is not None
        scores = x @ delta.router.t()
        size = rank // routing.num_scores
        if routing.router is Router.SIGMOID:
            values = scores.sigmoid().repeat_interleave(size, -1)
            values = values if delta.router_bias is None else values + delta.router_bias
            values = values.where(_is_among_largest(values, routing.top_k), 0.0)
            total, tiny = values.sum(-1, keepdim=True), torch.finfo(values.dtype).tiny
            return values / total.where(total.abs() >= tiny, tiny)
        if routing.router is Router.MAGNITUDE:
            kept = _is_among_largest(scores.abs(), routing.top_k)
            shares = scores.abs().where(kept, -torch.inf).div(routing.value).softmax(-1)
        else:
            shares = scores.softmax(-1)
            shares = shares.where(_is_among_largest(shares, routing.top_k), 0.0)
            if routing.renormalise:
                shares = shares / shares.sum(-1, keepdim=True)
        return shares.repeat_interleave(size, -1)


def _is_among_largest(values: torch.Tensor, top_k: int) -> torch.Tensor:
    """Whether each is one of the top_k largest of its row, of equal ones the first; 0: all are."""
    order = values.sort(stable=True, dim=-1, descending=True).indices
    places: torch.Tensor = order.argsort(-1)
    return places < (top_k or values.shape[-1])


def _write_embedding(module: nn.Module, delta: Delta, site: SiteSpec) -> None:
    table = module.weight  # [vocabulary, width]
    assert isinstance(table, torch.Tensor)
    if delta.transform is not None or delta.swap is not None or delta.weight is not None:
        raise NotDenseError(f"{site.path} is an embedding and is multiplied from a side")
    if delta.out_scale is not None:
        table = table * (1 + delta.out_scale)
    table = table + (delta.b @ delta.a).t()
    if delta.dense is not None:
        table = table + delta.dense
    if delta.bias is not None:
        table = table + delta.bias
    module.weight = nn.Parameter(table, requires_grad=False)


def _write_norm(module: nn.Module, delta: Delta) -> None:
    if delta.weight is not None:
        module.weight = nn.Parameter(delta.weight.clone(), requires_grad=False)
    if delta.bias is not None:
        bias = module.bias
        assert isinstance(bias, torch.Tensor)
        module.bias = nn.Parameter(bias + delta.bias, requires_grad=False)
