"""MixLoRA: its files, and a naive model that reads them. Imports nothing of polyadapt.

The model computes token by token and expert by expert, each expert the whole of its MLP, and adds
up behind down; a choice is made on Python's own floats. `slip` makes one of the usual mistakes, so
that a test shows that it would be seen.

arXiv 2404.15159; TUDB-Labs/MoE-PEFT:moe_peft/adapters/mixlora/model.py. Seen once to equal the
package mixlora 0.2.3 with its dropout and jitter off (Llama, Phi, Phi-3, Gemma 2: 2e-6 of the
largest logit), and the choices of moe-peft 2.0.2 by summed probability.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests.oracle import peft_oracle
from torch import nn
from transformers.pytorch_utils import Conv1D

# The linears of an MLP by what its module has: inputs and then down.
FORMS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
)
ATTENTION = {"gate_proj": ("q_proj", "v_proj", "o_proj"), "gate_up_proj": ("qkv_proj", "o_proj"),
             "fc1": ("q_proj", "dense"), "c_fc": ("c_attn",)}  # fmt: skip
OLD_NAMES = {"gate_proj": "w1_proj", "up_proj": "w3_proj", "down_proj": "w2_proj"}


def write_mixlora(
    base: nn.Module,
    directory: Path,
    *,
    seed: int = 1,
    num_experts: int = 4,
    top_k: int = 2,
    rank: int = 3,
    alpha: float = 5,
    strength: float = 0.4,
    names: Sequence[str] | None = None,
    has_old_names: bool = False,
    **config: Any,
) -> Path:
    """Write an adapter of the model's form; `names` are the targets, None: MLP and attention.

    config: more keys of adapter_config.json, or other values. A ~ N(0, 1/in), and B's deviation
    makes an expert's contribution about `strength` times the base's; routers are not shy.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def factors(key: str, linear: nn.Module, r: int, a: float) -> None:
        num_out, num_in = weight_of(linear).shape
        scale = a / (math.sqrt(r) if config.get("use_rslora") else r)
        spread = strength * float(weight_of(linear).std()) * math.sqrt(num_in / r) / scale
        tensors[f"{key}.lora_A.weight"] = noise(r, num_in) / math.sqrt(num_in)
        tensors[f"{key}.lora_B.weight"] = noise(num_out, r) * spread

    form = form_of(mlps_of(base)[0])
    names = [*form, *ATTENTION[form[0]]] if names is None else names
    expert = {"r": rank, "lora_alpha": alpha} | config.get("expert_lora", {})
    for number, (attention, mlp) in enumerate(zip(attentions_of(base), mlps_of(base), strict=True)):
        layer = f"mixlora.layers.{number}"
        width = weight_of(getattr(mlp, form[0])).shape[1]
        gate = "gate" if has_old_names else "mlp.moe_gate"
        tensors[f"{layer}.{gate}.weight"] = 1.5 * noise(num_experts, width) / math.sqrt(width)
        for name in names:
            if name in form:
                for e in range(num_experts):
                    key = f"{layer}.mlp.{name}.experts.{e}"
                    if has_old_names:
                        key = f"{layer}.experts.{e}.{OLD_NAMES.get(name, name)}"
                    factors(key, getattr(mlp, name), expert["r"], expert["lora_alpha"])
            if name not in form or hasattr(attention, name):
                factors(f"{layer}.self_attn.{name}", getattr(attention, name), rank, alpha)
    written = {
        "peft_type": "MIXLORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny",
        "bias": "none", "r": rank, "lora_alpha": alpha, "lora_dropout": 0.05,
        "target_modules": list(names), "routing_strategy": "mixlora", "num_experts": num_experts,
        "top_k": top_k,
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(written | config))
    return directory


def model_of(base: nn.Module, directory: Path, slip: str = "") -> nn.Module:
    """A copy of the base with the adapter's experts and its attention."""
    model = copy.deepcopy(base)
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    targets = config["target_modules"]
    if isinstance(targets, dict):
        targets = [name for name, is_target in targets.items() if is_target]
    scale = _scale(config)
    expert_scale = _scale(config | config.get("expert_lora", {}))
    for number, (attention, mlp) in enumerate(
        zip(attentions_of(model), mlps_of(model), strict=True)
    ):
        layer = f"mixlora.layers.{number}"
        for name in targets:
            a = tensors.get(f"{layer}.self_attn.{name}.lora_A.weight")
            if a is not None:
                b = tensors[f"{layer}.self_attn.{name}.lora_B.weight"]
                _add(getattr(attention, name), scale * b.double() @ a.double())
        experts = [
            {name: found for name in form_of(mlp) if (found := _factors(tensors, layer, name, e))}
            for e in range(config["num_experts"])
        ]
        router = tensors.get(f"{layer}.mlp.moe_gate.weight")
        router = tensors[f"{layer}.gate.weight"] if router is None else router
        mixed = Experts(mlp, router, experts, expert_scale, config, slip)
        parent = layers_of(model)[number]
        (place,) = [name for name, child in parent.named_children() if child is mlp]
        setattr(parent, place, mixed)
    return model


