"""A whole decoder layer in one native call, for float32 rows that read the cache by themselves.

Ask `native.is_available` first. What it computes is what the kernels of native/__init__.py and
native/dense.py compute one after another, bit for bit.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from dataclasses import dataclass

import torch

from polyadapt.ops.attention import AttentionBatch
from polyadapt.ops.native import build
from polyadapt.ops.plan import LoadedLane, PlanBuffers

_LAYER = struct.Struct("=41q6d")
_STEP = struct.Struct("=34q")
_LANE = struct.Struct("=10q")
_STAGES = ("qkv", "output", "gate/up", "down", "attention", "the step's write slots", "experts")


@dataclass(frozen=True, slots=True)
class Product:
    """One packed product with the sites of its columns; see native.dense.linear."""

    panels: torch.Tensor  # [ceil(out / PANEL), in, PANEL] float32 or bfloat16
    num_out: int
    bias: torch.Tensor | None  # float32 [out]
    parts: torch.Tensor  # int64 [n, 3]: site id, first column, columns

    def fields(self) -> tuple[int, ...]:
        """The fields of product_t in layer.c."""
        return (
            self.panels.data_ptr(),
            0 if self.bias is None else self.bias.data_ptr(),
            self.parts.data_ptr(),
            self.parts.shape[0],
            self.num_out,
            self.panels.shape[1],
            int(self.panels.dtype is torch.bfloat16),
        )


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """All that stays the same about one layer.

    norms and head_norms are (float32 weight, eps): before attention and before the MLP; of query
    and of key, or None; norm_sites are the sites of all of them. Caches [token slots, kv heads,
    dim] float32, contiguous.
    """

    qkv: Product
    output: Product
    gate_up: Product
    down: Product
    norms: tuple[tuple[torch.Tensor, float], tuple[torch.Tensor, float]]
    norm_sites: tuple[int, ...]
    head_norms: tuple[tuple[torch.Tensor, float], tuple[torch.Tensor, float]] | None
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    num_heads: int
    activation: int
    scale: float
    softcap: float
    window: int
    sinks: torch.Tensor | None

    def sites(self) -> list[int]:
        """Every site of the layer."""
        products = (self.qkv, self.output, self.gate_up, self.down)
        return [*(site for of in products for site in of.parts[:, 0].tolist()), *self.norm_sites]


class Layer:
    """One layer's constants, packed once."""

    def __init__(self, spec: LayerSpec) -> None:
        self.spec = spec  # keeps the tensors alive
        num_slots, num_kv_heads, dim = spec.k_cache.shape
        head_norms = spec.head_norms or ((None, 0.0), (None, 0.0))
        pointers = [
            0 if weight is None else weight.data_ptr() for weight, _ in (*spec.norms, *head_norms)
        ]
        self.block = _LAYER.pack(
            *spec.qkv.fields(), *spec.output.fields(), *spec.gate_up.fields(), *spec.down.fields(),
            *pointers, spec.k_cache.data_ptr(), spec.v_cache.data_ptr(),
            0 if spec.sinks is None else spec.sinks.data_ptr(), num_slots, spec.num_heads,
            num_kv_heads, dim, spec.activation, spec.window,
            *(eps for _, eps in (*spec.norms, *head_norms)), spec.scale, spec.softcap,
        )  # fmt: skip

    def run(self, step: bytes) -> None:
        """Compute the layer on the step's rows, in place in its x.

        Raises ValueError when an index points outside its tensor; then x holds nothing of use.
        """
        stage = ctypes.c_int64()
        result = _function()(self.block, step, ctypes.byref(stage))
        if result:
            code, index = result & 0xFF, result >> 8
            raise ValueError(
                f"the native layer refused its {_STAGES[stage.value]}: problem {code} at {index}"
            )


