"""X-LoRA, naively: no cache, both passes over the whole sequence for every token, one loop over
experts and modules, in float32. And checkpoints of it, as PEFT should write them and as the
original library does.

Reads the files itself and imports nothing of polyadapt.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from tests.oracle import adapters, peft_oracle

TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")
RANKS = (6, 3, 4)  # of the experts
HIDDEN = 24  # between the classifier's layers
_SPREAD = 2.5  # standard deviation of the classifier's outputs, about


# --------------------------------------------------------------------------- checkpoints
def make(
    model_dir: Path,
    out_dir: Path,
    *,
    ranks: Sequence[int] = RANKS,
    targets: Sequence[str] = TARGETS,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write what PEFT reads: adapter_config.json, the classifier, and an expert in every folder.

    Every second expert is rank-stabilised. `config` overrides peft.XLoraConfig's fields.
    """
    base = _base(Path(model_dir))
    for number, rank in enumerate(ranks):
        expert = _made_expert(Path(model_dir), rank, tuple(targets), number)
        shutil.copytree(expert, out_dir / str(number))
    settings = {
        "task_type": "CAUSAL_LM",
        "hidden_size": base.config.hidden_size,
        "adapters": {str(number): str(out_dir / str(number)) for number in range(len(ranks))},
        "layerwise_scalings": True,
        "xlora_depth": 2,
        "xlora_size": HIDDEN,
    }
    settings |= config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a second softmax behind the first
        written = peft.XLoraConfig(**settings)
    written.save_pretrained(out_dir)
    num_modules = len(_modules(base, _paths(out_dir / "0")))
    num_outputs = len(ranks) * (num_modules if written.layerwise_scalings else 1)
    sizes = [written.hidden_size, *[written.xlora_size] * (written.xlora_depth - 1), num_outputs]
    stride = 3 if written.xlora_dropout_p > 0 else 2
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for number, (num_in, num_out) in enumerate(itertools.pairwise(sizes)):
        gain = _SPREAD if number == len(sizes) - 2 else math.sqrt(2)
        weight = torch.randn(num_out, num_in, generator=generator) * gain / math.sqrt(num_in)
        name = f"base_model.internal_xlora_classifier.layers.{stride * number}"
        tensors[f"{name}.weight"] = weight
        tensors[f"{name}.bias"] = torch.randn(num_out, generator=generator) * 0.3
    save_file(tensors, out_dir / "adapter_model.safetensors")
    return out_dir


def to_original(directory: Path, out_dir: Path, **config: Any) -> Path:
    """The same adapter as the original library writes it, in a JSON with a trailing comma."""
    given = json.loads((directory / "adapter_config.json").read_text())
    names = [f"adapter_{number + 1}" for number in range(len(given["adapters"]))]
    kept = ("hidden_size", "enable_softmax", "enable_softmax_topk", "layerwise_scalings",
            "xlora_depth", "xlora_size", "softmax_temperature", "top_k_lora",
            "scaling_pass_value", "global_scaling_weight")  # fmt: skip
    written = {key: given[key] for key in kept}
    written |= {"adapters": names, "enable_relu_and_dropout": True, "stop_token_id": 2} | config
    out_dir.mkdir(parents=True)
    text = json.dumps(written, indent=1)
    (out_dir / "xlora_config.json").write_text(text[:-2] + ",\n}\n")
    for number, name in enumerate(names):
        shutil.copytree(directory / str(number), out_dir / name)
    layers = _layers(load_file(directory / "adapter_model.safetensors"))
    tensors = {}
    for number, (weight, bias) in enumerate(layers):
        name = "last" if number == len(layers) - 1 else f"inner.{3 * number}"
        tensors |= {f"{name}.weight": weight, f"{name}.bias": bias}
    save_file(tensors, out_dir / "xlora_classifier.safetensors")
    return out_dir


