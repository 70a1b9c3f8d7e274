"""The native CPU kernels as functions of torch tensors. Knows slots, sites and pages, never names.

The kernels are optional: ask `is_available` first. What they compute is specified by the torch
forms in ops/gated_matmul.py, ops/reference.py and ops/attention.py.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable

import torch

from polyadapt.ops.cells import USAGE_COLUMNS
from polyadapt.ops.native import build

_POINTER, _INT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
# The block of fields that gated_matmul.c calls call_t.
# `bytes` because packing is a tenth of the cost of passing so many arguments.
_GATED_CALL = struct.Struct("=31q")
_DTYPES = (torch.float32, torch.bfloat16)
_NO_MEMORY = 1
_GATED_PROBLEMS = {
    2: "slots[{}] is not a row of cells",
    3: "rows[{}] is not a row of y",
    4: "the cell of segment {} does not lie inside the arena",
    5: "bounds[{}] and the next do not lie in order inside rows",
    6: "ids[{}] is not below num_in",
    7: "parts[{}] names a site outside cells or columns outside y",
    8: "segment {} needs a table with the weights of its experts, which the lane has not",
}
_ATTENTION_PROBLEMS = {
    2: "kv_lens[{}] is negative or more than its pages hold",
    3: "page_table[{}] names a page outside the cache",
}


def is_available() -> bool:
    """Whether the kernels are compiled and loaded; the first call may compile for some seconds."""
    return build.load() is not None


def serves(x: torch.Tensor) -> bool:
    """Whether the kernels take such a tensor: they are there, and it is in the host's memory."""
    return x.device.type == "cpu" and is_available()


def unavailable_reason() -> str:
    """Why `is_available` is false; when it is true, how the kernels were built."""
    return build.outcome().reason


def gated_matmul_(
    y: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    cells: torch.Tensor,
    rows: torch.Tensor,
    bounds: torch.Tensor,
    slots: torch.Tensor,
    scales: torch.Tensor,
    num_segments: int,
    gate: torch.Tensor | None,
    table: torch.Tensor | None,
    parts: torch.Tensor,
    usage: torch.Tensor | None = None,
) -> None:
    """Add the adapters' part of one lane to y in place.

    Semantics, for each (site, column, width) of parts int64 [n, 3], whose y is the columns from
    `column` on, for segment s < num_segments with (offset, rank, parts, routing) =
    cells[slots[s], site], offset >= 0, and each row t in rows[bounds[s] : bounds[s + 1]]:
        h[i] = scales[s] * dot(A[i], x[t]);  h[i] = where(gate[t, i] != 0, gate[t, i] * h[i], 0)
        h[i] = where(w[i] != 0, w[i] * h[i], 0), w being what the routing says: see ops/cells.py
        y[t] += out_scale * y[t] + sum_i h[i] * B[i] + scales[s] * bias
    y [T, out] and x [T, in], both float32 or both bfloat16, last dimension contiguous; arena 1-D,
    either of the two; at `offset` lies the cell of ops/cells.py, of whose parts bias, out_scale and
    router_bias are read here. cells int64 [slots, sites, 4]; rows, bounds, slots int32; scales
    float32; gate float32 [T, width] or None, components from `width` on are ungated; table float32
    [T, width] or None, for routers that read it. At most 4096 components are routed. usage, see
    PlanBuffers, is added to. All on the host; cells,
    arena, rows, bounds, slots and scales contiguous. A row lies in at most one segment. Sums are
    float32, a bfloat16 y is rounded once. A row's bits do not depend on the number of threads or on
    the other rows. Raises ValueError, leaving y as it was, when an index points outside its tensor.
    """
    if x.dtype != y.dtype:
        raise ValueError(f"x is {x.dtype} and y is {y.dtype}; they must be of one dtype")
    (num_rows, num_in), (x_stride, last) = x.shape, x.stride()
    if y.shape[0] != num_rows or last != 1:
        raise ValueError(
            f"x {tuple(x.shape)} with strides {x.stride()} does not match y {tuple(y.shape)}; "
            "expected as many rows, with a contiguous last dimension"
        )
    _gated(
        y, x.data_ptr(), 0, x_stride, num_in, arena, cells, rows, bounds, slots, scales,
        num_segments, gate, table, parts, usage,
    )  # fmt: skip


