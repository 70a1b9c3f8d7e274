"""Synthetic LoRA adapters for the benchmark: PEFT directories with random weights.

Written straight as safetensors from the model's config.json, without loading the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file


def make_adapters(
    model_dir: Path, out_dir: Path, count: int, rank: int | Sequence[int] = 16
) -> dict[str, Path]:
    """Write `count` adapters on all seven linears of a Llama-like model; return name -> directory.

    Several ranks are given to the adapters in turn.
    A ~ N(0, 1/in), B ~ N(0, (0.075 / sqrt(rank))^2), bfloat16, alpha = 2 rank: about as large as
    trained ones, so that outputs stay finite and are changed.
    """
    config = json.loads((model_dir / "config.json").read_text())
    shapes = _shapes(config)
    ranks = (rank,) if isinstance(rank, int) else rank
    found = {}
    for index in range(count):
        name = f"bench-{index:03d}"
        directory = out_dir / name
        directory.mkdir(parents=True)
        own_rank = ranks[index % len(ranks)]
        generator = torch.Generator().manual_seed(index)
        tensors = {}
        for layer in range(config["num_hidden_layers"]):
            for path, (fan_in, fan_out) in shapes.items():
                key = f"base_model.model.model.layers.{layer}.{path}"
                a = torch.randn(own_rank, fan_in, generator=generator) / math.sqrt(fan_in)
                b = torch.randn(fan_out, own_rank, generator=generator) * (
                    0.075 / math.sqrt(own_rank)
                )
                tensors[f"{key}.lora_A.weight"] = a.bfloat16()
                tensors[f"{key}.lora_B.weight"] = b.bfloat16()
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        adapter_config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None,
            "inference_mode": True,
            "r": own_rank,
            "lora_alpha": 2 * own_rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": [path.rpartition(".")[2] for path in shapes],
        }
        (directory / "adapter_config.json").write_text(json.dumps(adapter_config, indent=2))
        found[name] = directory
    return found


def _shapes(config: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Return path inside a block -> (in, out) of the seven linears."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    return {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
