"""HiRA, with PEFT as the oracle: multiples of the base's own elements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import HiraConfig
from tests.support.family_suite import (
    check_equals_peft,
    check_refusals,
    check_refused,
    edit,
    load,
)
from tests.support.peft_variants import Maker

from polyadapt.ops import cells

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "all linear": ("llama", {"r": 3, "target_modules": "all-linear"}),
    # PEFT ignores the pattern.
    "ranks by pattern": (
        "llama",
        {"r": 4, "rank_pattern": {"v_proj": 2}, "target_modules": ["q_proj", "v_proj"]},
    ),
    "embedding": ("llama", {"r": 4, "target_modules": ["embed_tokens", "v_proj"]}),
    "biases": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_fc"]}),
    "fused projections": ("phi3", {"r": 4, "target_modules": ["qkv_proj", "gate_up_proj"]}),
}


made = Maker(HiraConfig, VARIANTS, std=0.7)


@pytest.mark.parametrize(("seed", "name"), list(enumerate(VARIANTS)))
def test_variants_equal_peft(seed: int, name: str, tmp_path: Path) -> None:
    check_equals_peft(*made(name, tmp_path, seed))


@pytest.mark.parametrize("name", ["ranks by pattern", "embedding"])
def test_whatever_is_wrong_is_refused(name: str, tmp_path: Path) -> None:
    check_refusals(*made(name, tmp_path))


def test_it_adds_and_scales(tmp_path: Path) -> None:
    base, directory = made("embedding", tmp_path)
    plan, deltas = load(directory, base)
    assert not plan.traits.is_scalable  # it multiplies W, as another adapter of a request may
    assert "model.embed_tokens.weight" in plan.traits.replaced
    assert {delta.parts for delta in deltas.values()} == {cells.DENSE}


def test_another_rank_is_refused(tmp_path: Path) -> None:
    base, directory = made("all linear", tmp_path)
    edit(directory, r=4)
    check_refused(base, directory, "shape_mismatch", "has rank 3, r is 4")
    edit(directory, rank_pattern={"layers.*": 3})
    load(directory, base)
