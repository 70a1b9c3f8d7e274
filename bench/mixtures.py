"""Checkpoints that PEFT does not write: experts of an adapter's own in place of each MLP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RANK, NUM_EXPERTS, TOP_K = 16, 8, 2
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def write_experts(base: Any, directory: Path) -> None:
    """Write a MixLoRA for a Llama-like model, whose stored rank is RANK at every linear: of the MLP
    RANK / NUM_EXPERTS for each expert.
    """
    generator = torch.Generator().manual_seed(1)
    expert_rank = RANK // NUM_EXPERTS
    tensors: dict[str, torch.Tensor] = {}

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.02

    def factors(key: str, linear: torch.nn.Linear, rank: int) -> None:
        tensors[f"{key}.lora_A.weight"] = noise(rank, linear.in_features)
        tensors[f"{key}.lora_B.weight"] = noise(linear.out_features, rank)

    for number, layer in enumerate(base.model.layers):
        at = f"mixlora.layers.{number}"
        width = layer.mlp.gate_proj.in_features
        tensors[f"{at}.mlp.moe_gate.weight"] = noise(NUM_EXPERTS, width)
        for name in ATTENTION:
            factors(f"{at}.self_attn.{name}", getattr(layer.self_attn, name), RANK)
        for name in MLP:
            for expert in range(NUM_EXPERTS):
                linear = getattr(layer.mlp, name)
                factors(f"{at}.mlp.{name}.experts.{expert}", linear, expert_rank)
    config = {
        "peft_type": "MIXLORA",
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "expert_lora": {"r": expert_rank, "lora_alpha": 2 * expert_rank},
        "target_modules": [*ATTENTION, *MLP],
        "routing_strategy": "mixlora",
        "num_experts": NUM_EXPERTS,
        "top_k": TOP_K,
    }
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
