"""What every family has to show: equal to PEFT, nothing unread, nothing unknown, shapes by name.

The Deltas that a family makes are applied by the naive modules below, which follow the formulas of
adapters/adapter.py one tensor at a time and share no code with the engine.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.support.basespec import ModelWeights, base_spec, dense_weight
from tests.support.naive_mixture import put_mixture
from tests.support.peft_adapters import reload, save
from torch import nn
from transformers import PreTrainedModel

from polyadapt.adapters.adapter import AdapterPlan, Delta
from polyadapt.adapters.packing import pack
from polyadapt.adapters.registry import open_adapter
from polyadapt.errors import AdapterRejected
from polyadapt.ops import cells
from polyadapt.ops.cells import Router
from polyadapt_store.checkpoint import Checkpoint
from polyadapt_store.manifest import weight_files

IDS = torch.tensor([[3, 17, 5, 41, 8, 8, 29, 60, 2, 33, 12]])
TOLERANCE = 2e-5  # of the largest logit, in float32
# These drop components that turn out to be zero, which only the numbers tell and no header does.
PRUNING = frozenset({"sora", "gs_lora"})


def make_checkpoint(
    base: PreTrainedModel,
    config: PeftConfig,
    directory: Path,
    *,
    seed: int = 1,
    std: float = 0.2,
    stds: Mapping[str, float] | None = None,
) -> Path:
    """Have PEFT save an adapter whose trained tensors are random and not zero.

    stds: other standard deviations for parameters whose name holds the key.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied weights, fan_in_fan_out and the like
        model = get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = next((s for key, s in (stds or {}).items() if key in name), std)
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return save(model.eval(), directory)


def load(directory: Path, base: PreTrainedModel) -> tuple[AdapterPlan, dict[int, Delta]]:
    """Read the adapter as the server does."""
    spec, (family, config) = base_spec(base), open_adapter(directory)
    with Checkpoint(weight_files(directory, family.files)) as checkpoint:
        plan = family.plan(config, checkpoint.header, spec)
        probe = family.read_probe(config, checkpoint, spec)
        deltas = family.read(config, checkpoint, spec, ModelWeights(base))
        assert not checkpoint.drained()
    packed = pack(deltas, spec, torch.float32, plan.traits, probe)
    if family.name in PRUNING:
        assert packed.weights.numel() <= plan.num_elements, "the plan counts what is stored"
    else:
        assert packed.weights.numel() == plan.num_elements, "the plan counts what the device holds"
    _check_declared(family, plan, deltas)
    return plan, deltas


def _check_declared(family: Any, plan: AdapterPlan, deltas: Mapping[int, Delta]) -> None:
    """What the documentation says of a family is what its adapters are."""
    replaced = {read.site_id for read in plan.reads if read.role in ("new_weight", "new_bias")}
    for site_id, delta in deltas.items():
        undeclared = delta.parts & cells.OVERRIDES & ~family.overrides
        assert not undeclared or site_id in replaced, f"{family.name}.overrides lacks {undeclared}"
    if any(read.role in ("new_weight", "new_bias", "token_rows") for read in plan.reads):
        return
    if family.scaling in ("yes", "no"):
        assert plan.traits.is_scalable == (family.scaling == "yes"), f"{family.name}.scaling"


@torch.no_grad()
def check_equals(
    base: PreTrainedModel,
    directory: Path,
    oracle: nn.Module,
    *,
    ids: torch.Tensor = IDS,
    tolerance: float = TOLERANCE,
) -> AdapterPlan:
    """Assert that the adapter makes of `base` what `oracle` is, and that it does something."""
    plan, deltas = load(directory, base)
    found = apply(base, deltas)(input_ids=ids).logits
    expected, plain = oracle(input_ids=ids).logits, base(input_ids=ids).logits
    largest = expected.abs().max()
    assert (expected - plain).abs().max() > 1e-2 * largest, "the adapter changes nothing"
    difference = float((found - expected).abs().max() / largest)
    assert difference <= tolerance, f"differs by {difference:.1e} of the largest logit"
    return plan


