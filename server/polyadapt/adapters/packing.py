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


class Layout:
    """Where the modules of any adapter of one base lie in its weights: end to end, by site."""

    def __init__(self, base: BaseSpec) -> None:
        self._widths = torch.tensor([s.in_features + s.out_features for s in base.sites])
        self._outs = torch.tensor([s.out_features for s in base.sites])

    def cells(self, ranks: torch.Tensor, has_bias: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Return an adapter's cells and the number of its elements.

        ranks: int64 [num_sites], -1 where nothing is adapted; has_bias: bool [num_sites].
        """
        is_adapted = ranks >= 0
        sizes = torch.where(is_adapted, ranks * self._widths + has_bias * self._outs, 0)
        ends = sizes.cumsum(0)
        starts = torch.where(is_adapted, ends - sizes, -1)
        return torch.stack([starts, ranks.clamp(min=0), has_bias.long()], dim=1), int(ends[-1])


def pack(
    modules: Mapping[int, LowRank],
    base: BaseSpec,
    dtype: torch.dtype,
    *,
    is_scalable: bool,
    is_kv_neutral: bool = False,
) -> PackedAdapter:
    """Lay the modules end to end in site order, cast once to the arena's dtype."""
    ranks, has_bias = [-1] * len(base.sites), [False] * len(base.sites)
    parts: list[torch.Tensor] = []
    for site_id in sorted(modules):
        module, site = modules[site_id], base.sites[site_id]
        a = module.a.t() if site.kind == "embedding" else module.a
        parts += [a, module.b.t()] + ([] if module.bias is None else [module.bias])
        ranks[site_id], has_bias[site_id] = module.a.shape[0], module.bias is not None
    cells, num_elements = Layout(base).cells(torch.tensor(ranks), torch.tensor(has_bias))
    # Filled block by block: one concatenation would need the bytes twice, and take every core.
    weights = torch.empty(num_elements, dtype=dtype)
    start = 0
    for block in parts:
        stop = start + block.numel()
        weights[start:stop].view(block.shape).copy_(block)
        start = stop
    rank = max((module.a.shape[0] for module in modules.values()), default=0)
    return PackedAdapter(weights, cells, is_scalable, rank, is_kv_neutral)
