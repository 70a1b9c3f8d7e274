"""RoAd, with PEFT as the oracle: pairs of outputs turned and scaled, bias included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import RoadConfig
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
    **{
        f"{variant}, groups of {group}": (
            "biased",
            {"variant": variant, "group_size": group, "target_modules": "all-linear"},
        )
        for variant, group in [("road_1", 8), ("road_2", 16), ("road_4", 4), ("road_4", 2)]
    },
    "one group": ("llama", {"group_size": 32, "target_modules": ["q_proj", "down_proj"]}),
    "fused projections": ("phi3", {"group_size": 16, "target_modules": ["qkv_proj"]}),
    "a new norm beside": (
        "llama",
        {"group_size": 8, "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    ),
}


made = Maker(RoadConfig, VARIANTS, std=0.4)


@pytest.mark.parametrize(("seed", "name"), list(enumerate(VARIANTS)))
def test_variants_equal_peft(seed: int, name: str, tmp_path: Path) -> None:
    check_equals_peft(*made(name, tmp_path, seed))


@pytest.mark.parametrize("name", ["road_4, groups of 4", "one group"])
def test_whatever_is_wrong_is_refused(name: str, tmp_path: Path) -> None:
    check_refusals(*made(name, tmp_path))


def test_two_factors_per_output_are_all_that_is_stored(tmp_path: Path) -> None:
    base, directory = made("one group", tmp_path)
    plan, deltas = load(directory, base)
    assert plan.num_elements == 4 * 2 * 32
    assert {delta.parts for delta in deltas.values()} == {cells.SWAP | 32 << cells.GROUP_SHIFT}
    assert not plan.traits.is_scalable


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base, directory = made("one group", tmp_path)
    edit(directory, group_size=64)
    check_refused(base, directory, "shape_mismatch", "do not fall into groups of 64")
    edit(directory, group_size=7)
    check_refused(base, directory, "invalid_config", "an even number")
    edit(directory, group_size=32, variant="road_3")
    check_refused(base, directory, "invalid_config", "road_1 or road_2 or road_4")
    edit(directory, variant="road_2")
    check_refused(base, directory, "shape_mismatch", "needs [32]")
