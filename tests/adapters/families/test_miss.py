"""MiSS and the old Bone, with PEFT as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import MissConfig
from safetensors.torch import load_file
from tests.support.family_suite import (
    change,
    check_equals_peft,
    check_refusals,
    check_refused,
    edit,
)
from tests.support.peft_adapters import reload
from tests.support.peft_variants import Maker

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"r": 8, "target_modules": "all-linear"}),
    "rank that does not divide": ("llama", {"r": 7, "target_modules": ["q_proj", "down_proj"]}),
    "rank of all inputs": ("llama", {"r": 32, "target_modules": ["k_proj", "gate_proj"]}),
    "random start": ("llama", {"r": 6, "target_modules": ["o_proj"], "init_weights": False}),
    "mini": (
        "llama",
        {"r": 5, "mini_r": 4, "init_weights": "mini", "target_modules": ["v_proj", "up_proj"]},
    ),
    "bat": ("llama", {"r": 4, "init_weights": "bat", "target_modules": ["v_proj", "down_proj"]}),
    "bat, new biases": (
        "biased",
        {"r": 8, "init_weights": "bat", "bias": "all", "target_modules": ["k_proj", "up_proj"]},
    ),
    "new biases of its own": (
        "biased",
        {"r": 5, "bias": "MiSS_only", "target_modules": ["q_proj", "down_proj"]},
    ),
    "fused projections": ("phi3", {"r": 6, "target_modules": ["qkv_proj", "gate_up_proj"]}),
}


made = Maker(MissConfig, VARIANTS)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_peft(name: str, seed: int, tmp_path: Path) -> None:
    base, directory = made(name, tmp_path, seed)
    plan = check_equals_peft(base, directory)
    assert plan.rank == (0 if "bat" in name else VARIANTS[name][1]["r"])
    assert plan.traits.is_scalable == ("bat" not in name and "biases" not in name)


@pytest.mark.parametrize("name", ["rank that does not divide", "bat"])
def test_bones_of_old_are_read(name: str, tmp_path: Path) -> None:
    base, directory = made(name, tmp_path)
    oracle = reload(base, directory)
    tensors = load_file(directory / "adapter_model.safetensors")
    renamed = {key.replace("miss_block", "bone_block"): t for key, t in tensors.items()}
    change(directory, **dict.fromkeys(tensors), **renamed)
    edit(directory, peft_type="BONE")

    check_equals_peft(base, directory, oracle=oracle)


@pytest.mark.parametrize("name", ["random start", "mini", "bat"])
def test_whatever_is_wrong_is_refused(name: str, tmp_path: Path) -> None:
    check_refusals(*made(name, tmp_path))


def test_blocks_must_fit_the_base(tmp_path: Path) -> None:
    base, directory = made("bat", tmp_path)
    edit(directory, r=5)
    check_refused(base, directory, "shape_mismatch", "needs [3, 5, 5]")
    edit(directory, r=4, init_weights="pissa")
    check_refused(base, directory, "invalid_config", "init_weights is 'pissa'")
    base, directory = made("mini", tmp_path)
    edit(directory, mini_r=5)
    check_refused(base, directory, "shape_mismatch", "needs [5, 5]")
