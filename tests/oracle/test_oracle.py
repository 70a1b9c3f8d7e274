"""The oracle itself: PEFT equals a dense model merged by hand from the files, and wrong formulas
are seen. Imports nothing of polyadapt."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.oracle import adapters, peft_oracle, tiny

PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Mutation:
    """How the hand-written formula is made wrong."""

    scale: Callable[[float], float] = lambda scale: scale
    transposes: bool = False
    drops_bias: bool = False


def merged_by_hand(model_dir: Path, adapter_dir: Path, mutation: Mutation) -> torch.nn.Module:
    """Return the base with W + scale * B @ A in place of every adapted weight."""
    config = json.loads((adapter_dir / "adapter_config.json").read_text())
    tensors = load_file(adapter_dir / "adapter_model.safetensors")
    model = peft_oracle.load_base(model_dir)
    untied = {path: model.get_submodule(path) for path in _adapted_paths(tensors)}
    with torch.no_grad():
        for module in untied.values():  # a tied weight is changed at one place only
            module.weight = torch.nn.Parameter(module.weight.detach().clone())
        while tensors:
            key, tensor = min(tensors.items(), key=lambda item: "lora_" in item[0])
            path, part = _split(key)
            if part == "bias":
                del tensors[key]
                if not mutation.drops_bias:
                    model.get_submodule(path).bias.copy_(tensor)
                continue
            if part == "weight":  # the base's own embedding or head, saved beside A and B
                assert torch.equal(tensors.pop(key), model.get_submodule(path).weight)
                continue
            kind = "lora_embedding_{}" if "embedding" in part else "lora_{}.weight"
            a = tensors.pop(f"{PREFIX}{path}.{kind.format('A')}")
            b = tensors.pop(f"{PREFIX}{path}.{kind.format('B')}")
            scale = mutation.scale(_scale(config, path, rank=a.shape[0]))
            delta = scale * (b @ a)
            if "embedding" in part or _is_conv1d(model, path):
                delta = delta.T
            if mutation.transposes and delta.shape[0] == delta.shape[1]:
                delta = delta.T
            module = model.get_submodule(path)
            module.weight += delta
            added = tensors.pop(f"{PREFIX}{path}.lora_B.bias", None)
            if added is not None and not mutation.drops_bias:
                base = 0.0 if module.bias is None else module.bias.detach()
                module.bias = torch.nn.Parameter(base + scale * added)
    return model


def _adapted_paths(tensors: dict[str, torch.Tensor]) -> set[str]:
    return {path for path, part in map(_split, tensors) if part.startswith("lora_")}


def _split(key: str) -> tuple[str, str]:
    """`base_model.model.<path>.<part>` -> (path, part).

    A base's own bias or weight is `<path>.base_layer.bias` where the module is adapted.
    """
    pattern = rf"{re.escape(PREFIX)}(.+?)\.(?:base_layer\.)?(lora_.*|bias|weight)"
    match = re.fullmatch(pattern, key)
    assert match, f"the hand-written merge knows no tensor {key}"
    return match[1], match[2]


def _scale(config: dict, path: str, rank: int) -> float:
    alpha = config["lora_alpha"]
    for pattern, value in config["alpha_pattern"].items():
        if re.fullmatch(rf"(.*\.)?{pattern}", path):
            alpha = value
    return alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


def _is_conv1d(model: torch.nn.Module, path: str) -> bool:
    return type(model.get_submodule(path)).__name__ == "Conv1D"


def logits_by_hand(
    model_dir: Path, adapter_dir: Path, ids: list[int], mutation: Mutation | None = None
) -> torch.Tensor:
    model = merged_by_hand(model_dir, adapter_dir, mutation or Mutation())
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


IDS = tiny.prompt_ids(3 * tiny.SLIDING_WINDOW, seed=7)


@pytest.mark.parametrize("rank", [1, 64])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_peft_equals_the_hand_merged_dense_model(architecture, rank, tiny_model, tmp_path):
    model_dir = tiny_model(architecture)
    adapter = adapters.make_lora(model_dir, tmp_path, rank, seed=rank)
    oracle = peft_oracle.logits(model_dir, adapter, IDS)
    peft_oracle.assert_matches(logits_by_hand(model_dir, adapter, IDS), oracle)


@pytest.mark.parametrize("variant", adapters.VARIANTS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3", "gpt2"])
def test_every_variant_equals_the_hand_merged_dense_model(
    architecture, variant, tiny_model, tmp_path
):
    model_dir = tiny_model(architecture)
    adapter = adapters.VARIANTS[variant](model_dir, tmp_path, 3)
    oracle = peft_oracle.logits(model_dir, adapter, IDS)
    peft_oracle.assert_matches(logits_by_hand(model_dir, adapter, IDS), oracle)


@pytest.mark.parametrize(
    ("variant", "mutation"),
    [
        ("rslora", Mutation(scale=lambda scale: scale / 4)),  # alpha / r instead of alpha / sqrt(r)
        ("patterns", Mutation(scale=lambda scale: scale * 1.01)),
        ("all_linear", Mutation(scale=lambda scale: 1.0)),
        ("all_linear", Mutation(transposes=True)),
        ("lora_bias", Mutation(drops_bias=True)),
        ("bias_lora_only", Mutation(drops_bias=True)),
        ("bias_all", Mutation(drops_bias=True)),
    ],
)
def test_a_wrong_formula_is_detected(variant, mutation, tiny_model, tmp_path):
    model_dir = tiny_model("qwen2")
    adapter = adapters.VARIANTS[variant](model_dir, tmp_path, 5)
    oracle = peft_oracle.logits(model_dir, adapter, IDS)
    wrong = logits_by_hand(model_dir, adapter, IDS, mutation)
    with pytest.raises(AssertionError, match="logits differ by"):
        peft_oracle.assert_matches(wrong, oracle)


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3"])
def test_a_forgotten_window_is_detected(architecture, tiny_model):
    model_dir = tiny_model(architecture)
    oracle = peft_oracle.logits(model_dir, None, IDS)
    model = peft_oracle.load_base(model_dir)
    model.config.sliding_window = 10 * len(IDS)
    with torch.inference_mode():
        wrong = model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    with pytest.raises(AssertionError, match="logits differ by"):
        peft_oracle.assert_matches(wrong, oracle)


@pytest.mark.parametrize("setting", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_a_forgotten_softcap_is_detected(setting, tiny_model):
    model_dir = tiny_model("gemma2")
    oracle = peft_oracle.logits(model_dir, None, IDS)
    model = peft_oracle.load_base(model_dir)
    setattr(model.config, setting, None)
    for module in model.modules():
        if hasattr(module, "attn_logit_softcapping") and setting == "attn_logit_softcapping":
            module.attn_logit_softcapping = None
    with torch.inference_mode():
        wrong = model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    with pytest.raises(AssertionError, match="logits differ by"):
        peft_oracle.assert_matches(wrong, oracle)


@pytest.mark.parametrize("architecture", tiny.LENGTH_DEPENDENT_ROPE)
def test_a_long_sequence_changes_a_length_dependent_rope(architecture, tiny_model):
    """If a long neighbour's rotary embedding leaked into a short prompt, it could be seen."""
    model_dir = tiny_model(architecture)
    short = peft_oracle.logits(model_dir, None, IDS[:20])
    long = peft_oracle.logits(model_dir, None, (IDS * 3)[:100])[:20]
    with pytest.raises(AssertionError, match="logits differ by"):
        peft_oracle.assert_matches(long, short)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_greedy_with_its_cache_equals_recomputing_every_step(architecture, tiny_model, tmp_path):
    model_dir = tiny_model(architecture)
    adapter = adapters.make_lora(model_dir, tmp_path, 8, seed=2)
    tokens, margins = peft_oracle.greedy(model_dir, adapter, IDS, 8)
    recomputed = peft_oracle.logits(model_dir, adapter, IDS + tokens)[len(IDS) - 1 : -1]
    best = recomputed.topk(2, dim=-1).values
    assert torch.allclose(best[:, 0] - best[:, 1], torch.tensor(margins), atol=1e-3)
    assert peft_oracle.assert_greedy_equal(recomputed.argmax(-1).tolist(), tokens, margins) >= 4


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_adapters_and_prompts_change_what_a_tiny_model_says(architecture, tiny_model, tmp_path):
    model_dir = tiny_model(architecture)
    adapter = adapters.make_lora(model_dir, tmp_path, 8, seed=2)
    base, _ = peft_oracle.greedy(model_dir, None, IDS, 12)
    adapted, _ = peft_oracle.greedy(model_dir, adapter, IDS, 12)
    other, _ = peft_oracle.greedy(model_dir, None, IDS[::-1], 12)
    assert base != adapted
    assert base != other


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_most_top_two_margins_are_firm(architecture, tiny_model):
    best = peft_oracle.logits(tiny_model(architecture), None, IDS).topk(2, dim=-1).values
    is_firm = (best[:, 0] - best[:, 1]) > peft_oracle.MARGIN_FLOOR
    assert is_firm.float().mean() > 0.9