class Step:
    """What all layers of one step share: where its rows are, and scratch that is grown and kept.

    One for all layers of a model, of the widest sizes among them.
    """

    def __init__(
        self, arena: torch.Tensor, cells: torch.Tensor, plan: PlanBuffers, specs: list[LayerSpec]
    ) -> None:
        self._arena, self._cells, self._plan = arena, cells, plan
        self._sites = frozenset(site for spec in specs for site in spec.sites())
        self.num_steps = 0  # that ran natively
        hidden = max(spec.qkv.panels.shape[1] for spec in specs)
        self._widths = (
            hidden,
            max(spec.qkv.num_out for spec in specs),
            max(spec.output.panels.shape[1] for spec in specs),
            max(spec.gate_up.num_out for spec in specs),
            max(spec.down.panels.shape[1] for spec in specs),
            hidden,
        )
        self._scratch: list[torch.Tensor] = []
        self._mixed = torch.empty(0, 0)
        self._lanes = b""
        self._made_for: tuple[object, ...] = ()
        self._block = b""

    def block(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: AttentionBatch
    ) -> bytes | None:
        """Return the step's argument block, or None when its rows are not for this kernel.

        x [rows, hidden], cos and sin [rows, rotary], float32 and contiguous.
        """
        lanes = self._plan.lanes
        made_for = (batch, lanes, x.data_ptr(), cos.data_ptr())
        if len(self._made_for) == 4 and all(
            old is new or (isinstance(old, int) and old == new)
            for old, new in zip(self._made_for, made_for, strict=True)
        ):
            return self._block
        if not self._fits(x, cos, sin, batch, lanes):
            return None
        rows = x.shape[0]
        if not self._scratch or self._scratch[0].shape[0] < rows:
            self._scratch = [torch.empty(rows, width) for width in self._widths]
        self._lanes = b"".join(_lane_block(lane) for lane in lanes)
        mixtures = self._mixtures()
        table, lens, plan = batch.page_table, batch.kv_lens, self._plan
        assert table is not None
        assert lens is not None
        self._block = _STEP.pack(
            x.data_ptr(), *(part.data_ptr() for part in self._scratch), cos.data_ptr(),
            sin.data_ptr(), batch.write_slots.data_ptr(), table.data_ptr(), lens.data_ptr(),
            _address(self._lanes), *mixtures[:2], self._arena.data_ptr(), self._cells.data_ptr(),
            plan.rows.data_ptr(), plan.rows.shape[0], self._arena.shape[0], self._cells.shape[0],
            self._cells.shape[1], self._arena.dtype is torch.bfloat16, rows, cos.shape[1],
            table.stride(0), table.shape[1], batch.page_size, len(lanes),
            0 if plan.usage is None else plan.usage.data_ptr(), *mixtures[2:],
            torch.get_num_threads(),
        )  # fmt: skip
        if not self._made_for or self._made_for[0] is not batch:
            self.num_steps += 1
        self._made_for = made_for
        return self._block

    def _mixtures(self) -> tuple[int, int, int, int, int]:
        """Addresses of the plan's mixtures and of scratch for their rows, and their sizes."""
        mixtures = self._plan.mixtures
        if mixtures is None:
            return 0, 0, 0, 0, 0
        rows, width = mixtures.num_rows, mixtures.width + 1
        if self._mixed.shape[0] < rows or self._mixed.shape[1] != width:
            self._mixed = torch.empty(rows, width)
        table = mixtures.table
        return table.data_ptr(), self._mixed.data_ptr(), table.shape[0], rows, width

    def _fits(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        batch: AttentionBatch,
        lanes: tuple[LoadedLane, ...],
    ) -> bool:
        table, lens = batch.page_table, batch.kv_lens
        return (
            not batch.chunks
            and table is not None
            and lens is not None
            and batch.num_decodes == x.shape[0] == cos.shape[0] == sin.shape[0]
            and table.shape[0] >= batch.num_decodes
            and table.stride(1) == 1
            and lens.shape[0] >= batch.num_decodes
            and batch.write_slots.shape[0] == batch.num_decodes
            and all(lane.num_short == lane.num_segments for lane in lanes)
            and self._sites.isdisjoint(self._plan.overrides)  # the head's, say, do not matter
            and self._plan.observer is None
            and x.is_contiguous()
            and cos.is_contiguous()
            and sin.is_contiguous()
            and x.dtype is cos.dtype is sin.dtype is torch.float32
        )


def _lane_block(lane: LoadedLane) -> bytes:
    return _LANE.pack(
        lane.bounds.data_ptr(), lane.slots.data_ptr(), lane.scales.data_ptr(), *_by_row(lane.gate),
        *_by_row(lane.table), lane.num_segments,
    )  # fmt: skip


def _by_row(values: torch.Tensor | None) -> tuple[int, int, int]:
    """Address, stride and width."""
    return (0, 0, 0) if values is None else (values.data_ptr(), values.stride(0), values.shape[1])


def _address(block: bytes) -> int:
    """Where the bytes lie; they must be kept alive by whoever asks."""
    return ctypes.cast(ctypes.c_char_p(block), ctypes.c_void_p).value or 0


@functools.cache
def _function() -> Callable[..., int]:
    library = build.load()
    if library is None:
        raise RuntimeError(f"there are no native kernels here: {build.outcome().reason}")
    function = library.polyadapt_layer
    function.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p]
    function.restype = ctypes.c_int64
    return function
