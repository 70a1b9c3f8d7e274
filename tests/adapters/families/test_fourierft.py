"""FourierFT, with PEFT as the oracle: the places follow from the seed, the rest is a transform."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import FourierFTConfig
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
    "defaults": ("llama", {"target_modules": ["q_proj", "o_proj"]}),
    "another seed": (
        "llama",
        {"n_frequency": 50, "random_loc_seed": 5, "scaling": 60.0, "target_modules": "all-linear"},
    ),
    "counts by pattern": (
        "llama",
        {
            "n_frequency": 90,
            "n_frequency_pattern": {"model.layers.0.self_attn.v_proj": 7, "v_proj": 70, "q": 3},
            "target_modules": ["q_proj", "v_proj"],
        },
    ),
    "biases": ("gpt2", {"n_frequency": 100, "target_modules": ["c_attn", "c_fc"]}),
    "new biases": (
        "gpt2",
        {"n_frequency": 100, "bias": "fourier_only", "target_modules": ["c_attn"]},
    ),
    "fused projections": ("phi3", {"n_frequency": 100, "target_modules": ["qkv_proj"]}),
}


made = Maker(FourierFTConfig, VARIANTS)


@pytest.mark.parametrize(("seed", "name"), list(enumerate(VARIANTS)))
def test_variants_equal_peft(seed: int, name: str, tmp_path: Path) -> None:
    check_equals_peft(*made(name, tmp_path, seed))


def test_whatever_is_wrong_is_refused(tmp_path: Path) -> None:
    check_refusals(*made("counts by pattern", tmp_path))


def test_it_adds_and_scales(tmp_path: Path) -> None:
    base, directory = made("another seed", tmp_path)
    plan, deltas = load(directory, base)
    assert plan.traits.is_scalable
    assert {delta.parts for delta in deltas.values()} == {cells.DENSE}


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base, directory = made("defaults", tmp_path)
    edit(directory, random_loc_seed=None)
    check_refused(base, directory, "invalid_config", "random_loc_seed is None")
    edit(directory, random_loc_seed=777, n_frequency=2000)
    change(directory, **{f"{Q0}.fourierft_spectrum": torch.ones(2000)})
    check_refused(base, directory, "shape_mismatch", "more than the 1024 elements")
