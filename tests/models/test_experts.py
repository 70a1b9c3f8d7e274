"""Experts are offered to adapters where they are proved, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from polyadapt.models import experts as experts_module
from polyadapt.models.base import BaseModel
from polyadapt.models.experts import AdaptedExperts
from polyadapt.models.load import load_base
from polyadapt.models.wrap import wrap_sites
from polyadapt.ops.cells import COLUMNS
from polyadapt.ops.experts import sort_pairs
from polyadapt.ops.plan import PlanBuffers

CPU = torch.device("cpu")


def load(directory: Path, dtype: torch.dtype = torch.float32) -> BaseModel:
    return load_base(directory, name="m", device=CPU, dtype=dtype, max_model_len=None)


def offered(base: BaseModel) -> list[str]:
    return [site.path for site in base.spec.sites if site.kind == "experts"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_both_weights_of_every_layer_are_offered(architecture, dtype, tiny_model):
    base = load(tiny_model(architecture), dtype)
    assert offered(base) == [
        f"model.layers.{layer}.mlp.experts.{name}"
        for layer in (0, 1)
        for name in ("gate_up_proj", "down_proj")
    ]
    for site_id, site in enumerate(base.spec.sites):
        if site.kind == "experts":
            assert site.num_experts == 4
            rows = base.weight(site_id)
            assert rows.shape == (4 * site.out_features, site.in_features)
            assert base.bias(site_id) is None
        else:
            assert site.num_experts == 0


def test_dense_models_offer_none(tiny_model: Callable[[str], Path]) -> None:
    assert offered(load(tiny_model("llama"))) == []


def test_without_a_plan_it_is_the_module_itself(tiny_model):
    base = load(tiny_model("mixtral"))
    cells = torch.full((1, len(base.spec.sites), COLUMNS), -1)
    buffers = PlanBuffers(16, CPU), PlanBuffers(16, CPU)
    wrap_sites(base, torch.empty(0), cells, *buffers)
    experts = base.module.get_submodule("model.layers.1.mlp.experts")
    assert isinstance(experts, AdaptedExperts)
    paths = [base.spec.sites[site.id].path.rpartition(".")[2] for site in experts.sites.values()]
    assert paths == list(experts.sites) == ["gate_up_proj", "down_proj"]
    x, weights = torch.randn(6, 64), torch.rand(6, 2)
    index = torch.tensor([[0, 3], [2, 1], [3, 2], [0, 1], [1, 3], [2, 0]])
    assert torch.equal(experts(x, index, weights), experts.base(x, index, weights))
    by_expert = experts.by_expert(x, sort_pairs(index, 4), weights, [])
    assert torch.allclose(by_expert, experts.base(x, index, weights), atol=1e-5)


def _scaled(module, forward, x, index, weights):
    return forward(module, x, index, weights) * 1.001


def _clamped(module, forward, x, index, weights):
    return forward(module, x.clamp(-20, 20), index, weights)


def _broken(module, forward, x, index, weights):
    if x.abs().max() > 50:
        raise ZeroDivisionError
    return forward(module, x, index, weights)


def _change_experts(monkeypatch: pytest.MonkeyPatch, change: Callable[..., torch.Tensor]) -> None:
    plain = MixtralExperts.forward
    monkeypatch.setattr(
        MixtralExperts,
        "forward",
        lambda self, hidden_states, top_k_index, top_k_weights: change(
            self, plain, hidden_states, top_k_index, top_k_weights
        ),
    )


@pytest.mark.parametrize("change", [_scaled, _clamped, _broken])
def test_experts_that_compute_something_else_are_not_offered(change, tiny_model, monkeypatch):
    _change_experts(monkeypatch, change)
    base = load(tiny_model("mixtral"))
    assert offered(base) == []
    assert isinstance(base.module.get_submodule("model.layers.0.mlp.experts"), MixtralExperts)


@pytest.mark.parametrize("expert", range(4))
def test_an_expert_that_the_reference_forward_never_chose_is_tried(expert, tiny_model, monkeypatch):
    def differs(module, forward, x, index, weights):
        return forward(module, x, index, torch.where(index == expert, 0.99 * weights, weights))

    _change_experts(monkeypatch, differs)
    monkeypatch.setattr(experts_module, "_NUM_TRACED", 1)
    assert offered(load(tiny_model("mixtral"))) == []


def test_experts_with_more_than_two_weights_are_not_offered(tiny_model, monkeypatch):
    plain = Qwen3MoeExperts.__init__

    def with_bias(self, config):
        plain(self, config)
        self.register_buffer("shift", torch.zeros(1), persistent=False)

    monkeypatch.setattr(Qwen3MoeExperts, "__init__", with_bias)
    assert offered(load(tiny_model("qwen3_moe"))) == []
