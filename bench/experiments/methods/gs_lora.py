"""GS-LoRA: one low-rank update of the feed-forward modules per forgetting task, sparse by block.

bjzhb666/GS-LoRA: engine_cl.py and util/cal_norm.py; loralib's alpha is 1, so the scale is 1 / r.
    loss = CE(retain) + beta relu(BND - CE(forget)) + lambda sum over blocks of |theta_block|
theta_block are all A and B of one decoder block, |.| is Frobenius' norm. Tasks are stacked here,
W x + 1 / r sum over t of B_t A_t x, where the authors merge each into the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from bench.experiments.methods import attach, lora
from bench.experiments.tiny_lm import FEED_FORWARD
from torch import nn

ALPHA = 1.0


def add_task(model: nn.Module, rank: int, draws: torch.Generator) -> dict[str, lora.LowRank]:
    """Put the update of a new forgetting task around what the feed-forward modules are now."""
    return lora.add_lora(model, FEED_FORWARD, rank, ALPHA, draws)


def group_norms(modules: Mapping[str, lora.LowRank]) -> dict[str, torch.Tensor]:
    """Block -> the Frobenius norm of all its A and B."""
    squares: dict[str, torch.Tensor] = {}
    for path, module in modules.items():
        own = module.A.square().sum() + module.B.square().sum()
        block = block_of(path)
        squares[block] = squares[block] + own if block in squares else own
    return {block: square.sqrt() for block, square in squares.items()}


def update_norms(modules: Mapping[str, lora.LowRank]) -> dict[str, float]:
    """Block -> the Frobenius norm of all its (1 / r) B A, which is what changes the model."""
    squares: dict[str, float] = {}
    for path, module in modules.items():
        own = float((module.scale * module.B.detach() @ module.A.detach()).square().sum())
        squares[block_of(path)] = squares.get(block_of(path), 0.0) + own
    return {block: square**0.5 for block, square in squares.items()}


def prune(modules: Mapping[str, lora.LowRank], share: float) -> list[str]:
    """Zero the blocks whose update is below this share of the largest; return the others."""
    norms = update_norms(modules)
    kept = [block for block, norm in norms.items() if norm >= share * max(norms.values())]
    with torch.no_grad():
        for path, module in modules.items():
            if block_of(path) not in kept:
                module.A.zero_()
                module.B.zero_()
    return kept


def forget_loss(
    retained: torch.Tensor,
    forgotten: torch.Tensor,
    modules: Mapping[str, lora.LowRank],
    *,
    bound: float,
    weight: float,
    sparsity: float,
) -> torch.Tensor:
    """The loss above, from the mean cross-entropies of a batch to retain and one to forget."""
    norms = torch.stack(list(group_norms(modules).values()))
    return retained + weight * F.relu(bound - forgotten) + sparsity * norms.sum()


def switch(modules: Mapping[str, lora.LowRank], *, is_on: bool) -> None:
    """Set or clear the task's gate bit."""
    for module in modules.values():
        module.is_on = is_on


def write(directory: Path, tasks: Mapping[str, Mapping[str, lora.LowRank]]) -> Path:
    """Write a stack of tasks, by name, in the form that the server reads; the authors have only
    whole models. Blocks that are zero are left out and named.
    """
    entries, tensors = [], {}
    for number, (name, modules) in enumerate(tasks.items()):
        pruned = {block for block, norm in update_norms(modules).items() if norm == 0}
        rank = next(iter(modules.values())).rank
        entries.append({"name": name, "r": rank, "alpha": ALPHA, "pruned": sorted(pruned)})
        for path, module in modules.items():
            if block_of(path) not in pruned:
                stem = f"base_model.model.{path}.tasks.{number}"
                tensors[f"{stem}.lora_A"] = module.A
                tensors[f"{stem}.lora_B"] = module.B
    config = {
        "peft_type": "GS_LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "bias": "none",
        "target_modules": list(FEED_FORWARD),
        "tasks": entries,
    }
    return attach.write(directory, config, tensors)


def block_of(path: str) -> str:
    """`model.layers.3.mlp.up_proj` -> `model.layers.3`."""
    return ".".join(path.split(".")[:3])
