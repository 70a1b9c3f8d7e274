"""AdaLoRA, with PEFT as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import AdaLoraConfig
from tests.support.family_suite import (
    check_equals_peft,
    check_refusals,
    check_refused,
    edit,
    load,
    make_checkpoint,
)
from tests.support.peft_variants import BASES
from transformers import PreTrainedModel

LAYER = "model.layers.{}.self_attn.{}_proj.lora_E"
KEPT = {
    LAYER.format(0, "q"): [True, False, True, True, False],
    LAYER.format(0, "v"): [False] * 5,
    LAYER.format(1, "q"): [True] * 5,
    LAYER.format(1, "v"): [False, False, False, False, True],
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": "all-linear"}),
    "alpha of zero": ("llama", {"target_modules": ["q_proj"], "lora_alpha": 0}),
    "components taken away": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "components taken away, alpha of zero": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 0},
    ),
    "transposed base": ("gpt2", {"target_modules": ["c_attn", "c_fc"]}),
    "new biases": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "bias": "all"}),
    "new biases of its own": ("gpt2", {"target_modules": ["c_proj"], "bias": "lora_only"}),
    "fused projections": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
}


def made(name: str, tmp_path: Path, seed: int = 1) -> tuple[PreTrainedModel, Path]:
    base_name, options = VARIANTS[name]
    base = BASES[base_name]()
    options = {"init_r": 5, "lora_alpha": 7, "total_step": 10} | options
    if "taken away" in name:
        options["rank_pattern"] = dict(KEPT)
    config = AdaLoraConfig(**options)
    return base, make_checkpoint(base, config, tmp_path / name, seed=seed, std=0.4)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_peft(name: str, seed: int, tmp_path: Path) -> None:
    base, directory = made(name, tmp_path, seed)
    plan = check_equals_peft(base, directory)
    assert plan.traits.is_scalable == ("biases" not in name)
    assert plan.rank == 5


def test_a_module_without_components_is_left_alone(tmp_path: Path) -> None:
    base, directory = made("components taken away", tmp_path)
    _, deltas = load(directory, base)
    assert sorted(delta.a.shape[0] for delta in deltas.values()) == [1, 3, 5]


def test_whatever_is_wrong_is_refused(tmp_path: Path) -> None:
    check_refusals(*made("alpha of zero", tmp_path))


def test_ranks_must_be_those_of_the_config(tmp_path: Path) -> None:
    base, directory = made("components taken away", tmp_path)
    edit(directory, rank_pattern={**KEPT, LAYER.format(1, "v"): [True] * 5})
    check_refused(base, directory, "rank_mismatch", "has rank 1 in the checkpoint and 5 by init_r")
    edit(directory, rank_pattern={**KEPT, LAYER.format(1, "v"): 3})
    check_refused(base, directory, "invalid_config", "lists of true and false")
    edit(directory, rank_pattern=[1])
    check_refused(base, directory, "invalid_config", "rank_pattern is [1]")
    edit(directory, rank_pattern=None, alora_invocation_tokens=[1])
    check_refused(base, directory, "unsupported_config", "alora_invocation_tokens is not served")