def add_ordering(directory: Path, model_dir: Path, names: Sequence[str], *, reverse: bool) -> None:
    """Put an ordering of mistral.rs' beside it, which may number the modules backwards."""
    first = next(path for path in sorted(directory.iterdir()) if path.is_dir())
    paths = _modules(_base(Path(model_dir)), _paths(first))
    numbers = list(range(len(paths)))
    layers = dict(zip(paths, numbers[::-1] if reverse else numbers, strict=True))
    ordering = {"order": list(names), "layers": layers, "base_model_id": "tiny"}
    (directory / "tiny-ordering.json").write_text(json.dumps(ordering))


# --------------------------------------------------------------------------- the oracle
@dataclass(frozen=True)
class XLora:
    """A checkpoint of either form. experts[e][path] = (A, B, scale); layers: (weight, bias)."""

    experts: tuple[dict[str, tuple[torch.Tensor, torch.Tensor, float]], ...]
    layers: tuple[tuple[torch.Tensor, torch.Tensor | None], ...]
    paths: tuple[str, ...]  # module number -> path
    is_layerwise: bool = False
    has_relu: bool = True
    has_softmax: bool = True
    has_top_softmax: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    weight: float = 1.0
    resting: float = 0.0
    frozen_from: int | None = None  # positions from there on have the scalings of the one before

    def chosen(self, **changes: Any) -> XLora:
        """As a request would have it."""
        return replace(self, **changes)


def load(model_dir: Path, directory: Path) -> XLora:
    """Read PEFT's form."""
    config = json.loads((directory / "adapter_config.json").read_text())
    folders = [directory / Path(path).name for path in config["adapters"].values()]
    resting = config["scaling_pass_value"]
    return XLora(
        experts=tuple(map(_read_expert, folders)),
        layers=_layers(load_file(directory / "adapter_model.safetensors")),
        paths=tuple(_modules(_base(Path(model_dir)), _paths(folders[0]))),
        is_layerwise=config["layerwise_scalings"],
        has_softmax=config["enable_softmax"],
        has_top_softmax=config["enable_softmax_topk"],
        temperature=config["softmax_temperature"],
        top_k=config["top_k_lora"],
        weight=config["global_scaling_weight"],
        resting=1 / len(folders) if resting is None else resting,
    )


@torch.inference_mode()
def logits(
    model_dir: Path, adapter: XLora, ids: Sequence[int], second: torch.nn.Module | None = None
) -> torch.Tensor:
    """Return the logits [len(ids), vocabulary] of the second pass; `second` is the model that makes
    it, where other adapters are in its weights.
    """
    model = _base(Path(model_dir)) if second is None else second
    scalings = scalings_of(model_dir, adapter, ids)
    with hooked(model, adapter, scalings):
        found: torch.Tensor = model(torch.tensor([list(ids)]), use_cache=False).logits[0]
    return found


@torch.inference_mode()
def mean_hidden(model_dir: Path, adapter: XLora, ids: Sequence[int]) -> torch.Tensor:
    """Return the mean over the tokens of what the second pass gives the head, [width]."""
    model = _base(Path(model_dir))
    with hooked(model, adapter, scalings_of(model_dir, adapter, ids)):
        out = model(torch.tensor([list(ids)]), use_cache=False, output_hidden_states=True)
    found: torch.Tensor = out.hidden_states[-1][0].double().mean(0).float()
    return found


@torch.inference_mode()
def scalings_of(model_dir: Path, adapter: XLora, ids: Sequence[int]) -> torch.Tensor:
    """Return what weighs the experts, [len(ids), modules, experts]."""
    model = _base(Path(model_dir))
    num_modules, num_experts = len(adapter.paths), len(adapter.experts)
    constant = torch.full((len(ids), num_modules, num_experts), adapter.resting)
    with hooked(model, adapter, constant):
        out = model(torch.tensor([list(ids)]), use_cache=False, output_hidden_states=True)
    h = out.hidden_states[-1][0]
    for number, (weight, bias) in enumerate(adapter.layers):
        if number and adapter.has_relu:
            h = h.clamp(min=0)
        h = h @ weight.t() if bias is None else h @ weight.t() + bias
    if not adapter.is_layerwise:
        h = h[:, None].expand(-1, num_modules, -1)
    scalings = h.reshape(len(ids), num_modules, num_experts).clone()
    for token in range(len(ids)):
        for module in range(num_modules):
            scalings[token, module] = _choose(scalings[token, module], adapter)
    if adapter.frozen_from is not None and adapter.frozen_from <= len(ids):
        scalings[adapter.frozen_from :] = scalings[adapter.frozen_from - 1]
    return scalings


