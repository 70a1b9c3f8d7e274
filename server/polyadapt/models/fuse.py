"""Replace what a loaded model computes in many small steps by few, each proved equal.

Works on structure: one reference forward is traced, every candidate is run on what the module that
it replaces was given, and it is kept only where it gives the same. What cannot be proved stays as
transformers wrote it. At the end the whole model is compared once more.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from polyadapt.errors import StartupError
from polyadapt.models.adapted import AdaptedEmbedding, AdaptedLinear, AdaptedNorm, Part
from polyadapt.models.base import BaseModel, LayerCache
from polyadapt.models.fused import FusedAttention, FusedLayer, FusedMlp, FusedNorm, FusedRotary
from polyadapt.models.wrap import is_norm, norm_eps, set_submodule
from polyadapt.ops import native
from polyadapt.ops.attention import AttentionBatch, Chunk
from polyadapt.ops.linear import DenseWeight, PackedWeight
from polyadapt.ops.native.layer import Layer, Step
from polyadapt.ops.pointwise import ACTIVATIONS
from polyadapt.ops.strategy import Strategy

logger = logging.getLogger(__name__)

_MAX_TABLE_BYTES = 64 << 20  # of rotary angles
_NUM_TRACED = 12  # tokens of the reference forward
# Largest difference to the reference, of its largest element: the order of float32 sums, and of
# bfloat16 the roundings that one fused step leaves out.
_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
_MODEL_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1}


@dataclass(frozen=True, slots=True)
class _Call:
    """What one module was given in the reference forward, and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@torch.inference_mode()
def fuse(base: BaseModel, page_size: int, strategy: Strategy) -> str:
    """Fuse in place, pack where the native kernels serve, and say what was done. The caches must be
    allocated.

    Raises StartupError when the whole does not compute what the model as loaded computes, and in
    exact mode when there is no native form or a row's bits depend on other rows.
    """
    is_native = native.serves(base.layers[0].k)
    if strategy.is_exact and not is_native:
        raise StartupError(
            f"--exact needs the native kernels, which are off: {native.unavailable_reason()}"
            if base.device.type == "cpu"
            else "--exact needs the native kernels, which are for --device cpu"
        )
    run = _Run(base, page_size)
    # At the first positions and at the last: a module may treat long contexts in its own way.
    starts = sorted({0, base.spec.max_model_len - run.num})
    traces = [run.trace(start) for start in starts]
    done: Counter[str] = Counter()
    # Norms first: an attention module that is replaced takes its norms along.
    for candidate in (_norm, _rotary, _mlp, _attention, _layer):
        for path in _paths(base.module):
            calls = [calls[path] for calls, _ in traces if path in calls]
            if len(calls) == len(traces) and (fused := _tried(candidate, base, path, calls)):
                done[type(fused).__name__] += 1
                set_submodule(base.module, path, fused)
    if is_native:
        _pack_rest(base)
        _set_gemm_rows(base, strategy.base_gemm_rows)
        _set_native_layers(base)
    for start, (_, expected) in zip(starts, traces, strict=True):
        for found in (run.logits(start), run.logits_by_rows([run.num], start)):
            difference = _difference(found, expected)
            if not difference <= _MODEL_TOLERANCE[base.dtype]:
                raise StartupError(
                    f"the fused model differs from {base.spec.architecture} as loaded by "
                    f"{difference:.1e} of its largest logit; "
                    + ("start with POLYADAPT_NATIVE=0 and " if is_native else "")
                    + "report this model"
                )
    nbytes = sum(weight.nbytes for weight in {id(b.weight): b.weight for b in base.blocks}.values())
    if strategy.is_exact:
        _check_exact(base, run, done)
    said = "fused: " + (", ".join(f"{num} {name}" for name, num in sorted(done.items())) or "none")
    logger.info("%s; weights take %d MiB", said, nbytes >> 20)
    if done["FusedAttention"] < len(base.layers) or done["FusedMlp"] < len(base.layers):
        logger.info(
            "of %d layers %d attention and %d MLP modules are fused; the others stay as loaded",
            len(base.layers), done["FusedAttention"], done["FusedMlp"],
        )  # fmt: skip
    return said


def _paths(model: nn.Module) -> list[str]:
    """Where modules are; names keep no replaced module alive, whose weights are to be freed."""
    return [path for path, _ in model.named_modules()]


