"""The MLPs of a model: found by structure, proved numerically when the model loads, and made to
serve adapters that bring experts of their own for a whole MLP.

What computes anything else stays as it is, and takes no such adapter. Knows no model by name.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from polyadapt.models.adapted import AdaptedLinear
from polyadapt.models.base import BaseModel
from polyadapt.models.fused import FusedMlp
from polyadapt.models.wrap import set_submodule
from polyadapt.ops.mixture import MixedMlp, add_mixed_, mix_
from polyadapt.types import MlpSpec, SiteSpec

logger = logging.getLogger(__name__)

# Largest difference to the module as loaded, of its largest element: the order of sums, and of
# bfloat16 the roundings between two products.
_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
_NUM_ROWS = 4
# transformers' names of functions of one number without parameters; several name the same one.
_ACTIVATIONS = (
    *("silu", "swish", "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
    *("gelu_python_tanh", "gelu_accurate", "quick_gelu", "relu", "relu2", "relu6", "leaky_relu"),
    *("mish", "hardswish", "tanh", "sigmoid", "linear"),
)
_SAME = 1e-5  # largest difference on -8 to 8 of two activations that are one: float32 rounding
_NATIVE = ("silu", "gelu_pytorch_tanh")  # in the order of native.dense.ACTIVATIONS
_NATIVE_FUNCTIONS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    F.silu,
    lambda x: F.gelu(x, approximate="tanh"),
)


@torch.inference_mode()
def list_mlps(model: nn.Module, sites: Sequence[SiteSpec]) -> tuple[MlpSpec, ...]:
    """Describe every module that provably is an MLP of two or three linears; see MlpSpec.

    Each candidate is called with a few random rows. `sites` are those of the model, whose modules
    are not wrapped yet.
    """
    site_ids = {site.path: site_id for site_id, site in enumerate(sites)}
    found = []
    for path, module in model.named_modules():
        form = _proved_form(module)
        if form is None or not all(f"{path}.{name}" in site_ids for name in form.linears):
            continue
        *inputs, down = (site_ids[f"{path}.{name}"] for name in form.linears)
        names = _names_of(module.get_submodule(form.activation))
        found.append(MlpSpec(path, tuple(inputs), down, form.is_gated, names))
    return tuple(found)


def adapt_mlps(base: BaseModel) -> None:
    """Let every listed MLP serve experts, in place; after fusing, which may have replaced it.

    One that cannot leaves the base's description, with a warning.
    """
    fused = {
        module.down.site.id: module
        for module in base.module.modules()
        if isinstance(module, FusedMlp)
    }
    kept = []
    for spec in base.spec.mlps:
        module = fused.get(spec.down)
        if module is None:
            wrapped = AdaptedMlp(base.module.get_submodule(spec.path), spec, base.spec.sites)
            set_submodule(base.module, spec.path, wrapped)
        elif module.gate_up.site.id == spec.inputs[0]:
            module.mixed = MixedMlp(
                site=module.gate_up.site,
                parts=module.gate_up.columns,
                down=spec.down,
                num_in=module.gate_up.weight.shape[1],
                width=module.down.weight.shape[1],
                is_gated=True,
                activation=_NATIVE_FUNCTIONS[module.activation],
                native=module.activation,
                bias=_float(module.down.bias),
            )
        else:
            logger.warning("%s takes no experts: which half is its gate is not clear", spec.path)
            continue
        kept.append(spec)
    base.spec = replace(base.spec, mlps=tuple(kept))


class AdaptedMlp(nn.Module):
    """The MLP as transformers wrote it, and for rows that have experts of their own those."""

    def __init__(self, base: nn.Module, spec: MlpSpec, sites: Sequence[SiteSpec]) -> None:
        """base: the module at spec.path, whose linears are wrapped already."""
        super().__init__()
        self.base = base
        names = [sites[site_id].path.rpartition(".")[2] for site_id in (*spec.inputs, spec.down)]
        self.inputs, self.down = names[:-1], names[-1]
        self.activation = _activation_name(base, spec)
        linears = [self._linear(name) for name in self.inputs]
        stops = list(itertools.accumulate(linear.weight.shape[0] for linear in linears))
        self.mixed = MixedMlp(
            site=linears[0].site,
            parts=torch.tensor(
                [
                    [linear.site.id, stop - linear.weight.shape[0], linear.weight.shape[0]]
                    for linear, stop in zip(linears, stops, strict=True)
                ]
            ),
            down=spec.down,
            num_in=linears[0].weight.shape[1],
            width=self._linear(self.down).weight.shape[1],
            is_gated=spec.is_gated,
            activation=base.get_submodule(self.activation),
            native=next((n for n, name in enumerate(_NATIVE) if name in spec.activations), None),
            bias=_float(self._linear(self.down).bias),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden] -> the same shape; its leading sizes multiply to the plan's row count."""
        if self.mixed.site.plan.mixtures is None:
            untouched: torch.Tensor = self.base(x)
            return untouched
        rows = x.reshape(-1, x.shape[-1])
        outputs = [self._linear(name)(rows) for name in self.inputs]
        u = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        inner = self.mixed.activate(u)
        h = mix_(inner, u, rows, self.mixed)
        y: torch.Tensor = self._linear(self.down)(inner)
        add_mixed_(y, h, self.mixed)
        return y.view(x.shape)

    def _linear(self, name: str) -> AdaptedLinear:
        linear = self.base.get_submodule(name)
        assert isinstance(linear, AdaptedLinear)
        return linear


