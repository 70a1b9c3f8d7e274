"""C3A, with PEFT as the oracle: circulant blocks of several sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import C3AConfig
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

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "blocks of eight": ("llama", {"block_size": 8, "target_modules": "all-linear"}),
    "odd blocks": ("llama", {"block_size": 1, "target_modules": ["down_proj", "v_proj"]}),
    "one block a column": ("llama", {"block_size": 32, "target_modules": ["q_proj", "o_proj"]}),
    # PEFT wants something before the dot, so that the whole path counts last.
    "sizes by pattern": (
        "llama",
        {
            "block_size": 16,
            "block_size_pattern": {
                "model.layers.1.self_attn.v_proj": 2,
                r"self_attn\.[vk]_proj": 4,
                "q_proj": 8,
            },
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        },
    ),
    "fused projections": ("phi3", {"block_size": 16, "target_modules": ["qkv_proj"]}),
    "a new norm beside": (
        "llama",
        {"block_size": 8, "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    ),
}


made = Maker(C3AConfig, VARIANTS, std=1.0)


@pytest.mark.parametrize(("seed", "name"), list(enumerate(VARIANTS)))
def test_variants_equal_peft(seed: int, name: str, tmp_path: Path) -> None:
    check_equals_peft(*made(name, tmp_path, seed))


@pytest.mark.parametrize("name", ["sizes by pattern"])
def test_whatever_is_wrong_is_refused(name: str, tmp_path: Path) -> None:
    check_refusals(*made(name, tmp_path))


def test_it_adds_and_scales(tmp_path: Path) -> None:
    base, directory = made("blocks of eight", tmp_path)
    plan, deltas = load(directory, base)
    assert plan.traits.is_scalable
    assert {delta.parts for delta in deltas.values()} == {cells.DENSE}


def test_blocks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base, directory = made("one block a column", tmp_path)
    edit(directory, block_size=10)
    change(directory, **{f"{Q0}.c3a_kernel": torch.ones(3, 3, 10)})
    check_refused(base, directory, "shape_mismatch", "blocks of 10")
    edit(directory, block_size=0)
    check_refused(base, directory, "invalid_config", "block_size is 0")
    edit(directory, block_size=32, block_size_pattern={"q_proj": "8"})
    check_refused(base, directory, "invalid_config", "block_size_pattern")