@torch.no_grad()
def check_equals_peft(
    base: PreTrainedModel,
    directory: Path,
    *,
    ids: torch.Tensor = IDS,
    oracle: PeftModel | None = None,
    tolerance: float = TOLERANCE,
) -> AdapterPlan:
    """Assert that the adapter does to `base` what PEFT makes of it, and that it does something."""
    plan, deltas = load(directory, base)
    expected = (oracle or reload(base, directory))(input_ids=ids).logits
    found = apply(base, deltas)(input_ids=ids).logits
    plain = base(input_ids=ids).logits
    largest = expected.abs().max()
    assert (expected - plain).abs().max() > 1e-2 * largest, "the adapter changes nothing"
    difference = float((found - expected).abs().max() / largest)
    assert difference <= tolerance, f"differs from PEFT by {difference:.1e} of the largest logit"
    return plan


def check_refusals(base: PreTrainedModel, directory: Path) -> None:
    """Assert that whatever is wrong with a file of this family is refused by name."""
    weights = directory / "adapter_model.safetensors"
    tensors, config = (
        load_file(weights),
        json.loads((directory / "adapter_config.json").read_text()),
    )
    try:
        for key, tensor in tensors.items():
            for axis in range(tensor.dim()):
                shape = list(tensor.shape)
                shape[axis] += 1
                _write(weights, {**tensors, key: torch.ones(shape)})
                problems = problems_of(base, directory)
                assert problems, f"{key} of shape {shape} was accepted"
            _write(weights, {**tensors, key: torch.full(tensor.shape, float("nan"))})
            assert "non_finite" in dict(problems_of(base, directory)), key
            _check_dtype(base, directory, tensors, key)
        path = next(iter(tensors)).rpartition(".layers.")[0]
        _write(weights, {**tensors, f"{path}.layers.0.self_attn.q_proj.strange": torch.ones(3)})
        assert problems_of(base, directory), "a tensor that nothing reads was accepted"
        _write(weights, {})
        assert problems_of(base, directory), "a checkpoint without tensors was accepted"
        _write(weights, tensors)
        edit(directory, use_magic=True)
        assert ("unknown_config_key", "'use_magic'") in problems_of(base, directory)
        edit(directory, use_magic=None)
    finally:
        _write(weights, tensors)
        (directory / "adapter_config.json").write_text(json.dumps(config))


def _check_dtype(
    base: PreTrainedModel, directory: Path, tensors: Mapping[str, torch.Tensor], key: str
) -> None:
    weights, tensor = directory / "adapter_model.safetensors", tensors[key]
    if tensor.is_floating_point():
        _write(weights, {**tensors, key: torch.ones(tensor.shape, dtype=torch.int32)})
        assert "unsupported_dtype" in dict(problems_of(base, directory)), key
        return
    for value in (-1, 1 << 30, 0.5):  # no indices
        _write(weights, {**tensors, key: torch.full(tensor.shape, value)})
        assert problems_of(base, directory), f"{key} of {value} was accepted"


def problems_of(base: PreTrainedModel, directory: Path) -> list[tuple[str, str]]:
    """(code, where) of everything that is wrong; empty when the adapter is accepted."""
    try:
        load(directory, base)
    except AdapterRejected as error:
        return [(problem.code, problem.where or "") for problem in error.problems]
    return []


def check_refused(base: PreTrainedModel, directory: Path, code: str, words: str) -> None:
    """Assert that the adapter is refused with this code and a message that holds `words`."""
    with pytest.raises(AdapterRejected) as caught:
        load(directory, base)
    found = [(problem.code, problem.message) for problem in caught.value.problems]
    assert any(given == code and words in message for given, message in found), found


def edit(directory: Path, **values: Any) -> None:
    """Change keys of the adapter's config."""
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change(directory: Path, **tensors: torch.Tensor | None) -> None:
    """Put tensors into the checkpoint by their whole names; None takes one out."""
    path = directory / "adapter_model.safetensors"
    merged = {**load_file(path), **tensors}
    _write(path, {key: tensor for key, tensor in merged.items() if tensor is not None})


def _write(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)


# --------------------------------------------------------------------------- Deltas, naively
def apply(base: PreTrainedModel, deltas: Mapping[int, Delta]) -> PreTrainedModel:
    """A copy of the model that computes with the Deltas."""
    model = copy.deepcopy(base)
    for mlp in base_spec(base).mlps:
        if mlp.inputs[0] in deltas and deltas[mlp.inputs[0]].routing is not None:
            put_mixture(model, base_spec(base), mlp, deltas)
    for site_id, delta in deltas.items():
        site = base_spec(base).sites[site_id]
        if delta.routing is not None and delta.routing.router is Router.EXPERTS:
            continue
        parent_path, _, name = site.path.rpartition(".")
        if site.kind == "experts":
            _add_to_experts(getattr(model.get_submodule(parent_path), name), delta)
            continue
        kinds = {"linear": _Linear, "embedding": _Embedding, "norm": _Norm, "bias": _Norm}
        module = model.get_submodule(site.path)
        setattr(model.get_submodule(parent_path), name, kinds[site.kind](module, delta))
    return model


