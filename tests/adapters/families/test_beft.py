"""BEFT, with PEFT as the oracle: vectors added with and without a bias of the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import BeftConfig
from tests.support.family_suite import check_equals_peft, check_refusals, load, make_checkpoint
from tests.support.peft_adapters import tiny_llama, tiny_phi3
from torch import nn
from transformers import PreTrainedModel

from polyadapt.ops import cells


def biased_llama() -> PreTrainedModel:
    """PEFT's BEFT takes no Conv1D, so that a Llama has to have the biases."""
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.v_proj.bias = nn.Parameter(torch.linspace(-1, 1, 16))
    return model


BASES = {"llama": tiny_llama, "biased": biased_llama, "phi3": tiny_phi3}

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


def made(name: str, tmp_path: Path, seed: int = 1) -> tuple[PreTrainedModel, Path]:
    base_name, options = VARIANTS[name]
    base = BASES[base_name]()
    return base, make_checkpoint(base, BeftConfig(**options), tmp_path, seed=seed, std=0.5)


def test_whatever_is_wrong_is_refused(tmp_path: Path) -> None:
    check_refusals(*made("beside a bias", tmp_path))


def test_a_vector_per_module_is_all_that_is_stored(tmp_path: Path) -> None:
    base, directory = made("in place of none", tmp_path)
    plan, deltas = load(directory, base)
    assert plan.num_elements == 2 * (32 + 16 + 32)
    assert {delta.parts for delta in deltas.values()} == {cells.BIAS}
    assert plan.traits.is_scalable
