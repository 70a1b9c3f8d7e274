"""A tiny Llama that a script trains from nothing and writes as a directory for the server."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from bench.experiments.data import END, PAD, START
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
LINEARS = ATTENTION + FEED_FORWARD


@dataclass(frozen=True, slots=True)
class Size:
    """What a tiny Llama measures."""

    vocab_size: int
    width: int = 64
    inner: int = 128
    num_layers: int = 2
    num_heads: int = 4
    max_positions: int = 64


def new_model(size: Size, seed: int) -> LlamaForCausalLM:
    """Return a random float32 model with a head of its own, the same for the same seed."""
    ids = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
    config = LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        max_position_embeddings=size.max_positions,
        tie_word_embeddings=False,
        # 0.02 is for wide models: at this width it would take hundreds of steps to grow out of.
        initializer_range=0.1,
        **ids,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    return model.float()


def frozen_copy(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return a copy whose parameters are not trained, for an adapter to be put into."""
    copied = copy.deepcopy(model).eval()
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    return copied


def save(model: LlamaForCausalLM, directory: Path) -> Path:
    """Write it as a transformers directory without a tokenizer; return the directory."""
    logging.disable_progress_bar()
    model.save_pretrained(directory)
    return directory
