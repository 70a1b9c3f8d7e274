"""The native kernels of what replaces the base, one segment a call.

Ask `native.is_available` first. A row's bits never depend on the other rows, on their number or on
the threads. In all of them rows is int32 [n] contiguous, and a row lies in it once; weights are
float32 or bfloat16 and contiguous; activations are either, with a contiguous last dimension.
ValueError when shapes, dtypes or a row do not fit; then nothing was written.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable

import torch

from polyadapt.ops.native import build

_CALL = struct.Struct("=14qd")
_DTYPES = (torch.float32, torch.bfloat16)


def block_transform(x: torch.Tensor, rows: torch.Tensor, transform: torch.Tensor) -> torch.Tensor:
    """[n, in] of x's dtype: block i of the row's columns times matrix i of `transform`.

    x [T, in]; transform [in / g, g, g], multiplied from the right.
    """
    num_blocks, g, _ = transform.shape
    num_in = x.shape[1]
    if transform.shape != (num_blocks, g, g) or num_blocks * g != num_in:
        raise ValueError(
            f"x {tuple(x.shape)} does not fit a transform {tuple(transform.shape)}; expected "
            f"blocks that cover {num_in} columns"
        )
    y = torch.empty(rows.shape[0], num_in, dtype=x.dtype)
    _run(0, y, x, x, transform, rows, num_in=num_in, group=g)
    return y


def swap_(y: torch.Tensor, rows: torch.Tensor, swap: torch.Tensor, group: int) -> None:
    """y[rows] = (1 + swap[0]) y[rows] + swap[1] y'[rows], in place.

    y' is y with the halves of every `group` columns exchanged; y [T, out], swap [2, out], group
    even and a divisor of out.
    """
    num_out = y.shape[1]
    if swap.shape != (2, num_out) or group < 2 or group % 2 or num_out % group:
        raise ValueError(
            f"y {tuple(y.shape)} does not fit a swap {tuple(swap.shape)} of groups of {group}; "
            f"expected [2, {num_out}] and an even divisor of {num_out}"
        )
    _run(1, y, None, y, swap, rows, num_out=num_out, group=group)


def add_dense_(
    y: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, dense: torch.Tensor, scale: float
) -> None:
    """y[rows] += scale * x[rows] dense^T, in place; y [T, out], x [T, in], dense [out, in]."""
    num_out, num_in = dense.shape
    if x.shape != (y.shape[0], num_in) or y.shape[1] != num_out or x.dtype != y.dtype:
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype} and y {tuple(y.shape)} {y.dtype} do not fit a weight "
            f"{tuple(dense.shape)}"
        )
    _run(2, y, x, y, dense, rows, num_in=num_in, num_out=num_out, scale=scale)


def _run(
    kernel: int,
    y: torch.Tensor,
    x: torch.Tensor | None,
    indexed: torch.Tensor,
    weight: torch.Tensor,
    rows: torch.Tensor,
    *,
    num_in: int = 0,
    num_out: int = 0,
    group: int = 0,
    scale: float = 1.0,
) -> None:
    is_fit = (
        indexed.dtype in _DTYPES
        and weight.dtype in _DTYPES
        and rows.dtype is torch.int32
        and rows.is_contiguous()
        and weight.is_contiguous()
        and y.stride(1) == 1
        and (x is None or x.stride(1) == 1)
    )
    if not is_fit:
        raise ValueError(
            f"activations {indexed.dtype}, weight {weight.dtype} and rows {rows.dtype}; expected "
            "float32 or bfloat16 and int32, each with a contiguous last dimension"
        )
    result = _functions()[kernel](
        _CALL.pack(
            y.data_ptr(), 0 if x is None else x.data_ptr(), weight.data_ptr(), rows.data_ptr(),
            y.stride(0), 0 if x is None else x.stride(0), rows.shape[0], indexed.shape[0], num_in,
            num_out, group, indexed.dtype is torch.bfloat16, weight.dtype is torch.bfloat16,
            torch.get_num_threads(), scale,
        )
    )  # fmt: skip
    if result:
        raise ValueError(f"rows[{result >> 8}] is not one of {indexed.shape[0]} rows")


@functools.cache
def _functions() -> tuple[Callable[[bytes], int], ...]:
    library = build.load()
    if library is None:
        raise RuntimeError(f"there are no native kernels here: {build.outcome().reason}")
    functions = (
        library.polyadapt_block_transform,
        library.polyadapt_swap,
        library.polyadapt_add_dense,
    )
    for function in functions:
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int64
    return functions
