"""SoRA against its paper's formula, computed densely in float32 from the stored tensors."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
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

RANK, ALPHA = 6, 10
# Gates of as many modules; the others have none that is zero.
GATES = ([1.5, 0.0, -0.3, 0.0, 0.0, 2.0], [0.0] * RANK, [0.0, 0.0, 0.0, 0.0, -0.0, 1e-20])


def llama() -> tuple[PreTrainedModel, list[str], list[str]]:
    layers = [f"model.layers.{i}" for i in range(2)]
    linears = [f"{x}.{y}" for x in layers for y in ("self_attn.q_proj", "mlp.up_proj")]
    return tiny_llama(), linears, [f"{x}.input_layernorm" for x in layers] + ["model.norm"]


def gpt2() -> tuple[PreTrainedModel, list[str], list[str]]:
    layers = [f"transformer.h.{i}" for i in range(2)]
    linears = [f"{x}.{y}" for x in layers for y in ("attn.c_attn", "mlp.c_fc")]
    return tiny_gpt2(), linears, [f"{x}.ln_1" for x in layers]


def made(
    directory: Path,
    base: PreTrainedModel,
    linears: list[str],
    norms: list[str],
    *,
    seed: int = 1,
) -> Path:
    """Write what SoRA's own trainer would have left of these modules."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    sizes = {site.path: (site.in_features, site.out_features) for site in base_spec(base).sites}
    tensors = {}
    for number, path in enumerate(linears):
        num_in, num_out = sizes[path]
        tensors[f"{path}.lora.lora_A"] = noise(RANK, num_in)
        tensors[f"{path}.lora.lora_B"] = noise(num_out, RANK)
        gate = torch.tensor(GATES[number]) if number < len(GATES) else noise(RANK)
        tensors[f"{path}.lora.gate"] = gate[None]
    for path in norms:
        for name, parameter in base.get_submodule(path).named_parameters():
            tensors[f"{path}.{name}"] = parameter.detach() + noise(*parameter.shape)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "SORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted({path.rpartition(".")[2] for path in linears}),
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@torch.no_grad()
def dense(base: PreTrainedModel, directory: Path) -> nn.Module:
    """W + alpha / r_max * B diag(g) A in every adapted linear, and the stored norms."""
    model = copy.deepcopy(base)
    tensors = load_file(directory / "adapter_model.safetensors")
    for key, value in tensors.items():
        path, _, name = key.rpartition(".")
        if name == "lora_A":
            gate = tensors[f"{path}.gate"][0]
            delta = ALPHA / RANK * tensors[f"{path}.lora_B"] @ torch.diag(gate) @ value
            module = model.get_submodule(path.removesuffix(".lora"))
            module.weight += delta.t() if isinstance(module, Conv1D) else delta
        elif name in ("weight", "bias"):
            model.get_submodule(path).get_parameter(name).copy_(value)
    return model


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("new", [llama, gpt2])
@torch.no_grad()
def test_it_equals_the_formula(new: Callable[[], Any], seed: int, tmp_path: Path) -> None:
    base, linears, norms = new()
    made(tmp_path, base, linears, norms, seed=seed)

    plan, deltas = load(tmp_path, base)

    expected = dense(base, tmp_path)(input_ids=IDS).logits
    found = apply(base, deltas)(input_ids=IDS).logits
    largest = expected.abs().max()
    assert (expected - base(input_ids=IDS).logits).abs().max() > 1e-2 * largest
    assert (found - expected).abs().max() <= 2e-5 * largest
    assert not plan.traits.is_scalable
    assert {f"{path}.weight" for path in norms} <= set(plan.traits.replaced)


def test_components_with_gate_zero_are_dropped_and_counted_at_most(tmp_path: Path) -> None:
    base, linears, _ = llama()
    made(tmp_path, base, linears, [])
    plan, deltas = load(tmp_path, base)
    ranks = {base_spec(base).sites[site_id].path: len(delta.a) for site_id, delta in deltas.items()}
    assert [ranks.get(path, 0) for path in linears] == [3, 0, 1, RANK]
    assert plan.rank == RANK
    widths = [32 + 32, 32 + 48, 32 + 32, 32 + 48]
    assert plan.num_elements == RANK * sum(widths)
    assert any("upper bounds" in note for note in plan.notes)
    assert plan.traits.is_scalable


def test_the_original_word_for_the_rank_is_read(tmp_path: Path) -> None:
    base, linears, norms = llama()
    made(tmp_path, base, linears, norms)
    edit(tmp_path, r=None, lora_r=RANK)
    load(tmp_path, base)
    edit(tmp_path, r=RANK, lora_r=3)
    check_refused(base, tmp_path, "invalid_config", "expected r, which is 6")
    edit(tmp_path, r=None, lora_r=None)
    check_refused(base, tmp_path, "invalid_config", "the rank that training began with")
    edit(tmp_path, r=RANK, lora_alpha=None)
    check_refused(base, tmp_path, "invalid_config", "lora_alpha")


@pytest.mark.parametrize("new", [llama, gpt2])
def test_whatever_is_wrong_is_refused(new: Callable[[], Any], tmp_path: Path) -> None:
    base, linears, norms = new()
    check_refusals(base, made(tmp_path, base, linears, norms))


def test_a_scale_is_that_of_the_stored_rank(tmp_path: Path) -> None:
    base, linears, norms = llama()
    made(tmp_path, base, linears, norms)
    edit(tmp_path, r=RANK + 2)
    check_refused(base, tmp_path, "rank_mismatch", "store all components")


def test_only_norms_are_replaced_without_a_word(tmp_path: Path) -> None:
    base, linears, norms = llama()
    made(tmp_path, base, linears, norms)
    change(tmp_path, **{"lm_head.weight": torch.ones(64, 32)})
    with pytest.raises(Exception, match="base weight that differs"):
        load(tmp_path, base)
    edit(tmp_path, modules_to_save=["lm_head"])
    assert "lm_head.weight" in load(tmp_path, base)[0].traits.replaced
