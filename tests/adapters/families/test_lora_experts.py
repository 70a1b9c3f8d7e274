"""LoRA on the weights of routed experts (PEFT's target_parameters), with PEFT as the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.support import family_suite
from tests.support.basespec import base_spec
from tests.support.family_suite import (
    change,
    check_equals_peft,
    check_refusals,
    check_refused,
    edit,
    load,
    make_checkpoint,
    problems_of,
)
from tests.support.peft_adapters import tiny_llama
from transformers import AutoModelForCausalLM, PreTrainedModel

from polyadapt.adapters.families import lora
from polyadapt.adapters.families.lora import Lora

NUM_EXPERTS = 4
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EXPERTS_0 = "base_model.model.model.layers.0.mlp.experts"

VARIANTS: dict[str, dict[str, Any]] = {
    "both": {"target_parameters": BOTH, "lora_alpha": 9},
    "both, named the other way round": {"target_parameters": BOTH[::-1]},
    "gate and up alone": {"target_parameters": ["gate_up_proj"]},
    "down alone": {"target_parameters": ["experts.down_proj"]},
    "beside attention": {
        "target_parameters": BOTH,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "lora_only",
    },
    "of several ranks": {
        "target_parameters": BOTH,
        "target_modules": ["o_proj"],
        "rank_pattern": {"experts.down_proj": 3, "o_proj": 5},
        "alpha_pattern": {r".*\.1\.mlp\.experts\.gate_up_proj": 21},
    },
    "rank-stabilised": {"target_parameters": BOTH, "use_rslora": True},
    "other parameters in every layer": {
        "target_parameters": [
            "model.layers.0.mlp.experts.gate_up_proj",
            "model.layers.0.mlp.experts.down_proj",
            "layers.1.mlp.experts.down_proj",
        ]
    },
    "rank one": {"target_parameters": BOTH, "r": 1},
}


@pytest.fixture(scope="module")
def model_of(tiny_model: Callable[[str], Path]) -> Callable[[str], PreTrainedModel]:
    models: dict[str, PreTrainedModel] = {}

    def model(architecture: str) -> PreTrainedModel:
        if architecture not in models:
            directory = tiny_model(architecture)
            models[architecture] = AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32
            ).eval()
        return models[architecture]

    return model


@pytest.fixture
def mixtral(model_of: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    return model_of("mixtral")


@pytest.fixture
def saved(mixtral: PreTrainedModel, tmp_path: Path) -> Path:
    """A good adapter on both weights and q_proj, to be spoilt."""
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=BOTH)
    return make_checkpoint(mixtral, config, tmp_path)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("name", VARIANTS)
def test_it_does_what_peft_does(name, architecture, model_of, tmp_path):
    base, options = model_of(architecture), {"r": 4, "target_modules": []} | VARIANTS[name]
    directory = make_checkpoint(base, LoraConfig(**options), tmp_path, seed=len(name))
    plan = check_equals_peft(base, directory)
    assert plan.rank == max([options["r"], *options.get("rank_pattern", {}).values()])
    assert "down_proj" in plan.target_modules or name == "gate and up alone"


def test_the_tensors_of_two_weights_are_told_apart(saved, mixtral):
    sites = base_spec(mixtral).sites
    plan, deltas = load(saved, mixtral)
    places = {read.key: sites[read.site_id].path for read in plan.reads}
    assert places[f"{EXPERTS_0}.lora_A.weight"] == "model.layers.0.mlp.experts.down_proj"
    wrapped = f"{EXPERTS_0}.base_layer.lora_A.weight"
    assert places[wrapped] == "model.layers.0.mlp.experts.gate_up_proj"
    for site_id, delta in deltas.items():
        rank = 2 * (sites[site_id].num_experts or 1)
        assert delta.a.shape == (rank, sites[site_id].in_features)
        assert delta.b.shape == (sites[site_id].out_features, rank)


def test_only_what_lies_behind_the_last_keys_leaves_them_alone(mixtral, tmp_path):
    for layer in (0, 1):
        config = LoraConfig(
            r=2, target_modules=[], target_parameters=[f"layers.{layer}.mlp.experts.down_proj"]
        )
        plan, _ = load(make_checkpoint(mixtral, config, tmp_path / str(layer)), mixtral)
        assert plan.traits.is_kv_neutral is (layer == 1)


def test_whatever_is_wrong_with_a_file_is_refused(saved, mixtral):
    check_refusals(mixtral, saved)


@pytest.mark.parametrize(
    ("key", "value", "options"),
    [
        ("lora_dropout", 0.1, {"lora_dropout": 0.1}),
        ("lora_bias", True, {"lora_bias": True}),
        ("use_dora", True, {"use_dora": True}),
        ("fan_in_fan_out", True, {"fan_in_fan_out": True}),
        ("alora_invocation_tokens", [3, 4], {"alora_invocation_tokens": [3, 4]}),
        ("use_bdlora", {"nblocks": 2}, None),
        ("init_lora_weights", "pissa", None),
    ],
)
def test_what_peft_does_not_make_beside_parameters_is_refused(key, value, options, saved, mixtral):
    if options is not None:
        config = LoraConfig(
            r=2, task_type="CAUSAL_LM", target_modules=[], target_parameters=BOTH, **options
        )
        with pytest.raises(ValueError, match=r"ParamWrapper|variant"):
            get_peft_model(copy.deepcopy(mixtral), config)
    edit(saved, **{key: value})
    check_refused(mixtral, saved, "unsupported_config", f"{key} = ")


def test_weights_of_modules_are_not_served_as_parameters(saved, mixtral):
    edit(saved, target_parameters=[*BOTH, "self_attn.k_proj.weight"])
    check_refused(mixtral, saved, "unsupported_config", "layers.0.self_attn.k_proj")


def test_a_router_is_refused_by_name(saved, mixtral):
    edit(saved, target_parameters=[*BOTH, "mlp.gate.weight"])
    router = "base_model.model.model.layers.0.mlp.gate"
    change(saved, **{f"{router}.lora_A.weight": torch.ones(2, 64)})
    check_refused(mixtral, saved, "unknown_module", router)


def test_experts_of_another_base_are_refused_by_name(saved):
    check_refused(tiny_llama(), saved, "unknown_module", EXPERTS_0)


def test_a_name_that_means_nothing_here_is_noted(saved, mixtral):
    edit(saved, target_parameters=[*BOTH, "feed_forward.experts.down_proj"])
    plan, _ = load(saved, mixtral)
    assert any("feed_forward.experts.down_proj" in note for note in plan.notes)


def test_tensors_of_a_weight_that_the_config_does_not_name_are_refused(saved, mixtral):
    edit(saved, target_parameters=BOTH[:1])  # then the outer tensors are those of gate_up_proj
    assert "shape_mismatch" in dict(problems_of(mixtral, saved))
    edit(saved, target_parameters=None)
    assert "unknown_module" in dict(problems_of(mixtral, saved))


def test_target_modules_do_not_mean_parameters(saved, mixtral):
    edit(saved, target_parameters=None, target_modules=["q_proj", "gate_up_proj", "down_proj"])
    assert "unknown_module" in dict(problems_of(mixtral, saved))
    edit(saved, target_modules=[])
    assert ("invalid_config", "target_modules") in problems_of(mixtral, saved)
    edit(saved, target_parameters="mlp.experts.down_proj")
    assert ("invalid_config", "target_parameters") in problems_of(mixtral, saved)


def test_experts_are_not_replaced_whole(saved, mixtral):
    edit(saved, modules_to_save=["mlp.experts"])
    change(saved, **{f"{EXPERTS_0}.weight": torch.ones(NUM_EXPERTS, 64)})
    check_refused(mixtral, saved, "unread_tensor", "can be adapted and not be replaced")


def test_another_rank_than_the_configs_is_refused(saved, mixtral):
    edit(saved, r=3, rank_pattern={"q_proj": 2})
    check_refused(mixtral, saved, "rank_mismatch", "has rank 8 in the checkpoint and 3")
    check_refused(mixtral, saved, "rank_mismatch", "for each of 4 experts")


@pytest.mark.parametrize(
    "mutate",
    [
        lambda patch: patch.setattr(lora, "_by_expert", lambda b, _: b),
        lambda patch: patch.setattr(lora, "_by_expert", lambda b, n: -b),
        lambda patch: patch.setattr(
            Lora,
            "delta",
            lambda *arguments, delta=Lora.delta: _reversed(delta(*arguments)),
        ),
    ],
    ids=["order of B", "sign", "order of experts"],
)
def test_a_mutation_of_the_formula_is_noticed(mutate, saved, mixtral, monkeypatch):
    check_equals_peft(mixtral, saved)
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match="differs from PEFT"):
        check_equals_peft(mixtral, saved)


def _reversed(delta: Any) -> Any:
    return family_suite.Delta(delta.a.flip(0).contiguous(), delta.b)
