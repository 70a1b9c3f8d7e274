"""The computed gates: what a row's own scores make of a cell's components. The torch form.

What each router means stands in ops/cells.py: Router; ops/reference.py says it again row by row.
"""

from __future__ import annotations

import torch

from polyadapt.ops.cells import USAGE_BUCKETS, Router, Routing

_TINY = torch.finfo(torch.float32).tiny


def weigh(
    scores: torch.Tensor, routing: Routing, rank: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the weight of every component, float32 [n, rank].

    scores [n, routing.num_scores] are the rows' products with ROUTER; of TABLE, the weights of the
    experts. bias: ROUTER_BIAS [rank] or None. rank is a multiple of num_scores.
    """
    scores = scores.float()
    repeats = rank // routing.num_scores
    if routing.router is Router.TABLE:
        return scores.repeat_interleave(repeats, 1)
    if routing.router is Router.SIGMOID:
        values = scores.sigmoid().repeat_interleave(repeats, 1)
        if bias is not None:
            values = values + bias.float()
        kept = largest(values, routing.top_k)
        values = torch.where(kept, values, 0.0)
        total = values.sum(1, keepdim=True)
        return values / torch.where(total.abs() < _TINY, _TINY, total)
    if routing.router is Router.MAGNITUDE:
        values = scores.abs()
        kept = largest(values, routing.top_k)
        weights = torch.where(kept, values / routing.value, -torch.inf).softmax(1)
        return weights.repeat_interleave(repeats, 1)
    return choose(scores, routing).repeat_interleave(repeats, 1)


def hinge(
    products: torch.Tensor, scores: torch.Tensor, value: float, thresholds: torch.Tensor | None
) -> torch.Tensor:
    """Return the components behind a hinge, float32 [n, rank]: max(products - thresholds
    - max(value - scores, 0), 0), see ops/cells.py: Router.HINGE.

    products [n, rank] with A and scores [n, 1 or 0] with ROUTER, both float32; thresholds [rank].
    """
    if thresholds is not None:
        products = products - thresholds.float()
    if scores.shape[1]:
        products = products - (value - scores).relu()
    return products.relu()


def choose(scores: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Return the weight of every expert by a softmax router, float32 [n, num_scores]; 0: not
    chosen.
    """
    weights = scores.float().softmax(1)
    if routing.router is Router.EXPERTS and routing.value > 0:
        is_kept = _mass(weights, routing.value)
    else:
        is_kept = largest(weights, routing.top_k)
    kept = torch.where(is_kept, weights, 0.0)
    return kept / kept.sum(1, keepdim=True) if routing.renormalise else kept


def note_usage(usage: torch.Tensor, weights: torch.Tensor) -> None:
    """Count the rows and add what each expert weighed: weights [rows, experts] to one slot's row of
    PlanBuffers.usage.
    """
    num_scores = weights.shape[1]
    buckets = min(num_scores, USAGE_BUCKETS)
    usage[0] += len(weights)
    bucket_of = torch.arange(num_scores, device=usage.device) * buckets // num_scores
    usage[1 : 1 + buckets].index_add_(0, bucket_of, weights.sum(0))


def _mass(values: torch.Tensor, mass: float) -> torch.Tensor:
    """Bool [n, m]: of each row the largest that it takes for a sum above `mass`."""
    order = values.argsort(dim=1, descending=True, stable=True)
    sums = values.gather(1, order).cumsum(1)
    before = torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], 1)
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, order, before <= mass)


def largest(values: torch.Tensor, top_k: int) -> torch.Tensor:
    """Bool [n, m]: the top_k largest of each row, those with the lower index first; 0: all."""
    if not 0 < top_k < values.shape[1]:
        return torch.ones_like(values, dtype=torch.bool)
    order = values.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, order, True)
