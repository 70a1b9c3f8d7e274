"""DEFT and PaRa, with PEFT as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import DeftConfig
from tests.support.family_suite import (
    check_equals_peft,
    check_refusals,
    check_refused,
    edit,
)
from tests.support.peft_variants import Maker

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "all linears, scaled": ("llama", {"alpha": 3, "target_modules": "all-linear"}),
    "orthonormal": (
        "llama",
        {"decomposition_method": "qr", "alpha": 8, "target_modules": ["v_proj", "up_proj"]},
    ),
    "random start": ("llama", {"init_weights": False, "target_modules": ["down_proj"]}),
    "removal": ("llama", {"para": True, "target_modules": ["v_proj", "down_proj"]}),
    "orthonormal removal": (
        "llama",
        {"para": True, "decomposition_method": "qr", "target_modules": ["v_proj", "down_proj"]},
    ),
    "more rank than outputs": ("llama", {"r": 20, "target_modules": ["k_proj", "v_proj"]}),
    "transposed base": ("gpt2", {"target_modules": ["c_attn", "c_fc"]}),
    "new biases": ("gpt2", {"bias": "deft_only", "target_modules": ["c_attn", "c_proj"]}),
    "fused projections": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
}
RANKS = {"more rank than outputs": 16}


made = Maker(DeftConfig, VARIANTS, r=5)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_peft(name: str, seed: int, tmp_path: Path) -> None:
    base, directory = made(name, tmp_path, seed)
    plan = check_equals_peft(base, directory)
    assert plan.rank == RANKS.get(name, 5)
    assert not plan.traits.is_scalable


@pytest.mark.parametrize("name", ["plain", "removal"])
def test_whatever_is_wrong_is_refused(name: str, tmp_path: Path) -> None:
    check_refusals(*made(name, tmp_path))


def test_what_is_put_in_is_there_if_and_only_if_the_config_says_so(tmp_path: Path) -> None:
    base, directory = made("plain", tmp_path)
    edit(directory, para=True)
    check_refused(base, directory, "config_mismatch", "holds a deft_R")
    base, directory = made("removal", tmp_path)
    edit(directory, para=False)
    check_refused(base, directory, "config_mismatch", "holds no deft_R")
    edit(directory, decomposition_method="svd")
    check_refused(base, directory, "invalid_config", "expected qr or relu")
