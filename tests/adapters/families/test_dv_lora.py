"""DV-LoRA against its formula, computed densely in float32 with its vectors as they are stored."""

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
from tests.support.peft_adapters import tiny_gpt2, tiny_llama
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

RANK, ALPHA = 4, 6
BASES: dict[str, tuple[Any, list[str]]] = {
    "llama": (tiny_llama, ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"]),
    "biased": (lambda: tiny_llama(has_biases=True), ["model.layers.0.mlp.up_proj"]),
    "gpt2": (tiny_gpt2, ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_proj"]),
}


def made(directory: Path, name: str, seed: int = 1) -> tuple[PreTrainedModel, Path]:
    new, paths = BASES[name]
    base, generator = new(), torch.Generator().manual_seed(seed)
    sizes = {site.path: (site.in_features, site.out_features) for site in base_spec(base).sites}
    tensors = {}
    for path in paths:
        num_in, num_out = sizes[path]
        shapes = {"A": (RANK, num_in), "B": (num_out, RANK), "U": (RANK, 1), "V": (num_out, 1)}
        for letter, shape in shapes.items():
            tensors[f"{path}.lora_{letter}"] = torch.randn(shape, generator=generator) * 0.6
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "DV_LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted({path.rpartition(".")[2] for path in paths}),
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return base, directory


@torch.no_grad()
def dense(base: PreTrainedModel, directory: Path) -> nn.Module:
    """W + alpha / r * diag(V) B diag(U) A."""
    model = copy.deepcopy(base)
    tensors = load_file(directory / "adapter_model.safetensors")
    for key, a in tensors.items():
        path, _, name = key.rpartition(".lora_")
        if name != "A":
            continue
        b, u, v = (tensors[f"{path}.lora_{letter}"] for letter in "BUV")
        delta = ALPHA / RANK * torch.diag(v[:, 0]) @ b @ torch.diag(u[:, 0]) @ a
        module = model.get_submodule(path)
        module.weight += delta.t() if isinstance(module, Conv1D) else delta
    return model


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", BASES)
@torch.no_grad()
def test_it_equals_the_formula(name: str, seed: int, tmp_path: Path) -> None:
    base, directory = made(tmp_path, name, seed)
    plan, deltas = load(directory, base)
    expected = dense(base, directory)(input_ids=IDS).logits
    found = apply(base, deltas)(input_ids=IDS).logits
    largest = expected.abs().max()
    assert (expected - base(input_ids=IDS).logits).abs().max() > 1e-2 * largest
    assert (found - expected).abs().max() <= 2e-5 * largest
    assert (plan.rank, plan.traits.is_scalable) == (RANK, True)


def test_whatever_is_wrong_is_refused(tmp_path: Path) -> None:
    check_refusals(*made(tmp_path, "llama"))


@pytest.mark.parametrize(
    ("key", "value", "code", "words"),
    [
        ("r", None, "invalid_config", "the scale is lora_alpha / r"),
        ("lora_alpha", None, "invalid_config", "the scale is lora_alpha / r"),
        ("r", 5, "shape_mismatch", "needs [5, 32]"),
        ("use_rslora", True, "unknown_config_key", "use_rslora"),
    ],
)
def test_what_the_scale_depends_on_must_be_said(
    key: str, value: Any, code: str, words: str, tmp_path: Path
) -> None:
    base, directory = made(tmp_path, "llama")
    edit(directory, **{key: value})
    check_refused(base, directory, code, words)


@pytest.mark.parametrize("letter", "ABUV")
def test_each_of_the_four_is_needed(letter: str, tmp_path: Path) -> None:
    base, directory = made(tmp_path, "llama")
    change(directory, **{f"model.layers.0.mlp.up_proj.lora_{letter}": None})
    check_refused(base, directory, "missing_tensor", f"no lora_{letter}")
