"""What a probe makes of hidden states: the weights of an adapter's experts, row by row.

The torch form of adapter.Probe. Knows no sequence and no slot.
"""

from __future__ import annotations

import math

import torch

from polyadapt.adapters.adapter import Probe
from polyadapt.ops.routing import largest


def weigh(
    hidden: torch.Tensor, weights: torch.Tensor, probe: Probe, *, is_exact: bool
) -> torch.Tensor:
    """Return the weights of every row before anything is chosen: float32 [rows, probe.width].

    hidden [rows, probe.sizes[0]] are final hidden states, weights [probe.num_elements] the tensors
    of probe.shapes end to end, either of any dtype; all sums are float32. is_exact: a row's bits
    do not depend on how many there are.
    """
    h, start = hidden.float(), 0
    tensors = []
    for shape in probe.shapes:
        stop = start + math.prod(shape)
        tensors.append(weights[start:stop].view(shape).float())
        start = stop
    step = 1 + probe.has_bias
    for first in range(0, len(tensors), step):
        if first and probe.has_relu:
            h = h.relu()
        h = _product(h, tensors[first], is_exact=is_exact)
        if probe.has_bias:
            h = h + tensors[first + 1]
    if probe.has_softmax:
        h = (_by_module(h, probe) / probe.temperature).softmax(-1).view(h.shape)
    return h


def choose(weights: torch.Tensor, probe: Probe, top_k: int, scale: float) -> torch.Tensor:
    """Return what a request that keeps the top_k largest (0: all) makes of the weights that `weigh`
    returned: float32 of the same shape [rows, probe.width].
    """
    found = _by_module(weights, probe)
    if 0 < top_k < probe.num_experts:
        found = torch.where(largest(found, top_k), found, 0.0)
    if probe.has_top_softmax:
        kept = found != 0
        found = torch.where(kept, found, -torch.inf).softmax(-1)
        found = torch.where(kept, found, 0.0)  # where nobody is kept, too
    return (scale * found).view(weights.shape)


def _product(x: torch.Tensor, weight: torch.Tensor, *, is_exact: bool) -> torch.Tensor:
    """x [rows, in] times weight [out, in] transposed."""
    if not is_exact or not len(x):
        return x @ weight.t()
    return torch.stack([torch.mv(weight, row) for row in x])


def _by_module(weights: torch.Tensor, probe: Probe) -> torch.Tensor:
    """[rows * modules, num_experts]"""
    return weights.reshape(-1, probe.num_experts)