def _tried(candidate: _Candidate, base: BaseModel, path: str, calls: list[_Call]) -> Any:
    """The module that may replace the one at `path`, or None."""
    try:
        module = base.module.get_submodule(path)
    except AttributeError:  # it went with a module around it
        return None
    try:
        return candidate(base, module, calls)
    except Exception:  # whatever an unknown module does when it is tried, it stays as it is
        logger.warning("%s is left as it is: it could not be tried", path, exc_info=True)
        return None


def _check_exact(base: BaseModel, run: _Run, done: Counter[str]) -> None:
    """Refuse a model with a layer that still computes in torch, whose bits follow the batch."""
    num_layers = len(base.layers)
    if done["FusedLayer"] < num_layers:
        raise StartupError(
            f"--exact cannot be promised for {base.spec.architecture}: {done['FusedLayer']} of "
            f"{num_layers} layers have an exact form; start without --exact"
        )
    for path, module in base.module.named_modules():
        is_known = isinstance(module, FusedNorm | AdaptedLinear | AdaptedEmbedding | nn.Embedding)
        # Angles that torch computes in a step depend on where in the batch a row stands.
        is_computed = bool(list(module.parameters(recurse=False))) or hasattr(module, "inv_freq")
        if not is_known and is_computed:
            raise StartupError(
                f"--exact cannot be promised for {base.spec.architecture}: {path} "
                f"({type(module).__name__}) has no exact form; start without --exact"
            )
    together, alone = run.logits_by_rows([run.num]), run.logits_by_rows([1] * run.num)
    if not torch.equal(together, alone):
        raise StartupError(
            f"--exact cannot be promised for {base.spec.architecture}: tokens in one step and one "
            "by one gave different bits; start without --exact"
        )


def _set_gemm_rows(base: BaseModel, gemm_rows: int) -> None:
    for module in base.module.modules():
        if isinstance(module, AdaptedLinear) and isinstance(module.weight, PackedWeight):
            module.weight = replace(module.weight, gemm_rows=gemm_rows)


