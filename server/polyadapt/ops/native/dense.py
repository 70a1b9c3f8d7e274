"""The native kernels of a dense decoder layer as functions of torch tensors.

Base product, norm, gated activation and rotary embedding. A row's bits never depend on the other
rows, on their number or on the threads. Ask `native.is_available` first.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable

import torch

from polyadapt.ops.native import build

PANEL = 16  # outputs that lie side by side in a packed weight; fixed in linear.c
ACTIVATIONS = ("silu", "gelu_tanh")  # the index is the kernel's code

_DTYPES = (torch.float32, torch.bfloat16)
_LINEAR = struct.Struct("=12q")
_NORM = struct.Struct("=12qd")
_ACT = struct.Struct("=9q")
_ROPE = struct.Struct("=11q")


def linear(
    x: torch.Tensor, panels: torch.Tensor, num_out: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """x W^T + bias [rows, num_out] of x's dtype; sums are float32, in the order of the inputs.

    x [rows, in] float32 or bfloat16, rows may be strided; panels [ceil(num_out / PANEL), in, PANEL]
    contiguous, either dtype, panels[p, k, c] = W[p * PANEL + c, k]; bias float32 [num_out].
    Raises ValueError when shapes or dtypes disagree.
    """
    num_rows, num_in = x.shape
    num_panels, panel_in, width = panels.shape
    dtype, w_dtype = x.dtype, panels.dtype
    if (
        panel_in != num_in
        or width != PANEL
        or not (num_panels - 1) * PANEL < num_out <= num_panels * PANEL
        or x.stride(1) != 1
        or dtype not in _DTYPES
        or w_dtype not in _DTYPES
    ):
        raise ValueError(
            f"x {tuple(x.shape)} {dtype} with strides {x.stride()} does not fit panels "
            f"{tuple(panels.shape)} {w_dtype} of {num_out} outputs"
        )
    if bias is not None and (bias.dtype is not torch.float32 or bias.shape != (num_out,)):
        raise ValueError(f"the bias must be float32 [{num_out}], not {bias.dtype} {bias.shape}")
    y = torch.empty(num_rows, num_out, dtype=dtype)
    _checked(
        _functions()[0](
            _LINEAR.pack(
                y.data_ptr(), x.data_ptr(), panels.data_ptr(),
                0 if bias is None else bias.data_ptr(), num_out, x.stride(0), num_rows, num_out,
                num_in, dtype is torch.bfloat16, w_dtype is torch.bfloat16, torch.get_num_threads(),
            )
        )
    )  # fmt: skip
    return y


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, of x's shape and dtype.

    x [..., width] float32 or bfloat16 with at most one stride per leading dimension pair: two or
    three dimensions, or more that are contiguous; weight float32 [width].
    """
    width = x.shape[-1]
    if weight.dtype is not torch.float32 or weight.shape != (width,) or x.dtype not in _DTYPES:
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype} needs a float32 weight [{width}], "
            f"not {weight.dtype} {tuple(weight.shape)}"
        )
    y = torch.empty(x.shape, dtype=x.dtype)
    if x.dim() == 3 and x.stride(2) == 1:
        inner, x_stride, x_inner = x.shape[1], x.stride(0), x.stride(1)
    else:
        x = x.contiguous()
        inner, x_stride, x_inner = 1, width, 0
    _functions()[1](
        _NORM.pack(
            y.data_ptr(), x.data_ptr(), weight.data_ptr(), inner * width, x_stride, inner, width,
            x_inner, x.numel() // max(width, 1), width, x.dtype is torch.bfloat16,
            torch.get_num_threads(), eps,
        )
    )  # fmt: skip
    return y


def gated_activation(x: torch.Tensor, kind: int) -> torch.Tensor:
    """act(x[:, :width]) * x[:, width:], [rows, width] of x's dtype; kind indexes ACTIVATIONS.

    x [rows, 2 * width] float32 or bfloat16, rows may be strided.
    """
    num_rows, double = x.shape
    if double % 2 or x.stride(1) != 1 or x.dtype not in _DTYPES:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} is not two halves of contiguous rows")
    width = double // 2
    y = torch.empty(num_rows, width, dtype=x.dtype)
    _functions()[2](
        _ACT.pack(
            y.data_ptr(), x.data_ptr(), width, x.stride(0), num_rows, width, kind,
            x.dtype is torch.bfloat16, torch.get_num_threads(),
        )
    )  # fmt: skip
    return y


def rope_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate the first `rotary` elements of every head in place, paired half against half.

    x [rows, heads, dim], cos and sin [rows, rotary] with equal strides, all of one dtype, float32
    or bfloat16; rotary even and at most dim. Raises ValueError otherwise.
    """
    num_rows, num_heads, dim = x.shape
    rotary = cos.shape[1]
    if (
        cos.shape != (num_rows, rotary)
        or cos.shape != sin.shape
        or cos.stride() != sin.stride()
        or cos.stride(1) != 1
        or x.stride(2) != 1
        or rotary % 2
        or rotary > dim
        or not x.dtype == cos.dtype == sin.dtype
        or x.dtype not in _DTYPES
    ):
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype} does not fit angles {tuple(cos.shape)} {cos.dtype} and "
            f"{tuple(sin.shape)} {sin.dtype}"
        )
    _functions()[3](
        _ROPE.pack(
            x.data_ptr(), cos.data_ptr(), sin.data_ptr(), x.stride(0), x.stride(1), cos.stride(0),
            num_rows, num_heads, rotary, x.dtype is torch.bfloat16, torch.get_num_threads(),
        )
    )  # fmt: skip


@functools.cache
def _functions() -> tuple[Callable[[bytes], int], ...]:
    library = build.load()
    if library is None:
        raise RuntimeError(f"there are no native kernels here: {build.outcome().reason}")
    functions = (
        library.polyadapt_linear,
        library.polyadapt_rms_norm,
        library.polyadapt_gated_activation,
        library.polyadapt_rope,
    )
    for function in functions:
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int64
    return functions


def _checked(result: int) -> None:
    if result:
        raise MemoryError("the native kernel found no memory for its scratch")
