"""Which form computes what, by machine and shape: the one table that decides.

Committed, not timed at start, so that a request's arithmetic is the same on every run of a machine.
Exact mode pins the forms whose rows do not depend on their neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polyadapt.ops.plan import GEMM_MIN_ROWS

_NEVER = 1 << 60


@dataclass(frozen=True, slots=True)
class Strategy:
    """From how many rows on torch's matrix products take over from the native kernels.

    adapter_gemm_rows counts the rows of one adapter in a step; base_gemm_rows all rows of a step,
    whose weights are then unpacked for the product. is_exact: a row's bits depend on nothing but
    its own sequence, so attention takes prefill row by row as well.
    """

    adapter_gemm_rows: int
    base_gemm_rows: int
    is_exact: bool = False


_PLAIN = Strategy(adapter_gemm_rows=GEMM_MIN_ROWS, base_gemm_rows=_NEVER)
# Tile registers multiply bfloat16 several times faster than float32 vectors do. The limit is an
# estimate from published times of such products; it has not been measured with this code.
_TILES = Strategy(adapter_gemm_rows=128, base_gemm_rows=128)
EXACT = Strategy(adapter_gemm_rows=_NEVER, base_gemm_rows=_NEVER, is_exact=True)


def choose(dtype: torch.dtype, *, is_exact: bool) -> Strategy:
    """Return this machine's strategy for activations of `dtype`."""
    if is_exact:
        return EXACT
    has_tiles = bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return _TILES if has_tiles and dtype is torch.bfloat16 else _PLAIN
