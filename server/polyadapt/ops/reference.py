"""The specification of the gated segmented product: one row at a time, in float32.

Slow on purpose. Every strategy and kernel is tested against these functions.
"""

from __future__ import annotations

import torch

from polyadapt.ops.cells import BIAS, OUT_SCALE, list_parts
from polyadapt.ops.plan import BatchPlan


def reference_matmul(
    y: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    cells: torch.Tensor,
    plan: BatchPlan,
    site: int,
) -> torch.Tensor:
    """Return y + the adapters' part as float32; see gated_matmul_ for the semantics.

    y [rows, out], x [rows, in] or, for an embedding, the one-hot rows [rows, vocabulary] with a
    cell whose A block is token-major (then pass its transpose in the arena's row-major layout).
    """
    out = y.float().clone()
    num_in, num_out = x.shape[1], y.shape[1]
    for lane in plan.lanes:
        for s in range(lane.num_segments):
            offset, rank, parts = cells[int(lane.slots[s]), site].tolist()
            if offset < 0:
                continue
            A = arena[offset:][: rank * num_in].view(rank, num_in).float()
            B = arena[offset + rank * num_in :][: rank * num_out].view(rank, num_out).float()
            at = offset + rank * (num_in + num_out)
            tails = {}
            for bit, size in list_parts(num_in, num_out, parts):
                tails[bit] = arena[at : at + size].float()
                at += size
            bias, out_scale = tails.get(BIAS, 0.0), tails.get(OUT_SCALE, 0.0)
            for t in lane.rows[lane.bounds[s] : lane.bounds[s + 1]]:
                h = float(lane.scales[s]) * (A @ x[t].float())  # [rank]
                if lane.gate is not None:
                    g = torch.ones(rank)
                    g[: lane.gate.shape[1]] = torch.from_numpy(lane.gate[t, :rank])
                    h = torch.where(g != 0, g * h, 0.0)
                out[t] += out_scale * out[t] + h @ B + float(lane.scales[s]) * bias
    return out
