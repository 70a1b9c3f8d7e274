"""What stands between the products of a decoder layer, row by row: the choice between the native
kernels and the torch forms, which are the specification.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from polyadapt.ops import native
from polyadapt.ops.native import dense

# In the order of dense.ACTIVATIONS.
ACTIVATIONS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    F.silu,
    lambda x: F.gelu(x, approximate="tanh"),
)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, of x's shape and dtype.

    x [..., width] float32 or bfloat16; weight float32 [width]; the mean is float32.
    """
    if native.serves(x):
        return dense.rms_norm(x, weight, eps)
    return F.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(x.dtype)


def gated_activation(x: torch.Tensor, kind: int) -> torch.Tensor:
    """act(x[:, :width]) * x[:, width:], [rows, width] of x's dtype; kind indexes ACTIVATIONS.

    x [rows, 2 * width] float32 or bfloat16.
    """
    if native.serves(x):
        return dense.gated_activation(x, kind)
    gate, up = x.chunk(2, -1)
    return ACTIVATIONS[kind](gate) * up


def rope_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate the first `rotary` elements of every head in place, paired half against half.

    x [rows, heads, dim], cos and sin [rows, rotary], all of one dtype; rotary even and at most dim.
    Of the halves (u, v): u cos - v sin, and v cos + u sin (arXiv 2104.09864, as transformers pairs
    them).
    """
    if native.serves(x):
        dense.rope_(x, cos, sin)
        return
    part = x[..., : cos.shape[1]]
    u, v = part.chunk(2, -1)
    turned = torch.cat((-v, u), -1) * sin[:, None]
    part.mul_(cos[:, None]).add_(turned)
