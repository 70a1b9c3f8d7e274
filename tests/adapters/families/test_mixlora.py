"""MixLoRA's files against its formulas, computed expert by expert from the stored tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.oracle.mixture import OLD_NAMES, model_of, write_mixlora
from tests.support.basespec import base_spec
from tests.support.family_suite import (
    IDS,
    TOLERANCE,
    apply,
    change,
    check_refusals,
    check_refused,
    edit,
    load,
    problems_of,
)
from tests.support.peft_adapters import tiny_gpt2, tiny_llama, tiny_phi3
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from polyadapt.adapters.families.conversions import Given
from polyadapt.offline.convert import convert, read_source
from polyadapt.ops.cells import Router

DYNAMIC = {"routing_strategy": "mixlora-dynamic", "top_p": 0.7, "temperature": 0.8}


def tiny_phi() -> PreTrainedModel:
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    model = PhiForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


BASES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_llama,
    "llama-biases": lambda: tiny_llama(has_biases=True),
    "phi3": tiny_phi3,
    "phi": tiny_phi,
    "gpt2": tiny_gpt2,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "top-2": {},
    "all": {"num_experts": 3, "top_k": 3},
    "one": {"num_experts": 5, "top_k": 1, "rank": 2},
    "rank-stabilised": {"use_rslora": True},
    "experts-of-their-own": {"expert_lora": {"r": 5, "lora_alpha": 3, "lora_dropout": 0.1}},
    "dynamic": {**DYNAMIC, "num_experts": 6},
    "dynamic-cold": {**DYNAMIC, "temperature": 0.0, "num_experts": 6},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("form", BASES)
@torch.no_grad()
def test_it_equals_the_formula(form: str, options: str, tmp_path: Path) -> None:
    base = BASES[form]()
    write_mixlora(base, tmp_path, **OPTIONS[options])
    _, deltas = load(tmp_path, base)
    expected = model_of(base, tmp_path)(input_ids=IDS).logits
    found = apply(base, deltas)(input_ids=IDS).logits
    largest = expected.abs().max()
    assert (expected - base(input_ids=IDS).logits).abs().max() > 1e-2 * largest
    assert (found - expected).abs().max() <= TOLERANCE * largest


@pytest.mark.parametrize(
    ("slip", "options"),
    [
        ("not renormalised", {}),
        ("smallest", {}),
        ("temperature inside", DYNAMIC),
        ("stop before", DYNAMIC),
        ("renormalise", {**DYNAMIC, "temperature": 1.5}),
    ],
)
@torch.no_grad()
def test_the_usual_slips_would_be_seen(slip: str, options: Any, tmp_path: Path) -> None:
    base = tiny_llama()
    write_mixlora(base, tmp_path, **options)
    expected = model_of(base, tmp_path)(input_ids=IDS).logits
    wrong = model_of(base, tmp_path, slip)(input_ids=IDS).logits
    assert (wrong - expected).abs().max() > 1e-2 * expected.abs().max()


def test_its_plan_says_what_it_costs_and_replaces(tmp_path: Path) -> None:
    base = tiny_llama()
    plan, deltas = load(write_mixlora(base, tmp_path, num_experts=4, top_k=2, rank=3), base)
    traits = plan.traits
    assert (plan.family, plan.rank, traits.token_cost) == ("mixlora", 3, 2)
    assert not traits.is_scalable
    assert traits.replaced == ("model.layers.0.mlp", "model.layers.1.mlp")
    assert "gate_proj" in plan.target_modules
    paths = {site.path: site_id for site_id, site in enumerate(base_spec(base).sites)}
    gate = deltas[paths["model.layers.0.mlp.gate_proj"]]
    assert gate.a.shape == (12, 32)
    assert gate.routing.router is Router.EXPERTS
    assert gate.router.shape == (4, 32)
    assert deltas[paths["model.layers.0.mlp.down_proj"]].router is None
    assert deltas[paths["model.layers.0.self_attn.q_proj"]].routing is None


def test_a_choice_by_summed_probability_may_cost_every_expert(tmp_path: Path) -> None:
    base = tiny_gpt2()
    plan, _ = load(write_mixlora(base, tmp_path, num_experts=6, **DYNAMIC), base)
    assert plan.traits.token_cost == 6
    # Weights that do not sum up to one weigh the base's own bias.
    assert "transformer.h.0.mlp.c_proj.bias" in plan.traits.replaced


def test_targets_may_be_only_some_of_the_linears(tmp_path: Path) -> None:
    base = tiny_llama()
    for names in (["up_proj"], ["q_proj"], ["gate_proj", "down_proj", "v_proj"]):
        write_mixlora(base, tmp_path, names=names, **DYNAMIC)
        _, deltas = load(tmp_path, base)
        with torch.no_grad():
            expected = model_of(base, tmp_path)(input_ids=IDS).logits
            found = apply(base, deltas)(input_ids=IDS).logits
        assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max(), names


def test_older_names_and_an_object_of_targets_mean_the_same(tmp_path: Path) -> None:
    base = tiny_llama()
    new, old = tmp_path / "new", tmp_path / "old"
    write_mixlora(base, new)
    write_mixlora(base, old, has_old_names=True, routing_strategy="mixtral")
    for names in (OLD_NAMES, {name: name[:2] for name in OLD_NAMES.values()}):
        config = json.loads((old / "adapter_config.json").read_text())
        targets = [names.get(name, name) for name in config["target_modules"]]
        edit(old, target_modules=dict.fromkeys(targets, True) | {"dense": False})
        for one, two in zip(load(new, base)[1].items(), load(old, base)[1].items(), strict=True):
            assert one[0] == two[0]
            assert torch.equal(one[1].a, two[1].a)
            assert torch.equal(one[1].b, two[1].b)
        tensors = load_file(old / "adapter_model.safetensors")  # w1_proj is also written as w1
        short = {key.replace("_proj.lora", ".lora") if ".experts." in key else key: tensor
                 for key, tensor in tensors.items()}  # fmt: skip
        save_file(short, old / "adapter_model.safetensors")


def test_a_pickle_is_made_safe_by_convert(tmp_path: Path) -> None:
    base = tiny_llama()
    source = write_mixlora(base, tmp_path / "in")
    tensors = load_file(source / "adapter_model.safetensors")
    (source / "adapter_model.safetensors").unlink()
    torch.save({k: torch.nn.Parameter(t) for k, t in tensors.items()}, source / "adapter_model.bin")
    convert("pickle", read_source(source), Given(), tmp_path / "out", force=False)
    assert load(tmp_path / "out", base)[0].family == "mixlora"


# --------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("form", ["llama", "gpt2"])
def test_whatever_is_wrong_is_refused(form: str, tmp_path: Path) -> None:
    base = BASES[form]()
    check_refusals(base, write_mixlora(base, tmp_path, num_experts=2, names=None))


@pytest.mark.parametrize(
    ("changed", "code", "words"),
    [
        ({"routing_strategy": "mixlora-switch"}, "unsupported_config", "capacity is counted"),
        ({"routing_strategy": "best"}, "invalid_config", "mixlora or mixtral or mixlora-dynamic"),
        ({"routing_strategy": None}, "invalid_config", "routing_strategy"),
        ({"use_dora": True}, "unsupported_config", "magnitudes"),
        ({"expert_lora": {"use_dora": True}}, "unsupported_config", "expert_lora: use_dora"),
        ({"expert_lora": {"r": 0}}, "invalid_config", "expert_lora: r is 0"),
        ({"expert_lora": {"magic": 1}}, "unknown_config_key", "expert_lora: config key 'magic'"),
        ({"expert_lora": 3}, "invalid_config", "expert_lora is 3"),
        ({"act_fn": "relu"}, "unsupported_config", "the base's activation is silu or swish"),
        ({"act_fn": 3}, "invalid_config", "act_fn is 3"),
        ({"bias": "all"}, "invalid_config", "bias is 'all'"),
        ({"top_k": 5}, "invalid_config", "at most num_experts, which is 4"),
        ({"top_k": 0}, "invalid_config", "top_k is 0"),
        ({"num_experts": 0}, "invalid_config", "num_experts is 0"),
        ({"num_experts": 5}, "missing_tensor", "of expert 4"),
        ({"num_experts": 3}, "unread_tensor", "num_experts is 3"),
        ({"num_experts": 5000}, "invalid_config", "at most 4095"),
        ({"r": 4}, "shape_mismatch", "need [4, 32]"),
        ({"r": None}, "invalid_config", "the scale depends on it"),
        ({"lora_alpha": None}, "invalid_config", "the scale depends on it"),
        ({"expert_capacity": 32}, "unsupported_config", "mixlora-switch"),
        ({"target_modules": []}, "invalid_config", "target_modules"),
        ({"target_modules": {"q_proj": 1}}, "invalid_config", "true and false by name"),
        ({"target_modules": ["q_proj"]}, "not_targeted", "model.layers.0.mlp.gate_proj"),
        ({**DYNAMIC, "top_p": 0}, "invalid_config", "top_p is 0"),
        ({**DYNAMIC, "temperature": -1}, "invalid_config", "temperature is -1"),
    ],
)
def test_a_config_that_is_not_served_is_refused(
    changed: dict[str, Any], code: str, words: str, tmp_path: Path
) -> None:
    base = tiny_llama()
    write_mixlora(base, tmp_path)
    edit(tmp_path, **changed)
    check_refused(base, tmp_path, code, words)


def test_an_activation_by_another_of_its_names_is_the_same(tmp_path: Path) -> None:
    base = tiny_llama()
    load(write_mixlora(base, tmp_path, act_fn="swish"), base)
    gelu = tiny_gpt2()
    load(write_mixlora(gelu, tmp_path, act_fn="gelu_pytorch_tanh"), gelu)
    edit(tmp_path, act_fn="gelu")
    check_refused(gelu, tmp_path, "unsupported_config", "act_fn is 'gelu'")


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("mixlora.layers.1.mlp.moe_gate.weight", "missing_tensor", "layers.1.mlp.moe_gate"),
        (
            "mixlora.layers.0.mlp.up_proj.experts.2.lora_B.weight",
            "missing_tensor",
            "up_proj has no lora_B.weight of expert 2",
        ),
        (
            "mixlora.layers.1.self_attn.q_proj.lora_A.weight",
            "missing_tensor",
            "q_proj has no lora_A.weight",
        ),
    ],
)
def test_a_part_that_is_missing_is_named(name: str, code: str, words: str, tmp_path: Path) -> None:
    base = tiny_llama()
    write_mixlora(base, tmp_path)
    change(tmp_path, **{name: None})
    check_refused(base, tmp_path, code, words)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("mixlora.layers.2.mlp.moe_gate.weight", "unknown_module"),
        ("mixlora.layers.00.mlp.moe_gate.weight", "unread_tensor"),
        ("mixlora.layers.0.mlp.gate_proj.experts.9.lora_A.weight", "unread_tensor"),
        ("mixlora.layers.0.mlp.other_proj.experts.0.lora_A.weight", "unknown_module"),
        ("mixlora.layers.0.mlp.gate_proj.lora_A.weight", "unread_tensor"),
        ("mixlora.layers.0.self_attn.gate_proj.lora_A.weight", "unknown_module"),
        ("mixlora.layers.0.mlp.gate_proj.experts.0.lora_magnitude.weight", "unread_tensor"),
        ("loramoe.layers.0.mlp.moe_gate.weight", "unread_tensor"),
        ("mixlora.layers.0.gate.weight", "duplicate_tensor"),
        ("mixlora.layers.0.experts.0.w1.lora_A.weight", "duplicate_tensor"),
    ],
)
def test_a_tensor_too_many_is_named(name: str, code: str, tmp_path: Path) -> None:
    base = tiny_llama()
    write_mixlora(base, tmp_path)
    change(tmp_path, **{name: torch.ones(3, 32)})
    assert code in dict(problems_of(base, tmp_path)), problems_of(base, tmp_path)


def test_a_base_whose_layers_have_no_such_mlp_is_refused(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2,
        max_position_embeddings=128,
    )  # fmt: skip
    write_mixlora(tiny_llama(), tmp_path)
    check_refused(MixtralForCausalLM(config).eval(), tmp_path, "unsupported_base", "layer 0")
