"""The native kernels of an adapter's own experts for a whole MLP as functions of torch tensors.

Ask `native.is_available` first. What they compute is what ops/mixture.py says.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable

import torch

from polyadapt.ops.native import build

# The block of fields that calls.h calls mixture_call_t.
CALL = struct.Struct("=34q")
_DTYPES = (torch.float32, torch.bfloat16)
_NO_MEMORY = 1
PROBLEMS = {
    2: "the slot of segment {} is not a row of cells",
    3: "rows[{}] is not a row of x",
    4: "the experts of segment {} do not lie inside the arena, or not as many in every cell",
    5: "segment {} does not lie inside rows and h",
}


def mix_(
    inner: torch.Tensor,
    u: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    arena: torch.Tensor,
    cells: torch.Tensor,
    rows: torch.Tensor,
    segments: torch.Tensor,
    parts: torch.Tensor,
    down: int,
    usage: torch.Tensor | None,
    *,
    is_gated: bool,
    activation: int,
) -> None:
    """Put the experts' sum into `inner` and fill their rows of h, in place; see ops/mixture.py.

    segments int64 [n, 4]: slot, first position in `rows`, one past the last, first row of h; parts
    int64 [m, 3]: site id, first column of u, columns; down: the site id. inner, u and x of one
    dtype, float32 or bfloat16, last dimension contiguous; h float32 [rows, widest rank of down +
    1]. activation is an index of native.dense.ACTIVATIONS; usage, see PlanBuffers, is added to. A
    row's bits do not depend on the others.
    Raises ValueError, leaving everything as it was, when an index points outside its tensor.
    """
    _check(inner, u, x, h)
    columns = inner.shape[1] * (2 if is_gated else 1)
    if u.shape != (x.shape[0], columns) or inner.shape[0] != x.shape[0]:
        raise ValueError(
            f"u {tuple(u.shape)} does not match x {tuple(x.shape)} and inner {tuple(inner.shape)}; "
            f"expected as many rows, and {columns} columns"
        )
    _run(
        0, inner, u, x, None, h, arena, cells, rows, segments, parts, down, None, usage,
        width=inner.shape[1], is_gated=is_gated, activation=activation,
    )  # fmt: skip


def add_mixed_(
    y: torch.Tensor,
    h: torch.Tensor,
    arena: torch.Tensor,
    cells: torch.Tensor,
    rows: torch.Tensor,
    segments: torch.Tensor,
    parts: torch.Tensor,
    down: int,
    bias: torch.Tensor | None,
    *,
    num_in: int,
    width: int,
    is_gated: bool,
) -> None:
    """Add what the experts do behind down, in place; see ops/mixture.py.

    y [rows, out]; h as mix_ left it; bias float32 [out] or None; num_in and width are x's and
    inner's. The rest, and what is raised, as in mix_.
    """
    _check(y, y, y, h)
    if bias is not None and (bias.dtype is not torch.float32 or bias.shape != (y.shape[1],)):
        raise ValueError(f"the bias must be float32 [{y.shape[1]}], not {bias.dtype} {bias.shape}")
    _run(
        1, None, None, None, y, h, arena, cells, rows, segments, parts, down, bias, None,
        num_in=num_in, width=width, is_gated=is_gated,
    )  # fmt: skip


def _check(one: torch.Tensor, two: torch.Tensor, three: torch.Tensor, h: torch.Tensor) -> None:
    tensors = (one, two, three)
    is_fit = all(t.dtype is one.dtype and t.stride(1) == 1 for t in tensors)
    if not is_fit or one.dtype not in _DTYPES or h.dtype is not torch.float32 or h.stride(1) != 1:
        raise ValueError(
            f"activations {[t.dtype for t in tensors]} and h {h.dtype}; expected float32 or "
            "bfloat16 for all and float32, each with a contiguous last dimension"
        )


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _stride(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _run(
    kernel: int,
    inner: torch.Tensor | None,
    u: torch.Tensor | None,
    x: torch.Tensor | None,
    y: torch.Tensor | None,
    h: torch.Tensor,
    arena: torch.Tensor,
    cells: torch.Tensor,
    rows: torch.Tensor,
    segments: torch.Tensor,
    parts: torch.Tensor,
    down: int,
    bias: torch.Tensor | None,
    usage: torch.Tensor | None,
    *,
    num_in: int = 0,
    width: int,
    is_gated: bool,
    activation: int = 0,
) -> None:
    given = x if y is None else y
    assert given is not None
    is_indexed = rows.dtype is torch.int32 and cells.dtype is segments.dtype is torch.int64
    if not is_indexed or not segments.is_contiguous() or arena.dtype not in _DTYPES:
        raise ValueError(
            f"rows {rows.dtype}, cells {cells.dtype}, segments {segments.dtype}, arena "
            f"{arena.dtype}; expected int32, int64, int64, float32 or bfloat16"
        )
    result = _functions()[kernel](
        CALL.pack(
            _address(inner), _address(u), _address(x), _address(y), h.data_ptr(),
            arena.data_ptr(), cells.data_ptr(), rows.data_ptr(), _address(bias),
            _address(usage), segments.data_ptr(), parts.data_ptr(), _stride(inner), _stride(u),
            _stride(x), _stride(y), h.stride(0), segments.shape[0], rows.shape[0], given.shape[0],
            h.shape[0], x.shape[1] if x is not None else num_in, width,
            0 if y is None else y.shape[1], parts.shape[0], down, arena.shape[0],
            cells.shape[0], cells.shape[1], is_gated, activation, given.dtype is torch.bfloat16,
            arena.dtype is torch.bfloat16, torch.get_num_threads(),
        )
    )  # fmt: skip
    if result:
        code, index = result & 0xFF, result >> 8
        if code == _NO_MEMORY:
            raise MemoryError("the native kernel found no memory for its scratch")
        raise ValueError(PROBLEMS[code].format(index))


@functools.cache
def _functions() -> tuple[Callable[[bytes], int], ...]:
    library = build.load()
    if library is None:
        raise RuntimeError(f"there are no native kernels here: {build.outcome().reason}")
    functions = (library.polyadapt_mix, library.polyadapt_add_mixed)
    for function in functions:
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int64
    return functions
