"""Adapters made by PEFT on tiny random models: the oracle of the families' tests."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)


def tiny_llama(*, tied: bool = False, has_biases: bool = False, seed: int = 0) -> PreTrainedModel:
    """Two layers, width 32, vocabulary 64, biases at the linears of its layers or none."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        attention_bias=has_biases,
        mlp_bias=has_biases,
    )
    model = LlamaForCausalLM(config)
    _randomise_biases(model)
    return model.eval()


def tiny_gpt2(seed: int = 0) -> PreTrainedModel:
    """Two layers, width 32: Conv1D, biases, LayerNorm with bias, tied embeddings."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    )
    _randomise_biases(model)
    return model.eval()


def tiny_phi3(seed: int = 0) -> PreTrainedModel:
    """Two layers, width 32, fused qkv_proj and gate_up_proj."""
    torch.manual_seed(seed)
    config = Phi3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    return Phi3ForCausalLM(config).eval()


def peft_model(base: PreTrainedModel, config: LoraConfig, seed: int = 1) -> PeftModel:
    """Wrap a copy of `base`, with random non-zero A, B and trained biases."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied weights, fan_in_fan_out and the like
        model = get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * 0.2)
    return model.eval()


def save(model: PeftModel, directory: Path, **options: object) -> Path:
    """Write adapter_config.json and adapter_model.safetensors below `directory`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory, **options)
    return directory


def reload(base: PreTrainedModel, directory: Path) -> PeftModel:
    """Return a copy of `base` with the saved adapter as PEFT reads it back.

    Not the model that was saved: PEFT sorts a config's patterns when it writes them, so the first
    that matches may be another one afterwards.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(copy.deepcopy(base), directory).eval()


def merged(base: PreTrainedModel, directory: Path) -> nn.Module:
    """Return the base with the saved adapter merged into its weights by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return reload(base, directory).merge_and_unload()


def _randomise_biases(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
