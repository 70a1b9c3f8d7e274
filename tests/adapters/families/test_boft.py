"""BOFT, with PEFT as the oracle: one factor as blocks, several as its extension computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft.tuners.boft.layer as peft_boft
import pytest
import torch
from peft import BOFTConfig
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
    "defaults": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "block size": ("llama", {"boft_block_size": 16, "target_modules": "all-linear"}),
    "number of blocks": (
        "llama",
        {"boft_block_size": 0, "boft_block_num": 2, "target_modules": ["k_proj", "down_proj"]},
    ),
    "odd blocks": ("llama", {"boft_block_size": 3, "target_modules": ["down_proj"]}),
    "biases stay": ("biased", {"boft_block_size": 8, "target_modules": ["v_proj"]}),
    "new biases": (
        "biased",
        {"boft_block_size": 8, "bias": "boft_only", "target_modules": ["v_proj"]},
    ),
    "fused projections": ("phi3", {"boft_block_size": 8, "target_modules": ["qkv_proj"]}),
    # Without its extension PEFT stores one factor and leaves the config as it was.
    "one factor of three": (
        "llama",
        {"boft_n_butterfly_factor": 3, "target_modules": ["v_proj"]},
    ),
}

FACTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "two": ("llama", {"boft_n_butterfly_factor": 2, "target_modules": ["q_proj", "down_proj"]}),
    "three": ("llama", {"boft_n_butterfly_factor": 3, "target_modules": ["v_proj", "down_proj"]}),
    "four of eight": (
        "llama",
        {
            "boft_n_butterfly_factor": 4,
            "boft_block_size": 0,
            "boft_block_num": 8,
            "target_modules": ["q_proj", "v_proj"],
        },
    ),
    "biases stay": ("biased", {"boft_n_butterfly_factor": 2, "target_modules": ["v_proj"]}),
}


made = Maker(BOFTConfig, VARIANTS)
made_of_factors = Maker(BOFTConfig, FACTORS)


class _Blocks:
    """What PEFT's CUDA extension does: matrices [factors, blocks, g, g] put on diagonals."""

    @staticmethod
    def apply(turns: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.block_diag(*factor) for factor in turns])


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has PEFT believe in its CUDA extension, whose one function is replaced."""
    monkeypatch.setattr(peft_boft, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(peft_boft, "FastBlockDiag", _Blocks)


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension")
@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1")
@pytest.mark.parametrize(("seed", "name"), list(enumerate(VARIANTS)))
def test_variants_equal_peft(seed: int, name: str, tmp_path: Path) -> None:
    check_equals_peft(*made(name, tmp_path, seed))


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize(("seed", "name"), list(enumerate(FACTORS)))
def test_several_factors_equal_peft(seed: int, name: str, tmp_path: Path) -> None:
    base, directory = made_of_factors(name, tmp_path, seed)
    plan = check_equals_peft(base, directory)
    assert not plan.traits.is_scalable
    assert {delta.parts for delta in load(directory, base)[1].values()} == {cells.DENSE}


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("name", ["two", "biases stay"])
def test_whatever_is_wrong_with_factors_is_refused(name: str, tmp_path: Path) -> None:
    check_refusals(*made_of_factors(name, tmp_path, 1))


def test_whatever_is_wrong_is_refused(tmp_path: Path) -> None:
    check_refusals(*made("number of blocks", tmp_path))


def test_factors_that_the_config_does_not_name_are_refused(tmp_path: Path) -> None:
    base, directory = made("defaults", tmp_path)
    change(directory, **{f"{Q0}.boft_R": torch.zeros(2, 8, 4, 4)})
    check_refused(base, directory, "shape_mismatch", "holds 2 factors")
    edit(directory, boft_n_butterfly_factor=2)
    load(directory, base)
    edit(directory, boft_n_butterfly_factor=5)
    change(directory, **{f"{Q0}.boft_R": torch.zeros(5, 8, 4, 4)})
    check_refused(base, directory, "shape_mismatch", "a multiple of 16 blocks")


def test_block_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base, directory = made("defaults", tmp_path)
    edit(directory, boft_block_num=8)
    check_refused(base, directory, "invalid_config", "boft_block_num is 8")
    edit(directory, boft_block_num=0, boft_block_size=0)
    check_refused(base, directory, "invalid_config", "boft_block_num is 0")
    edit(directory, boft_block_size=5)
    change(directory, **{f"{Q0}.boft_R": torch.zeros(1, 6, 5, 5)})
    check_refused(base, directory, "shape_mismatch", "do not fall into blocks of 5")
