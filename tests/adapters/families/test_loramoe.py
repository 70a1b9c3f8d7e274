"""LoRAMoE in MoE-PEFT's files, against its formula, expert by expert and token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.oracle.routed import routed, write_loramoe
from tests.support.basespec import base_spec
from tests.support.family_suite import (
    change,
    check_equals,
    check_refusals,
    check_refused,
    edit,
    load,
)
from tests.support.peft_adapters import tiny_gpt2, tiny_llama, tiny_phi3
from transformers import PreTrainedModel

from polyadapt.adapters.families.loramoe import LoraMoe

UP0 = "loramoe.layers.0.mlp.up_proj"
Q0 = "loramoe.layers.0.self_attn.q_proj"

SHAPES: dict[str, dict[str, Any]] = {
    "as the template": {"rank": 8, "num_experts": 4},
    "odd": {"rank": 3, "num_experts": 5},
    "two of rank one": {"rank": 1, "num_experts": 2},
    "one expert": {"rank": 4, "num_experts": 1},
    "rank-stabilised": {"rank": 4, "use_rslora": True},
    "experts alone": {"plain": ()},
    "one linear alone": {"plain": (), "routed": ("down_proj",)},
    "no experts": {"routed": ()},
}


@pytest.fixture
def base() -> PreTrainedModel:
    return tiny_llama()


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", SHAPES)
def test_it_equals_the_formula(name, seed, base, tmp_path):
    directory = write_loramoe(base, tmp_path, seed=seed, **SHAPES[name])
    plan = check_equals(base, directory, routed(base, directory))
    assert plan.traits.is_scalable


@pytest.mark.parametrize(
    ("new", "plain", "mlp"),
    [
        (tiny_gpt2, ("c_attn",), ("c_fc",)),
        (tiny_phi3, ("qkv_proj", "o_proj"), ("gate_up_proj", "down_proj")),
        (lambda: tiny_llama(has_biases=True), ("k_proj",), ("up_proj",)),
    ],
)
def test_layers_are_found_whatever_the_base_calls_its_stack(
    new: Callable[[], PreTrainedModel], plain, mlp, tmp_path
):
    base = new()
    directory = write_loramoe(base, tmp_path, plain=plain, routed=mlp)
    check_equals(base, directory, routed(base, directory))


@pytest.mark.parametrize("slip", ["one expert", "equal shares", "experts reversed"])
def test_the_usual_mistakes_would_be_seen(slip, base, tmp_path):
    directory = write_loramoe(base, tmp_path)
    with pytest.raises(AssertionError, match="differs by"):
        check_equals(base, directory, routed(base, directory, slip=slip))


MUTATIONS: dict[str, Callable[[Any], Any]] = {
    "top-k": lambda delta: replace(delta, routing=replace(delta.routing, top_k=2)),
    "router": lambda delta: replace(delta, router=delta.router.flip(0).contiguous()),
    "order of experts": lambda delta: replace(delta, a=delta.a.flip(0), b=delta.b.flip(1)),
    "scale": lambda delta: replace(delta, b=delta.b / 2),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_of_the_formula_is_noticed(name, base, tmp_path, monkeypatch):
    directory, made = write_loramoe(base, tmp_path, plain=()), LoraMoe.delta
    oracle = routed(base, directory)
    check_equals(base, directory, oracle)
    monkeypatch.setattr(LoraMoe, "delta", lambda *arguments: MUTATIONS[name](made(*arguments)))
    with pytest.raises(AssertionError, match="differs by"):
        check_equals(base, directory, oracle)


def test_target_modules_may_say_of_each_name_whether_it_is_meant(base, tmp_path):
    directory = write_loramoe(base, tmp_path)
    names = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    edit(directory, target_modules={**dict.fromkeys(names, True), "k_proj": False, "fc1": False})
    check_equals(base, directory, routed(base, directory))
    edit(directory, target_modules={**dict.fromkeys(names, True), "up_proj": False})
    check_refused(base, directory, "not_targeted", "up_proj")
    edit(directory, target_modules={"up_proj": "yes"})
    check_refused(base, directory, "invalid_config", "target_modules")


@pytest.mark.parametrize("options", [{"plain": ("q_proj",), "routed": ("up_proj",)}])
def test_whatever_is_wrong_with_a_file_is_refused(options, base, tmp_path):
    check_refusals(base, write_loramoe(base, tmp_path, num_experts=2, **options))


@pytest.mark.parametrize(
    ("code", "words", "values"),
    [
        ("missing_tensor", "no experts.4.lora_A.weight, experts.4.lora_B", {"num_experts": 5}),
        ("shape_mismatch", "needs [3, 32]", {"num_experts": 3}),
        ("config_mismatch", "experts.3.lora_A.weight, experts.3.lora_B", {"num_experts": 3}),
        ("invalid_config", "num_experts is None", {"num_experts": None}),
        ("invalid_config", "at most 64 experts", {"num_experts": 65}),
        ("invalid_config", "num_experts is [4, 4]", {"num_experts": [4, 4]}),
        ("invalid_config", "r is None", {"r": None}),
        ("invalid_config", "lora_alpha is None", {"lora_alpha": None}),
        ("rank_mismatch", "has rank 3 in the checkpoint and r is 4", {"r": 4}),
        ("invalid_config", "expected 'loramoe'", {"routing_strategy": "mola"}),
        ("unknown_config_key", "top_k", {"top_k": 2}),
        ("unsupported_config", "use_dora is not served", {"use_dora": True}),
        ("unsupported_config", "bias is not served", {"bias": "all"}),
        ("unsupported_config", "modules_to_save is not", {"modules_to_save": ["lm_head"]}),
    ],
)
def test_configs_that_mean_something_else_are_refused(code, words, values, base, tmp_path):
    write_loramoe(base, tmp_path)
    edit(tmp_path, **values)
    check_refused(base, tmp_path, code, words)


@pytest.mark.parametrize(
    ("code", "words", "tensors"),
    [
        ("missing_tensor", "no moe_gate.weight", {f"{UP0}.moe_gate.weight": None}),
        ("missing_tensor", "no experts.1.lora_B", {f"{UP0}.experts.1.lora_B.weight": None}),
        ("missing_tensor", "no lora_A.weight", {f"{Q0}.lora_A.weight": None}),
        ("config_mismatch", "up_proj has lora_A", {f"{UP0}.lora_A.weight": torch.ones(3, 32)}),
        (
            "shape_mismatch",
            "experts.2.lora_A",
            {f"{UP0}.experts.2.lora_A.weight": torch.ones(4, 32)},
        ),
        (
            "unknown_module",
            "layers.7.mlp.up_proj",
            {"loramoe.layers.7.mlp.up_proj.moe_gate.weight": torch.ones(4, 32)},
        ),
        (
            "unknown_module",
            "layers.0.mlp'",
            {"loramoe.layers.0.mlp.moe_gate.weight": torch.ones(4, 32)},
        ),
        ("unread_tensor", "a head for classes", {"classifier": torch.ones(2, 32)}),
        (
            "unread_tensor",
            "is a normalisation",
            {"loramoe.layers.0.input_layernorm.lora_A.weight": torch.ones(3, 32)},
        ),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(code, words, tensors, base, tmp_path):
    write_loramoe(base, tmp_path)
    change(tmp_path, **tensors)
    check_refused(base, tmp_path, code, words)


def test_files_of_another_prefix_are_refused(base, tmp_path):
    write_loramoe(base, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    renamed = {key.replace("loramoe.", "mola."): tensor for key, tensor in tensors.items()}
    change(tmp_path, **dict.fromkeys(tensors), **renamed)
    check_refused(base, tmp_path, "unknown_module", "mola.layers.0")


def test_the_rank_is_that_of_all_experts(base, tmp_path):
    write_loramoe(base, tmp_path, rank=3, num_experts=4)
    plan, deltas = load(tmp_path, base)
    ranks = {base_spec(base).sites[i].path.rpartition(".")[2]: len(d.a) for i, d in deltas.items()}
    assert ranks == {"q_proj": 3, "v_proj": 3, "o_proj": 3} | dict.fromkeys(
        ("gate_proj", "up_proj", "down_proj"), 12
    )
    assert plan.rank == 12
