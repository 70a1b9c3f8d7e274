"""Block-LoRA in both readings, against their formulas block by block in float32."""

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

PATHS = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
GPT2_PATHS = ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"]
CASES: dict[str, dict[str, Any]] = {
    "rank": {"block_layout": "rank_shared_A", "n_blocks": 3, "r": 6, "scale_rule": "alpha/r"},
    "rank, scaled by a block's": {
        "block_layout": "rank_shared_A", "n_blocks": 3, "r": 6,
        "scale_rule": "alpha/(r/n_blocks)",
    },
    "one block": {"block_layout": "rank_shared_A", "n_blocks": 1, "r": 4, "scale_rule": "alpha/r"},
    "input": {
        "block_layout": "input_fold_shared_A", "n_blocks": 4, "r": 5, "scale_rule": "alpha/r",
    },
}  # fmt: skip
ALPHA = 7


def made(
    directory: Path, base: PreTrainedModel, name: str, paths: list[str], seed: int = 1
) -> Path:
    case, generator = CASES[name], torch.Generator().manual_seed(seed)
    sizes = {site.path: (site.in_features, site.out_features) for site in base_spec(base).sites}
    tensors = {}
    for path in paths:
        num_in, num_out = sizes[path]
        n, r = case["n_blocks"], case["r"]
        shapes: dict[str, tuple[int, int]] = {}
        if case["block_layout"] == "rank_shared_A":
            shapes["shared.lora_A"] = (r // n, num_in)
            shapes |= {f"blocks.{i}.lora_B": (num_out, r // n) for i in range(n)}
        else:
            shapes = {"shared.lora_A": (r, num_in // n), "shared.lora_B": (num_out, r)}
        for key, shape in shapes.items():
            noise = torch.randn(shape, generator=generator) * 0.3
            tensors[f"base_model.model.{path}.{key}"] = noise
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    targets = sorted({path.rpartition(".")[2] for path in paths})
    config = {"peft_type": "BLOCK_LORA", "lora_alpha": ALPHA, "target_modules": targets, **case}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


class _Blocks(nn.Module):
    """A linear and what the blocks add, one block after the other."""

    def __init__(
        self, linear: nn.Module, tensors: dict[str, torch.Tensor], case: dict[str, Any]
    ) -> None:
        super().__init__()
        self.linear, self.tensors, self.case = linear, tensors, case

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, r, a = self.case["n_blocks"], self.case["r"], self.tensors["shared.lora_A"]
        scale = {"alpha/r": ALPHA / r, "alpha/(r/n_blocks)": ALPHA / (r / n)}
        y = self.linear(x)
        for i in range(n):
            if self.case["block_layout"] == "rank_shared_A":
                added = (x @ a.t()) @ self.tensors[f"blocks.{i}.lora_B"].t()
            else:
                size = x.shape[-1] // n
                piece = x[..., i * size : (i + 1) * size]
                added = (piece @ a.t()) @ self.tensors["shared.lora_B"].t()
            y = y + scale[self.case["scale_rule"]] * added
        return y


def dense(base: PreTrainedModel, directory: Path, name: str, paths: list[str]) -> nn.Module:
    model = copy.deepcopy(base)
    stored = load_file(directory / "adapter_model.safetensors")
    for path in paths:
        prefix = f"base_model.model.{path}."
        own = {k.removeprefix(prefix): t for k, t in stored.items() if k.startswith(prefix)}
        parent, _, last = path.rpartition(".")
        blocks = _Blocks(model.get_submodule(path), own, CASES[name])
        setattr(model.get_submodule(parent), last, blocks)
    return model


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_both_layouts_equal_their_formulas(name: str, kind: str, seed: int, tmp_path: Path) -> None:
    base, paths = (tiny_llama(), PATHS) if kind == "llama" else (tiny_gpt2(), GPT2_PATHS)
    directory = made(tmp_path, base, name, paths, seed)
    plan, deltas = load(directory, base)
    expected = dense(base, directory, name, paths)(input_ids=IDS).logits
    found = apply(base, deltas)(input_ids=IDS).logits
    largest = expected.abs().max()
    assert (expected - base(input_ids=IDS).logits).abs().max() > 1e-2 * largest
    assert (found - expected).abs().max() <= 2e-5 * largest
    ranks = {"rank": 2, "rank, scaled by a block's": 2, "one block": 4, "input": 5}
    assert plan.rank == ranks[name]


@pytest.mark.parametrize("name", ["rank", "input"])
def test_whatever_is_wrong_is_refused(name: str, tmp_path: Path) -> None:
    base = tiny_llama()
    check_refusals(base, made(tmp_path, base, name, PATHS))


@pytest.mark.parametrize(
    ("name", "edits", "code", "words"),
    [
        ("rank", {"block_layout": None}, "invalid_config", "block_layout is None"),
        ("rank", {"block_layout": "columns"}, "invalid_config", "block_layout is 'columns'"),
        ("rank", {"n_blocks": None}, "invalid_config", "are all needed"),
        ("rank", {"n_blocks": 0}, "invalid_config", "n_blocks is 0"),
        ("rank", {"n_blocks": 65, "r": 65}, "invalid_config", "at most 64"),
        ("rank", {"n_blocks": 4}, "invalid_config", "a multiple of n_blocks"),
        ("rank", {"r": None}, "invalid_config", "r is None"),
        ("rank", {"lora_alpha": None}, "invalid_config", "lora_alpha is None"),
        ("rank", {"scale_rule": None}, "invalid_config", "scale_rule is None"),
        ("rank", {"scale_rule": "alpha/sqrt(r)"}, "invalid_config", "alpha/sqrt(r)"),
        ("input", {"scale_rule": "alpha/(r/n_blocks)"}, "invalid_config", "does not cut the rank"),
        ("rank", {"n_blocks": 2, "r": 4}, "config_mismatch", "blocks.2.lora_B"),
        ("rank", {"n_blocks": 4, "r": 8}, "missing_tensor", "no blocks.3.lora_B"),
        ("rank", {"use_rslora": True}, "unknown_config_key", "use_rslora"),
        ("input", {"n_blocks": 3}, "shape_mismatch", "shared.lora_A"),
        ("input", {"block_layout": "rank_shared_A", "r": 20}, "missing_tensor", "no blocks.0"),
        ("input", {"block_layout": "rank_shared_A", "r": 20}, "config_mismatch", "shared.lora_B"),
    ],
)
def test_what_is_not_the_layout_is_refused(
    name: str, edits: dict[str, Any], code: str, words: str, tmp_path: Path
) -> None:
    base = tiny_llama()
    directory = made(tmp_path, base, name, PATHS)
    edit(directory, **edits)
    check_refused(base, directory, code, words)


def test_an_input_that_cannot_be_cut_into_the_pieces_is_refused(tmp_path: Path) -> None:
    base = tiny_llama()
    directory = made(tmp_path, base, "input", PATHS[:1])
    edit(directory, n_blocks=3)
    key = f"base_model.model.{PATHS[0]}.shared.lora_A"
    change(directory, **{key: torch.ones(5, 32 // 3)})
    check_refused(base, directory, "shape_mismatch", "32 inputs are no multiple of 3 blocks")