def gated_embedding_(
    y: torch.Tensor,
    ids: torch.Tensor,
    num_in: int,
    arena: torch.Tensor,
    cells: torch.Tensor,
    rows: torch.Tensor,
    bounds: torch.Tensor,
    slots: torch.Tensor,
    scales: torch.Tensor,
    num_segments: int,
    gate: torch.Tensor | None,
    table: torch.Tensor | None,
    site: int,
    usage: torch.Tensor | None = None,
) -> None:
    """Add the adapters' part of an embedding in place.

    Semantics: as gated_matmul_ with h[i] = scales[s] * A[ids[t], i] before the gate.
    y [T, width of the embedding]; ids int64 [T] contiguous, below num_in, the size of the
    vocabulary; the A block is token-major [num_in, rank]. Raises ValueError as gated_matmul_ does.
    """
    if ids.dtype != torch.int64 or ids.shape[0] != y.shape[0] or not ids.is_contiguous():
        raise ValueError(
            f"ids {tuple(ids.shape)} {ids.dtype} do not match y {tuple(y.shape)}; "
            "expected one contiguous int64 per row"
        )
    _gated(
        y, 0, ids.data_ptr(), 0, num_in, arena, cells, rows, bounds, slots, scales, num_segments,
        gate, table, torch.tensor([[site, 0, y.shape[1]]]), usage,
    )  # fmt: skip


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    page_size: int,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend one query row per sequence to that sequence's pages.

    Semantics, for head h, its key-value head g = h // (heads // kv heads) and positions j in
    [max(0, kv_lens[b] - window), kv_lens[b]), at the token slot
    page_table[b, j // page_size] * page_size + j % page_size:
        s[j] = scale * dot(q[b, h], k[slot, g]);  softcap: s[j] = softcap * tanh(s[j] / softcap)
        out[b, h] = sum_j exp(s[j]) * v[slot, g] / (sum_j exp(s[j]) + exp(sinks[h]))
    q [B, heads, D], k_cache [token slots, kv heads, D], v_cache [token slots, kv heads, Dv], all
    float32 or all bfloat16, last dimension contiguous. page_table int32 [B, pages], rows may be
    strided; kv_lens int32 [B]; sinks float32 [heads] or None. softcap 0 and window 0 mean off.
    Returns [B, heads, Dv] of q's dtype; zeros where kv_lens is 0. Sums are float32; a sequence's
    bits do not depend on the number of threads or on the rest of the batch. Raises ValueError when
    shapes disagree or an index points outside the cache.
    """
    num_sequences, num_heads, d = q.shape
    num_slots, num_kv_heads, dv = v_cache.shape
    if k_cache.shape != (num_slots, num_kv_heads, d) or num_heads % num_kv_heads:
        raise ValueError(
            f"q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)} and v_cache "
            f"{tuple(v_cache.shape)} do not fit together; expected [B, Hq, D], [slots, Hkv, D] and "
            "[slots, Hkv, Dv] with Hq a multiple of Hkv"
        )
    if q.dtype not in _DTYPES or not (q.dtype == k_cache.dtype == v_cache.dtype):
        raise ValueError(
            f"q is {q.dtype}, the caches {k_cache.dtype} and {v_cache.dtype}; "
            "expected float32 or bfloat16 for all three"
        )
    if not (q.stride(2) == k_cache.stride(2) == v_cache.stride(2) == 1):
        raise ValueError("the last dimension of q, k_cache and v_cache must be contiguous")
    if page_table.dtype != torch.int32 or kv_lens.dtype != torch.int32:
        raise ValueError(
            f"page_table and kv_lens must be int32, not {page_table.dtype}, {kv_lens.dtype}"
        )
    if page_table.shape[0] < num_sequences or page_table.stride(1) != 1:
        raise ValueError(
            f"page_table {tuple(page_table.shape)} needs a contiguous row per sequence"
        )
    if kv_lens.shape[0] < num_sequences or not kv_lens.is_contiguous() or page_size < 1:
        raise ValueError(
            f"kv_lens {tuple(kv_lens.shape)} and page_size {page_size} do not fit; expected one "
            f"contiguous length for each of {num_sequences} sequences and a size above 0"
        )
    if sinks is not None and (
        sinks.dtype != torch.float32 or sinks.shape != (num_heads,) or not sinks.is_contiguous()
    ):
        raise ValueError(
            f"sinks must be contiguous float32 [{num_heads}], not {tuple(sinks.shape)}"
        )
    out = torch.empty(num_sequences, num_heads, dv, dtype=q.dtype)
    strides = (_INT * 6)(*q.stride()[:2], *k_cache.stride()[:2], *v_cache.stride()[:2])
    result = _functions()[1](
        out.data_ptr(), q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
        page_table.data_ptr(), kv_lens.data_ptr(), None if sinks is None else sinks.data_ptr(),
        ctypes.addressof(strides), page_table.stride(0), num_sequences, num_heads, num_kv_heads,
        d, dv, num_slots, page_table.shape[1], page_size, window, scale, softcap,
        q.dtype is torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    if result:
        _raise(result, _ATTENTION_PROBLEMS)
    return out


def _gated(
    y: torch.Tensor,
    x_ptr: int,
    ids_ptr: int,
    x_stride: int,
    num_in: int,
    arena: torch.Tensor,
    cells: torch.Tensor,
    rows: torch.Tensor,
    bounds: torch.Tensor,
    slots: torch.Tensor,
    scales: torch.Tensor,
    num_segments: int,
    gate: torch.Tensor | None,
    table: torch.Tensor | None,
    parts: torch.Tensor,
    usage: torch.Tensor | None,
) -> None:
    # Called for every adapted module of every step: few, cheap checks; indices are checked in C.
    y_dtype, arena_dtype = y.dtype, arena.dtype
    num_slots, num_sites, _ = cells.shape
    num_rows = y.shape[0]
    y_stride, last = y.stride()
    if y_dtype not in _DTYPES or arena_dtype not in _DTYPES or last != 1:
        raise ValueError(
            f"y is {y_dtype} with strides {y.stride()} and arena is {arena_dtype}; expected "
            "float32 or bfloat16 and a contiguous last dimension"
        )
    if not (
        rows.dtype is bounds.dtype is slots.dtype is torch.int32
        and cells.dtype is torch.int64
        and scales.dtype is torch.float32
    ):
        raise ValueError(
            f"rows {rows.dtype}, bounds {bounds.dtype}, slots {slots.dtype}, cells {cells.dtype}, "
            f"scales {scales.dtype}; expected int32, int32, int32, int64, float32"
        )
    if (
        bounds.shape[0] <= num_segments
        or slots.shape[0] < num_segments
        or scales.shape[0] < num_segments
    ):
        raise ValueError(
            f"{num_segments} segments need as many slots and scales and one bound more; there are "
            f"{len(slots)} slots, {len(scales)} scales and {len(bounds)} bounds"
        )
    gate_ptr, gate_stride, gate_width = _by_row("gate", gate, num_rows)
    table_ptr, table_stride, table_width = _by_row("table", table, num_rows)
    usage_ptr = 0
    if usage is not None:
        usage_ptr = usage.data_ptr()
        if usage.dtype is not torch.float32 or usage.shape != (num_slots, USAGE_COLUMNS):
            raise ValueError(
                f"usage is {usage.dtype} {tuple(usage.shape)}; expected float32 "
                f"[{num_slots}, {USAGE_COLUMNS}]"
            )
    call = _GATED_CALL.pack(
        y.data_ptr(), x_ptr, ids_ptr, arena.data_ptr(), cells.data_ptr(), rows.data_ptr(),
        bounds.data_ptr(), slots.data_ptr(), scales.data_ptr(), gate_ptr, table_ptr,
        usage_ptr, parts.data_ptr(), y_stride, x_stride, gate_stride, table_stride, gate_width,
        table_width, num_rows, num_in, y.shape[1], parts.shape[0], rows.shape[0], arena.shape[0],
        num_slots, num_sites, num_segments, y_dtype is torch.bfloat16,
        arena_dtype is torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    result = _functions()[0](call)
    if result:
        _raise(result, _GATED_PROBLEMS)


def _by_row(name: str, values: torch.Tensor | None, num_rows: int) -> tuple[int, int, int]:
    """Address, stride and width of what is indexed by row; zeros for None."""
    if values is None:
        return 0, 0, 0
    (rows, width), (stride, last) = values.shape, values.stride()
    if values.dtype is not torch.float32 or last != 1 or rows < num_rows:
        raise ValueError(
            f"{name} is {values.dtype} {tuple(values.shape)} with strides {values.stride()}; "
            f"expected float32 with a contiguous row for each of {num_rows} rows"
        )
    return values.data_ptr(), stride, width


@functools.cache
def _functions() -> tuple[Callable[..., int], Callable[..., int]]:
    library = build.load()
    if library is None:
        raise RuntimeError(f"there are no native kernels here: {unavailable_reason()}")
    gated, attention = library.polyadapt_gated_matmul, library.polyadapt_paged_attention
    gated.argtypes = [ctypes.c_char_p]
    attention.argtypes = [_POINTER] * 8 + [_INT] * 10 + [_DOUBLE] * 2 + [_INT] * 2
    gated.restype = attention.restype = _INT
    return gated, attention


def _raise(result: int, problems: dict[int, str]) -> None:
    code, index = result & 0xFF, result >> 8
    if code == _NO_MEMORY:
        raise MemoryError("the native kernel found no memory for its scratch")
    raise ValueError(problems[code].format(index))
