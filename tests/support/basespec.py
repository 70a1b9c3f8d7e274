"""A BaseSpec and BaseWeights of any transformers model, built by walking its modules.

Independent of polyadapt.models, so that the families are tested without it.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from polyadapt.types import BaseSpec, MlpSpec, SiteSpec

# The linears of an MLP, inputs and then down, and whether it is gated; by their names.
_MLPS = {
    ("gate_proj", "up_proj", "down_proj"): True,
    ("gate_up_proj", "down_proj"): True,
    ("fc1", "fc2"): False,
    ("c_fc", "c_proj"): False,
}
_ACTIVATIONS = (
    ("silu", "swish"),
    ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"),
)


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
        mlps=tuple(_mlps(model)),
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


def _mlps(model: nn.Module) -> list[MlpSpec]:
    sites = enumerate(site for site, _ in _walk(model))
    site_ids = {site.path: i for i, site in sites if site.kind == "linear"}
    config = model.config
    act = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    act = getattr(config, "hidden_activation", act)  # Gemma
    names = next(names for names in _ACTIVATIONS if act in names)
    found = []
    for path, module in model.named_modules():
        form = next((f for f in _MLPS if all(f"{path}.{name}" in site_ids for name in f)), None)
        if form is not None and not hasattr(module, "c_attn"):
            *inputs, down = (site_ids[f"{path}.{name}"] for name in form)
            found.append(MlpSpec(path, tuple(inputs), down, _MLPS[form], names))
    return found


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
