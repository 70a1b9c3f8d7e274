"""VB-LoRA, with PEFT as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import VBLoRAConfig
from tests.support.family_suite import (
    check_equals_peft,
    check_refusals,
    check_refused,
    edit,
)
from tests.support.peft_variants import Maker

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "one vector in a mixture": ("llama", {"topk": 1, "target_modules": ["v_proj"]}),
    "three vectors in a mixture": (
        "llama",
        {"topk": 3, "vector_length": 16, "target_modules": ["v_proj", "down_proj"]},
    ),
    "only what is mixed": (
        "llama",
        {"save_only_topk_weights": True, "target_modules": ["v_proj", "down_proj"]},
    ),
    "only what is mixed, three of many": (
        "llama",
        {
            "topk": 3,
            "num_vectors": 300,
            "save_only_topk_weights": True,
            "target_modules": ["v_proj", "down_proj"],
        },
    ),
    "only the one vector": (
        "llama",
        {"topk": 1, "save_only_topk_weights": True, "target_modules": ["v_proj"]},
    ),
    "transposed base": ("gpt2", {"target_modules": ["c_attn", "c_fc"]}),
    "new biases": ("gpt2", {"bias": "all", "target_modules": ["c_attn", "c_fc"]}),
    "fused projections": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
}


made = Maker(VBLoRAConfig, VARIANTS, r=3, num_vectors=11, vector_length=8, std=0.5)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_peft(name: str, seed: int, tmp_path: Path) -> None:
    base, directory = made(name, tmp_path, seed)
    plan = check_equals_peft(base, directory)
    assert plan.rank == 3
    assert plan.traits.is_scalable == ("biases" not in name)


@pytest.mark.parametrize("name", ["plain", "three vectors in a mixture", "only what is mixed"])
def test_whatever_is_wrong_is_refused(name: str, tmp_path: Path) -> None:
    check_refusals(*made(name, tmp_path))


def test_vectors_must_fit_the_base_and_the_config(tmp_path: Path) -> None:
    base, directory = made("plain", tmp_path)
    edit(directory, vector_length=7)
    check_refused(base, directory, "shape_mismatch", "expected [11, 7]")
    edit(directory, vector_length=8, topk=12)
    check_refused(base, directory, "invalid_config", "at most 11 vectors")


def test_what_is_stored_must_be_what_the_config_says(tmp_path: Path) -> None:
    base, directory = made("plain", tmp_path)
    edit(directory, save_only_topk_weights=True)
    check_refused(base, directory, "shape_mismatch", "vblora_logits_A_topk_indices and vblora")
    base, directory = made("only what is mixed", tmp_path)
    edit(directory, save_only_topk_weights=False)
    check_refused(base, directory, "shape_mismatch", "vblora_logits_A and vblora_logits_B and no")