def test_loading_an_adapter_that_replaces_biases_leaves_the_base_alone(tiny_model, tmp_path):
    model_dir = tiny_model("qwen2")
    before = peft_oracle.logits(model_dir, None, IDS)
    peft_oracle.logits(model_dir, adapters.bias_all(model_dir, tmp_path, 1), IDS)
    assert torch.equal(peft_oracle.logits(model_dir, None, IDS), before)


def test_matching_refuses_other_shapes_and_non_finite_values():
    oracle = torch.tensor([[1.0, -2.0]])
    peft_oracle.assert_matches(oracle + 1.9e-4, oracle)
    for wrong in (oracle + 2.1e-4, oracle.T, torch.full_like(oracle, math.nan)):
        with pytest.raises(AssertionError):
            peft_oracle.assert_matches(wrong, oracle)


def test_greedy_comparison_ends_at_the_first_small_margin_and_never_compares_nothing():
    compare = peft_oracle.assert_greedy_equal
    assert compare([1, 2, 9], [1, 2, 3], [0.5, 0.5, 1e-4]) == 2
    for ours, margins in [([1, 9, 3], [0.5] * 3), ([1, 2], [0.5] * 3), ([1, 2, 3], [1e-4] * 3)]:
        with pytest.raises(AssertionError):
            compare(ours, [1, 2, 3], margins)


def test_tiny_models_carry_a_tokenizer_that_round_trips_and_a_chat_template(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    text = "Grüße, 東京 🙂\n\ttabs and   spaces"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= tiny.VOCAB_SIZE
    messages = [{"role": "user", "content": "hi"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|start|>user\nhi<|end|>\n<|start|>assistant\n"
    ends = tokenizer(tiny.END)["input_ids"]
    assert ends == [tiny.END_ID]
