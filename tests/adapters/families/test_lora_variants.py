"""LoRA's variants, with PEFT as the oracle: DoRA, block-diagonal factors, KaSA, starts that
change the base, and replaced modules and tokens beside A and B.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from tests.support.family_suite import (
    change,
    check_equals_peft,
    check_refusals,
    check_refused,
    edit,
    load,
    make_checkpoint,
    problems_of,
)
from tests.support.peft_adapters import reload, tiny_llama
from tests.support.peft_variants import Maker

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("llama", {"use_dora": True, "target_modules": "all-linear", "lora_alpha": 9}),
    "dora, rank-stabilised": (
        "llama",
        {"use_dora": True, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    ),
    "dora with a base bias": ("gpt2", {"use_dora": True, "target_modules": ["c_attn", "c_fc"]}),
    "dora with new biases": (
        "gpt2",
        {"use_dora": True, "bias": "all", "target_modules": ["c_attn", "c_fc"]},
    ),
    "dora of the embedding": (
        "llama",
        {"use_dora": True, "target_modules": ["embed_tokens", "v_proj"]},
    ),
    "block-diagonal": (
        "llama",
        {
            "use_bdlora": BdLoraConfig(
                target_modules_bd_a=["o_proj", "down_proj"],
                target_modules_bd_b=["q_proj", "up_proj"],
                nblocks=2,
            ),
            "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"],
        },
    ),
    "without the tail": (
        "llama",
        {"kasa_config": KasaConfig(), "target_modules": "all-linear", "lora_alpha": 9},
    ),
    "without the tail, by pattern": (
        "biased",
        {
            "kasa_config": KasaConfig(),
            "use_rslora": True,
            "lora_bias": True,
            "rank_pattern": {"down_proj": 7},
            "target_modules": ["v_proj", "down_proj"],
        },
    ),
    "new head": ("llama", {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}),
    "new embedding": ("llama", {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]}),
    "new norms": (
        "llama",
        {"modules_to_save": ["input_layernorm", "norm"], "target_modules": ["q_proj"]},
    ),
    "new norms with biases": ("gpt2", {"modules_to_save": ["ln_1"], "target_modules": ["c_attn"]}),
    "new linears": ("llama", {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]}),
    "new tokens": ("llama", {"trainable_token_indices": [2, 41], "target_modules": ["q_proj"]}),
    "new tokens, tied": (
        "tied",
        {"trainable_token_indices": [3, 60, 8], "target_modules": ["q_proj"]},
    ),
    "new tokens by name": (
        "llama",
        {
            "trainable_token_indices": {"embed_tokens": [5, 41], "lm_head": [1, 7, 9]},
            "target_modules": ["q_proj"],
        },
    ),
    "fused projections, dora": (
        "phi3",
        {"use_dora": True, "target_modules": ["qkv_proj", "gate_up_proj"]},
    ),
}


made = Maker(LoraConfig, VARIANTS, r=4)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_peft(name: str, seed: int, tmp_path: Path) -> None:
    base, directory = made(name, tmp_path, seed)
    check_equals_peft(base, directory)


@pytest.mark.parametrize(
    "name", ["dora", "block-diagonal", "without the tail, by pattern", "new head", "new tokens"]
)
def test_whatever_is_wrong_is_refused(name: str, tmp_path: Path) -> None:
    check_refusals(*made(name, tmp_path))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_that_can_be_computed_again_are_served_on_the_intact_base(
    init: str, tmp_path: Path
) -> None:
    base = tiny_llama()
    config = LoraConfig(
        r=4, lora_alpha=6, init_lora_weights=init, target_modules=["q_proj", "v_proj", "up_proj"]
    )
    directory = make_checkpoint(base, config, tmp_path)

    # PEFT takes the components out again when it loads.
    plan = check_equals_peft(base, directory, oracle=reload(base, directory), tolerance=1e-4)

    assert plan.rank == 8


def test_a_tail_is_taken_out_of_the_base_once(tmp_path: Path) -> None:
    base, directory = made("without the tail, by pattern", tmp_path)
    plan, _ = load(directory, base)
    assert plan.rank == 14
    assert not plan.traits.is_scalable
    assert "model.layers.0.self_attn.v_proj.weight" in plan.traits.replaced

    edit(directory, use_bdlora={"nblocks": 2})
    check_refused(base, directory, "unsupported_config", "not served together with")
    edit(directory, use_bdlora=None, kasa_config={"delta": 1})
    check_refused(base, directory, "unknown_config_key", "'delta'")
    edit(directory, kasa_config=None)
    check_refused(base, directory, "config_mismatch", "holds a lora_diag")


def test_what_multiplies_the_base_is_not_scalable(tmp_path: Path) -> None:
    base, directory = made("dora", tmp_path)
    traits = load(directory, base)[0].traits
    assert not traits.is_scalable
    assert "model.layers.0.self_attn.q_proj.weight" in traits.replaced

    base, directory = made("new tokens, tied", tmp_path)
    replaced = load(directory, base)[0].traits.replaced
    assert set(replaced) == {"lm_head.weight", "model.embed_tokens.weight"}


def test_an_invocation_sequence_is_a_trait(tmp_path: Path) -> None:
    base = tiny_llama()
    config = LoraConfig(
        r=4, target_modules=["q_proj"], alora_invocation_tokens=[5, 9], task_type="CAUSAL_LM"
    )
    directory = make_checkpoint(base, config, tmp_path)
    assert load(directory, base)[0].traits.invocation == (5, 9)
    edit(directory, alora_invocation_tokens=[64])
    check_refused(base, directory, "invalid_config", "below 64")


def test_what_the_config_announces_must_be_there(tmp_path: Path) -> None:
    base, directory = made("new head", tmp_path)
    change(directory, **{"base_model.model.lm_head.weight": None})
    check_refused(base, directory, "missing_tensor", "modules_to_save names 'lm_head'")

    base, directory = made("new tokens", tmp_path)
    edit(directory, trainable_token_indices=[2])
    check_refused(base, directory, "config_mismatch", "has 2 rows")
    edit(directory, trainable_token_indices=[2, 64])
    check_refused(base, directory, "invalid_config", "64 rows")

    base, directory = made("dora", tmp_path)
    change(directory, **{f"{Q0}.lora_magnitude_vector": None})
    check_refused(base, directory, "config_mismatch", "no lora_magnitude_vector")


def test_a_weight_that_nobody_announced_is_refused(tmp_path: Path) -> None:
    base, directory = made("dora", tmp_path)
    change(directory, **{"base_model.model.model.norm.weight": torch.ones(32)})
    check_refused(base, directory, "unread_tensor", "modules_to_save does not name")


TOGETHER: dict[str, tuple[dict[str, Any], str]] = {
    "dora on a changed base": ({"use_dora": True, "init_lora_weights": "pissa"}, "use_dora"),
    "dora with a bias of B": ({"use_dora": True, "lora_bias": True}, "use_dora"),
    "an invocation and a changed base": (
        {"alora_invocation_tokens": [5], "init_lora_weights": "olora"},
        "init_lora_weights",
    ),
    "an invocation and biases": ({"alora_invocation_tokens": [5], "bias": "all"}, "bias"),
    "an invocation and new tokens": (
        {"alora_invocation_tokens": [5], "trainable_token_indices": [5]},
        "trainable_token_indices",
    ),
    "an invocation and a new head": (
        {"alora_invocation_tokens": [5], "modules_to_save": ["lm_head"]},
        "modules_to_save",
    ),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_options_that_would_lose_something_together_are_refused(name: str, tmp_path: Path) -> None:
    options, key = TOGETHER[name]
    base = tiny_llama()
    directory = make_checkpoint(base, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    edit(directory, **options)
    assert ("unsupported_config", key) in problems_of(base, directory)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_embedding_starts_as_plain_lora_whatever_the_config_says(
    init: str, tmp_path: Path
) -> None:
    base = tiny_llama()
    config = LoraConfig(r=4, init_lora_weights=init, target_modules=["q_proj", "embed_tokens"])
    directory = make_checkpoint(base, config, tmp_path)
    check_equals_peft(base, directory, oracle=reload(base, directory), tolerance=1e-4)


def test_blocks_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    base, directory = made("block-diagonal", tmp_path)
    blocks = {"target_modules_bd_a": ["o_proj", "down_proj"], "nblocks": 3}
    edit(directory, use_bdlora={**blocks, "target_modules_bd_b": ["q_proj", "up_proj"]})
    assert problems_of(base, directory)


def test_a_tied_head_is_saved_with_its_embedding(tmp_path: Path) -> None:
    base = tiny_llama(tied=True)
    config = LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    directory = make_checkpoint(base, config, tmp_path)
    check_equals_peft(base, directory)


def test_a_tied_head_that_is_adapted_too_is_replaced(tmp_path: Path) -> None:
    base = tiny_llama(tied=True)
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], trainable_token_indices=[3, 9])
    directory = make_checkpoint(base, config, tmp_path)
    assert "lm_head.weight" in load(directory, base)[0].traits.replaced
