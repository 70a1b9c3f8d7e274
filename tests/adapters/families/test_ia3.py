"""(IA)3, with PEFT as the oracle: factors of outputs with their bias, and of inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config
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
    "defaults": ("llama", {}),
    "outputs only": (
        "llama",
        {"target_modules": ["q_proj", "v_proj", "up_proj"], "feedforward_modules": []},
    ),
    "an input by pattern": (
        "llama",
        {"target_modules": "model.*_proj", "feedforward_modules": r"model\.layers\.1\..*_proj"},
    ),
    # PEFT compares ends without asking for a dot, so that up_proj means gate_up_proj.
    "an input by the end of a name": (
        "phi3",
        {"target_modules": "model.*(qkv|gate_up)_proj", "feedforward_modules": ["up_proj"]},
    ),
    "fused outputs": (
        "phi3",
        {"target_modules": ["qkv_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "biases": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "feedforward_modules": []}),
    "inputs before biases": (
        "gpt2",
        {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]},
    ),
    "a new head beside": (
        "llama",
        {"target_modules": ["q_proj"], "feedforward_modules": [], "modules_to_save": ["lm_head"]},
    ),
}


made = Maker(IA3Config, VARIANTS)


@pytest.mark.parametrize(("seed", "name"), list(enumerate(VARIANTS)))
def test_variants_equal_peft(seed: int, name: str, tmp_path: Path) -> None:
    check_equals_peft(*made(name, tmp_path, seed))


@pytest.mark.parametrize("name", ["defaults", "inputs before biases"])
def test_whatever_is_wrong_is_refused(name: str, tmp_path: Path) -> None:
    check_refusals(*made(name, tmp_path))


def test_a_scale_per_channel_is_all_that_is_stored(tmp_path: Path) -> None:
    base, directory = made("defaults", tmp_path)
    plan, deltas = load(directory, base)
    assert plan.rank == 0
    assert not plan.traits.is_scalable
    assert "model.layers.0.mlp.down_proj.weight" in plan.traits.replaced
    parts = {delta.parts for delta in deltas.values()}
    assert parts == {cells.OUT_SCALE, cells.TRANSFORM | 1 << cells.GROUP_SHIFT}
    assert plan.num_elements == sum(t.numel() for d in deltas.values() for _, t in d.tails)


def test_where_the_factors_stand_must_be_said(tmp_path: Path) -> None:
    base, directory = made("defaults", tmp_path)
    edit(directory, feedforward_modules=None)
    check_refused(base, directory, "invalid_config", "feedforward_modules is None")
    edit(directory, feedforward_modules=[])
    check_refused(base, directory, "shape_mismatch", "needs [32, 1]")
    edit(directory, feedforward_modules="(")
    check_refused(base, directory, "invalid_pattern", "feedforward_modules")
