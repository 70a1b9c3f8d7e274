"""BEFT, with PEFT as the oracle: vectors added with and without a bias of the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import BeftConfig
from tests.support.family_suite import check_equals_peft, check_refusals, load
from tests.support.peft_variants import Maker

from polyadapt.ops import cells

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "beside a bias": ("biased", {"target_modules": ["v_proj"]}),
    "in place of none": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "fused projections": ("phi3", {"target_modules": ["qkv_proj"]}),
    "a new norm beside": ("llama", {"target_modules": ["v_proj"], "modules_to_save": ["norm"]}),
}


@pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias term")
@pytest.mark.parametrize(("seed", "name"), list(enumerate(VARIANTS)))
def test_variants_equal_peft(seed: int, name: str, tmp_path: Path) -> None:
    check_equals_peft(*made(name, tmp_path, seed))


made = Maker(BeftConfig, VARIANTS, std=0.5)


def test_whatever_is_wrong_is_refused(tmp_path: Path) -> None:
    check_refusals(*made("beside a bias", tmp_path))


def test_a_vector_per_module_is_all_that_is_stored(tmp_path: Path) -> None:
    base, directory = made("in place of none", tmp_path)
    plan, deltas = load(directory, base)
    assert plan.num_elements == 2 * (32 + 16 + 32)
    assert {delta.parts for delta in deltas.values()} == {cells.BIAS}
    assert plan.traits.is_scalable
