"""Find the places of a model that an adapter can change, and wrap them from outside by structure.

One function lists the sites, one wraps them; both walk the modules in the same order, which is the
order of site ids. Knows module classes, never model names.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from polyadapt.models.adapted import AdaptedEmbedding, AdaptedLinear, AdaptedNorm, Part
from polyadapt.models.base import BaseModel, WeightBlock
from polyadapt.models.experts import AdaptedExperts
from polyadapt.ops.gated_matmul import Site
from polyadapt.ops.linear import DenseWeight
from polyadapt.ops.plan import PlanBuffers
from polyadapt.types import SiteSpec


def list_sites(model: nn.Module) -> tuple[SiteSpec, ...]:
    """Describe every linear, Conv1D, embedding, norm and expert weight of the model."""
    return tuple(spec for spec, _ in _walk(model))


def list_blocks(model: nn.Module, sites: tuple[SiteSpec, ...]) -> list[WeightBlock]:
    """Return where each site's weight and bias lie, by site id; [out, in] whatever the module, of
    a norm [width], of experts [experts * out, in].
    """
    blocks = []
    for site in sites:
        module = _module_of(model, site)
        if isinstance(module, AdaptedExperts):
            rows = DenseWeight(module.weight(_parameter_name(site)).flatten(0, 1))
            blocks.append(WeightBlock(rows, 0, rows.shape[0], None))
            continue
        weight, bias = module.weight, getattr(module, "bias", None)
        assert isinstance(weight, torch.Tensor)
        assert bias is None or isinstance(bias, torch.Tensor)
        dense = DenseWeight(weight.t() if isinstance(module, Conv1D) else weight)
        blocks.append(WeightBlock(dense, 0, dense.tensor.shape[0], bias))
    return blocks


def wrap_sites(
    base: BaseModel,
    arena: torch.Tensor,
    cells: torch.Tensor,
    tokens: PlanBuffers,
    outputs: PlanBuffers,
    device_cells: torch.Tensor | None = None,
) -> None:
    """Replace every site's module in place. The head sees only the rows whose logits are wanted.

    The tensors are what ops/gated_matmul.py: Site says of them.
    """
    model = base.module
    for site_id, spec in enumerate(base.spec.sites):
        plan = outputs if spec.path == base.spec.head_path else tokens
        site = Site(site_id, arena, cells, plan, device_cells)
        module = _module_of(model, spec)
        if isinstance(module, AdaptedExperts):
            module.sites[_parameter_name(spec)] = site
            continue
        if spec.kind == "norm":
            wrapped: nn.Module = AdaptedNorm(module, site, base.row_dims[site_id])
        else:
            wrapped = _wrapped(module, site, base.blocks[site_id])
        set_submodule(model, spec.path, wrapped)


def set_submodule(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`."""
    parent_path, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent_path), name, module)


def _module_of(model: nn.Module, spec: SiteSpec) -> nn.Module:
    is_parameter = spec.kind == "experts"
    return model.get_submodule(spec.path.rpartition(".")[0] if is_parameter else spec.path)


def _parameter_name(spec: SiteSpec) -> str:
    return spec.path.rpartition(".")[2]


def _wrapped(module: nn.Module, site: Site, block: WeightBlock) -> nn.Module:
    if isinstance(module, nn.Embedding):
        return AdaptedEmbedding(module, block.weight, module.weight.dtype, site)
    return AdaptedLinear(block.weight, block.bias, (Part(site, 0, block.weight.shape[0]),))


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
        elif is_norm(module):
            assert isinstance(module.weight, torch.Tensor)
            width, has_bias = module.weight.shape[0], getattr(module, "bias", None) is not None
            yield SiteSpec(path, "norm", width, width, has_bias), module
        elif isinstance(module, AdaptedExperts):
            for spec in module.describe(path):
                yield spec, module


def is_norm(module: nn.Module) -> bool:
    """Whether it is LayerNorm, or has the structure of a root mean square norm: nothing but one
    vector of weights and an epsilon, whatever its class is called.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1:
        return False
    if isinstance(module, nn.LayerNorm):
        return True
    is_plain = len(list(module.parameters())) == 1 and not list(module.children())
    return is_plain and norm_eps(module) is not None


def norm_eps(module: nn.Module) -> float | None:
    """The epsilon of a norm, under the names that transformers gives it."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None


def _linear(path: str, in_features: int, out_features: int, has_bias: bool) -> SiteSpec:
    return SiteSpec(path, "linear", in_features, out_features, has_bias)
