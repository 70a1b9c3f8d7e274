"""X-LoRA: frozen LoRAs, weighed per token and module by a classifier over the base's hidden state.

arXiv 2402.07148, EricLBuehler/xlora:src/xlora/xlora_classifier.py, with depth 1, layerwise
scalings, softmax over all experts and temperature 1:
    h = the base's last hidden state;  S = softmax over e of (W h + b)[module, e]
    y = W x + sum over e of s_e B_e A_e (S_e x)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from bench.experiments.methods import attach, lora
from torch import nn


@dataclass(slots=True)
class Scalings:
    """What all modules read: float [rows, length, modules, experts], or None: the base alone."""

    values: torch.Tensor | None = None


class WeighedExperts(nn.Module):
    """One linear with every expert's B A, expert after expert; their scales are inside B."""

    def __init__(
        self, inner: nn.Module, experts: Sequence[lora.LowRank], place: int, scalings: Scalings
    ) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("A", torch.cat([e.A.detach() for e in experts]))
        self.register_buffer("B", torch.cat([e.scale * e.B.detach() for e in experts], 1))
        self.rank = experts[0].rank
        self.place = place
        self.scalings = scalings

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, length, in] -> [rows, length, out]."""
        y = self.inner(x)
        if self.scalings.values is None:
            return y
        gate = self.scalings.values[:, :, self.place].repeat_interleave(self.rank, -1)
        return y + F.linear(gate * F.linear(x, self.A), self.B)


class XLora(nn.Module):
    """A Llama with experts and the classifier, which alone is trained."""

    def __init__(
        self,
        model: nn.Module,
        experts: Sequence[Mapping[str, lora.LowRank]],
        draws: torch.Generator,
    ) -> None:
        """`model` is a frozen copy of the base; each expert is path -> module, of equal ranks."""
        super().__init__()
        self.model = model
        self.paths = list(experts[0])
        self.num_experts = len(experts)
        self.scalings = Scalings()
        places = iter(range(len(self.paths)))

        def make(inner: nn.Module) -> WeighedExperts:
            place = next(places)
            own = [expert[self.paths[place]] for expert in experts]
            return WeighedExperts(inner, own, place, self.scalings)

        made = attach.replace(model, {path.rpartition(".")[2] for path in self.paths}, make)
        assert list(made) == self.paths, "the modules' order is the classifier's"
        width = int(model.config.hidden_size)
        num_outputs = len(self.paths) * self.num_experts
        self.weight = attach.new_a(num_outputs, width, draws)
        self.bias = nn.Parameter(torch.zeros(num_outputs))

    def weigh(self, ids: torch.Tensor) -> torch.Tensor:
        """The scalings of these rows [rows, length, modules, experts]."""
        self.scalings.values = None
        with torch.no_grad():
            hidden = self.model.model(input_ids=ids, use_cache=False)
        scores = F.linear(hidden.last_hidden_state, self.weight, self.bias)
        shape = (*ids.shape, len(self.paths), self.num_experts)
        return torch.softmax(scores.view(shape).float(), -1)

    def forward(
        self,
        input_ids: torch.Tensor,
        use_cache: bool = False,
        scalings: torch.Tensor | None = None,
    ) -> SimpleNamespace:
        """As transformers' models are called; `scalings` instead of the classifier's own."""
        self.scalings.values = self.weigh(input_ids) if scalings is None else scalings
        return self.model(input_ids=input_ids, use_cache=use_cache)


def write(directory: Path, model: XLora, experts: Sequence[Mapping[str, lora.LowRank]]) -> Path:
    """Write it in PEFT's form: the classifier, and each expert in a folder of its number."""
    names = [str(number) for number in range(len(experts))]
    for name, expert in zip(names, experts, strict=True):
        lora.write(directory / name, expert)
    config = {
        "peft_type": "XLORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "hidden_size": model.weight.shape[1],
        "adapters": {name: name for name in names},
        "enable_softmax": True,
        "enable_softmax_topk": False,
        "layerwise_scalings": True,
        "xlora_depth": 1,
        "xlora_dropout_p": 0.0,
        "use_trainable_adapters": False,
        "softmax_temperature": 1.0,
        "top_k_lora": None,
        "scaling_pass_value": 0.0,
        "global_scaling_weight": 1.0,
    }
    stem = "base_model.internal_xlora_classifier.layers.0"
    tensors = {f"{stem}.weight": model.weight, f"{stem}.bias": model.bias}
    return attach.write(directory, config, tensors)
