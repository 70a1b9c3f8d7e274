"""Drop-in modules that add the adapters' part to a base module. Know slots and sites, no families.

Outside a plan each is exactly the module it replaced.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from polyadapt.ops.gated_matmul import Site, gated_embedding_, gated_matmul_


class AdaptedLinear(nn.Module):
    """y = W x + b, then each row's adapter. weight [out, in] as in nn.Linear, whatever it was
    stored as.

    The parameters are the replaced module's own, so a tied weight stays one tensor.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, site: Site) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.site = site

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]; the leading sizes multiply to the plan's row count."""
        y = F.linear(x, self.weight, self.bias)
        gated_matmul_(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), self.site)
        return y


class AdaptedEmbedding(nn.Module):
    """y = W[ids] * embed_scale, then each row's adapter, scaled alike (Gemma scales its
    embedding).
    """

    def __init__(self, base: nn.Embedding, site: Site) -> None:
        super().__init__()
        self.weight = base.weight
        self.base = base
        self.site = site
        scale = getattr(base, "embed_scale", None)
        self.delta_scale = None if scale is None else torch.as_tensor(scale)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [..., ] int64 -> [..., width]."""
        y: torch.Tensor = self.base(ids)
        if self.delta_scale is None:
            self._add(y, ids)
            return y
        delta = torch.zeros_like(y)
        self._add(delta, ids)
        return y + delta * self.delta_scale.to(y.dtype)

    def _add(self, y: torch.Tensor, ids: torch.Tensor) -> None:
        gated_embedding_(y.view(-1, y.shape[-1]), ids.reshape(-1), self.weight.shape[0], self.site)


class AdaptedBias(nn.Module):
    """A norm whose last step adds its bias: each row's adapter may replace that bias."""

    def __init__(self, base: nn.Module, site: Site) -> None:
        super().__init__()
        self.base = base
        self.weight = base.weight
        self.bias = base.bias
        self.site = site

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., width] -> [..., width]."""
        y: torch.Tensor = self.base(x)
        gated_matmul_(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), self.site)
        return y
