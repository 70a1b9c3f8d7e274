"""Checkpoints that PEFT does not write, or not whole: adapters that route their rows.

Each stores RANK components at every linear, random and small.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RANK, NUM_EXPERTS, TOP_K = 16, 8, 2
NUM_PROBED = 4
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
    _write(directory, tensors, config)


def write_ranks(base: Any, directory: Path) -> None:
    """Write a SMoRA of RANK components at every linear, half of which each row chooses."""
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for path, linear in _linears(base):
        key, (num_out, num_in) = f"base_model.model.{path}", linear.weight.shape
        tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, num_in, generator=generator) * 0.02
        tensors[f"{key}.lora_B.weight"] = torch.randn(num_out, RANK, generator=generator) * 0.02
        tensors[f"{key}.lora_router.weight"] = torch.randn(RANK, num_in, generator=generator) * 0.02
        tensors[f"{key}.lora_biases"] = torch.zeros(RANK)
    config = {
        "peft_type": "SRMOLE",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 16,
        "activate_r": RANK // 2,
        "rank_partition": 1,
        "target_modules": [*ATTENTION, *MLP],
    }
    _write(directory, tensors, config)


def write_probed(base: Any, directory: Path) -> None:
    """Write an X-LoRA of NUM_PROBED experts, which together have RANK components a linear."""
    generator = torch.Generator().manual_seed(1)
    rank, linears = RANK // NUM_PROBED, _linears(base)
    for expert in range(NUM_PROBED):
        tensors: dict[str, torch.Tensor] = {}
        for path, linear in linears:
            key, (num_out, num_in) = f"base_model.model.{path}", linear.weight.shape
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, num_in, generator=generator) * 0.02
            tensors[f"{key}.lora_B.weight"] = torch.randn(num_out, rank, generator=generator) * 0.02
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": [*ATTENTION, *MLP],
        }
        _write(directory / str(expert), tensors, config)
    width, num_outputs = base.config.hidden_size, NUM_PROBED * len(linears)
    classifier = "base_model.internal_xlora_classifier.layers.0"
    tensors = {
        f"{classifier}.weight": torch.randn(num_outputs, width, generator=generator) * 0.02,
        f"{classifier}.bias": torch.zeros(num_outputs),
    }
    config = {
        "peft_type": "XLORA",
        "task_type": "CAUSAL_LM",
        "hidden_size": width,
        "adapters": {str(expert): str(expert) for expert in range(NUM_PROBED)},
        "layerwise_scalings": True,
        "enable_softmax": True,
        "xlora_depth": 1,
    }
    _write(directory, tensors, config)


def _linears(base: Any) -> list[tuple[str, torch.nn.Linear]]:
    wanted = (*ATTENTION, *MLP)
    return [
        (path, module) for path, module in base.named_modules() if path.rpartition(".")[2] in wanted
    ]


def _write(directory: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
