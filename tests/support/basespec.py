"""A BaseSpec and BaseWeights of any transformers model, built by walking its modules.

Independent of polyadapt.models, so that the families are tested without it.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from polyadapt.types import BaseSpec, SiteSpec


def base_spec(model: nn.Module, name: str = "tiny") -> BaseSpec:
    """Describe `model`, a causal language model of transformers."""
    paths = {id(module): path for path, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return BaseSpec(
        name=name,
        digest="sha256:" + "0" * 64,
        architecture=type(model).__name__,
        vocab_size=head.weight.shape[0],
        max_model_len=128,
        is_tied=head.weight is embedding.weight,
        embedding_path=paths[id(embedding)],
        head_path=paths[id(head)],
        sites=tuple(site for site, _ in _walk(model)),
    )


class ModelWeights:
    """BaseWeights over a model's own parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module for _, module in _walk(model)]
        self.dtype = next(model.parameters()).dtype

    def weight(self, site_id: int) -> torch.Tensor:
        return dense_weight(self._modules[site_id])

    def bias(self, site_id: int) -> torch.Tensor | None:
        bias = getattr(self._modules[site_id], "bias", None)
        return None if bias is None else bias.detach()


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight as [out, in] (embedding: [vocabulary, width])."""
    weight = module.weight.detach()
    return weight.t() if isinstance(module, Conv1D) else weight


def _walk(model: nn.Module) -> list[tuple[SiteSpec, nn.Module]]:
    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            out_features, in_features = dense_weight(module).shape
            has_bias = module.bias is not None
            found.append((SiteSpec(path, "linear", in_features, out_features, has_bias), module))
        elif isinstance(module, nn.Embedding):
            rows, width = module.weight.shape
            found.append((SiteSpec(path, "embedding", rows, width, False), module))
        elif [p.dim() for p in module.parameters(recurse=False)] == [3, 3]:
            for name, weight in module.named_parameters(recurse=False):
                num_experts, num_out, num_in = weight.shape
                at = f"{path}.{name}"
                spec = SiteSpec(at, "experts", num_in, num_out, False, num_experts)
                found.append((spec, module))
        elif "Norm" in type(module).__name__ and isinstance(module.weight, nn.Parameter):
            width = module.weight.shape[0]
            has_bias = getattr(module, "bias", None) is not None
            found.append((SiteSpec(path, "norm", width, width, has_bias), module))
    return found
