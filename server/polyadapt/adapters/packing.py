"""One adapter as one flat host tensor in the arena's layout. Knows sites, never families.

The layout of a cell is given in ops/gated_matmul.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from polyadapt.adapters.adapter import LowRank
from polyadapt.types import BaseSpec


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """weights [num_elements] in the arena's dtype; cells int64 [num_sites, 3] with offsets
    from 0.
    """

    weights: torch.Tensor
    cells: torch.Tensor
    is_scalable: bool
    rank: int
    is_kv_neutral: bool = False  # see AdapterPlan

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self.weights.numel() * self.weights.element_size()


def pack(
    modules: Mapping[int, LowRank],
    base: BaseSpec,
    dtype: torch.dtype,
    *,
    is_scalable: bool,
    is_kv_neutral: bool = False,
) -> PackedAdapter:
    """Lay the modules end to end in site order, cast once to the arena's dtype."""
    cells = torch.zeros(len(base.sites), 3, dtype=torch.int64)
    cells[:, 0] = -1
    parts: list[torch.Tensor] = []
    offset = 0
    for site_id in sorted(modules):
        module, site = modules[site_id], base.sites[site_id]
        rank = module.a.shape[0]
        a = module.a.t() if site.kind == "embedding" else module.a
        blocks = [a, module.b.t()] + ([] if module.bias is None else [module.bias])
        cells[site_id] = torch.tensor([offset, rank, int(module.bias is not None)])
        parts += blocks
        offset += sum(block.numel() for block in blocks)
    # Filled block by block: one concatenation would need the bytes twice, and take every core.
    weights = torch.empty(offset, dtype=dtype)
    start = 0
    for block in parts:
        stop = start + block.numel()
        weights[start:stop].view(block.shape).copy_(block)
        start = stop
    rank = max((module.a.shape[0] for module in modules.values()), default=0)
    return PackedAdapter(weights, cells, is_scalable, rank, is_kv_neutral)
