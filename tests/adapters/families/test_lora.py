"""The family `lora` against PEFT's own merged weights, and against checkpoints that must be
refused.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tests.support.basespec import ModelWeights, base_spec, dense_weight
from tests.support.peft_adapters import (
    merged,
    peft_model,
    reload,
    save,
    tiny_gpt2,
    tiny_llama,
    tiny_phi3,
)
from transformers import PreTrainedModel

from polyadapt.adapters.adapter import AdapterPlan, Delta
from polyadapt.adapters.registry import family_of, read_config
from polyadapt.errors import AdapterRejected
from polyadapt.types import BaseSpec
from polyadapt_store.checkpoint import Checkpoint

TOLERANCE = 2e-6  # fp32; weights and deltas are of the order of one


def load(directory: Path, base: PreTrainedModel) -> tuple[AdapterPlan, dict[int, Delta]]:
    spec, config = base_spec(base), read_config(directory / "adapter_config.json")
    family = family_of(config)
    with Checkpoint(directory / "adapter_model.safetensors") as checkpoint:
        plan = family.plan(config, checkpoint.header, spec)
        return plan, family.read(config, checkpoint, spec, ModelWeights(base))


def assert_equals_merged(
    base: PreTrainedModel, modules: dict[int, Delta], expected: torch.nn.Module
) -> None:
    """Compare W + B A and the bias of every site with PEFT's merged module."""
    spec, weights = base_spec(base), ModelWeights(base)
    for site_id, site in enumerate(spec.sites):
        target = expected.get_submodule(site.path)
        module = modules.get(site_id)
        if site.kind != "norm":
            delta = torch.zeros(1) if module is None else module.b @ module.a
            delta = delta.t() if site.kind == "embedding" and module is not None else delta
            torch.testing.assert_close(
                weights.weight(site_id) + delta,
                dense_weight(target),
                rtol=0,
                atol=TOLERANCE,
                msg=lambda text, path=site.path: f"{path}: {text}",
            )
        bias = weights.bias(site_id)
        if module is not None and module.bias is not None:
            bias = module.bias if bias is None else bias + module.bias
        if bias is not None:
            torch.testing.assert_close(bias, target.bias.detach(), rtol=0, atol=TOLERANCE)


LLAMA_CONFIGS = {
    "plain": LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"]),
    "every linear": LoraConfig(r=3, lora_alpha=7, target_modules="all-linear"),
    "rank-stabilised": LoraConfig(
        r=5, lora_alpha=7, use_rslora=True, target_modules=["k_proj", "down_proj"]
    ),
    "rank and alpha patterns": LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "up_proj"],
        rank_pattern={r"layers\.0\..*q_proj": 2, "q_proj": 6, "model.layers.1.mlp.up_proj": 3},
        alpha_pattern={"v_proj": 3, r"^model\.layers\.1\.self_attn\.[qv]_proj": 20},
    ),
    "rank-stabilised with patterns": LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"q_proj": 9},
        alpha_pattern={"v_proj": 3},
    ),
    "target pattern": LoraConfig(
        r=4, target_modules=r"model\.layers\.\d+\.(self_attn\.(q|o)_proj|mlp\.down_proj)"
    ),
    "one layer": LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=1),
    "layer list with a name": LoraConfig(
        r=4, target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="layers"
    ),
    "excluded modules": LoraConfig(
        r=4, target_modules=["q_proj", "o_proj"], exclude_modules=["layers.0.self_attn.q_proj"]
    ),
    "excluded pattern": LoraConfig(
        r=4, target_modules=["q_proj", "o_proj"], exclude_modules=r".*\.1\..*o_proj"
    ),
    "full paths": LoraConfig(r=4, target_modules=["model.layers.0.self_attn.q_proj"]),
    "embedding": LoraConfig(r=4, lora_alpha=6, target_modules=["embed_tokens", "q_proj"]),
    "head": LoraConfig(r=4, lora_alpha=6, target_modules=["lm_head"]),
    "embedding and head": LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]),
    "gaussian start": LoraConfig(r=4, init_lora_weights="gaussian", target_modules=["q_proj"]),
}


