"""Trainable tokens, with PEFT as the oracle: rows of tables replaced, tied or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import TrainableTokensConfig
from tests.support.family_suite import (
    change,
    check_equals_peft,
    check_refusals,
    check_refused,
    edit,
    load,
)
from tests.support.peft_variants import Maker

EMBEDDING = "base_model.model.model.embed_tokens.trainable_tokens_delta"
HEAD = "base_model.model.lm_head.trainable_tokens_delta"

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "embedding": ("llama", {"token_indices": [8, 41, 3]}),
    "tied": ("tied", {"token_indices": [8, 41, 3]}),
    "head": ("llama", {"token_indices": [8, 41], "target_modules": ["lm_head"]}),
    "both": ("llama", {"token_indices": [8], "target_modules": ["embed_tokens", "lm_head"]}),
    "positions": ("gpt2", {"token_indices": [4, 0], "target_modules": ["wpe"]}),
    "tied, biases elsewhere": ("gpt2", {"token_indices": [29, 12]}),
}


made = Maker(TrainableTokensConfig, VARIANTS)


@pytest.mark.parametrize(("seed", "name"), list(enumerate(VARIANTS)))
def test_variants_equal_peft(seed: int, name: str, tmp_path: Path) -> None:
    plan = check_equals_peft(*made(name, tmp_path, seed))
    assert not plan.traits.is_scalable


@pytest.mark.parametrize("name", ["embedding", "tied"])
def test_whatever_is_wrong_is_refused(name: str, tmp_path: Path) -> None:
    check_refusals(*made(name, tmp_path))


def test_every_row_is_one_component(tmp_path: Path) -> None:
    base, directory = made("tied", tmp_path)
    plan, deltas = load(directory, base)
    assert plan.rank == 3
    assert {delta.parts for delta in deltas.values()} == {0}
    assert set(plan.traits.replaced) == {"lm_head.weight", "model.embed_tokens.weight"}


def test_a_tied_head_follows_the_embedding(tmp_path: Path) -> None:
    base, directory = made("tied", tmp_path)
    change(directory, **{HEAD: None})  # PEFT's own trainable_token_indices stores it once
    assert len(load(directory, base)[1]) == 2
    check_equals_peft(base, directory)


def test_two_tables_of_a_tied_base_are_refused(tmp_path: Path) -> None:
    base, directory = made("tied", tmp_path)
    change(directory, **{HEAD: torch.ones(3, 32)})
    check_refused(base, directory, "config_mismatch", "by two different ones")


def test_tokens_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base, directory = made("embedding", tmp_path)
    edit(directory, token_indices=[8, 41])
    check_refused(base, directory, "config_mismatch", "token_indices names 2 tokens")
    edit(directory, token_indices=[8, 41, 64])
    check_refused(base, directory, "invalid_config", "token_indices holds 64")
    edit(directory, token_indices=[8, 41, 8])
    check_refused(base, directory, "invalid_config", "every token id once")
    edit(directory, token_indices=[])
    check_refused(base, directory, "invalid_config", "a list of token ids")


def test_tables_that_are_not_selected_are_refused(tmp_path: Path) -> None:
    base, directory = made("both", tmp_path)
    edit(directory, target_modules="model.embed_tokens")
    check_refused(base, directory, "not_targeted", "lm_head")
    change(directory, **{EMBEDDING: None, HEAD: None})
    check_refused(base, directory, "missing_tensor", "holds no trainable_tokens_delta")
