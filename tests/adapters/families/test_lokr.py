"""LoKr, with PEFT as the oracle: every mixture of whole and factored matrices, dense or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoKrConfig
from tests.support.family_suite import (
    change,
    check_equals_peft,
    check_refusals,
    check_refused,
    edit,
    load,
)
from tests.support.peft_variants import Maker

from polyadapt.ops import cells

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"

# name -> base, options, the largest rank; 0 where a dense matrix is smaller than A and B
VARIANTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "both whole": ("llama", {"r": 8, "alpha": 3, "target_modules": "all-linear"}, 0),
    "the second factored": ("llama", {"r": 2, "alpha": 5, "target_modules": ["q_proj"]}, 8),
    "the second factored, in four": (
        "llama",
        {"r": 3, "decompose_factor": 4, "target_modules": ["down_proj"]},
        12,
    ),
    "both factored": (
        "llama",
        {"r": 1, "decompose_both": True, "target_modules": ["q_proj", "up_proj", "down_proj"]},
        1,
    ),
    "the first factored": (
        "llama",
        {"r": 3, "decompose_both": True, "decompose_factor": 8, "target_modules": ["q_proj"]},
        12,
    ),
    # The first matrix is [6, 4] of up_proj and [4, 6] of down_proj.
    "tall and wide": ("llama", {"r": 2, "target_modules": ["up_proj", "down_proj"]}, 8),
    "wide and low": (
        "llama",
        {"r": 7, "decompose_factor": 2, "target_modules": ["q_proj", "k_proj"]},
        14,
    ),
    "a pattern of ranks and alphas": (
        "llama",
        {
            "r": 2,
            "alpha": 7,
            "rank_pattern": {"layers.1.self_attn.q_proj": 3},
            "alpha_pattern": {"v_proj": 2},
            "target_modules": ["q_proj", "v_proj"],
        },
        12,
    ),
    "fused projections": ("phi3", {"r": 2, "target_modules": ["qkv_proj", "gate_up_proj"]}, 8),
}


made = Maker(LoKrConfig, {name: variant[:2] for name, variant in VARIANTS.items()}, std=0.4)


@pytest.mark.parametrize(("seed", "name"), list(enumerate(VARIANTS)))
def test_variants_equal_peft(seed: int, name: str, tmp_path: Path) -> None:
    base, directory = made(name, tmp_path, seed)
    plan = check_equals_peft(base, directory)
    assert plan.rank == VARIANTS[name][2]
    assert plan.traits.is_scalable


@pytest.mark.parametrize("name", ["both whole", "the second factored", "both factored"])
def test_whatever_is_wrong_is_refused(name: str, tmp_path: Path) -> None:
    check_refusals(*made(name, tmp_path))


def test_what_is_smaller_is_stored(tmp_path: Path) -> None:
    base, directory = made("wide and low", tmp_path)
    plan, deltas = load(directory, base)
    # k_proj of 32 inputs and 16 outputs has rank 14 as well, and 14 * (32 + 16) > 32 * 16.
    assert {delta.parts for delta in deltas.values()} == {0, cells.DENSE}
    assert plan.num_elements == 2 * 14 * (32 + 32) + 2 * 32 * 16


def test_a_matrix_is_whole_or_factored(tmp_path: Path) -> None:
    base, directory = made("the second factored", tmp_path)
    change(directory, **{f"{Q0}.lokr_w2": torch.ones(8, 8)})
    check_refused(base, directory, "shape_mismatch", "either lokr_w2 or both")
    change(directory, **{f"{Q0}.lokr_w2": None, f"{Q0}.lokr_w2_b": None})
    check_refused(base, directory, "shape_mismatch", "either lokr_w2 or both")


def test_sizes_that_do_not_make_the_weight_are_refused(tmp_path: Path) -> None:
    base, directory = made("both whole", tmp_path)
    change(directory, **{f"{Q0}.lokr_w1": torch.ones(8, 4)})
    check_refused(base, directory, "shape_mismatch", "8 * 8 outputs and W 32")
    edit(directory, r=0)
    check_refused(base, directory, "invalid_config", "r is 0")


def test_convolutions_are_refused(tmp_path: Path) -> None:
    base, directory = made("both whole", tmp_path)
    change(directory, **{f"{Q0}.lokr_t2": torch.ones(2, 2, 1, 1)})
    check_refused(base, directory, "unread_tensor", "belongs to a convolution")