@pytest.mark.parametrize("name", LLAMA_CONFIGS)
def test_llama_equals_peft(name: str, tmp_path: Path) -> None:
    base = tiny_llama()
    model = peft_model(base, LLAMA_CONFIGS[name])
    save(model, tmp_path)

    plan, modules = load(tmp_path, base)

    assert modules
    assert plan.traits.is_scalable
    assert_equals_merged(base, modules, merged(base, tmp_path))


@pytest.mark.parametrize(
    ("pattern", "is_kv_neutral"),
    [
        (r".*layers\.1\.(self_attn\.[qo]_proj|mlp\..*_proj)", True),
        (r".*layers\.1\.self_attn\.(o|k)_proj", False),
        (r".*layers\.0\.mlp\..*_proj", False),
        ("lm_head", True),
    ],
)
def test_keys_and_values_are_the_bases_when_nothing_before_them_changes(
    pattern: str, is_kv_neutral: bool, tmp_path: Path
) -> None:
    base = tiny_llama()
    save(peft_model(base, LoraConfig(r=4, target_modules=pattern)), tmp_path)
    plan, _ = load(tmp_path, base)
    assert plan.traits.is_kv_neutral == is_kv_neutral


GPT2_CONFIGS = {
    "Conv1D": LoraConfig(r=4, lora_alpha=6, target_modules=["c_attn", "c_proj", "c_fc"]),
    "fan_in_fan_out": LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True),
    "bias lora_only": LoraConfig(r=4, target_modules=["c_attn", "c_fc"], bias="lora_only"),
    "bias all": LoraConfig(r=4, target_modules=["c_attn"], bias="all"),
    "lora_bias": LoraConfig(r=4, lora_alpha=6, target_modules=["c_attn"], lora_bias=True),
    "lora_bias and bias all": LoraConfig(
        r=4, lora_alpha=6, target_modules=["c_attn"], lora_bias=True, bias="all"
    ),
    "rank-stabilised lora_bias": LoraConfig(
        r=5, lora_alpha=6, target_modules=["c_proj"], lora_bias=True, use_rslora=True
    ),
    "every linear": LoraConfig(r=2, target_modules="all-linear"),
}


@pytest.mark.parametrize("name", GPT2_CONFIGS)
def test_gpt2_equals_peft(name: str, tmp_path: Path) -> None:
    base, config = tiny_gpt2(), GPT2_CONFIGS[name]
    save(peft_model(base, config), tmp_path)

    plan, modules = load(tmp_path, base)

    assert modules
    assert plan.traits.is_scalable == (config.bias == "none")
    assert_equals_merged(base, modules, merged(base, tmp_path))


def test_replaced_layer_norm_biases_are_read(tmp_path: Path) -> None:
    base = tiny_gpt2()
    save(peft_model(base, LoraConfig(r=4, target_modules=["c_attn"], bias="all")), tmp_path)

    _, modules = load(tmp_path, base)

    norms = [i for i, site in enumerate(base_spec(base).sites) if site.kind == "norm"]
    assert len(norms) == 5
    for site_id in norms:
        assert modules[site_id].a.shape == (0, 32)
        assert modules[site_id].b.shape == (32, 0)
        bias = modules[site_id].bias
        assert bias is not None
        assert bias.abs().max() > 0.01


def test_fused_projections_equal_peft(tmp_path: Path) -> None:
    base = tiny_phi3()
    model = peft_model(base, LoraConfig(r=4, target_modules=["qkv_proj", "gate_up_proj"]))
    save(model, tmp_path)

    _, modules = load(tmp_path, base)

    assert len(modules) == 4
    assert_equals_merged(base, modules, merged(base, tmp_path))


