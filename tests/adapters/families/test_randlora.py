"""RandLoRA, with PEFT as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import RandLoraConfig
from safetensors.torch import load_file
from tests.support.family_suite import (
    change,
    check_equals_peft,
    check_refusals,
    check_refused,
    edit,
)
from tests.support.peft_variants import Maker

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not save:UserWarning")

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "stored": ("llama", {"target_modules": ["v_proj"]}),
    "modules of several sizes": ("llama", {"r": 8, "target_modules": "all-linear"}),
    "drawn again": (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj", "v_proj"],
            "save_projection": False,
            "projection_prng_key": 77,
        },
    ),
    "sparse, drawn again": (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "save_projection": False, "sparse": True},
    ),
    "very sparse, drawn again": (
        "llama",
        {
            "target_modules": ["q_proj", "up_proj"],
            "save_projection": False,
            "sparse": True,
            "very_sparse": True,
        },
    ),
    "transposed base, drawn again": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj"], "save_projection": False},
    ),
    "new biases": ("gpt2", {"bias": "all", "target_modules": ["c_attn", "c_fc"]}),
    "fused projections": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
}


made = Maker(RandLoraConfig, VARIANTS, r=5, randlora_alpha=7, std=0.05)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_peft(name: str, seed: int, tmp_path: Path) -> None:
    base, directory = made(name, tmp_path, seed)
    plan = check_equals_peft(base, directory)
    assert plan.rank == 0
    assert plan.traits.is_scalable == ("biases" not in name)
    assert any("drawn" in note for note in plan.notes) == ("drawn" in name)


@pytest.mark.parametrize("name", ["stored", "drawn again"])
def test_whatever_is_wrong_is_refused(name: str, tmp_path: Path) -> None:
    check_refusals(*made(name, tmp_path))


def test_the_bases_are_stored_if_and_only_if_the_config_says_so(tmp_path: Path) -> None:
    base, directory = made("stored", tmp_path)
    edit(directory, save_projection=False)
    check_refused(base, directory, "config_mismatch", "says that it is not stored")
    edit(directory, save_projection=True)
    change(directory, **{"base_model.randlora_B": None})
    check_refused(base, directory, "missing_tensor", "no randlora_B")


def test_a_modules_own_copy_of_the_bases_must_be_that_of_all(tmp_path: Path) -> None:
    base, directory = made("stored", tmp_path)
    key = "base_model.model.model.layers.1.self_attn.v_proj.randlora_A"
    change(directory, **{key: load_file(directory / "adapter_model.safetensors")[key] * 2})
    check_refused(base, directory, "shape_mismatch", "is not the one that all share")
