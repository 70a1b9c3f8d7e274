"""GraLoRA, with PEFT as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import GraloraConfig
from safetensors.torch import load_file
from tests.support.family_suite import (
    change,
    check_equals_peft,
    check_refusals,
    check_refused,
    edit,
)
from tests.support.peft_variants import Maker

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "two blocks": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "four blocks": ("llama", {"r": 8, "gralora_k": 4, "target_modules": "all-linear"}),
    "one block": ("llama", {"r": 5, "gralora_k": 1, "target_modules": ["v_proj", "up_proj"]}),
    "with a general part": ("llama", {"hybrid_r": 3, "target_modules": ["k_proj", "down_proj"]}),
    "transposed base": ("gpt2", {"hybrid_r": 1, "target_modules": ["c_attn", "c_fc"]}),
    "new biases": ("gpt2", {"bias": "all", "target_modules": ["c_attn", "c_fc"]}),
    "fused projections": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
}
RANKS = {"four blocks": 32, "one block": 5, "with a general part": 15, "transposed base": 13}


made = Maker(GraloraConfig, VARIANTS, r=6, alpha=5, gralora_k=2, std=0.3)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_peft(name: str, seed: int, tmp_path: Path) -> None:
    base, directory = made(name, tmp_path, seed)
    plan = check_equals_peft(base, directory)
    assert plan.rank == RANKS.get(name, 12)
    assert plan.traits.is_scalable == ("biases" not in name)


@pytest.mark.parametrize("name", ["two blocks", "with a general part"])
def test_whatever_is_wrong_is_refused(name: str, tmp_path: Path) -> None:
    check_refusals(*made(name, tmp_path))


def test_the_general_part_is_there_if_and_only_if_the_config_says_so(tmp_path: Path) -> None:
    base, directory = made("with a general part", tmp_path)
    tensors = load_file(directory / "adapter_model.safetensors")
    change(directory, **{key: None for key in tensors if "general" in key})
    check_refused(base, directory, "config_mismatch", "holds 0 of gralora_A_general")
    change(directory, **tensors)
    edit(directory, hybrid_r=0)
    check_refused(base, directory, "config_mismatch", "hybrid_r is 0")


def test_blocks_must_fit(tmp_path: Path) -> None:
    base, directory = made("two blocks", tmp_path)
    edit(directory, gralora_k=4)
    check_refused(base, directory, "invalid_config", "a divisor of r = 6")
    edit(directory, gralora_k=3)
    check_refused(base, directory, "shape_mismatch", "needs [3, 10, 6]")
