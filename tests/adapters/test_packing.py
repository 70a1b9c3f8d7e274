"""Where the parts of a delta lie in the packed adapter, and what no site has a place for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from polyadapt.adapters.adapter import ORDINARY, Delta
from polyadapt.adapters.packing import pack
from polyadapt.ops import cells as layout
from polyadapt.types import BaseSpec, SiteSpec

SITES = (
    SiteSpec("embed", "embedding", 10, 8, False),
    SiteSpec("linear", "linear", 12, 8, False),
    SiteSpec("norm", "norm", 8, 8, False),
    SiteSpec("biased", "norm", 8, 8, True),
    SiteSpec("experts", "experts", 12, 8, False, num_experts=3),
)
EMBEDDING, LINEAR, NORM, BIASED_NORM, EXPERTS = range(5)
BASE = BaseSpec("base", "sha256:0", "Tiny", 10, 16, False, "embed", "linear", SITES)


def plain(site_id: int, rank: int = 0) -> Delta:
    site = SITES[site_id]
    return Delta(torch.randn(rank, site.in_features), torch.randn(site.out_features, rank))


def test_every_part_lies_where_the_layout_says():
    everything = replace(
        plain(LINEAR, 2),
        bias=torch.randn(8),
        out_scale=torch.randn(8),
        transform=torch.randn(3, 4, 4),
        swap=torch.randn(2, 8),
        dense=torch.randn(8, 12),
    )
    embedding = replace(plain(EMBEDDING, 1), dense=torch.randn(10, 8))
    norm = replace(plain(NORM), weight=torch.randn(8), bias=torch.randn(8))
    deltas = {NORM: norm, LINEAR: everything, EMBEDDING: embedding}
    packed = pack(deltas, BASE, torch.float32, ORDINARY)
    end = 0
    for site_id, a in ((0, embedding.a.t()), (1, everything.a), (2, norm.a)):
        delta, site = deltas[site_id], SITES[site_id]
        offset, rank, parts, _ = packed.cells[site_id].tolist()
        assert (offset, rank, parts) == (end, len(delta.a), delta.parts)
        size = layout.num_elements(site.in_features, site.out_features, rank, parts)
        tails = [tensor.flatten() for _, tensor in delta.tails]
        expected = torch.cat([a.flatten(), delta.b.t().flatten(), *tails])
        assert torch.equal(packed.weights[offset : offset + size], expected)
        assert [bit for bit, _ in delta.tails] == sorted(bit for bit, _ in delta.tails)
        end += size
    assert packed.weights.numel() == end
    assert layout.group_of(everything.parts) == 4
    assert packed.cells[BIASED_NORM].tolist() == [-1, 0, 0, 0]


REFUSED = {
    "a transform that does not cover the input": (LINEAR, {"transform": torch.ones(2, 4, 4)}),
    "a transform of blocks that are not square": (LINEAR, {"transform": torch.ones(3, 4, 2)}),
    "a swap without groups": (LINEAR, {"swap": torch.ones(2, 8)}),
    "a swap of odd groups": (LINEAR, {"swap": torch.ones(2, 8), "group": 1}),
    "a swap of groups that do not divide": (LINEAR, {"swap": torch.ones(2, 8), "group": 6}),
    "groups of two sizes": (
        LINEAR,
        {"swap": torch.ones(2, 8), "group": 2, "transform": torch.ones(3, 4, 4)},
    ),
    "a dense weight lying down": (LINEAR, {"dense": torch.ones(12, 8)}),
    "a weight on a linear": (LINEAR, {"weight": torch.ones(8)}),
    "a scale of another width": (LINEAR, {"out_scale": torch.ones(12)}),
    "a bias of another width": (LINEAR, {"bias": torch.ones(12)}),
    "A of another width": (LINEAR, {"a": torch.ones(1, 8), "b": torch.ones(8, 1)}),
    "B of another rank": (LINEAR, {"b": torch.ones(8, 1)}),
    "a weight on an embedding": (EMBEDDING, {"weight": torch.ones(8)}),
    "a transform on an embedding": (EMBEDDING, {"transform": torch.ones(5, 2, 2)}),
    "A and B on a norm": (NORM, {"a": torch.ones(1, 8), "b": torch.ones(8, 1)}),
    "a scale on a norm": (NORM, {"out_scale": torch.ones(8)}),
    "a bias on experts": (EXPERTS, {"bias": torch.ones(8)}),
    "fewer components than experts": (EXPERTS, {"a": torch.ones(2, 12), "b": torch.ones(8, 2)}),
    "only a bias on a norm without one": (NORM, {"bias": torch.ones(8)}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_site_has_no_place_for_is_refused(name):
    site_id, parts = REFUSED[name]
    with pytest.raises(ValueError, match=rf"{SITES[site_id].path} of .* takes no parts"):
        pack({site_id: replace(plain(site_id), **parts)}, BASE, torch.float32, ORDINARY)


def test_a_norm_that_has_a_bias_takes_one_alone():
    delta = replace(plain(BIASED_NORM), bias=torch.ones(8))
    packed = pack({BIASED_NORM: delta}, BASE, torch.float32, ORDINARY)
    assert packed.cells[BIASED_NORM].tolist() == [0, 0, layout.BIAS, 0]
