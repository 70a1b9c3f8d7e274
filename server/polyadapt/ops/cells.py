"""The layout of one cell: what one adapter stores for one site, end to end in the flat arena.

    A [rank, in] (embedding: [in, rank], one row per token), ROUTER [scores, in] where the cell's
    routing has one, B transposed [rank, out], then, where the cell has them and in this order,
    BIAS         [out]              added to y
    OUT_SCALE    [out]              y += out_scale * y, before anything is added
    ROUTER_BIAS  [rank]             added to the components' scores, or their thresholds: Router
    TRANSFORM    [in / g, g, g]     block n of x is multiplied by matrix n from the right, before W
    SWAP         [2, out]           y = (1 + swap[0]) * y + swap[1] * (y with the halves of every
                                    group of g columns exchanged), before OUT_SCALE
    DENSE        [out, in]          y += dense x (embedding: [in, out], a row per token)
    WEIGHT       [out]              stands for a norm's own weight
A cell is one row of an int64 table: (offset, rank, parts, routing), offset -1 where the adapter
leaves the site alone. `parts` holds the bits above and, from bit GROUP_SHIFT on, g; `routing` is
Routing.code, 0 where nothing is routed. Torch-free.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

OFFSET, RANK, PARTS, ROUTING = 0, 1, 2, 3
COLUMNS = 4
BIAS, OUT_SCALE, ROUTER_BIAS, TRANSFORM, SWAP, DENSE, WEIGHT = 1, 2, 4, 8, 16, 32, 64
GROUP_SHIFT = 8
ROUTER_MASK = 15  # of a routing's code
# Served by ops/overrides.py, segment by segment; the rest by the gated product for all at once.
OVERRIDES = TRANSFORM | SWAP | DENSE | WEIGHT

MAX_SCORES = (1 << 12) - 1
MAX_ROUTED = 4096  # components of one cell
# What is noted of an adapter's routing: how many rows, and the summed weights of its experts, of
# more than so many in as many buckets of neighbours.
USAGE_BUCKETS = 64
USAGE_COLUMNS = 1 + USAGE_BUCKETS


class Router(enum.IntEnum):
    """How a row's components are weighed at a site, from scores s[e] = dot(ROUTER[e], x) and, from
    there, weights of experts, or of components. The k largest are kept (k = 0: all; of equal ones
    those with the lower number), the others weigh nothing.

    Expert e has the components e * r up to (e + 1) * r of r = rank / scores; they weigh what it
    weighs.
    """

    NONE = 0
    # p = softmax(s) over all; the k largest p, divided by their sum where `renormalise` is set.
    SOFTMAX = 1
    # A weight per component i: v[i] = sigmoid(s[i // r]) + router_bias[i]; the k largest v, divided
    # by their sum, or by the smallest normal float32 where that is nearer to 0.
    SIGMOID = 2
    # m = |s|; the k largest m; softmax(m / value) over those.
    MAGNITUDE = 3
    # No ROUTER: the weights of experts are those of the lane's table from column `value` on.
    TABLE = 4
    # Not for the gated product, which leaves such a cell alone: the experts of a whole MLP, see
    # ops/mixture.py. p = softmax(s); kept are the k largest, or where `value` is not 0 as many of
    # the largest as it takes for a sum above it; divided by their sum where `renormalise` is set.
    # ROUTER, with all of that, stands in the cell of the MLP's first site alone (has_router); the
    # `value` of the others is what the weights are multiplied by.
    EXPERTS = 5
    # No weights: every component's own product is cut off below, before the scale and the gate,
    #   h[i] = max(dot(A[i], x) - router_bias[i] - max(value - s[0], 0), 0)
    # The inner one is there where the cell has a ROUTER, which then has one row. NaN stays NaN.
    HINGE = 6


@dataclass(frozen=True, slots=True)
class Routing:
    """How a cell's components are weighed, row by row, from what the rows themselves say."""

    router: Router
    num_scores: int  # at most MAX_SCORES
    top_k: int = 0  # at most MAX_SCORES; 0: all
    renormalise: bool = False
    has_router: bool = True  # whether ROUTER is in the cell
    # MAGNITUDE: the temperature, as float32; TABLE: the first column; EXPERTS, HINGE: see there.
    value: float = 0.0

    @property
    def code(self) -> int:
        """The int64 of the cell table, at least 0: router in 4 bits, flags in 4, k in 12, scores in
        12, value in 31 as a float32 whose sign is a flag, of TABLE as an integer.
        """
        return (
            self.router
            | self.renormalise << 4
            | self.has_router << 5
            | (self.value < 0) << 6
            | self.top_k << 8
            | self.num_scores << 20
            | self._value_bits << 32
        )

    @property
    def _value_bits(self) -> int:
        if self.router is Router.TABLE:
            return int(self.value)
        bits: int = struct.unpack("<I", struct.pack("<f", abs(self.value)))[0]
        return bits

    @classmethod
    def of(cls, code: int) -> Routing:
        """The routing of an int64 other than 0."""
        router, bits, sign = Router(code & ROUTER_MASK), code >> 32, -1 if code >> 6 & 1 else 1
        return cls(
            router,
            num_scores=code >> 20 & MAX_SCORES,
            top_k=code >> 8 & MAX_SCORES,
            renormalise=bool(code >> 4 & 1),
            has_router=bool(code >> 5 & 1),
            value=bits
            if router is Router.TABLE
            else sign * struct.unpack("<f", struct.pack("<I", bits))[0],
        )


def num_router_rows(routing: int) -> int:
    """How many rows follow A in a cell with this routing."""
    return routing >> 20 & MAX_SCORES if routing >> 5 & 1 else 0


def num_elements(num_in: int, num_out: int, rank: int, parts: int, routing: int = 0) -> int:
    """Return how many elements a cell takes at a site of num_in inputs and num_out outputs."""
    tails = sum(size for _, size in list_parts(num_in, num_out, rank, parts))
    return rank * (num_in + num_out) + num_router_rows(routing) * num_in + tails


def list_parts(num_in: int, num_out: int, rank: int, parts: int) -> list[tuple[int, int]]:
    """Return (bit, elements) of what follows B, in order."""
    sizes = (
        (BIAS, num_out),
        (OUT_SCALE, num_out),
        (ROUTER_BIAS, rank),
        (TRANSFORM, num_in * group_of(parts)),
        (SWAP, 2 * num_out),
        (DENSE, num_in * num_out),
        (WEIGHT, num_out),
    )
    return [(bit, size) for bit, size in sizes if parts & bit]


def group_of(parts: int) -> int:
    """Return g, the columns that a transform or a swap takes together; 0 where there is neither."""
    return parts >> GROUP_SHIFT