def greedy(model_dir: Path, adapter: XLora, ids: Sequence[int], num: int) -> list[int]:
    """Return the likeliest next tokens, everything computed anew for each."""
    seen = list(ids)
    for _ in range(num):
        seen.append(int(logits(model_dir, adapter, seen)[-1].argmax()))
    return seen[len(ids) :]


def _choose(z: torch.Tensor, adapter: XLora) -> torch.Tensor:
    """The scalings [experts] of one token at one module."""
    found = (z / adapter.temperature).softmax(0) if adapter.has_softmax else z
    if adapter.top_k is not None:
        best = sorted(range(len(found)), key=lambda e: (-float(found[e]), e))[: adapter.top_k]
        found = torch.stack([x if e in best else torch.zeros(()) for e, x in enumerate(found)])
    if adapter.has_top_softmax:
        kept = [e for e, x in enumerate(found) if x != 0]
        found = torch.zeros(len(found)).index_put((torch.tensor(kept),), found[kept].softmax(0))
    return found


@contextlib.contextmanager
def hooked(model: torch.nn.Module, adapter: XLora, scalings: torch.Tensor) -> Iterator[None]:
    """Have every adapted module add its experts: scalings [tokens, modules, experts]."""

    def adding(number: int, path: str) -> Any:
        def add(module: torch.nn.Module, args: Any, y: torch.Tensor) -> torch.Tensor:
            is_table = isinstance(module, torch.nn.Embedding)
            for e, expert in enumerate(adapter.experts):
                a, b, scale = expert[path]
                s = scalings[:, number, e, None]
                inner = s * a.t()[args[0][0]] if is_table else (s * args[0][0]) @ a.t()
                y = y + adapter.weight * scale * inner @ b.t()
            return y

        return add

    hooks = [
        model.get_submodule(path).register_forward_hook(adding(number, path))
        for number, path in enumerate(adapter.paths)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _read_expert(directory: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    config = json.loads((directory / "adapter_config.json").read_text())
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank)
    tensors = load_file(directory / "adapter_model.safetensors")
    found = {}
    for path in _paths(directory):
        name = f"base_model.model.{path}"
        if f"{name}.lora_embedding_A" in tensors:
            pair = tensors[f"{name}.lora_embedding_A"], tensors[f"{name}.lora_embedding_B"]
        else:
            pair = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        found[path] = (*pair, scale)
    return found


def _paths(directory: Path) -> set[str]:
    """The modules that a LoRA adapts."""
    keys = load_file(directory / "adapter_model.safetensors")
    return {key.removeprefix("base_model.model.").split(".lora_")[0] for key in keys}


def _modules(model: torch.nn.Module, paths: set[str]) -> list[str]:
    """Those modules in the order in which Python walks the model."""
    return [path for path, _ in model.named_modules() if path in paths]


def _layers(
    tensors: dict[str, torch.Tensor],
) -> tuple[tuple[torch.Tensor, torch.Tensor | None], ...]:
    numbers = sorted({int(key.split(".")[-2]) for key in tensors})
    name = "base_model.internal_xlora_classifier.layers"
    return tuple((tensors[f"{name}.{n}.weight"], tensors.get(f"{name}.{n}.bias")) for n in numbers)


@functools.cache
def _made_expert(model_dir: Path, rank: int, targets: tuple[str, ...], number: int) -> Path:
    """A LoRA of PEFT's beside the model; making one means loading it."""
    name = f"expert-{number}-{rank}-{'-'.join(targets)}"
    return adapters.make_lora(
        model_dir, model_dir.parent / f"{model_dir.name}-{name}", rank, targets, seed=number,
        use_rslora=number % 2 == 1, alpha=5 + number, strength=0.5,
    )  # fmt: skip


@functools.cache
def _base(model_dir: Path) -> torch.nn.Module:
    return peft_oracle.load_base(model_dir)
