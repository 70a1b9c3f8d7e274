"""VeRA and PVeRA, with PEFT as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PveraConfig, VeraConfig
from tests.support.family_suite import (
    change,
    check_equals_peft,
    check_refusals,
    check_refused,
    edit,
    load,
    make_checkpoint,
)
from tests.support.peft_variants import BASES
from transformers import PreTrainedModel

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not save:UserWarning")

CONFIGS: dict[str, type[PeftConfig]] = {"vera": VeraConfig, "pvera": PveraConfig}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "modules of several sizes": ("llama", {"target_modules": "all-linear"}),
    "drawn again": (
        "llama",
        {
            "target_modules": ["q_proj", "up_proj", "v_proj"],
            "save_projection": False,
            "projection_prng_key": 77,
        },
    ),
    "drawn again for one layer": (
        "llama",
        {
            "target_modules": ["v_proj", "down_proj"],
            "save_projection": False,
            "layers_to_transform": [1],
        },
    ),
    "transposed base, drawn again": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj"], "save_projection": False},
    ),
    "new biases": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "bias": "all"}),
    "fused projections": ("phi3", {"target_modules": ["qkv_proj", "down_proj"]}),
}


def made(name: str, family: str, tmp_path: Path, seed: int = 1) -> tuple[PreTrainedModel, Path]:
    base_name, options = VARIANTS[name]
    base = BASES[base_name]()
    config = CONFIGS[family](r=7, **options)
    return base, make_checkpoint(base, config, tmp_path / name, seed=seed)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_peft(name: str, family: str, seed: int, tmp_path: Path) -> None:
    base, directory = made(name, family, tmp_path, seed)
    plan = check_equals_peft(base, directory)
    assert plan.family == family
    assert plan.rank == 7
    assert any("drawn" in note for note in plan.notes) == ("drawn" in name)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", ["modules of several sizes", "drawn again"])
def test_whatever_is_wrong_is_refused(name: str, family: str, tmp_path: Path) -> None:
    check_refusals(*made(name, family, tmp_path))


def test_projections_are_stored_if_and_only_if_the_config_says_so(tmp_path: Path) -> None:
    base, directory = made("modules of several sizes", "vera", tmp_path)
    edit(directory, save_projection=False)
    check_refused(base, directory, "config_mismatch", "says that it is not stored")
    edit(directory, save_projection=True)
    change(directory, **{"base_model.vera_A": None})
    check_refused(base, directory, "missing_tensor", "no vera_A")


def test_projections_of_another_selection_are_refused(tmp_path: Path) -> None:
    base, directory = made("modules of several sizes", "vera", tmp_path)
    change(directory, **{"base_model.vera_A": torch.ones(7, 32)})
    check_refused(base, directory, "shape_mismatch", "expected [7, 48]")


def test_sampling_is_refused(tmp_path: Path) -> None:
    base, directory = made("modules of several sizes", "pvera", tmp_path)
    edit(directory, generator_seed=3)
    load(directory, base)
    edit(directory, sample_at_inference=True)
    check_refused(base, directory, "unsupported_config", "sample_at_inference is not served")
