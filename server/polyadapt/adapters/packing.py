"""One adapter as one flat host tensor in the arena's layout. Knows sites, never families.

The layout of a cell is given in ops/cells.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from polyadapt.adapters.adapter import ORDINARY, Delta, Traits
from polyadapt.adapters.pinned import Block
from polyadapt.ops import cells as layout
from polyadapt.types import BaseSpec, SiteKind, SiteSpec

_ANYWHERE: dict[SiteKind, int] = {
    "linear": layout.BIAS
    | layout.OUT_SCALE
    | layout.ROUTER_BIAS
    | layout.TRANSFORM
    | layout.SWAP
    | layout.DENSE,
    "embedding": layout.BIAS | layout.OUT_SCALE | layout.DENSE,
    "norm": layout.BIAS | layout.WEIGHT,
    "experts": 0,
}


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """weights [num_elements] in the arena's dtype; cells int64 [num_sites, 4] with offsets
    from 0. Behind the last cell lie the tensors of traits.probe. memory: the page-locked block that
    the weights lie in, which whoever holds it gives back; None for ordinary memory.
    """

    weights: torch.Tensor
    cells: torch.Tensor
    rank: int
    traits: Traits = ORDINARY
    memory: Block | None = None
    pack_s: float = 0.0  # what it took to pack; 0 when it came packed

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self.weights.numel() * self.weights.element_size()


class Layout:
    """Where the modules of any adapter of one base lie in its weights: end to end, by site."""

    def __init__(self, base: BaseSpec) -> None:
        self._sizes = [(site.in_features, site.out_features) for site in base.sites]
        self._widths = torch.tensor([num_in + num_out for num_in, num_out in self._sizes])
        self._outs = torch.tensor([num_out for _, num_out in self._sizes])

    def cells(
        self, ranks: torch.Tensor, parts: torch.Tensor, routings: torch.Tensor
    ) -> tuple[torch.Tensor, int]:
        """Return an adapter's cells and the number of its elements.

        ranks: int64 [num_sites], -1 where nothing is adapted; parts and routings: int64
        [num_sites].
        """
        is_adapted = ranks >= 0
        sizes = torch.where(parts == layout.BIAS, self._outs, 0) + ranks * self._widths
        # Nearly all cells have a bias or nothing behind B, and this is done for every load.
        for site_id in (parts & ~layout.BIAS | routings).nonzero().flatten().tolist():
            num_in, num_out = self._sizes[site_id]
            sizes[site_id] = layout.num_elements(
                num_in, num_out, int(ranks[site_id]), int(parts[site_id]), int(routings[site_id])
            )
        sizes = torch.where(is_adapted, sizes, 0)
        ends = sizes.cumsum(0)
        starts = torch.where(is_adapted, ends - sizes, -1)
        return torch.stack([starts, ranks.clamp(min=0), parts, routings], dim=1), int(ends[-1])


def pack(
    modules: Mapping[int, Delta],
    base: BaseSpec,
    dtype: torch.dtype,
    traits: Traits,
    probe: Sequence[torch.Tensor] = (),
) -> PackedAdapter:
    """Lay the modules end to end in site order and the tensors of traits.probe behind them, cast
    once to the arena's dtype.

    Raises ValueError for a part that its site has no place for, or whose shape is not the site's.
    """
    ranks, parts, routings = ([empty] * len(base.sites) for empty in (-1, 0, 0))
    blocks: list[torch.Tensor] = []
    for site_id in sorted(modules):
        module, site = modules[site_id], base.sites[site_id]
        _check(module, site)
        a = module.a.t() if site.kind == "embedding" else module.a
        router = () if module.router is None else (module.router,)
        blocks += [a, *router, module.b.t(), *(tensor for _, tensor in module.tails)]
        ranks[site_id], parts[site_id] = module.a.shape[0], module.parts
        routings[site_id] = module.code
    cells, num_elements = Layout(base).cells(*map(torch.tensor, (ranks, parts, routings)))
    if tuple(tuple(tensor.shape) for tensor in probe) != shapes_of(traits):
        given = [tuple(tensor.shape) for tensor in probe]
        raise ValueError(f"the probe has tensors of {given}, expected {shapes_of(traits)}")
    blocks += probe
    num_elements += num_behind(traits)
    # Filled block by block: one concatenation would need the bytes twice, and take every core.
    weights = torch.empty(num_elements, dtype=dtype)
    start = 0
    for block in blocks:
        stop = start + block.numel()
        weights[start:stop].view(block.shape).copy_(block)
        start = stop
    rank = max((module.a.shape[0] for module in modules.values()), default=0)
    return PackedAdapter(weights, cells, rank, traits)


def shapes_of(traits: Traits) -> tuple[tuple[int, ...], ...]:
    """Of the tensors behind an adapter's cells."""
    return () if traits.probe is None else traits.probe.shapes


