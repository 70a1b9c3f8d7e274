"""WaveFT, with PEFT as the oracle: Haar's wavelets on even and odd sizes, or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import WaveFTConfig
from tests.support.family_suite import (
    change,
    check_equals_peft,
    check_refusals,
    check_refused,
    edit,
    load,
)
from tests.support.peft_variants import BASES, Maker
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from polyadapt.ops import cells

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def odd_llama() -> PreTrainedModel:
    """MLPs of an odd width."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=45,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).eval()


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "haar": ("llama", {"n_frequency": 60, "target_modules": "all-linear"}),
    "odd sizes": ("odd", {"n_frequency": 1400, "target_modules": ["up_proj", "down_proj"]}),
    "no wavelets": (
        "llama",
        {
            "n_frequency": 60,
            "use_idwt": False,
            "wavelet_family": "sym4",
            "scaling": 3.0,
            "random_loc_seed": 12,
            "target_modules": ["q_proj", "down_proj"],
        },
    ),
    "counts by pattern": (
        "llama",
        {
            "n_frequency": 90,
            "n_frequency_pattern": {"model.layers.0.self_attn.v_proj": 30, "v_proj": 70},
            "target_modules": ["q_proj", "v_proj"],
        },
    ),
    "counts in proportion": (
        "llama",
        {
            "n_frequency": 90,
            "proportional_parameters": True,
            "target_modules": ["q_proj", "k_proj", "down_proj"],
        },
    ),
    "biases": ("gpt2", {"n_frequency": 100, "bias": "all", "target_modules": ["c_attn", "c_fc"]}),
    "fused projections": ("phi3", {"n_frequency": 100, "target_modules": ["qkv_proj"]}),
}


made = Maker(WaveFTConfig, VARIANTS, bases=BASES | {"odd": odd_llama})


@pytest.mark.parametrize(("seed", "name"), list(enumerate(VARIANTS)))
def test_variants_equal_peft(seed: int, name: str, tmp_path: Path) -> None:
    check_equals_peft(*made(name, tmp_path, seed))


def test_whatever_is_wrong_is_refused(tmp_path: Path) -> None:
    check_refusals(*made("counts by pattern", tmp_path))


def test_it_adds_and_scales(tmp_path: Path) -> None:
    base, directory = made("haar", tmp_path)
    plan, deltas = load(directory, base)
    assert plan.traits.is_scalable
    assert {delta.parts for delta in deltas.values()} == {cells.DENSE}


def test_other_wavelets_are_refused_by_name(tmp_path: Path) -> None:
    base, directory = made("haar", tmp_path)
    edit(directory, wavelet_family="sym4")
    check_refused(base, directory, "unsupported_config", "'sym4' is not served")


def test_more_coefficients_than_elements_are_refused(tmp_path: Path) -> None:
    base, directory = made("counts in proportion", tmp_path)
    change(directory, **{f"{Q0}.waveft_spectrum": torch.ones(2000)})
    check_refused(base, directory, "shape_mismatch", "more than the 1024 elements")
