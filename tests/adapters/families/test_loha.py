"""LoHa, with PEFT as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoHaConfig
from tests.support.family_suite import (
    check_equals_peft,
    check_refusals,
    load,
)
from tests.support.peft_variants import Maker

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "one target": ("llama", {"target_modules": ["v_proj"]}),
    "all linears": ("llama", {"r": 4, "target_modules": "all-linear"}),
    "ranks and alphas by pattern": (
        "llama",
        {
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"q_proj": 5},
            "alpha_pattern": {"up_proj": 2},
        },
    ),
    "a base with biases": ("biased", {"target_modules": ["v_proj", "up_proj"]}),
    "a convolution's option": (
        "llama",
        {"use_effective_conv2d": True, "target_modules": ["down_proj"]},
    ),
    "fused projections": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
}
RANKS = {"all linears": 16}


made = Maker(LoHaConfig, VARIANTS, r=3, alpha=5, std=0.5)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_peft(name: str, seed: int, tmp_path: Path) -> None:
    base, directory = made(name, tmp_path, seed)
    plan = check_equals_peft(base, directory)
    assert plan.rank == RANKS.get(name, 9)
    assert plan.traits.is_scalable


def test_a_difference_that_takes_less_than_its_components_is_stored_whole(tmp_path: Path) -> None:
    base, directory = made("ranks and alphas by pattern", tmp_path)
    plan, deltas = load(directory, base)
    assert {delta.dense is None for delta in deltas.values()} == {True, False}
    assert plan.num_elements == 2 * (9 * (32 + 48) + 32 * 32)


@pytest.mark.parametrize("name", ["one target", "ranks and alphas by pattern"])
def test_whatever_is_wrong_is_refused(name: str, tmp_path: Path) -> None:
    check_refusals(*made(name, tmp_path))
