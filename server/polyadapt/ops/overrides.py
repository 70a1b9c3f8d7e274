"""What adapters put in the base's place for their own rows, segment by segment: the parts of
cells.OVERRIDES.

Nearly no step has any: whoever calls these asks for `plan.overrides` first. The specification is
ops/reference.py. Knows slots and sites, never names or families.

At one site at most one lane of a row replaces something; the engine refuses requests for more.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from polyadapt.ops import cells as cells_layout
from polyadapt.ops import native
from polyadapt.ops.cells import DENSE, SWAP, TRANSFORM, WEIGHT
from polyadapt.ops.gated_matmul import Site
from polyadapt.ops.linear import Weight
from polyadapt.ops.native import overrides as kernels
from polyadapt.ops.plan import Override

Parts = list[tuple[int, int, int]]  # of one product: site id, first column, columns


def replace_products_(
    y: torch.Tensor,
    x: torch.Tensor,
    site: Site,
    parts: Parts,
    weight: Weight,
    bias: torch.Tensor | None,
) -> None:
    """Transform what goes into the base product and exchange what comes out of it, in place.

    Semantics, for each part, whose y is its columns and whose W and b are those rows of `weight`
    and `bias`, and each row t of a segment with these parts in its cell there:
        u[n g + j] = sum_i x[t, n g + i] * transform[n, i, j];  y[t] = W u + b
        y[t, o] = (1 + swap[0, o]) * y[t, o] + swap[1, o] * y[t, o'],
    where o' is o with the halves of every g columns exchanged. y [rows, out] holds W x + b and
    nothing else yet, x [rows, in]; float32 or bfloat16.
    """
    num_in = x.shape[1]
    for override in site.plan.overrides:
        for site_id, column, width in parts:
            group, found = _found(site, override, site_id, num_in, width, TRANSFORM | SWAP)
            columns = y[:, column : column + width]
            if TRANSFORM in found:
                turned = _turned(x, override, found[TRANSFORM].view(-1, group, group))
                _put(columns, override, weight.columns(turned, bias, column, column + width))
            if SWAP in found:
                _swap_(columns, override, found[SWAP].view(2, width), group)


def add_dense_(y: torch.Tensor, x: torch.Tensor, site: Site, parts: Parts) -> None:
    """y[t] += scale * dense x[t] in the columns of each part; y [rows, out], x [rows, in]."""
    num_in = x.shape[1]
    for override in site.plan.overrides:
        for site_id, column, width in parts:
            _, found = _found(site, override, site_id, num_in, width, DENSE)
            if DENSE not in found:
                continue
            dense, columns = found[DENSE].view(width, num_in), y[:, column : column + width]
            if override.is_short and native.is_available():
                kernels.add_dense_(columns, x, override.rows, dense, override.scale)
            else:
                delta = x[override.index].to(dense.dtype) @ dense.t()
                columns[override.index] += (override.scale * delta).to(y.dtype)


def add_dense_rows_(y: torch.Tensor, ids: torch.Tensor, num_in: int, site: Site) -> None:
    """y[t] += scale * dense[ids[t]]; y [rows, width], ids int64 [rows] below num_in."""
    width = y.shape[1]
    for override in site.plan.overrides:
        _, found = _found(site, override, site.id, num_in, width, DENSE)
        if DENSE in found:
            delta = found[DENSE].view(num_in, width)[ids[override.index]]
            y[override.index] += (override.scale * delta).to(y.dtype)


def norm_weights(site: Site, width: int) -> Iterator[tuple[Override, torch.Tensor]]:
    """The segments whose cell at this norm has a weight of its own, with it: [width]."""
    for override in site.plan.overrides:
        _, found = _found(site, override, site.id, width, width, WEIGHT)
        if WEIGHT in found:
            yield override, found[WEIGHT]


def _found(
    site: Site, override: Override, site_id: int, num_in: int, num_out: int, wanted: int
) -> tuple[int, dict[int, torch.Tensor]]:
    """The group of the segment's cell, and those of its parts that are wanted, flat, by bit."""
    offset, rank, parts = site.cells[override.slot, site_id].tolist()
    if offset < 0 or not parts & wanted:
        return 0, {}
    found, at = {}, offset + rank * (num_in + num_out)
    for bit, size in cells_layout.list_parts(num_in, num_out, parts):
        if bit & wanted:
            found[bit] = site.arena[at : at + size]
        at += size
    return cells_layout.group_of(parts), found


def _turned(x: torch.Tensor, override: Override, transform: torch.Tensor) -> torch.Tensor:
    """[segment rows, in] of x's dtype."""
    if override.is_short and native.is_available():
        return kernels.block_transform(x, override.rows, transform)
    num_blocks, group, _ = transform.shape
    rows = x[override.index].to(transform.dtype)
    blocks = rows.view(-1, num_blocks, group).transpose(0, 1)  # [blocks, segment rows, g]
    return torch.bmm(blocks, transform).transpose(0, 1).reshape(rows.shape).to(x.dtype)


def _swap_(y: torch.Tensor, override: Override, swap: torch.Tensor, group: int) -> None:
    if native.is_available():  # one pass over the rows, however many they are
        kernels.swap_(y, override.rows, swap, group)
        return
    rows = y[override.index].to(swap.dtype)
    halves = rows.view(rows.shape[0], -1, 2, group // 2)
    exchanged = halves.flip(2).reshape(rows.shape)
    _put(y, override, ((1 + swap[0]) * rows + swap[1] * exchanged).to(y.dtype))


def _put(y: torch.Tensor, override: Override, rows: torch.Tensor) -> None:
    y[override.index] = rows