@pytest.mark.parametrize("ensure_weight_tying", [False, True])
def test_tied_embedding_and_head_keep_their_own_deltas(
    ensure_weight_tying: bool, tmp_path: Path
) -> None:
    # Merging would write both deltas into the one shared weight, so the wrapped model is the
    # oracle.
    base = tiny_llama(tied=True)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["embed_tokens"] if ensure_weight_tying else ["embed_tokens", "lm_head"],
        ensure_weight_tying=ensure_weight_tying,
    )
    model = peft_model(base, config)
    save(model, tmp_path)

    _, modules = load(tmp_path, base)

    spec = base_spec(base)
    sites = {site.path: site_id for site_id, site in enumerate(spec.sites)}
    embedding, head = modules[sites["model.embed_tokens"]], modules[sites["lm_head"]]
    assert (embedding.b @ embedding.a - (head.b @ head.a).t()).abs().max() > 0.01 or (
        ensure_weight_tying
    )
    ids = torch.arange(20)[None]
    with torch.no_grad():
        wrapped = reload(base, tmp_path).base_model.model
        expected_rows = wrapped.model.embed_tokens(ids)[0]
        hidden = torch.randn(7, 32)
        expected_logits = wrapped.lm_head(hidden)
        rows = base.model.embed_tokens(ids)[0] + (embedding.b @ embedding.a[:, ids[0]]).t()
        logits = base.lm_head(hidden) + hidden @ head.a.t() @ head.b.t()
    torch.testing.assert_close(rows, expected_rows, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_read_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    base = tiny_llama()
    save(peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"])), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    halved = {key: tensor.to(dtype) for key, tensor in load_file(weights).items()}
    save_file(halved, weights)

    _, modules = load(tmp_path, base)

    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    site = next(i for i in modules if "layers.0" in base_spec(base).sites[i].path)
    assert modules[site].b.dtype == torch.float32
    assert torch.equal(modules[site].b, halved[key].float())


def _without_prefix(key: str) -> str:
    return key.removeprefix("base_model.model.")


def _twice_prefixed(key: str) -> str:
    return f"base_model.model.{key}"


def _with_adapter_name(key: str) -> str:
    for part in (".lora_A", ".lora_B"):
        key = key.replace(part, f"{part}.default")
    return key


@pytest.mark.parametrize("rename", [_without_prefix, _twice_prefixed, _with_adapter_name])
def test_other_spellings_of_tensor_names_mean_the_same(
    rename: Callable[[str], str], tmp_path: Path
) -> None:
    base = tiny_gpt2()
    config = LoraConfig(r=4, target_modules=["c_attn"], bias="lora_only", lora_bias=True)
    save(peft_model(base, config), tmp_path)
    _, expected = load(tmp_path, base)
    weights = tmp_path / "adapter_model.safetensors"
    save_file({rename(key): tensor for key, tensor in load_file(weights).items()}, weights)

    _, modules = load(tmp_path, base)

    assert modules.keys() == expected.keys()
    for site_id, module in modules.items():
        assert torch.equal(module.a, expected[site_id].a)
        assert torch.equal(module.b, expected[site_id].b)
        assert module.bias is not None
        assert torch.equal(module.bias, expected[site_id].bias)


def test_biases_may_lie_outside_the_base_layer(tmp_path: Path) -> None:
    base = tiny_gpt2()
    save(peft_model(base, LoraConfig(r=4, target_modules=["c_attn"], bias="lora_only")), tmp_path)
    _, expected = load(tmp_path, base)
    weights = tmp_path / "adapter_model.safetensors"
    save_file(
        {key.replace(".base_layer.", "."): tensor for key, tensor in load_file(weights).items()},
        weights,
    )

    _, modules = load(tmp_path, base)

    for site_id, module in modules.items():
        assert torch.equal(module.bias, expected[site_id].bias)


def test_plan_counts_what_the_device_must_hold(tmp_path: Path) -> None:
    base = tiny_gpt2()
    save(peft_model(base, LoraConfig(r=4, target_modules=["c_attn", "wte"], bias="all")), tmp_path)

    plan, modules = load(tmp_path, base)

    held = sum(
        module.a.numel() + module.b.numel() + (0 if module.bias is None else module.bias.numel())
        for module in modules.values()
    )
    assert plan.num_elements == held
    assert plan.rank == 4
    assert plan.target_modules == ("c_attn", "wte")


def test_plan_says_what_has_no_effect(tmp_path: Path) -> None:
    base = tiny_llama()
    config = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1)
    save(peft_model(base, config), tmp_path)
    edit(tmp_path, base_model_name_or_path="elsewhere/model", brand_new_key=None)

    plan, _ = load(tmp_path, base)

    assert "lora_dropout has no effect when serving" in plan.notes
    assert any("'brand_new_key'" in note for note in plan.notes)
    assert any("'elsewhere/model'" in note for note in plan.notes)


def test_targeted_modules_without_tensors_are_noted(tmp_path: Path) -> None:
    base = tiny_llama()
    save(peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])), tmp_path)
    change(tmp_path, drop=lambda key: "layers.1." in key)

    plan, modules = load(tmp_path, base)

    assert len(modules) == 1
    assert any("model.layers.1.self_attn.q_proj" in note for note in plan.notes)


