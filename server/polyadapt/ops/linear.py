"""The base product and the two forms in which a base weight is kept.

A dense weight is torch's [out, in]. A packed weight lies in panels for the native kernel and, where
its values allow it without loss, in half the bytes. Knows no sites and no modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from polyadapt.ops.native import dense

PANEL = dense.PANEL
_UNPACKED_ROWS = 4096


class Weight(Protocol):
    """A base weight W [out, in], whatever it is stored as."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""

    @property
    def dtype(self) -> torch.dtype:
        """What it is stored in; models ask their modules for it."""

    @property
    def device(self) -> torch.device:
        """Where it lies."""

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [rows, in] -> x W^T + bias [rows, out], of x's dtype."""

    def columns(
        self, x: torch.Tensor, bias: torch.Tensor | None, start: int, stop: int
    ) -> torch.Tensor:
        """Columns start..stop-1 of `product`, [rows, stop - start]."""

    def take(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows W[ids], [..., in], in the stored dtype; ids int64 [...]."""

    def block(self, start: int, stop: int) -> torch.Tensor:
        """Rows W[start:stop] as [stop - start, in], a view or a copy, in the stored dtype."""


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """The weight as torch keeps it."""

    tensor: torch.Tensor  # [out, in]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.tensor.shape[0], self.tensor.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.tensor.numel() * self.tensor.element_size()

    @property
    def dtype(self) -> torch.dtype:
        """What it is stored in."""
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.tensor.device

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [rows, in] -> [rows, out]."""
        return F.linear(x, self.tensor, bias)

    def columns(
        self, x: torch.Tensor, bias: torch.Tensor | None, start: int, stop: int
    ) -> torch.Tensor:
        """The product with the rows start..stop-1 of W alone."""
        return F.linear(x, self.tensor[start:stop], None if bias is None else bias[start:stop])

    def take(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows W[ids]."""
        return self.tensor[ids]

    def block(self, start: int, stop: int) -> torch.Tensor:
        """A view of the rows start..stop-1."""
        return self.tensor[start:stop]


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """The weight in panels of PANEL outputs, for the native kernel alone."""

    panels: torch.Tensor  # [ceil(out / PANEL), in, PANEL] float32 or bfloat16
    num_out: int
    gemm_rows: int = 1 << 60  # from so many rows on torch multiplies by an unpacked copy

    @classmethod
    def pack(cls, parts: list[torch.Tensor], gemm_rows: int = 1 << 60) -> PackedWeight:
        """Lay weights [out_i, in] end to end; bfloat16 when that loses nothing, else as they are.

        Needs room for one copy of the parts beside them.
        """
        num_out, num_in = sum(part.shape[0] for part in parts), parts[0].shape[1]
        is_exact = all(torch.equal(part.bfloat16().to(part.dtype), part) for part in parts)
        dtype = torch.bfloat16 if is_exact else torch.float32
        num_panels = -(-num_out // PANEL)
        rows = torch.zeros(num_panels * PANEL, num_in, dtype=dtype)
        start = 0
        for part in parts:
            rows[start : start + part.shape[0]] = part
            start += part.shape[0]
        panels = rows.view(num_panels, PANEL, num_in).transpose(1, 2).contiguous()
        return cls(panels, num_out, gemm_rows)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.num_out, self.panels.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.panels.numel() * self.panels.element_size()

    @property
    def dtype(self) -> torch.dtype:
        """What it is stored in."""
        return self.panels.dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.panels.device

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [rows, in] -> [rows, out] by the native kernel; bias float32."""
        if x.shape[0] >= self.gemm_rows:
            y = x.new_empty(x.shape[0], self.num_out)
            for start in range(0, self.num_out, _UNPACKED_ROWS):  # a copy of a few MiB at a time
                stop = min(start + _UNPACKED_ROWS, self.num_out)
                weight = self.block(start, stop).to(x.dtype)
                part = None if bias is None else bias[start:stop].to(x.dtype)
                y[:, start:stop] = F.linear(x, weight, part)
            return y
        return dense.linear(x, self.panels, self.num_out, bias)

    def columns(
        self, x: torch.Tensor, bias: torch.Tensor | None, start: int, stop: int
    ) -> torch.Tensor:
        """The product with the panels that hold the rows start..stop-1 of W."""
        first, last = start // PANEL, -(-stop // PANEL)
        low, high = first * PANEL, min(last * PANEL, self.num_out)
        part = PackedWeight(self.panels[first:last], high - low, self.gemm_rows)
        y = part.product(x, None if bias is None else bias[low:high])
        return y[:, start - low : stop - low]

    def take(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows W[ids], gathered from their panels."""
        return self.panels[ids // PANEL, :, ids % PANEL]

    def block(self, start: int, stop: int) -> torch.Tensor:
        """A copy of the rows start..stop-1."""
        first, last = start // PANEL, -(-stop // PANEL)
        rows = self.panels[first:last].transpose(1, 2).reshape(-1, self.panels.shape[1])
        return rows[start - first * PANEL : stop - first * PANEL]
