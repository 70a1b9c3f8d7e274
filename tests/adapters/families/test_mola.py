"""MoLA in MoE-PEFT's files, against its formula, expert by expert and token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.oracle.routed import routed, write_mola
from tests.support.family_suite import (
    change,
    check_equals,
    check_refusals,
    check_refused,
    edit,
    load,
)
from tests.support.peft_adapters import tiny_gpt2, tiny_llama
from transformers import PreTrainedModel

from polyadapt.adapters.families.mola import Mola

Q0 = "mola.layers.0.self_attn.q_proj"

SHAPES: dict[str, dict[str, Any]] = {
    "two of four": {},
    "two of eight": {"num_experts": 8, "rank": 8},
    "odd": {"num_experts": 7, "rank": 3, "top_k": 3},
    "one": {"top_k": 1},
    "all": {"num_experts": 3, "top_k": 3},
    "more in the upper layer": {"num_experts": [2, 6]},
    "everything by layer": {"num_experts": [2, 5], "top_k": [1, 3], "rank": [4, 2]},
    "rank-stabilised": {"use_rslora": True, "rank": 4},
}


@pytest.fixture
def base() -> PreTrainedModel:
    return tiny_llama()


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", SHAPES)
def test_it_equals_the_formula(name, seed, base, tmp_path):
    directory = write_mola(base, tmp_path, seed=seed, **SHAPES[name])
    plan = check_equals(base, directory, routed(base, directory))
    assert plan.traits.is_scalable


def test_other_layouts_of_a_linear(tmp_path):
    base = tiny_gpt2()
    directory = write_mola(base, tmp_path, names=("c_attn", "c_fc"))
    check_equals(base, directory, routed(base, directory))


def test_two_experts_are_taken_where_nothing_is_said(base, tmp_path):
    directory = write_mola(base, tmp_path)
    oracle = routed(base, directory)
    edit(directory, top_k=None)
    check_equals(base, directory, oracle)


def test_equal_scores_take_the_lower_experts(base, tmp_path):
    directory = write_mola(base, tmp_path, names=("q_proj",))
    for layer in (0, 1):
        change(
            directory,
            **{f"mola.layers.{layer}.self_attn.q_proj.moe_gate.weight": torch.zeros(4, 32)},
        )
    check_equals(base, directory, routed(base, directory))
    with pytest.raises(AssertionError, match="differs by"):
        check_equals(base, directory, routed(base, directory, slip="experts reversed"))


@pytest.mark.parametrize("slip", ["not divided", "one expert", "equal shares", "experts reversed"])
def test_the_usual_mistakes_would_be_seen(slip, base, tmp_path):
    directory = write_mola(base, tmp_path)
    with pytest.raises(AssertionError, match="differs by"):
        check_equals(base, directory, routed(base, directory, slip=slip))


MUTATIONS: dict[str, Callable[[Any], Any]] = {
    "renormalise": lambda delta: replace(delta, routing=replace(delta.routing, renormalise=False)),
    "top-k": lambda delta: replace(delta, routing=replace(delta.routing, top_k=0)),
    "order of experts": lambda delta: replace(delta, a=delta.a.flip(0), b=delta.b.flip(1)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_of_the_formula_is_noticed(name, base, tmp_path, monkeypatch):
    directory, made = write_mola(base, tmp_path), Mola.delta
    oracle = routed(base, directory)
    check_equals(base, directory, oracle)
    monkeypatch.setattr(Mola, "delta", lambda *arguments: MUTATIONS[name](made(*arguments)))
    with pytest.raises(AssertionError, match="differs by"):
        check_equals(base, directory, oracle)


def test_whatever_is_wrong_with_a_file_is_refused(base, tmp_path):
    check_refusals(base, write_mola(base, tmp_path, names=("q_proj",), num_experts=2))


@pytest.mark.parametrize(
    ("code", "words", "values"),
    [
        ("invalid_config", "top_k is 5, expected at most num_experts", {"top_k": 5}),
        ("invalid_config", "top_k is [2, 5]", {"top_k": [2, 5]}),
        ("invalid_config", "a list of 2, one for each layer", {"num_experts": [4, 4, 4]}),
        ("invalid_config", "top_k is 0", {"top_k": 0}),
        ("invalid_config", "num_experts is [4, '4']", {"num_experts": [4, "4"]}),
        ("invalid_config", "expected 'mola'", {"routing_strategy": "loramoe"}),
        ("missing_tensor", "no experts.4.lora_A.weight", {"num_experts": [4, 5]}),
        ("rank_mismatch", "r is 4", {"r": [3, 4]}),
    ],
)
def test_configs_that_mean_something_else_are_refused(code, words, values, base, tmp_path):
    write_mola(base, tmp_path)
    edit(tmp_path, **values)
    check_refused(base, tmp_path, code, words)


def test_an_ordinary_lora_has_no_place_beside_the_experts(base, tmp_path):
    write_mola(base, tmp_path)
    change(tmp_path, **{f"{Q0}.lora_A.weight": torch.ones(3, 32)})
    check_refused(base, tmp_path, "unknown_module", f"{Q0}.lora_A")


def test_its_experts_are_counted(base, tmp_path):
    write_mola(base, tmp_path, num_experts=[2, 6], rank=3)
    plan, deltas = load(tmp_path, base)
    assert plan.rank == 18
    assert {delta.routing.num_scores for delta in deltas.values()} == {2, 6}