# --------------------------------------------------------------------------- refusals
def edit(directory: Path, **values: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change(
    directory: Path,
    *,
    drop: Callable[[str], bool] = lambda key: False,
    add: dict[str, torch.Tensor] | None = None,
) -> None:
    path = directory / "adapter_model.safetensors"
    kept = {key: tensor for key, tensor in load_file(path).items() if not drop(key)}
    save_file(kept | (add or {}), path)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A good adapter on q_proj of a tiny Llama, to be spoilt."""
    return save(peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"])), tmp_path)


def problems_of(directory: Path, base: PreTrainedModel | None = None) -> list[tuple[str, str]]:
    """Return (code, where) of every problem of plan and read."""
    with pytest.raises(AdapterRejected) as caught:
        load(directory, base or tiny_llama())
    assert all(problem.message for problem in caught.value.problems)
    return [(problem.code, problem.where or "") for problem in caught.value.problems]


REFUSED_KEYS: dict[str, Any] = {
    "target_parameters": ["self_attn.q_proj.weight"],
    "layer_replication": [[0, 2], [1, 2]],
    "use_qalora": True,
    "arrow_config": {"top_k": 3},
    "monteclora_config": {"num_samples": 8},
    "velora_config": {"num_groups": 64},
    "megatron_config": {"tensor_model_parallel_size": 2},
}


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_options_that_change_the_output_are_refused(key: str, saved: Path) -> None:
    edit(saved, **{key: REFUSED_KEYS[key]})
    assert ("unsupported_config", key) in problems_of(saved)


@pytest.mark.parametrize(
    "init",
    ["pissa_niter_16", "corda", "lora_ga", "loftq"],
)
def test_starts_that_change_the_base_are_refused(init: str, saved: Path) -> None:
    edit(saved, init_lora_weights=init)
    assert problems_of(saved) == [("unsupported_config", "init_lora_weights")]


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_starts_that_leave_the_base_alone_are_served(init: Any, saved: Path) -> None:
    edit(saved, init_lora_weights=init)
    assert load(saved, tiny_llama())[1]


BAD_CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "zero rank": ({"r": 0}, ("invalid_config", "r")),
    "negative rank": ({"r": -4}, ("invalid_config", "r")),
    "fractional rank": ({"r": 4.0}, ("invalid_config", "r")),
    "boolean rank": ({"r": True}, ("invalid_config", "r")),
    "text rank": ({"r": "4"}, ("invalid_config", "r")),
    "enormous rank": ({"r": 10**30}, ("invalid_config", "r")),
    "null rank": ({"r": None}, ("invalid_config", "r")),
    "text alpha": ({"lora_alpha": "8"}, ("invalid_config", "lora_alpha")),
    "enormous alpha": ({"lora_alpha": 10**400}, ("invalid_config", "lora_alpha")),
    "unknown bias": ({"bias": "some"}, ("invalid_config", "bias")),
    "text flag": ({"use_rslora": "yes"}, ("invalid_config", "use_rslora")),
    "unknown start": ({"init_lora_weights": "zeroes"}, ("invalid_config", "init_lora_weights")),
    "no targets": ({"target_modules": None}, ("invalid_config", "target_modules")),
    "empty targets": ({"target_modules": []}, ("invalid_config", "target_modules")),
    "targets of numbers": ({"target_modules": [1]}, ("invalid_config", "target_modules")),
    "layers of text": ({"layers_to_transform": "1"}, ("invalid_config", "layers_to_transform")),
    "layers with a pattern": (
        {"target_modules": ".*q_proj", "layers_to_transform": [0, 1]},
        ("invalid_config", "layers_to_transform"),
    ),
    "lookahead": ({"target_modules": "(?=.*q).*"}, ("invalid_pattern", "target_modules")),
    "back reference": ({"rank_pattern": {r"(q)\1": 4}}, ("invalid_pattern", "rank_pattern")),
    "broken pattern": ({"exclude_modules": "("}, ("invalid_pattern", "exclude_modules")),
    "huge pattern": ({"target_modules": "a" * 9000}, ("invalid_pattern", "target_modules")),
    "pattern table as list": ({"rank_pattern": [4]}, ("invalid_config", "rank_pattern")),
    "zero in a pattern": (
        {"rank_pattern": {"q_proj": 0}},
        ("invalid_config", "rank_pattern['q_proj']"),
    ),
    "text in a pattern": (
        {"alpha_pattern": {"q_proj": "big"}},
        ("invalid_config", "alpha_pattern['q_proj']"),
    ),
    "too many patterns": (
        {"rank_pattern": {f"m{i}": 4 for i in range(3000)}},
        ("invalid_config", "rank_pattern"),
    ),
    "unknown key": ({"use_magic": True}, ("unknown_config_key", "'use_magic'")),
    "unknown empty-looking key": ({"magic": [0]}, ("unknown_config_key", "'magic'")),
    "other targets": (
        {"target_modules": ["v_proj"]},
        ("not_targeted", "model.layers.0.self_attn.q_proj"),
    ),
    "excluded": (
        {"exclude_modules": ["q_proj"]},
        ("not_targeted", "model.layers.0.self_attn.q_proj"),
    ),
    "other layer": (
        {"layers_to_transform": [0]},
        ("not_targeted", "model.layers.1.self_attn.q_proj"),
    ),
    "other rank": ({"r": 8}, ("rank_mismatch", "model.layers.0.self_attn.q_proj")),
    "other rank by pattern": (
        {"rank_pattern": {"q_proj": 2}},
        ("rank_mismatch", "model.layers.0.self_attn.q_proj"),
    ),
    "announced lora_bias": ({"lora_bias": True}, ("config_mismatch", "lora_bias")),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configs_are_refused(name: str, saved: Path) -> None:
    values, expected = BAD_CONFIGS[name]
    edit(saved, **values)
    assert expected in problems_of(saved)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
BAD_TENSORS: dict[str, tuple[str | None, dict[str, torch.Tensor], str]] = {
    # name: (tensor to drop, tensors to add, expected code)
    "missing A": (f"{Q0}.lora_A.weight", {}, "missing_tensor"),
    "missing B": (f"{Q0}.lora_B.weight", {}, "missing_tensor"),
    "wrong input size": (None, {f"{Q0}.lora_A.weight": torch.ones(4, 31)}, "shape_mismatch"),
    "wrong output size": (None, {f"{Q0}.lora_B.weight": torch.ones(33, 4)}, "shape_mismatch"),
    "ranks of A and B differ": (None, {f"{Q0}.lora_B.weight": torch.ones(32, 5)}, "shape_mismatch"),
    "A is a vector": (None, {f"{Q0}.lora_A.weight": torch.ones(32)}, "shape_mismatch"),
    "A is a scalar": (None, {f"{Q0}.lora_A.weight": torch.tensor(1.0)}, "shape_mismatch"),
    "A has three dimensions": (
        None,
        {f"{Q0}.lora_A.weight": torch.ones(4, 32, 1)},
        "shape_mismatch",
    ),
    "rank zero": (None, {f"{Q0}.lora_A.weight": torch.ones(0, 32)}, "invalid_rank"),
    "unknown module": (
        None,
        {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)},
        "unknown_module",
    ),
    "unknown tensor": (None, {f"{Q0}.lora_C.weight": torch.ones(4)}, "unknown_module"),
    "no structure": (None, {"tensor": torch.ones(4)}, "unread_tensor"),
    "duplicate": (None, {f"{Q0}.lora_A.default.weight": torch.ones(4, 32)}, "duplicate_tensor"),
    "duplicate by prefix": (
        None,
        {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)},
        "duplicate_tensor",
    ),
    "embedding A on a linear": (
        None,
        {f"{Q0}.lora_embedding_A": torch.ones(4, 32)},
        "unread_tensor",
    ),
    "replaced weight": (None, {f"{Q0}.base_layer.weight": torch.ones(32, 32)}, "unread_tensor"),
    "bias where the base has none": (
        None,
        {f"{Q0}.base_layer.bias": torch.ones(32)},
        "unread_tensor",
    ),
    "lora_bias not announced": (None, {f"{Q0}.lora_B.bias": torch.ones(32)}, "config_mismatch"),
    "norm weight": (
        None,
        {"base_model.model.model.norm.weight": torch.ones(32)},
        "unread_tensor",
    ),
    "resized embedding": (
        None,
        {"base_model.model.model.embed_tokens.weight": torch.ones(65, 32)},
        "shape_mismatch",
    ),
    "trained embedding": (
        None,
        {"base_model.model.model.embed_tokens.weight": torch.ones(64, 32)},
        "base_weight_differs",
    ),
    "DoRA's magnitudes": (None, {f"{Q0}.lora_magnitude_vector": torch.ones(32)}, "config_mismatch"),
    "trained tokens": (
        None,
        {
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(
                2, 32
            )
        },
        "config_mismatch",
    ),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors_are_refused(name: str, saved: Path) -> None:
    dropped, added, code = BAD_TENSORS[name]
    change(saved, drop=lambda key: key == dropped, add=added)
    assert code in {found for found, _ in problems_of(saved)}


def test_shape_problem_names_key_given_and_expected(saved: Path) -> None:
    change(saved, add={f"{Q0}.lora_A.weight": torch.ones(4, 31)})
    with pytest.raises(AdapterRejected) as caught:
        load(saved, tiny_llama())
    (problem,) = caught.value.problems
    assert f"{Q0}.lora_A.weight" in problem.message
    assert "[4, 31]" in problem.message
    assert "[4, 32]" in problem.message


def test_a_checkpoint_without_tensors_is_refused(saved: Path) -> None:
    change(saved, drop=lambda key: True)
    assert problems_of(saved) == [("no_tensors", "")]


def test_every_problem_is_reported_at_once(saved: Path) -> None:
    edit(saved, r=8, use_qalora=True, lora_alpha="x")
    change(
        saved,
        drop=lambda key: key == f"{Q0}.lora_B.weight",
        add={"tensor": torch.ones(1)},
    )
    codes = {code for code, _ in problems_of(saved)}
    assert codes >= {"unsupported_config", "invalid_config", "missing_tensor", "unread_tensor"}


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    base = tiny_gpt2()
    save(peft_model(base, LoraConfig(r=4, target_modules=["c_attn"])), tmp_path)
    assert {code for code, _ in problems_of(tmp_path, tiny_llama())} == {"unknown_module"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_numbers_are_refused_by_name(value: float, saved: Path) -> None:
    spoilt = torch.ones(32, 4)
    spoilt[17, 2] = value
    change(saved, add={f"{Q0}.lora_B.weight": spoilt})
    assert problems_of(saved) == [("non_finite", f"'{Q0}.lora_B.weight'")]


def test_a_scale_that_overflows_is_refused(saved: Path) -> None:
    edit(saved, lora_alpha=1e20)
    change(saved, add={f"{Q0}.lora_B.weight": torch.full((32, 4), 1e30)})
    assert [code for code, _ in problems_of(saved)] == ["non_finite"]


def test_an_untouched_copy_of_the_embedding_is_dropped(tmp_path: Path) -> None:
    base = tiny_llama()
    model = peft_model(base, LoraConfig(r=4, target_modules=["q_proj"]))
    save(model, tmp_path, save_embedding_layers=True)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert any("embed_tokens" in key for key in keys)

    _, modules = load(tmp_path, base)

    assert len(modules) == 2


def test_a_copy_in_higher_precision_than_the_base_is_compared_in_its_dtype(tmp_path: Path) -> None:
    base = tiny_llama().to(torch.bfloat16)
    model = peft_model(base.float(), LoraConfig(r=4, target_modules=["q_proj"]))
    save(model, tmp_path, save_embedding_layers=True)
    assert load(tmp_path, base.to(torch.bfloat16))[1]


def test_a_malicious_pattern_returns_at_once(saved: Path) -> None:
    bomb = r"(\w+)*!"
    edit(saved, target_modules=bomb, rank_pattern={bomb: 4}, alpha_pattern={r"((a+)+)+$": 2})
    started = time.process_time()
    assert ("not_targeted", "model.layers.0.self_attn.q_proj") in problems_of(saved)
    assert time.process_time() - started < 2


HOSTILE_VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        0.5,
        2**63,
        10**400,
        "",
        "q_proj",
        "a" * 5000,
        "(",
        "\ud800",
        "\0",
    ),
    *([], [None], [[]], [{}], [0], ["q_proj", 3], ["\ud800"], {}, {"q_proj": None}, {"": 4}),
    *({"(": 4}, {"\ud800[": 4}, {"q_proj": []}, {"q_proj": 10**400}, {"q_proj": {"q_proj": 4}}),
]


def test_no_value_of_any_config_key_breaks_the_plan(saved: Path) -> None:
    config = read_config(saved / "adapter_config.json")
    spec = base_spec(tiny_llama())
    with Checkpoint(saved / "adapter_model.safetensors") as checkpoint:
        header = checkpoint.header
    num_refused = num_served = longest = 0
    for key in [*config, "never_heard_of"]:
        for value in HOSTILE_VALUES:
            spoilt = config | {key: value}
            try:
                family_of(spoilt).plan(spoilt, header, spec)
            except AdapterRejected as error:
                longest = max(longest, *(len(problem.message) for problem in error.problems), 0)
                num_refused += 1
            else:
                num_served += 1
    assert num_refused > 300
    assert num_served > 100
    assert longest < 1000


def test_plan_needs_no_torch(saved: Path) -> None:
    program = """
import sys
sys.modules["torch"] = None
import msgspec
from pathlib import Path
from polyadapt.adapters.registry import family_of, read_config
from polyadapt.types import BaseSpec
from polyadapt_store.checkpoint import read_header
from polyadapt_store.limits import StoreLimits
directory = Path(sys.argv[1])
config = read_config(directory / "adapter_config.json")
header = read_header(directory / "adapter_model.safetensors", StoreLimits())
base = msgspec.json.decode(sys.stdin.buffer.read(), type=BaseSpec)
sys.stdout.write(str(family_of(config).plan(config, header, base).rank))
"""
    import msgspec

    spec: BaseSpec = base_spec(tiny_llama())
    done = subprocess.run(
        [sys.executable, "-c", program, str(saved)],
        input=msgspec.json.encode(spec),
        capture_output=True,
        check=False,
    )
    assert done.stdout == b"4", done.stderr.decode()