def logits(model_dir: Path, directory: Path, ids: Sequence[int]) -> torch.Tensor:
    """Return the logits [len(ids), vocabulary] of one sequence under the adapter."""
    with torch.inference_mode():
        model = model_of(peft_oracle.load_base(model_dir), directory)
        return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


class Experts(nn.Module):
    """sum_e w_e MLP_e(x), row by row."""

    def __init__(
        self,
        mlp: nn.Module,
        router: torch.Tensor,
        experts: list[dict[str, tuple[torch.Tensor, torch.Tensor]]],
        scale: float,
        config: Mapping[str, Any],
        slip: str = "",
    ) -> None:
        super().__init__()
        self.mlp, self.router, self.experts, self.scale = mlp, router, experts, scale
        self.config, self.slip = config, slip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = [self.row(row) for row in x.reshape(-1, x.shape[-1])]
        return torch.stack(rows).view(x.shape)

    def row(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        for e, weight in self.choose((self.router @ x).tolist()).items():
            y += weight * self.expert(x, self.experts[e])
        return y

    def choose(self, scores: list[float]) -> dict[int, float]:
        """Weight by expert."""
        order = sorted(range(len(scores)), key=lambda e: (-scores[e], e))
        if self.config["routing_strategy"] == "mixlora-dynamic":
            temperature = self.config.get("temperature", 0.0) or 1.0
            shares = _softmax(scores)
            if self.slip == "temperature inside":
                shares = _softmax([score / temperature for score in scores])
                temperature = 1.0
            kept, total = {}, 0.0
            for e in order:
                share = shares[e] / temperature
                if self.slip == "stop before" and kept and total + share > self.config["top_p"]:
                    break
                kept[e] = share
                total += share
                if total > self.config["top_p"]:
                    break
            if self.slip == "renormalise":
                return {e: share / total for e, share in kept.items()}
            return kept
        kept_ids = order[: self.config["top_k"]]
        if self.slip == "smallest":
            kept_ids = order[-self.config["top_k"] :]
        shares = _softmax(scores)
        total = sum(shares[e] for e in kept_ids)
        if self.slip == "not renormalised":
            total = 1.0
        return {e: shares[e] / total for e in kept_ids}

    def expert(self, x: torch.Tensor, factors: dict[str, Any]) -> torch.Tensor:
        form = form_of(self.mlp)

        def linear(name: str, x: torch.Tensor) -> torch.Tensor:
            y = getattr(self.mlp, name)(x)
            if name in factors:
                a, b = factors[name]
                y = y + self.scale * (b @ (a @ x))
            return y

        act = _activation(self.mlp)
        if len(form) == 3:
            inner = act(linear(form[0], x)) * linear(form[1], x)
        elif form[0] == "gate_up_proj":
            gate, up = linear(form[0], x).chunk(2, -1)
            inner = act(gate) * up
        else:
            inner = act(linear(form[0], x))
        return linear(form[-1], inner)


# --------------------------------------------------------------------------- the base's structure
def layers_of(model: nn.Module) -> nn.ModuleList:
    decoder = model.get_decoder()
    return decoder.layers if hasattr(decoder, "layers") else decoder.h


def mlps_of(model: nn.Module) -> list[nn.Module]:
    return [layer.mlp for layer in layers_of(model)]


def attentions_of(model: nn.Module) -> list[nn.Module]:
    layers = layers_of(model)
    return [layer.self_attn if hasattr(layer, "self_attn") else layer.attn for layer in layers]


def form_of(mlp: nn.Module) -> tuple[str, ...]:
    mlp = mlp.mlp if isinstance(mlp, Experts) else mlp
    return next(form for form in FORMS if hasattr(mlp, form[0]))


def weight_of(linear: nn.Module) -> torch.Tensor:
    """[out, in]"""
    weight = linear.weight.detach()
    return weight.t() if isinstance(linear, Conv1D) else weight


def _activation(mlp: nn.Module) -> nn.Module:
    found = [getattr(mlp, name, None) for name in ("act_fn", "activation_fn", "act")]
    return next(act for act in found if act is not None)


def _scale(config: Mapping[str, Any]) -> float:
    root = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    return float(config["lora_alpha"] / root)


def _factors(
    tensors: Mapping[str, torch.Tensor], layer: str, name: str, e: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    old = OLD_NAMES.get(name, name)
    for key in (f"{layer}.mlp.{name}.experts.{e}", f"{layer}.experts.{e}.{old}"):
        if f"{key}.lora_A.weight" in tensors:
            return tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
    return None


def _softmax(scores: list[float]) -> list[float]:
    exps = [math.exp(score - max(scores)) for score in scores]
    return [value / sum(exps) for value in exps]


@torch.no_grad()
def _add(linear: nn.Module, delta: torch.Tensor) -> None:
    weight = linear.weight.double() + (delta.t() if isinstance(linear, Conv1D) else delta)
    linear.weight = nn.Parameter(weight.float(), requires_grad=False)
