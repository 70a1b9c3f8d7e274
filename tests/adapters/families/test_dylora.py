"""DyLoRA against its paper's formula, computed densely in float32 for every rank."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tests.support.family_suite import (
    IDS,
    apply,
    change,
    check_refusals,
    check_refused,
    edit,
    load,
    make_checkpoint,
)
from tests.support.peft_adapters import tiny_gpt2, tiny_llama
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from polyadapt.adapters.registry import family_of

RANK, ALPHA = 6, 9
NESTED = {"nested": True, "rank_min": 1, "rank_max": RANK, "scale": "alpha/b"}
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "every linear": (tiny_llama, {"target_modules": "all-linear"}),
    "embedding and head": (tiny_llama, {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "transposed weights": (tiny_gpt2, {"target_modules": ["c_attn", "c_fc"]}),
    "an alpha of its own": (
        tiny_llama,
        {"target_modules": ["q_proj", "up_proj"], "alpha_pattern": {"up_proj": 20}},
    ),
}


def made(name: str, directory: Path, seed: int = 1) -> tuple[PreTrainedModel, Path]:
    new_base, options = CASES[name]
    base = new_base()
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, **options)
    directory = make_checkpoint(base, config, directory, seed=seed)
    edit(directory, **NESTED)
    return base, directory


@torch.no_grad()
def dense(base: PreTrainedModel, directory: Path, b: int) -> nn.Module:
    """W + alpha / b * B[:, :b] A[:b] in every adapted module."""
    model = copy.deepcopy(base)
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    for key, a in tensors.items():
        for left, right in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A",) * 2):
            if not key.endswith(left):
                continue
            path = key.removeprefix("base_model.model.").removesuffix(f".{left}")
            factor_b = tensors[key.replace("_A", "_B") if left == right else key[:-8] + "B.weight"]
            alpha = config["alpha_pattern"].get(path.rpartition(".")[2], config["lora_alpha"])
            delta = (alpha / b) * factor_b[:, :b] @ a[:b]
            module = model.get_submodule(path)
            is_transposed = isinstance(module, Conv1D | nn.Embedding)
            module.weight = nn.Parameter(module.weight + (delta.t() if is_transposed else delta))
    return model


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_every_rank_equals_the_formula(name: str, tmp_path: Path) -> None:
    base, directory = made(name, tmp_path)
    plan, deltas = load(directory, base)
    assert (plan.traits.nested_rank, plan.traits.min_nested_rank) == (RANK, 1)
    plain = base(input_ids=IDS).logits
    for b in range(1, RANK + 1):
        # As the engine's gate does: the first b components, r_max / b of each.
        first = {
            site_id: replace(delta, a=delta.a[:b], b=delta.b[:, :b] * (RANK / b))
            for site_id, delta in deltas.items()
        }
        expected = dense(base, directory, b)(input_ids=IDS).logits
        found = apply(base, first)(input_ids=IDS).logits
        largest = expected.abs().max()
        assert (expected - plain).abs().max() > 1e-2 * largest
        assert (found - expected).abs().max() <= 2e-5 * largest, f"rank {b}"


def test_replaced_parameters_of_the_base_are_served_at_every_rank(tmp_path: Path) -> None:
    base = tiny_gpt2()
    config = LoraConfig(r=RANK, target_modules=["c_attn"], bias="lora_only")
    directory = make_checkpoint(base, config, tmp_path)
    edit(directory, **NESTED)
    plan, deltas = load(directory, base)
    assert "transformer.h.0.attn.c_attn.bias" in plan.traits.replaced
    assert all(delta.bias is not None and len(delta.a) == RANK for delta in deltas.values())


def test_exactly_one_family_claims_a_lora(tmp_path: Path) -> None:
    assert family_of({"peft_type": "LORA"}).name == "lora"
    assert family_of({"peft_type": "LORA", "nested": False}).name == "lora"
    assert family_of({"peft_type": "LORA", "nested": True}).name == "dylora"
    base, directory = made("every linear", tmp_path)
    edit(directory, nested=False)
    check_refused(base, directory, "unknown_config_key", "'rank_max'")
    edit(directory, nested="yes")
    check_refused(base, directory, "invalid_config", "nested is 'yes'")


def test_whatever_is_wrong_is_refused(tmp_path: Path) -> None:
    check_refusals(*made("every linear", tmp_path))


@pytest.mark.parametrize(
    ("key", "value", "code", "words"),
    [
        ("scale", None, "invalid_config", "expected 'alpha/b'"),
        ("scale", "alpha/r", "invalid_config", "expected 'alpha/b'"),
        ("rank_max", 8, "invalid_config", "expected r, which is 6"),
        ("rank_min", 7, "invalid_config", "at most rank_max"),
        ("rank_min", 0, "invalid_config", "rank_min is 0"),
        ("use_rslora", True, "unsupported_config", "alpha / sqrt(r)"),
        ("use_dora", True, "unsupported_config", "row norms"),
        ("lora_bias", True, "unsupported_config", "bias of B"),
        ("rank_pattern", {"q_proj": 4}, "unsupported_config", "one rank everywhere"),
        ("alora_invocation_tokens", [3], "unsupported_config", "every token"),
        ("use_bdlora", {"nblocks": 2}, "unsupported_config", "blocks"),
        ("trainable_token_indices", [3], "unsupported_config", "replaced token"),
        ("init_lora_weights", "pissa", "invalid_config", "change the base"),
        ("layer_replication", [[0, 1]], "unsupported_config", "repeats layers"),
    ],
)
def test_what_is_not_nested_is_refused(
    key: str, value: Any, code: str, words: str, tmp_path: Path
) -> None:
    base, directory = made("every linear", tmp_path)
    edit(directory, **{key: value})
    check_refused(base, directory, code, words)


def test_every_module_has_all_components(tmp_path: Path) -> None:
    base, directory = made("every linear", tmp_path)
    change(
        directory,
        **{f"{Q0}.lora_A.weight": torch.ones(4, 32), f"{Q0}.lora_B.weight": torch.ones(32, 4)},
    )
    check_refused(base, directory, "rank_mismatch", "has rank 4 in the checkpoint")