@torch.no_grad()
def _add_to_experts(weight: torch.Tensor, delta: Delta) -> None:
    """W[e] += B[e] A[e]; weight [experts, out, in]."""
    num_experts = len(weight)
    for e, (a, b) in enumerate(
        zip(delta.a.chunk(num_experts), delta.b.chunk(num_experts, 1), strict=True)
    ):
        weight[e] += b @ a


class _Linear(nn.Module):
    def __init__(self, base: nn.Module, delta: Delta) -> None:
        super().__init__()
        self.weight, self.bias, self.delta = dense_weight(base), base.bias, delta

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        delta, y = self.delta, x
        if delta.transform is not None:
            num, g, _ = delta.transform.shape
            blocks = y.reshape(*y.shape[:-1], num, 1, g)
            y = (blocks @ delta.transform).reshape(x.shape)
        y = y @ self.weight.t()
        if self.bias is not None:
            y = y + self.bias
        if delta.swap is not None:
            halves = y.reshape(*y.shape[:-1], -1, 2, delta.group // 2)
            y = (1 + delta.swap[0]) * y + delta.swap[1] * halves.flip(-2).reshape(y.shape)
        if delta.out_scale is not None:
            y = y + delta.out_scale * y
        h = x @ delta.a.t()
        if delta.routing is not None and delta.routing.router is Router.HINGE:
            h = h if delta.router_bias is None else h - delta.router_bias
            if delta.router is not None:
                h = h - (delta.routing.value - x @ delta.router.t()).clamp(min=0)
            h = h.clamp(min=0)
        elif delta.routing is not None:
            h = h * _shares(delta, x)
        y = y + h @ delta.b.t()
        if delta.bias is not None:
            y = y + delta.bias
        return y if delta.dense is None else y + x @ delta.dense.t()


def _shares(delta: Delta, x: torch.Tensor) -> torch.Tensor:
    """What each row's components weigh [..., rank], row by row; see polyadapt.ops.cells: Router."""
    routing, router, rank = delta.routing, delta.router, len(delta.a)
    assert routing is not None
    assert router is not None
    size = rank // routing.num_scores
    rows = []
    for scores in (x.reshape(-1, x.shape[-1]) @ router.t()).tolist():
        weights = [0.0] * rank
        if routing.router is Router.SIGMOID:
            bias = [0.0] * rank if delta.router_bias is None else delta.router_bias.tolist()
            values = [1 / (1 + math.exp(-scores[i // size])) + bias[i] for i in range(rank)]
            kept = _best(values, routing.top_k)
            for i in kept:
                weights[i] = values[i] / sum(values[j] for j in kept)
        else:
            is_arrow = routing.router is Router.MAGNITUDE
            scores = [abs(score) / routing.value for score in scores] if is_arrow else scores
            kept = _best(scores, routing.top_k)
            among = kept if is_arrow or routing.renormalise else range(len(scores))
            total = sum(math.exp(scores[e] - max(scores)) for e in among)
            for e in kept:
                share = math.exp(scores[e] - max(scores)) / total
                weights[e * size : (e + 1) * size] = [share] * size
        rows.append(weights)
    return torch.tensor(rows).reshape(*x.shape[:-1], rank)


def _best(values: list[float], top_k: int) -> list[int]:
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    return order[: top_k or len(values)]


class _Embedding(nn.Module):
    def __init__(self, base: nn.Embedding, delta: Delta) -> None:
        super().__init__()
        self.weight, self.delta = base.weight, delta

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        delta, y = self.delta, self.weight[ids]
        if delta.out_scale is not None:
            y = y + delta.out_scale * y
        y = y + delta.a.t()[ids] @ delta.b.t()
        return y if delta.dense is None else y + delta.dense[ids]


class _Norm(nn.Module):
    def __init__(self, base: nn.Module, delta: Delta) -> None:
        super().__init__()
        self.base = copy.deepcopy(base)
        with torch.no_grad():
            if delta.weight is not None:
                self.base.weight.copy_(delta.weight)
            if delta.bias is not None:
                self.base.bias.add_(delta.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x)
