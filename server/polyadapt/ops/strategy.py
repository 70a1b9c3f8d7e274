"""Which form computes what, by machine and shape: the one table that decides.

Committed, not timed at start, so that a request's arithmetic is the same on every run of a machine.
Exact mode pins the forms whose rows do not depend on their neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from polyadapt.ops.plan import GEMM_MIN_ROWS

_NEVER = 1 << 60


@dataclass(frozen=True, slots=True)
class Strategy:
    """From how many rows on torch's matrix products take over from the native kernels.

    Of one adapter in a step, adapter_gemm_rows counts the rows and adapter_gemm_work the rows times
    the largest rank; base_gemm_rows counts all rows of a step, whose weights are then unpacked for
    the product. is_exact: a row's bits depend on nothing but
    its own sequence, so attention takes prefill row by row as well.
    """

    adapter_gemm_rows: int
    adapter_gemm_work: int
    base_gemm_rows: int
    is_exact: bool = False

    def gemm_rows(self, ranks: np.ndarray) -> np.ndarray:
        """Rows from which on GEMMs serve adapters of these largest ranks, both int64 [n]."""
        by_work = -(-self.adapter_gemm_work // np.maximum(ranks, 1))
        limits: np.ndarray = np.maximum(by_work, self.adapter_gemm_rows)
        return limits


# Prompt steps of SmolLM2-135M with one adapter on all seven linears, two AVX2 cores, GEMMs' time in
# the kernel's: with 512 rows 1.30, 1.34, 1.05 and 0.95 at ranks 8, 16, 64 and 128; with 256 rows
# 1.25, 1.26, 1.29, 1.16 and 0.95 at ranks 8 to 256; with 128 rows never below 1.04.
_PLAIN = Strategy(adapter_gemm_rows=GEMM_MIN_ROWS, adapter_gemm_work=1 << 16, base_gemm_rows=_NEVER)
# Tile registers multiply bfloat16 several times faster than float32 vectors do. The limit is an
# estimate from published times of such products; it has not been measured with this code.
_TILES = Strategy(adapter_gemm_rows=128, adapter_gemm_work=0, base_gemm_rows=128)
EXACT = Strategy(
    adapter_gemm_rows=_NEVER, adapter_gemm_work=0, base_gemm_rows=_NEVER, is_exact=True
)


def choose(dtype: torch.dtype, *, is_exact: bool) -> Strategy:
    """Return this machine's strategy for activations of `dtype`."""
    if is_exact:
        return EXACT
    has_tiles = bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return _TILES if has_tiles and dtype is torch.bfloat16 else _PLAIN
