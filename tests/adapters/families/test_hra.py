"""HRA, with PEFT as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HRAConfig
from safetensors.torch import load_file
from tests.support.family_suite import (
    change,
    check_equals_peft,
    check_refusals,
    check_refused,
)
from tests.support.peft_variants import Maker

pytestmark = pytest.mark.filterwarnings("ignore:The symmetric initialization:UserWarning")

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "reflections": ("llama", {"r": 6, "target_modules": "all-linear"}),
    "an odd number of reflections": ("llama", {"r": 5, "target_modules": ["q_proj", "down_proj"]}),
    "one reflection": ("llama", {"r": 1, "target_modules": ["q_proj", "down_proj"]}),
    "orthonormal": (
        "llama",
        {"r": 6, "apply_GS": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    ),
    "a base with biases": ("biased", {"r": 4, "target_modules": ["v_proj", "up_proj"]}),
    "new biases": (
        "biased",
        {"r": 3, "bias": "hra_only", "target_modules": ["v_proj", "down_proj"]},
    ),
    "fused projections": ("phi3", {"r": 6, "target_modules": ["qkv_proj", "gate_up_proj"]}),
}


# So much that pairs of columns that PEFT starts as equal are not cut off to their rounding.
made = Maker(HRAConfig, VARIANTS, std=0.5)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_peft(name: str, seed: int, tmp_path: Path) -> None:
    base, directory = made(name, tmp_path, seed)
    plan = check_equals_peft(base, directory)
    assert plan.rank == VARIANTS[name][1]["r"]


def test_it_multiplies_the_weight_and_cannot_be_scaled(tmp_path: Path) -> None:
    base, directory = made("a base with biases", tmp_path)
    traits = check_equals_peft(base, directory).traits
    assert not traits.is_scalable
    assert traits.replaced[0] == "model.layers.0.self_attn.v_proj.weight"
    assert len(traits.replaced) == 4


@pytest.mark.parametrize("name", ["one reflection", "orthonormal"])
def test_whatever_is_wrong_is_refused(name: str, tmp_path: Path) -> None:
    check_refusals(*made(name, tmp_path))


@pytest.mark.parametrize("name", ["reflections", "orthonormal"])
def test_a_column_of_zeros_is_no_reflection(name: str, tmp_path: Path) -> None:
    base, directory = made(name, tmp_path)
    key, u = next(iter(load_file(directory / "adapter_model.safetensors").items()))
    u[:, 2] = torch.zeros(u.shape[0])
    change(directory, **{key: u})
    check_refused(base, directory, "shape_mismatch", "a column of hra_u is zero")
