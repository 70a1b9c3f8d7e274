"""B-LoRA against W + B A in float32, its halves, and what its scale means."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.basespec import base_spec
from tests.support.family_suite import (
    IDS,
    apply,
    change,
    check_refusals,
    check_refused,
    edit,
    load,
)
from tests.support.peft_adapters import tiny_llama
from torch import nn
from transformers import PreTrainedModel

RANK = 4
HALVES = {"content": ["model.layers.0"], "style": ["model.layers.1"]}
LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]


def made(directory: Path, base: PreTrainedModel, seed: int = 1, **config: Any) -> Path:
    """Write what B-LoRA's trainer would, of the attentions of both layers."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {site.path: (site.in_features, site.out_features) for site in base_spec(base).sites}
    tensors = {}
    for layer in range(2):
        for name in LINEARS:
            path = f"model.layers.{layer}.{name}"
            num_in, num_out = sizes[path]
            for key, shape in (("down", (RANK, num_in)), ("up", (num_out, RANK))):
                noise = torch.randn(shape, generator=generator) * 0.3
                tensors[f"{path}.lora.{key}.weight"] = noise
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    given = {
        "peft_type": "B_LORA",
        "halves": HALVES,
        "scale_mode": "linear",
        "target_modules": [name.rpartition(".")[2] for name in LINEARS],
    }
    (directory / "adapter_config.json").write_text(json.dumps(given | config))
    return directory


@torch.no_grad()
def dense(base: PreTrainedModel, directory: Path) -> nn.Module:
    """W + up down."""
    model = copy.deepcopy(base)
    tensors = load_file(directory / "adapter_model.safetensors")
    for key, down in tensors.items():
        path, _, name = key.partition(".lora.")
        if name == "down.weight":
            model.get_submodule(path).weight += tensors[f"{path}.lora.up.weight"] @ down
    return model


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("mode", ["linear", "blora_squared"])
@torch.no_grad()
def test_it_equals_the_formula(mode: str, seed: int, tmp_path: Path) -> None:
    base = tiny_llama()
    directory = made(tmp_path, base, seed, scale_mode=mode, r=RANK)
    plan, deltas = load(directory, base)
    expected = dense(base, directory)(input_ids=IDS).logits
    found = apply(base, deltas)(input_ids=IDS).logits
    largest = expected.abs().max()
    assert (expected - base(input_ids=IDS).logits).abs().max() > 1e-2 * largest
    assert (found - expected).abs().max() <= 2e-5 * largest
    assert plan.traits.is_scale_squared == (mode == "blora_squared")
    assert plan.traits.is_scalable


def test_one_half_is_an_adapter(tmp_path: Path) -> None:
    base = tiny_llama()
    directory = made(tmp_path, base, halves={"style": ["model.layers.1"]})
    weights = directory / "adapter_model.safetensors"
    style = {key: tensor for key, tensor in load_file(weights).items() if ".layers.1." in key}
    save_file(style, weights)
    _, deltas = load(directory, base)
    paths = {base_spec(base).sites[site_id].path for site_id in deltas}
    assert paths == {f"model.layers.1.{name}" for name in LINEARS}


def test_whatever_is_wrong_is_refused(tmp_path: Path) -> None:
    base = tiny_llama()
    check_refusals(base, made(tmp_path, base))


@pytest.mark.parametrize(
    ("key", "value", "code", "words"),
    [
        ("scale_mode", None, "invalid_config", "expected blora_squared or linear"),
        ("scale_mode", "squared", "invalid_config", "expected blora_squared or linear"),
        ("halves", None, "invalid_config", "an object of content, style or both"),
        ("halves", {}, "invalid_config", "an object of content, style or both"),
        ("halves", {"form": ["model.layers.0"]}, "invalid_config", "an object of content"),
        ("halves", {"content": "model.layers.0"}, "invalid_config", "each a list of paths"),
        ("halves", {"content": []}, "invalid_config", "each a list of paths"),
        ("halves", {"content": ["model.layers.0"]}, "config_mismatch", "lies in none of content"),
        ("halves", {half: ["model.layers"] for half in HALVES}, "config_mismatch", "both halves"),
        (
            "halves",
            {"content": ["model.layers.0", "model.layers.1"], "style": ["model.layers.2"]},
            "config_mismatch",
            "no tensor of it",
        ),
        ("r", 5, "rank_mismatch", "has rank 4 in the checkpoint and r is 5"),
        ("lora_alpha", 4, "unsupported_config", "B A is added as it is"),
    ],
)
def test_halves_that_are_not_what_is_stored_are_refused(
    key: str, value: Any, code: str, words: str, tmp_path: Path
) -> None:
    base = tiny_llama()
    directory = made(tmp_path, base)
    edit(directory, **{key: value})
    check_refused(base, directory, code, words)


def test_a_layers_number_is_no_prefix_of_another(tmp_path: Path) -> None:
    base = tiny_llama()
    directory = made(tmp_path, base, halves={"content": ["model.layers.0"], "style": ["model.l"]})
    check_refused(base, directory, "config_mismatch", "lies in none of content, style")


def test_a_matrix_without_its_other_is_refused(tmp_path: Path) -> None:
    base = tiny_llama()
    directory = made(tmp_path, base)
    change(directory, **{"model.layers.0.self_attn.q_proj.lora.up.weight": None})
    check_refused(base, directory, "missing_tensor", "no lora.up.weight")
