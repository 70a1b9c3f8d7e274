"""Drop-in modules that add the adapters' part to a base module. Know slots and sites, no families.

Outside a plan each is exactly the module it replaced.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

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
        # int64 [parts, 3]: site id, first column, columns
        self.columns = torch.tensor([[p.site.id, p.start, p.stop - p.start] for p in parts])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]; the leading sizes multiply to the plan's row count."""
        rows = x.reshape(-1, x.shape[-1])
        if rows.stride(1) != 1:  # a transposed input: the native products read whole rows
            rows = rows.contiguous()
        y = self.weight.product(rows, self.bias)
        if self.site.plan.lanes:
            gated_matmul_(y, rows, self.site, self.columns)
        return y.view(*x.shape[:-1], y.shape[-1])


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
        gated_embedding_(y.view(-1, y.shape[-1]), ids.reshape(-1), self.weight.shape[0], self.site)


class AdaptedBias(nn.Module):
    """A norm whose last step adds its bias: each row's adapter may replace that bias."""

    def __init__(self, base: nn.Module, site: Site) -> None:
        super().__init__()
        self.base = base
        self.site = site

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., width] -> [..., width]."""
        y: torch.Tensor = self.base(x)
        if self.site.plan.lanes:
            gated_matmul_(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), self.site)
        return y
