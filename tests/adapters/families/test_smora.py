"""SMoRA against its paper's formula, component by component and token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.oracle.routed import routed, write_smora
from tests.support.basespec import base_spec
from tests.support.family_suite import (
    change,
    check_equals,
    check_refusals,
    check_refused,
    edit,
    load,
    problems_of,
)
from tests.support.peft_adapters import tiny_gpt2, tiny_llama
from transformers import PreTrainedModel

from polyadapt.adapters.families.smora import Smora
from polyadapt.ops.cells import Router

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
GPT2 = ("c_attn", "c_fc")

SHAPES: dict[str, dict[str, Any]] = {
    "few of many": {"rank": 16, "kept": 3},
    "odd": {"rank": 7, "kept": 5},
    "one of one": {"rank": 1, "kept": 1},
    "all of them": {"rank": 5, "kept": 5},
    "in parts": {"rank": 6, "kept": 4, "partition": 2},
    "in parts whose components are equal": {"rank": 9, "kept": 4, "partition": 3, "bias": 0.0},
    "one score for all": {"rank": 6, "kept": 2, "partition": 6, "bias": 0.0},
}


@pytest.fixture
def base() -> PreTrainedModel:
    return tiny_llama()


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", SHAPES)
def test_it_equals_the_formula(name, seed, base, tmp_path):
    directory = write_smora(base, tmp_path, seed=seed, **SHAPES[name])
    plan = check_equals(base, directory, routed(base, directory))
    assert plan.rank == SHAPES[name]["rank"]
    assert plan.traits.is_scalable
    assert not plan.traits.is_kv_neutral


@pytest.mark.parametrize("new", [tiny_gpt2, lambda: tiny_llama(has_biases=True)])
def test_other_layouts_of_a_linear(new: Callable[[], PreTrainedModel], tmp_path):
    base = new()
    names = GPT2 if base.config.model_type == "gpt2" else ("q_proj", "gate_proj")
    directory = write_smora(base, tmp_path, names=names, rank=6, kept=3)
    check_equals(base, directory, routed(base, directory))


@pytest.mark.parametrize(
    ("slip", "options"),
    [
        ("bias in the choice alone", {}),
        ("softmax", {}),
        ("all components", {}),
        ("not divided", {}),
        ("alpha / r", {}),
        ("last of equal ones", {"rank": 6, "kept": 2, "partition": 3, "bias": 0.0}),
    ],
)
def test_the_usual_mistakes_would_be_seen(slip, options, base, tmp_path):
    directory = write_smora(base, tmp_path, **options)
    with pytest.raises(AssertionError, match="differs by"):
        check_equals(base, directory, routed(base, directory, slip=slip))


MUTATIONS: dict[str, Callable[[Any], Any]] = {
    "k": lambda delta: replace(delta, routing=replace(delta.routing, top_k=1)),
    "kind": lambda delta: replace(
        delta, routing=replace(delta.routing, router=Router.SOFTMAX), router_bias=None
    ),
    "bias": lambda delta: replace(delta, router_bias=-delta.router_bias),
    "router": lambda delta: replace(delta, router=delta.router.flip(0).contiguous()),
    "scale": lambda delta: replace(delta, b=delta.b / 2),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_of_the_formula_is_noticed(name, base, tmp_path, monkeypatch):
    directory, made = write_smora(base, tmp_path), Smora.delta
    oracle = routed(base, directory)
    check_equals(base, directory, oracle)
    monkeypatch.setattr(Smora, "delta", lambda *arguments: MUTATIONS[name](made(*arguments)))
    with pytest.raises(AssertionError, match=r"differs by|the plan counts"):
        check_equals(base, directory, oracle)


def test_biases_of_the_base_may_be_replaced_beside_it(tmp_path):
    base = tiny_llama(has_biases=True)
    directory = write_smora(base, tmp_path, names=("q_proj",))
    edit(directory, bias="lora_only")
    change(directory, **{f"{Q0}.bias": torch.ones(32)})
    plan, deltas = load(directory, base)
    assert not plan.traits.is_scalable
    (site_id,) = (
        i for i, s in enumerate(base_spec(base).sites) if f"base_model.model.{s.path}" == Q0
    )
    assert deltas[site_id].bias is not None
    assert deltas[site_id].router is not None


def test_it_leaves_keys_and_values_alone_behind_the_last_ones(base, tmp_path):
    write_smora(base, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kept = "layers.1.mlp.down_proj"
    change(tmp_path, **{key: None for key in tensors if kept not in key})
    assert load(tmp_path, base)[0].traits.is_kv_neutral


def test_whatever_is_wrong_with_a_file_is_refused(base, tmp_path):
    check_refusals(base, write_smora(base, tmp_path, names=("q_proj",)))


def test_the_older_version_is_another_model(base, tmp_path):
    write_smora(base, tmp_path)
    change(tmp_path, **{f"{Q0}.lora_biases": None})
    check_refused(base, tmp_path, "missing_tensor", "an older version of SMoRA")


@pytest.mark.parametrize(
    ("code", "words", "values"),
    [
        ("invalid_config", "activate_r is 7, expected at most r, which is 6", {"activate_r": 7}),
        ("invalid_config", "rank_partition is 4, expected a divisor", {"rank_partition": 4}),
        ("invalid_config", "activate_r is 0", {"activate_r": 0}),
        ("shape_mismatch", "lora_router.weight' has shape [6, 32]", {"rank_partition": 2}),
        ("rank_mismatch", "has rank 6 in the checkpoint and r is 8", {"r": 8}),
        ("unsupported_config", "use_rslora is not served", {"use_rslora": True}),
        ("unsupported_config", "alpha_pattern is not served", {"alpha_pattern": {"q_proj": 3}}),
        ("unsupported_config", "use_dora is not served", {"use_dora": True}),
        ("unsupported_config", "a replaced token", {"trainable_token_indices": [1, 2]}),
        ("invalid_config", "a random start", {"init_lora_weights": "pissa"}),
        ("not_targeted", "q_proj", {"target_modules": ["v_proj", "o_proj", "down_proj"]}),
    ],
)
def test_configs_that_mean_something_else_are_refused(code, words, values, base, tmp_path):
    write_smora(base, tmp_path)
    edit(tmp_path, **values)
    check_refused(base, tmp_path, code, words)


def test_biases_under_which_nothing_could_be_divided_are_refused(base, tmp_path):
    write_smora(base, tmp_path, kept=2)
    change(tmp_path, **{f"{Q0}.lora_biases": torch.full((6,), -1.0)})
    check_refused(base, tmp_path, "shape_mismatch", "no sum of chosen values is positive")
    change(tmp_path, **{f"{Q0}.lora_biases": torch.full((6,), -0.9)})
    load(tmp_path, base)


def test_embeddings_have_no_router(base, tmp_path):
    write_smora(base, tmp_path)
    change(tmp_path, **{"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(6, 64)})
    check_refused(base, tmp_path, "unread_tensor", "no input that a router could read")


def test_what_only_training_reads_is_noted(base, tmp_path):
    write_smora(base, tmp_path)
    edit(tmp_path, epsilon_greedy=True, dense_compute=True)
    notes = load(tmp_path, base)[0].notes
    assert {"epsilon_greedy has no effect when serving"} <= set(notes)
    assert not problems_of(base, tmp_path)
