"""The layout of one cell: what one adapter stores for one site, end to end in the flat arena.

    A [rank, in] (embedding: [in, rank], one row per token), B transposed [rank, out], then, where
    the cell has them and in this order,
    BIAS       [out]                added to y
    OUT_SCALE  [out]                y += out_scale * y, before anything is added
    TRANSFORM  [in / g, g, g]       block n of x is multiplied by matrix n from the right, before W
    SWAP       [2, out]             y = (1 + swap[0]) * y + swap[1] * (y with the halves of every
                                    group of g columns exchanged), before OUT_SCALE
    DENSE      [out, in]            y += dense x (embedding: [in, out], a row per token)
    WEIGHT     [out]                stands for a norm's own weight
A cell is one row of an int64 table: (offset, rank, parts), offset -1 where the adapter leaves the
site alone. `parts` holds the bits above and, from bit GROUP_SHIFT on, g. Torch-free.
"""

from __future__ import annotations

OFFSET, RANK, PARTS = 0, 1, 2
BIAS, OUT_SCALE, TRANSFORM, SWAP, DENSE, WEIGHT = 1, 2, 4, 8, 16, 32
GROUP_SHIFT = 8
# Served by ops/overrides.py, segment by segment; the rest by the gated product for all at once.
OVERRIDES = TRANSFORM | SWAP | DENSE | WEIGHT


def num_elements(num_in: int, num_out: int, rank: int, parts: int) -> int:
    """Return how many elements a cell takes at a site of num_in inputs and num_out outputs."""
    return rank * (num_in + num_out) + sum(size for _, size in list_parts(num_in, num_out, parts))


def list_parts(num_in: int, num_out: int, parts: int) -> list[tuple[int, int]]:
    """Return (bit, elements) of what follows B, in order."""
    sizes = (
        (BIAS, num_out),
        (OUT_SCALE, num_out),
        (TRANSFORM, num_in * group_of(parts)),
        (SWAP, 2 * num_out),
        (DENSE, num_in * num_out),
        (WEIGHT, num_out),
    )
    return [(bit, size) for bit, size in sizes if parts & bit]


def group_of(parts: int) -> int:
    """Return g, the columns that a transform or a swap takes together; 0 where there is neither."""
    return parts >> GROUP_SHIFT