def num_behind(traits: Traits) -> int:
    """How many elements lie behind an adapter's cells."""
    return 0 if traits.probe is None else traits.probe.num_elements


def _check(module: Delta, site: SiteSpec) -> None:
    """What no step could compute is refused here, whatever family made it."""
    rank, num_in, num_out = module.a.shape[0], site.in_features, site.out_features
    parts, group = module.parts & ((1 << layout.GROUP_SHIFT) - 1), layout.group_of(module.parts)
    given = {bit: tuple(tensor.shape) for bit, tensor in module.tails}
    expected: dict[int, tuple[int, ...]] = {
        layout.BIAS: (num_out,),
        layout.OUT_SCALE: (num_out,),
        layout.ROUTER_BIAS: (rank,),
        layout.TRANSFORM: (num_in // group if group else 0, group, group),
        layout.SWAP: (2, num_out),
        layout.DENSE: (num_in, num_out) if site.kind == "embedding" else (num_out, num_in),
        layout.WEIGHT: (num_out,),
    }
    is_plain = module.a.shape == (rank, num_in) and module.b.shape == (num_out, rank)
    is_whole = not parts & layout.TRANSFORM or num_in % group == 0
    is_whole = is_whole and rank % (site.num_experts or 1) == 0
    is_paired = not parts & layout.SWAP or (
        module.group in (0, group) and group and not group % 2 and num_out % group == 0
    )
    is_placed = not parts & ~_ANYWHERE[site.kind] and not (site.kind == "norm" and rank)
    # The norms of most models have no bias to begin with: such a step is told by the weight.
    is_seen = site.kind != "norm" or site.has_bias or parts != layout.BIAS
    has_shapes = all(given[bit] == expected[bit] for bit in given) and _is_routed(module, site)
    if not (is_plain and is_whole and is_paired and is_placed and is_seen and has_shapes):
        raise ValueError(
            f"the {site.kind} {site.path} of {num_in} inputs and {num_out} outputs takes no parts "
            f"{given} in groups of {group} beside A {tuple(module.a.shape)}, B "
            f"{tuple(module.b.shape)} and {module.routing}; see ops/cells.py and "
            "adapters/adapter.py: Delta"
        )


def _is_routed(module: Delta, site: SiteSpec) -> bool:
    """Whether the site takes the routing, and the router has its shape."""
    routing, rank = module.routing, module.a.shape[0]
    router = None if module.router is None else tuple(module.router.shape)
    if routing is None:
        return router is None and module.router_bias is None
    has_router = router == (routing.num_scores, site.in_features)
    is_hinge = routing.router is layout.Router.HINGE
    needs_router = routing.router not in (layout.Router.TABLE, layout.Router.EXPERTS)
    needs_router = needs_router and not is_hinge
    kinds = ("linear", "embedding") if routing.router is layout.Router.TABLE else ("linear",)
    return (
        site.kind in kinds
        and 0 < routing.num_scores <= (1 if is_hinge else layout.MAX_SCORES)
        and 0 <= routing.top_k <= layout.MAX_SCORES
        and rank % routing.num_scores == 0
        and rank <= layout.MAX_ROUTED
        and (router is None or has_router)
        and routing.has_router == (router is not None)
        and (has_router or not needs_router)
        and (module.router_bias is None or is_hinge or routing.router is layout.Router.SIGMOID)
    )
