"""What adapters put in the base's place for their own rows, segment by segment: the parts of
cells.OVERRIDES.

Nearly no step has any: whoever calls these asks for `plan.overrides` first. The specification is
ops/reference.py. Knows slots and sites, never names or families.

At one site at most one lane of a row replaces something; the engine refuses requests for more.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from polyadapt.ops import native
from polyadapt.ops.cells import (
    DENSE,
    SWAP,
    TRANSFORM,
    WEIGHT,
    group_of,
    list_parts,
    num_elements,
)
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
    for site_id, column, width in parts:
        columns, turned = y[:, column : column + width], []
        turning = _at(site, site_id, TRANSFORM)
        for override in turning:
            group = group_of(override.parts)
            found = _found(site, override, site_id, num_in, width)
            turned.append(_turned(x, override, found[TRANSFORM].view(-1, group, group)))
        if turned:  # in one product: the base's weight is read once for all of them
            products = weight.columns(torch.cat(turned), bias, column, column + width)
            sizes = [len(rows) for rows in turned]
            for override, rows in zip(turning, torch.split(products, sizes), strict=True):
                columns[override.index] = rows
        for override in _at(site, site_id, SWAP):
            swap = _found(site, override, site_id, num_in, width)[SWAP].view(2, width)
            _swap_(columns, override, swap, group_of(override.parts))


def add_dense_(y: torch.Tensor, x: torch.Tensor, site: Site, parts: Parts) -> None:
    """y[t] += scale * dense x[t] in the columns of each part; y [rows, out], x [rows, in]."""
    num_in = x.shape[1]
    for site_id, column, width in parts:
        for override in _at(site, site_id, DENSE):
            dense = _found(site, override, site_id, num_in, width)[DENSE].view(width, num_in)
            columns = y[:, column : column + width]
            if override.is_short and native.serves(x):
                kernels.add_dense_(columns, x, override.rows, dense, override.scale)
            else:
                delta = x[override.index].to(dense.dtype) @ dense.t()
                columns[override.index] += (override.scale * delta).to(y.dtype)


def add_dense_rows_(y: torch.Tensor, ids: torch.Tensor, num_in: int, site: Site) -> None:
    """y[t] += scale * dense[ids[t]]; y [rows, width], ids int64 [rows] below num_in."""
    width = y.shape[1]
    for override in _at(site, site.id, DENSE):
        dense = _found(site, override, site.id, num_in, width)[DENSE].view(num_in, width)
        delta = dense[ids[override.index]]
        y[override.index] += (override.scale * delta).to(y.dtype)


def norm_weights(site: Site, width: int) -> Iterator[tuple[Override, torch.Tensor]]:
    """The segments whose cell at this norm has a weight of its own, with it: [width]."""
    for override in _at(site, site.id, WEIGHT):
        yield override, _found(site, override, site.id, width, width)[WEIGHT]


def _at(site: Site, site_id: int, wanted: int) -> list[Override]:
    """The segments with one of these parts at the site."""
    found = site.plan.overrides.get(site_id, ())
    return [override for override in found if override.parts & wanted]


def _found(
    site: Site, override: Override, site_id: int, num_in: int, num_out: int
) -> dict[int, torch.Tensor]:
    """The parts of the segment's cell, flat, by bit."""
    # The parts are the plan's to remember; where they lie may change between two steps.
    offset, rank, _, routing = site.cells[override.slot, site_id].tolist()
    found, at = {}, offset + num_elements(num_in, num_out, rank, 0, routing)
    for bit, size in list_parts(num_in, num_out, rank, override.parts):
        found[bit] = site.arena[at : at + size]
        at += size
    return found


def _turned(x: torch.Tensor, override: Override, transform: torch.Tensor) -> torch.Tensor:
    """[segment rows, in] of x's dtype."""
    if transform.shape[1] == 1:  # a scale of each input
        return (x[override.index] * transform.flatten()).to(x.dtype)
    if override.is_short and native.serves(x):
        return kernels.block_transform(x, override.rows, transform)
    num_blocks, group, _ = transform.shape
    rows = x[override.index].to(transform.dtype)
    blocks = rows.view(-1, num_blocks, group).transpose(0, 1)  # [blocks, segment rows, g]
    return torch.bmm(blocks, transform).transpose(0, 1).reshape(rows.shape).to(x.dtype)


def _swap_(y: torch.Tensor, override: Override, swap: torch.Tensor, group: int) -> None:
    if native.serves(y):  # one pass over the rows, however many they are
        kernels.swap_(y, override.rows, swap, group)
        return
    rows = y[override.index].to(swap.dtype)
    halves = rows.view(rows.shape[0], -1, 2, group // 2)
    exchanged = halves.flip(2).reshape(rows.shape)
    y[override.index] = ((1 + swap[0]) * rows + swap[1] * exchanged).to(y.dtype)
