"""Find the places of a model that an adapter can change, and wrap them from outside by structure.

One function lists the sites, one wraps them; both walk the modules in the same order, which is the
order of site ids. Knows module classes, never model names.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from polyadapt.models.adapted import AdaptedBias, AdaptedEmbedding, AdaptedLinear
from polyadapt.ops.gated_matmul import Site
from polyadapt.ops.plan import PlanBuffers
from polyadapt.types import SiteSpec


def list_sites(model: nn.Module) -> tuple[SiteSpec, ...]:
    """Describe every linear, Conv1D, embedding and biased norm of the model."""
    return tuple(spec for spec, _ in _walk(model))


def wrap_sites(
    model: nn.Module,
    arena: torch.Tensor,
    cells: torch.Tensor,
    tokens: PlanBuffers,
    outputs: PlanBuffers,
    head_path: str,
) -> None:
    """Replace every site's module in place. The head sees only the rows whose logits are wanted."""
    for site_id, (spec, module) in enumerate(list(_walk(model))):
        plan = outputs if spec.path == head_path else tokens
        site = Site(site_id, arena, cells, plan)
        parent_path, _, name = spec.path.rpartition(".")
        setattr(model.get_submodule(parent_path), name, _wrapped(module, site))


def _wrapped(module: nn.Module, site: Site) -> nn.Module:
    if isinstance(module, nn.Linear):
        return AdaptedLinear(module.weight, module.bias, site)
    if isinstance(module, Conv1D):
        # GPT-2 stores [in, out]; inside there is one layout.
        weight = nn.Parameter(module.weight.detach().t().contiguous(), requires_grad=False)
        return AdaptedLinear(weight, module.bias, site)
    if isinstance(module, nn.Embedding):
        return AdaptedEmbedding(module, site)
    return AdaptedBias(module, site)


def _walk(model: nn.Module) -> Iterator[tuple[SiteSpec, nn.Module]]:
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            out_features, in_features = module.weight.shape
            yield _linear(path, in_features, out_features, module.bias is not None), module
        elif isinstance(module, Conv1D):
            in_features, out_features = module.weight.shape
            yield _linear(path, in_features, out_features, module.bias is not None), module
        elif isinstance(module, nn.Embedding):
            rows, width = module.weight.shape
            yield SiteSpec(path, "embedding", rows, width, False), module
        elif isinstance(module, nn.LayerNorm) and module.bias is not None:
            width = module.bias.shape[0]
            yield SiteSpec(path, "bias", width, width, True), module


def _linear(path: str, in_features: int, out_features: int, has_bias: bool) -> SiteSpec:
    return SiteSpec(path, "linear", in_features, out_features, has_bias)
