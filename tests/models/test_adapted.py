"""Norms with a weight per adapter, wherever the rows lie in their input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from polyadapt.models.adapted import AdaptedNorm
from polyadapt.models.fused import FusedNorm
from polyadapt.models.wrap import list_sites
from polyadapt.ops import native
from polyadapt.ops.cells import BIAS, WEIGHT
from polyadapt.ops.gated_matmul import Site
from polyadapt.ops.plan import PlanBuffers, RowUse, build_plan

WIDTH, ROWS = 8, 5
# (shape with r for rows, dimension that counts them)
SHAPES = [
    (lambda r: (r, WIDTH), 0),
    (lambda r: (1, r, WIDTH), 1),
    (lambda r: (1, r, 3, WIDTH), 1),
    (lambda r: (1, 3, r, WIDTH), 2),
    (lambda r: (r, 5, WIDTH), 0),
]


class CentredOnOne(nn.Module):
    """As Gemma's: the weight is the difference to one."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-5
        self.weight = nn.Parameter(torch.randn(WIDTH), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


def layer_norm() -> nn.Module:
    norm = nn.LayerNorm(WIDTH)
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    return norm


def site(num_rows: int) -> Site:
    """Slot 0 holds a weight and a bias, slot 1 a bias; rows 1 and 3 are slot 0's, 2 is slot 1's."""
    arena = torch.randn(3 * WIDTH)
    cells = torch.tensor([[[0, 0, WEIGHT | BIAS, 0]], [[2 * WIDTH, 0, BIAS, 0]]])
    has_overrides = np.array([True, False])
    plan = PlanBuffers(num_rows, torch.device("cpu"), cells, has_overrides)
    uses = [RowUse(0, 1, (0,), (1.0,))]
    if num_rows > 1:
        uses = [
            RowUse(row, row + 1, (slot,), (scale,))
            for row, slot, scale in ((1, 0, 1.0), (2, 1, 0.5), (3, 0, 1.0))
        ]
    plan.load(build_plan(uses, num_rows))
    return Site(0, arena, cells, plan)


@pytest.mark.parametrize("num_rows", [1, ROWS])
@pytest.mark.parametrize(("shape", "row_dim"), SHAPES)
@pytest.mark.parametrize("make", [CentredOnOne, layer_norm, lambda: nn.RMSNorm(WIDTH, eps=1e-5)])
def test_each_row_has_its_own_weight_and_bias(make, shape, row_dim, num_rows):
    norm, where = make(), site(num_rows)
    x = torch.randn(shape(num_rows))
    expected = norm(x).clone()
    bias, weight = where.arena[:WIDTH], where.arena[WIDTH : 2 * WIDTH]  # in the order of their bits
    before = norm.weight.data.clone()
    norm.weight.data.copy_(weight)
    for row in (1, 3) if num_rows > 1 else (0,):
        own = norm(x.select(row_dim, row)) + bias
        expected.select(row_dim, row).copy_(own)
    norm.weight.data.copy_(before)
    if num_rows > 1:
        expected.select(row_dim, 2).add_(0.5 * where.arena[2 * WIDTH :])
    found = AdaptedNorm(norm, where, row_dim)(x)
    torch.testing.assert_close(found, expected)
    assert torch.equal(norm.weight, before), "the base was changed"
    if native.is_available() and not isinstance(norm, nn.LayerNorm):
        offset = float(isinstance(norm, CentredOnOne))
        fused = FusedNorm(norm.weight + offset, 1e-5, offset=offset, site=where, row_dim=row_dim)
        torch.testing.assert_close(fused(x), expected)
    where.plan.clear()
    assert torch.equal(AdaptedNorm(norm, where, row_dim)(x), norm(x))


def test_a_layer_norms_bias_needs_no_weight_beside_it():
    norm, where = layer_norm(), site(ROWS)
    where.plan.load(build_plan([RowUse(2, 3, (1,), (0.5,))], ROWS))
    assert not where.plan.overrides
    x = torch.randn(1, ROWS, WIDTH)
    expected = norm(x)
    expected[0, 2] += 0.5 * where.arena[2 * WIDTH :]
    torch.testing.assert_close(AdaptedNorm(norm, where, 1)(x), expected)


def test_a_norm_is_found_by_its_structure():
    class Weighted(nn.Module):  # no epsilon: not a norm
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))

    model = nn.ModuleDict(
        {
            "one": CentredOnOne(),
            "plain": nn.LayerNorm(WIDTH, bias=False),
            "biased": nn.LayerNorm(WIDTH),
            "rms": nn.RMSNorm(WIDTH, eps=1e-6),
            "bare": nn.LayerNorm(WIDTH, elementwise_affine=False),
            "groups": nn.GroupNorm(2, WIDTH),
            "batch": nn.BatchNorm1d(WIDTH),
            "weighted": Weighted(),
        }
    )
    found = {site.path: (site.kind, site.out_features, site.has_bias) for site in list_sites(model)}
    assert found == {
        "one": ("norm", WIDTH, False),
        "plain": ("norm", WIDTH, False),
        "biased": ("norm", WIDTH, True),
        "rms": ("norm", WIDTH, False),
    }
