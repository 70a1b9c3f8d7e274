"""LayerNorm tuning, with PEFT as the oracle: new weights and biases of normalisations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LNTuningConfig
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

LN1 = "base_model.model.transformer.h.0.ln_1"

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "all norms": ("llama", {}),
    "norms with biases": ("gpt2", {}),
    "some norms": ("gpt2", {"target_modules": r"transformer\.h\.1\.ln_1|transformer\.ln_f"}),
    "a new head beside": (
        "llama",
        {"target_modules": ["input_layernorm"], "modules_to_save": ["lm_head"]},
    ),
    "another new norm beside": (
        "gpt2",
        {"target_modules": ["ln_1"], "modules_to_save": ["ln_f"]},
    ),
    "phi3": ("phi3", {"target_modules": ["post_attention_layernorm"]}),
}


made = Maker(LNTuningConfig, VARIANTS)


@pytest.mark.parametrize(("seed", "name"), list(enumerate(VARIANTS)))
def test_variants_equal_peft(seed: int, name: str, tmp_path: Path) -> None:
    check_equals_peft(*made(name, tmp_path, seed))


@pytest.mark.parametrize("name", ["all norms", "norms with biases"])
def test_whatever_is_wrong_is_refused(name: str, tmp_path: Path) -> None:
    check_refusals(*made(name, tmp_path))


def test_what_is_replaced_is_said(tmp_path: Path) -> None:
    base, directory = made("some norms", tmp_path)
    plan, deltas = load(directory, base)
    assert not plan.traits.is_scalable
    assert set(plan.traits.replaced) == {
        f"transformer.{norm}.{part}" for norm in ("h.1.ln_1", "ln_f") for part in ("weight", "bias")
    }
    assert {delta.parts for delta in deltas.values()} == {cells.BIAS | cells.WEIGHT}
    assert plan.num_elements == 2 * 2 * 32


def test_a_bias_must_be_there_where_the_base_has_one_and_nowhere_else(tmp_path: Path) -> None:
    base, directory = made("norms with biases", tmp_path)
    change(directory, **{f"{LN1}.ln_tuning_layers.bias": None})
    check_refused(base, directory, "missing_tensor", "has a new weight and no")
    change(directory, **{f"{LN1}.bias": torch.ones(32)})
    check_refused(base, directory, "unread_tensor", "is of no new")

    base, directory = made("all norms", tmp_path)
    norm = "base_model.model.model.norm.ln_tuning_layers"
    change(directory, **{f"{norm}.bias": torch.ones(32)})
    check_refused(base, directory, "unread_tensor", "no bias to replace")


def test_modules_that_are_no_norms_are_refused(tmp_path: Path) -> None:
    base, directory = made("all norms", tmp_path)
    edit(directory, target_modules=["norm", "lm_head"])
    head = "base_model.model.lm_head.ln_tuning_layers"
    change(directory, **{f"{head}.weight": torch.ones(64, 32)})
    check_refused(base, directory, "unread_tensor", "of kind linear, which ln_tuning does not")


def test_a_norm_that_is_not_selected_is_refused(tmp_path: Path) -> None:
    base, directory = made("norms with biases", tmp_path)
    edit(directory, target_modules=["ln_1", "ln_2"])
    check_refused(base, directory, "not_targeted", "transformer.ln_f")
