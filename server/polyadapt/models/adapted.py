"""Drop-in modules that add the adapters' part to a base module. Know slots and sites, no families.

Outside a plan each is exactly the module it replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from polyadapt.ops import overrides
from polyadapt.ops.gated_matmul import Site, gated_embedding_, gated_matmul_
from polyadapt.ops.linear import Weight


@dataclass(frozen=True, slots=True)
class Part:
    """Outputs start..stop-1 of a linear are the site's."""

    site: Site
    start: int
    stop: int


class AdaptedLinear(nn.Module):
    """y = W x + b, then each row's adapter. One site, or several that share their input.

    weight [out, in], whatever it was stored as; bias [out], float32 where the weight is packed.
    """

    def __init__(self, weight: Weight, bias: torch.Tensor | None, parts: tuple[Part, ...]) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.parts = parts
        self.site = parts[0].site
        self.listed = [(p.site.id, p.start, p.stop - p.start) for p in parts]
        self.columns = torch.tensor(self.listed)  # int64 [parts, 3]: site id, first column, columns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]; the leading sizes multiply to the plan's row count."""
        rows = x.reshape(-1, x.shape[-1])
        if rows.stride(1) != 1:  # a transposed input: the native products read whole rows
            rows = rows.contiguous()
        y = self.weight.product(rows, self.bias)
        plan = self.site.plan
        if plan.overrides and any(part.site.id in plan.overrides for part in self.parts):
            self._add_around(y, rows)
        elif plan.lanes:
            gated_matmul_(y, rows, self.site, self.listed)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _add_around(self, y: torch.Tensor, rows: torch.Tensor) -> None:
        overrides.replace_products_(y, rows, self.site, self.listed, self.weight, self.bias)
        gated_matmul_(y, rows, self.site, self.listed)
        overrides.add_dense_(y, rows, self.site, self.listed)


class AdaptedEmbedding(nn.Module):
    """y = W[ids] * embed_scale, then each row's adapter, scaled alike (Gemma scales its
    embedding).

    base is the replaced module, or None where only the shared weight is left of it.
    """

    def __init__(
        self, base: nn.Embedding | None, weight: Weight, dtype: torch.dtype, site: Site
    ) -> None:
        super().__init__()
        self.base = base
        self.weight = weight
        self.dtype = dtype  # of the output
        self.site = site
        scale = getattr(base, "embed_scale", None)
        self.delta_scale = None if scale is None else torch.as_tensor(scale)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [..., ] int64 -> [..., width]."""
        if self.delta_scale is None:
            y = self.weight.take(ids).to(self.dtype) if self.base is None else self.base(ids)
            if self.site.plan.lanes:
                self._add(y, ids)
            return y
        if not self.site.plan.lanes:
            assert self.base is not None, "only a plain embedding is taken apart"
            return self.base(ids)  # type: ignore[no-any-return]
        # An adapter may scale what is looked up, so it has to see that before the model scales it.
        y = self.weight.take(ids).to(self.dtype)
        self._add(y, ids)
        return y * self.delta_scale.to(y.dtype)

    def _add(self, y: torch.Tensor, ids: torch.Tensor) -> None:
        rows, ids, num_in = y.view(-1, y.shape[-1]), ids.reshape(-1), self.weight.shape[0]
        gated_embedding_(rows, ids, num_in, self.site)
        if self.site.id in self.site.plan.overrides:
            overrides.add_dense_rows_(rows, ids, num_in, self.site)


class AdaptedNorm(nn.Module):
    """A norm: each row's adapter may replace its weight and add to its bias.

    row_dim: which dimension of x counts the plan's rows; another one may count heads.
    """

    def __init__(self, base: nn.Module, site: Site, row_dim: int) -> None:
        super().__init__()
        self.base = base
        self.site = site
        self.row_dim = row_dim
        self.has_bias = getattr(base, "bias", None) is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., width] -> the same shape."""
        y: torch.Tensor = self.base(x)
        plan = self.site.plan
        # Where the base has no bias an adapter has one only beside a weight.
        if self.site.id in plan.overrides or (self.has_bias and plan.lanes):
            adapt_norm_(y, x, self.site, self.row_dim, self._with_weight)
        return y

    def _with_weight(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        own = self.base.weight
        assert isinstance(own, torch.Tensor)
        y: torch.Tensor = functional_call(self.base, {"weight": weight.to(own.dtype)}, (x,))
        return y


def adapt_norm_(
    y: torch.Tensor,
    x: torch.Tensor,
    site: Site,
    row_dim: int,
    with_weight: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    """Put each row's own norm into y, in place.

    y and x [..., width], y what the base makes of x; dimension row_dim counts the plan's rows.
    with_weight(some rows of x, weight [width]) is the base's norm with that weight.
    """
    width = y.shape[-1]
    for override, weight in overrides.norm_weights(site, width):
        index = override.index
        if isinstance(index, slice):
            length = index.stop - index.start
            rows = with_weight(x.narrow(row_dim, index.start, length), weight)
            y.narrow(row_dim, index.start, length).copy_(rows)
        else:
            y.index_copy_(row_dim, index, with_weight(x.index_select(row_dim, index), weight))
    heads = y.movedim(row_dim, 0).view(y.shape[row_dim], -1, width)
    for head in heads.unbind(1):  # [rows, width]
        gated_matmul_(head, head, site)  # of rank 0: only a bias, which reads no input
