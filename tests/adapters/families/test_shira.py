"""SHiRA, with PEFT as the oracle: a few elements of the weight, at the places that are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import ShiraConfig
from safetensors.torch import load_file
from tests.support.family_suite import (
    change,
    check_equals_peft,
    check_refusals,
    check_refused,
    load,
)
from tests.support.peft_variants import Maker

from polyadapt.ops import cells

V0 = "base_model.model.model.layers.0.self_attn.v_proj"

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "all linear": ("llama", {"r": 2, "target_modules": "all-linear"}),
    "places from a seed": ("llama", {"r": 1, "random_seed": 4, "target_modules": ["v_proj"]}),
    "a new head beside": (
        "llama",
        {"r": 3, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    ),
    "fused projections": ("phi3", {"r": 4, "target_modules": ["qkv_proj", "gate_up_proj"]}),
}


made = Maker(ShiraConfig, VARIANTS, std=0.5)


pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")


@pytest.mark.parametrize(("seed", "name"), list(enumerate(VARIANTS)))
def test_variants_equal_peft(seed: int, name: str, tmp_path: Path) -> None:
    check_equals_peft(*made(name, tmp_path, seed))


def test_whatever_is_wrong_is_refused(tmp_path: Path) -> None:
    check_refusals(*made("places from a seed", tmp_path))


def test_it_adds_and_scales(tmp_path: Path) -> None:
    base, directory = made("all linear", tmp_path)
    plan, deltas = load(directory, base)
    assert plan.traits.is_scalable
    assert {delta.parts for delta in deltas.values()} == {cells.DENSE}


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])  # the latter under Windows
def test_places_may_be_stored_otherwise(dtype: torch.dtype, tmp_path: Path) -> None:
    base, directory = made("places from a seed", tmp_path)
    stored = load_file(directory / "adapter_model.safetensors")
    change(directory, **{k: t.to(dtype) for k, t in stored.items() if "indices" in k})
    check_equals_peft(base, directory)


@pytest.mark.parametrize(("axis", "size", "name"), [(0, 16, "rows"), (1, 32, "columns")])
def test_places_outside_of_the_weight_are_refused(
    axis: int, size: int, name: str, tmp_path: Path
) -> None:
    base, directory = made("places from a seed", tmp_path)
    places = load_file(directory / "adapter_model.safetensors")[f"{V0}.shira_indices"]
    places[axis, 5] = size
    change(directory, **{f"{V0}.shira_indices": places})
    check_refused(base, directory, "shape_mismatch", f"{name} from 0 to {size}, W has {size}")


def test_values_of_one_place_add_up(tmp_path: Path) -> None:
    base, directory = made("places from a seed", tmp_path)
    places = load_file(directory / "adapter_model.safetensors")[f"{V0}.shira_indices"]
    places[:, :7] = places[:, :1]
    change(directory, **{f"{V0}.shira_indices": places})
    check_equals_peft(base, directory)