# --------------------------------------------------------------------------- finding them
@dataclass(frozen=True, slots=True)
class _Form:
    """Names of children: the inputs' linears and then down, and the activation."""

    linears: tuple[str, ...]
    activation: str
    is_gated: bool


def _proved_form(module: nn.Module) -> _Form | None:
    """The form that gives what the module gives, for small rows and for large ones: some clamp."""
    linears = {
        name: child
        for name, child in module.named_children()
        if isinstance(child, nn.Linear | Conv1D)
    }
    weights = {id(p) for linear in linears.values() for p in linear.parameters()}
    holds_more = any(id(p) not in weights for p in module.parameters())
    # Attention may have an MLP's shapes, and must not be called by itself.
    if len(linears) not in (2, 3) or holds_more or hasattr(module, "polyadapt_cache"):
        return None
    calls: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
    for form in _candidates(module, linears):
        width = _size_of(linears[form.linears[0]])[0]
        if width not in calls:
            calls[width] = _called(module, linears[form.linears[0]])
        x, expected = calls[width]
        if expected is not None and _is_equal(_computed(module, form, x), expected):
            return form
    return None


def _candidates(module: nn.Module, linears: Mapping[str, nn.Module]) -> Iterator[_Form]:
    """Every form that the shapes allow, the order of the children first."""
    activations = [
        name
        for name, child in module.named_children()
        if name not in linears and not list(child.parameters())
    ]
    sizes = {name: _size_of(linear) for name, linear in linears.items()}
    for names in itertools.permutations(linears):
        *inputs, (inner, hidden) = (sizes[name] for name in names)
        is_joined = inputs == [(hidden, 2 * inner)]
        if is_joined or all(size == (hidden, inner) for size in inputs):
            for activation in activations:
                yield _Form(names, activation, is_joined or len(inputs) == 2)


def _called(module: nn.Module, linear: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Random rows of the module's width, and what it makes of them; None: it takes no such call."""
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_NUM_ROWS, _size_of(linear)[0], generator=generator)
    x = torch.cat([rows, 64 * rows]).to(weight.device, weight.dtype)[None]
    try:
        y = module(x)
    except Exception:  # whatever an unknown module says to it, it is no MLP then
        logger.debug("%s is called otherwise than an MLP", type(module).__name__, exc_info=True)
        return x, None
    return x, y if isinstance(y, torch.Tensor) else None


def _computed(module: nn.Module, form: _Form, x: torch.Tensor) -> torch.Tensor:
    *inputs, down = (module.get_submodule(name) for name in form.linears)
    act = module.get_submodule(form.activation)
    u = torch.cat([linear(x) for linear in inputs], -1)
    if form.is_gated:
        gate, up = u.chunk(2, -1)
        inner = act(gate) * up
    else:
        inner = act(u)
    y: torch.Tensor = down(inner)
    return y


def _is_equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Of the small rows and of the large ones, each beside its own largest element."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    tolerance = _TOLERANCE.get(found.dtype, 0.0)
    return all(
        float((one.float() - two.float()).abs().max())
        <= tolerance * (float(two.abs().max()) or 1.0)
        for one, two in zip(found.chunk(2, 1), expected.chunk(2, 1), strict=True)
    )


def _size_of(linear: nn.Module) -> tuple[int, int]:
    """Inputs and outputs."""
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    first, second = weight.shape
    return (first, second) if isinstance(linear, Conv1D) else (second, first)


def _activation_name(module: nn.Module, spec: MlpSpec) -> str:
    """The child that is the activation: list_mlps found one."""
    for name, child in module.named_children():
        if not isinstance(child, AdaptedLinear) and _names_of(child) == spec.activations:
            return name
    raise AssertionError("an MLP that was listed has its activation")


def _names_of(activation: nn.Module) -> tuple[str, ...]:
    """Every name that stands for the function in transformers; empty: it is none of the known."""
    grid, known = _known_activations()
    y = activation(grid)
    return tuple(name for name, of in known.items() if float((of - y).abs().max()) <= _SAME)


@functools.cache
def _known_activations() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A grid, and what each function makes of it."""
    grid = torch.linspace(-8.0, 8.0, 513)
    return grid, {name: ACT2FN[name](grid) for name in _ACTIVATIONS if name in ACT2FN}


def _float(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.detach().float()