class _Run:
    """Forwards of a few tokens over the first pages of the caches, which nobody owns yet."""

    def __init__(self, base: BaseModel, page_size: int) -> None:
        self.base = base
        self.num = num = min(_NUM_TRACED, base.spec.max_model_len, base.layers[0].k.shape[0])
        self.page_size = page_size
        step = max(1, base.spec.vocab_size // (num + 1))
        ids = torch.arange(1, num + 1)[None] * step % base.spec.vocab_size
        self.ids = ids.to(base.device)

    def logits(self, first: int = 0) -> torch.Tensor:
        """All tokens as one prompt's chunk, at positions from `first` on."""
        slots = torch.arange(self.num, device=self.base.device)
        chunks = [Chunk(0, self.num, self.num, slots)]
        batch = AttentionBatch(slots, page_size=self.page_size, chunks=chunks)
        return self._forward(0, self.num, batch, first)

    def logits_by_rows(self, sizes: list[int], first: int = 0) -> torch.Tensor:
        """The tokens in steps of these sizes, every row reading the cache by itself."""
        found, start = [], 0
        device = self.base.device
        pages = torch.arange(-(-self.num // self.page_size), dtype=torch.int32, device=device)
        for size in sizes:
            at = torch.arange(start, start + size, device=device)
            batch = AttentionBatch(at, page_size=self.page_size, num_decodes=size)
            batch.page_table = pages.expand(size, -1).contiguous()
            batch.kv_lens = (at + 1).int()
            found.append(self._forward(start, size, batch, first))
            start += size
        return torch.cat(found, 1)

    def _forward(self, start: int, size: int, batch: AttentionBatch, first: int) -> torch.Tensor:
        device = self.base.device
        for layer in self.base.layers:
            layer.batch = batch
        logits: torch.Tensor = self.base.module(
            input_ids=self.ids[:, start : start + size],
            position_ids=torch.arange(first + start, first + start + size, device=device)[None],
            use_cache=False,
            logits_to_keep=torch.arange(size, device=device),
        ).logits
        return logits

    def trace(self, first: int) -> tuple[dict[str, _Call], torch.Tensor]:
        """Return every module's last call by the module's path, and the logits."""
        calls: dict[str, _Call] = {}

        def noting(path: str) -> Any:
            def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                calls[path] = _Call(_kept(args), _kept(kwargs), _kept(output))

            return note

        modules = dict(self.base.module.named_modules())
        inner = {id(m.base) for m in modules.values() if isinstance(m, AdaptedNorm)}
        hooks = [
            module.register_forward_hook(noting(path), with_kwargs=True)
            for path, module in modules.items()
            if path
            and id(module) not in inner
            and not isinstance(module, AdaptedLinear | AdaptedEmbedding)
        ]
        try:
            return calls, self.logits(first).clone()
        finally:
            for hook in hooks:
                hook.remove()


def _kept(value: Any) -> Any:
    """Copies of tensors: a later in-place step must not change what was seen."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, tuple):
        return tuple(_kept(item) for item in value)
    if isinstance(value, dict):
        return {key: _kept(item) for key, item in value.items()}
    return value


# --------------------------------------------------------------------------- candidates
_Candidate = Callable[[BaseModel, nn.Module, list[_Call]], nn.Module | None]


def _scaled(module: nn.Module, call: _Call, factor: float) -> _Call:
    """The call with its first tensor times `factor`: a module may clamp, or have an epsilon."""
    args, kwargs = call.args, dict(call.kwargs)
    if args:
        args = (args[0] * factor, *args[1:])
    else:
        kwargs["hidden_states"] = kwargs["hidden_states"] * factor
    return _Call(args, kwargs, _kept(module(*_kept(args), **_kept(kwargs))))


def _norm(base: BaseModel, module: nn.Module, calls: list[_Call]) -> nn.Module | None:
    adapted = module if isinstance(module, AdaptedNorm) else None
    own = module if adapted is None else adapted.base
    eps = norm_eps(own)
    if not is_norm(own) or eps is None or len(list(own.parameters())) != 1:
        return None
    assert isinstance(own.weight, torch.Tensor)
    for offset in (0.0, 1.0):
        fused = FusedNorm(own.weight.float() + offset, eps, offset=offset)
        if adapted is not None:
            fused.site, fused.row_dim = adapted.site, adapted.row_dim
        if _is_equal(base, fused, calls[0]):
            # Norms are also of tiny rows, where eps counts, and the model's were not.
            others = [_scaled(module, calls[0], factor) for factor in (1e-3, 64.0)]
            if all(_is_equal(base, fused, call) for call in [*calls[1:], *others]):
                return fused
    return None


def _rotary(base: BaseModel, module: nn.Module, calls: list[_Call]) -> nn.Module | None:
    call = calls[0]
    is_pair = isinstance(call.output, tuple) and len(call.output) == 2
    given = (*call.args, *call.kwargs.values())
    if not is_pair or len(given) != 2 or not hasattr(module, "inv_freq"):
        return None
    positions = torch.arange(base.spec.max_model_len, device=base.device)[None]
    if positions.numel() * call.output[0].shape[-1] * 8 > _MAX_TABLE_BYTES:
        return None
    # As the model calls it: (x, position_ids), by position or by name.
    args, kwargs = call.args, dict(call.kwargs)
    if len(args) == 2:
        args = (args[0], positions)
    else:
        kwargs["position_ids"] = positions
    cos, sin = module(*args, **kwargs)
    fused = FusedRotary(cos[0].clone(), sin[0].clone())
    return fused if all(_is_equal(base, fused, call) for call in calls) else None


def _mlp(base: BaseModel, module: nn.Module, calls: list[_Call]) -> nn.Module | None:
    call, linears = calls[0], _plain_linears(module)
    if len(call.args) != 1 or call.kwargs or not isinstance(call.args[0], torch.Tensor):
        return None
    x = call.args[0]
    if len(linears) == 2:
        return _half_fused_mlp(base, module, linears, calls)
    if len(linears) != 3:
        return None
    for gate, up, down in itertools.permutations(linears):
        width, hidden = gate.weight.shape
        if up.weight.shape != (width, hidden) or down.weight.shape != (hidden, width):
            continue
        if hidden != x.shape[-1]:
            continue
        for kind, activation in enumerate(ACTIVATIONS):
            y = down(activation(gate(x)) * up(x))
            if _difference(y, call.output) <= _TOLERANCE[base.dtype]:
                fused = FusedMlp(_joined([gate, up]), _joined([down]), kind)
                return _proved(base, fused, [*calls, _scaled(module, call, 64.0)])
    return None


def _half_fused_mlp(
    base: BaseModel, module: nn.Module, linears: list[AdaptedLinear], calls: list[_Call]
) -> nn.Module | None:
    """Gate and up are one linear already (Phi-3)."""
    call = calls[0]
    for gate_up, down in itertools.permutations(linears):
        hidden, width = down.weight.shape
        if gate_up.weight.shape != (2 * width, hidden):
            continue
        for kind, activation in enumerate(ACTIVATIONS):
            gate, up = gate_up(call.args[0]).chunk(2, -1)
            if _difference(down(activation(gate) * up), call.output) <= _TOLERANCE[base.dtype]:
                fused = FusedMlp(_joined([gate_up]), _joined([down]), kind)
                return _proved(base, fused, [*calls, _scaled(module, call, 64.0)])
    return None


def _attention(base: BaseModel, module: nn.Module, calls: list[_Call]) -> nn.Module | None:
    cache = getattr(module, "polyadapt_cache", None)
    if not isinstance(cache, LayerCache) or cache.shape is None or cache.options is None:
        return None
    inputs, output = _projections(module)
    if output is None:
        return None
    shape = cache.shape
    angles = calls[0].kwargs.get("position_embeddings")
    if shape.key_dim != shape.value_dim or not isinstance(angles, tuple):
        return None
    norms = (getattr(module, "q_norm", None), getattr(module, "k_norm", None))
    pair = norms if all(isinstance(norm, FusedNorm) for norm in norms) else None
    if pair is None and norms != (None, None):
        return None
    qkv = _joined(inputs)
    num_heads = qkv.weight.shape[0] // shape.key_dim - 2 * shape.num_kv_heads
    if num_heads < 1 or output.weight.shape[1] != num_heads * shape.key_dim:
        return None
    fused = FusedAttention(qkv, _joined([output]), pair, cache, num_heads)  # type: ignore[arg-type]
    # Some clamp query and key: seen where they are large. There scores are, and rounding with them.
    loud = _scaled(module, calls[0], 8.0)
    if not _is_equal(base, fused, loud, tolerance=5e-2):
        return None
    return _proved(base, fused, calls)


def _layer(base: BaseModel, module: nn.Module, calls: list[_Call]) -> nn.Module | None:
    children = [
        child for child in module.children() if list(child.parameters()) or _is_fused(child)
    ]
    norms = [child for child in children if isinstance(child, FusedNorm)]
    attention = [child for child in children if isinstance(child, FusedAttention)]
    mlp = [child for child in children if isinstance(child, FusedMlp)]
    counts = (len(children), len(norms), len(attention), len(mlp))
    if counts != (4, 2, 1, 1) or "position_embeddings" not in calls[0].kwargs:
        return None
    for first, second in (norms, norms[::-1]):
        fused = FusedLayer((first, second), attention[0], mlp[0])
        if all(_is_equal(base, fused, call) for call in calls):
            return fused
    return None


def _is_fused(module: nn.Module) -> bool:
    return isinstance(module, FusedNorm | FusedAttention | FusedMlp)


def _set_native_layers(base: BaseModel) -> None:
    """Give the fused layers their native form, if each of them has one: they share scratch."""
    layers = [module for module in base.module.modules() if isinstance(module, FusedLayer)]
    specs = [spec for layer in layers if (spec := layer.spec()) is not None]
    if not layers or len(specs) != len(layers):
        return
    site = layers[0].attention.qkv.site
    step = Step(site.arena, site.cells, site.plan, specs)
    for layer, spec in zip(layers, specs, strict=True):
        layer.native = (Layer(spec), step)
    base.step = step


def _projections(module: nn.Module) -> tuple[list[AdaptedLinear], AdaptedLinear | None]:
    """The linears that make query, key and value, in this order, and the one after attention."""
    output = getattr(module, "o_proj", None)
    for names in (("q_proj", "k_proj", "v_proj"), ("qkv_proj",)):
        found = [getattr(module, name, None) for name in names]
        inputs = [linear for linear in found if isinstance(linear, AdaptedLinear)]
        if len(inputs) == len(names) and isinstance(output, AdaptedLinear):
            return inputs, output
    return [], None


# --------------------------------------------------------------------------- pieces
def _plain_linears(module: nn.Module) -> list[AdaptedLinear]:
    """The module's linears, when nothing else in it has weights."""
    linears = [child for child in module.children() if isinstance(child, AdaptedLinear)]
    others = [child for child in module.children() if not isinstance(child, AdaptedLinear)]
    is_plain = not any(list(child.parameters()) for child in others)
    return linears if is_plain and not list(module.parameters(recurse=False)) else []


def _joined(linears: list[AdaptedLinear]) -> AdaptedLinear:
    """One linear with the parts of all, packed where that serves; the originals stay as they
    are.
    """
    parts, start = [], 0
    for linear in linears:
        for part in linear.parts:
            parts.append(Part(part.site, start + part.start, start + part.stop))
        start += linear.weight.shape[0]
    weights = [linear.weight.block(0, linear.weight.shape[0]) for linear in linears]
    bias = None
    if any(linear.bias is not None for linear in linears):
        bias = torch.cat([_bias(linear) for linear in linears])
    if native.serves(weights[0]):
        return AdaptedLinear(PackedWeight.pack(weights), bias, tuple(parts))
    if len(linears) == 1:
        return AdaptedLinear(linears[0].weight, linears[0].bias, tuple(parts))
    if bias is not None:
        bias = bias.to(weights[0].dtype)
    return AdaptedLinear(DenseWeight(torch.cat(weights)), bias, tuple(parts))


def _bias(linear: AdaptedLinear) -> torch.Tensor:
    """float32 [out]; zeros where there is none."""
    if linear.bias is None:
        return torch.zeros(linear.weight.shape[0], device=linear.weight.device)
    return linear.bias.detach().float()


def _proved(base: BaseModel, fused: nn.Module, calls: list[_Call]) -> nn.Module | None:
    """Return the module, its sites' weights now being the packed ones, if it equals the calls."""
    if not all(_is_equal(base, fused, call) for call in calls):
        return None
    for linear in fused.children():
        if isinstance(linear, AdaptedLinear):
            _move_blocks(base, linear)
    return fused


def _move_blocks(base: BaseModel, linear: AdaptedLinear) -> None:
    for part in linear.parts:
        block = base.blocks[part.site.id]
        base.blocks[part.site.id] = replace(
            block, weight=linear.weight, start=part.start, stop=part.stop
        )


def _pack_rest(base: BaseModel) -> None:
    """Pack the linears that stand alone; a plain embedding shares the packed weight of its head."""
    plain = {
        id(module.base.weight): path
        for path, module in base.module.named_modules()
        if isinstance(module, AdaptedEmbedding) and type(module.base) is nn.Embedding
    }
    for path in _paths(base.module):
        linear = base.module.get_submodule(path)
        if not isinstance(linear, AdaptedLinear) or not isinstance(linear.weight, DenseWeight):
            continue
        joined = _joined([linear])
        _move_blocks(base, joined)
        set_submodule(base.module, path, joined)
        tied = plain.get(id(linear.weight.tensor))
        if tied is not None:
            embedding = base.module.get_submodule(tied)
            assert isinstance(embedding, AdaptedEmbedding)
            alone = AdaptedEmbedding(None, joined.weight, embedding.dtype, embedding.site)
            set_submodule(base.module, tied, alone)
            block = base.blocks[embedding.site.id]
            base.blocks[embedding.site.id] = replace(block, weight=joined.weight)


def _is_equal(
    base: BaseModel, fused: nn.Module, call: _Call, tolerance: float | None = None
) -> bool:
    limit = tolerance or _TOLERANCE[base.dtype]
    found, expected = fused(*_kept(call.args), **_kept(call.kwargs)), call.output
    if isinstance(expected, tuple):
        if not isinstance(found, tuple) or len(found) != len(expected):
            return False
    else:
        found, expected = (found,), (expected,)
    return all(
        one is other is None or _difference(one, other) <= limit
        for one, other in zip(found, expected, strict=True)
    )


def _difference(found: Any, expected: Any) -> float:
    """Largest difference, of the largest element; infinite where kinds, shapes or dtypes differ."""
    if not isinstance(found, torch.Tensor) or not isinstance(expected, torch.Tensor):
        return float("inf")
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    largest = float(expected.abs().max())
    return float((found.float() - expected.float()).abs().max()) / (largest or 1.0)
