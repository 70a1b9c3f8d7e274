"""DeLoRA, with PEFT as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import DeloraConfig
from safetensors.torch import load_file
from tests.support.family_suite import (
    change,
    check_equals_peft,
    check_refusals,
)
from tests.support.peft_variants import Maker

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": "all-linear"}),
    "ranks and bounds by pattern": (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"q_proj": 3, r"layers\.1\..*down_proj": 7},
            "lambda_pattern": {"q_proj": 2},
        },
    ),
    "new biases": ("biased", {"bias": "all", "target_modules": ["v_proj", "up_proj"]}),
    "new biases of its own": ("biased", {"bias": "delora_only", "target_modules": ["v_proj"]}),
    "fused projections": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
}


made = Maker(DeloraConfig, VARIANTS, r=5)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_peft(name: str, seed: int, tmp_path: Path) -> None:
    base, directory = made(name, tmp_path, seed)
    plan = check_equals_peft(base, directory)
    assert plan.rank == (7 if "pattern" in name else 5)
    assert plan.traits.is_scalable == ("biases" not in name)


def test_the_stored_norms_count_and_small_components_are_not_blown_up(tmp_path: Path) -> None:
    base, directory = made("plain", tmp_path)
    tensors = load_file(directory / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        if "w_norm" in key:
            tensor *= torch.linspace(0.5, 2.0, tensor.shape[0])
        elif "delora_A" in key:
            tensor[1] *= 1e-6
        elif "delora_B" in key:
            tensor[:, 2] *= 1e-6
    change(directory, **tensors)

    check_equals_peft(base, directory)


@pytest.mark.parametrize("name", ["new biases of its own", "ranks and bounds by pattern"])
def test_whatever_is_wrong_is_refused(name: str, tmp_path: Path) -> None:
    check_refusals(*made(name, tmp_path))
