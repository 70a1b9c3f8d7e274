"""What routed adapters chose, and the warning where one expert got nearly all."""

from __future__ import annotations

import logging

import pytest
import torch

from polyadapt.engine.usage import MAX_ADAPTERS, RoutingUsage
from polyadapt.ops import cells as layout
from polyadapt.ops.cells import Router, Routing


def make_cells(num_scores: list[int]) -> torch.Tensor:
    """One routed site of two for each slot."""
    cells = torch.zeros(len(num_scores), 2, layout.COLUMNS, dtype=torch.int64)
    cells[:, 0, layout.OFFSET] = -1
    for slot, num in enumerate(num_scores):
        cells[slot, 1, layout.ROUTING] = Routing(Router.SOFTMAX, num).code
    return cells


def test_a_snapshot_has_the_shares_of_those_that_routed():
    usage = RoutingUsage(make_cells([4, 2, 3]))
    assert usage.snapshot({0: "a", 1: "b", 2: "c"}) == {}
    usage.table[0, :5] = torch.tensor([10.0, 1.0, 2.0, 1.0, 0.0])
    usage.table[2, :4] = torch.tensor([20.0, 5.0, 0.0, 5.0])
    found = usage.snapshot({0: "a", 1: "b", 2: "c"})
    assert list(found) == ["c", "a"]  # the busiest first
    assert found["a"] == pytest.approx((10.0, 0.25, 0.5, 0.25, 0.0))
    assert found["c"] == pytest.approx((20.0, 0.5, 0.0, 0.5))
    assert list(usage.snapshot({0: "a"})) == ["a"]  # slot 2 is nobody's any more
    usage.forget(0)
    assert usage.snapshot({0: "a"}) == {}


def test_a_snapshot_is_bounded():
    num = MAX_ADAPTERS + 5
    usage = RoutingUsage(make_cells([100] * num))
    usage.table[:, 0] = torch.arange(num) + 1.0
    usage.table[:, 1:] = 1.0
    found = usage.snapshot({slot: str(slot) for slot in range(num)})
    assert len(found) == MAX_ADAPTERS
    assert all(len(shares) == 1 + layout.USAGE_BUCKETS for shares in found.values())
    assert "0" not in found


@pytest.mark.parametrize(
    ("rows", "weights", "is_warned"),
    [
        (1e6, [99.0, 1.0], True),
        (1e6, [60.0, 40.0], False),
        (10, [99.0, 1.0], False),
        (1e6, [5.0], False),
    ],
)
def test_a_collapse_is_said_once(rows, weights, is_warned, caplog):
    usage = RoutingUsage(make_cells([len(weights)]))
    usage.table[0, 0] = rows
    usage.table[0, 1 : 1 + len(weights)] = torch.tensor(weights)
    with caplog.at_level(logging.WARNING):
        usage.snapshot({0: "sha256:a"})
        usage.snapshot({0: "sha256:a"})
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == is_warned
    if is_warned:
        assert "sha256:a has collapsed: expert 0 has 99 %" in messages[0]


def test_more_rows_are_counted_than_a_float32_can():
    usage = RoutingUsage(make_cells([2]))
    for _ in range(4):
        usage.table[0, :3] = torch.tensor([2.0**24, 2.0**24, 1.0])
        found = usage.snapshot({0: "a"})
    usage.table[0, :3] = torch.tensor([1.0, 0.0, 1.0])
    found = usage.snapshot({0: "a"})
    assert found["a"][0] == 2**26 + 1
    assert found["a"][2] == pytest.approx(5 / (2**26 + 5))


def test_slots_of_nobody_hide_nobody_and_are_not_looked_at():
    cells = make_cells([2] * (MAX_ADAPTERS + 2))
    usage = RoutingUsage(cells)
    usage.table[:, 0] = 9.0
    usage.table[-1, :3] = torch.tensor([1.0, 1.0, 0.0])
    cells[:-1, :, layout.OFFSET] = -1  # gone, or on their way
    assert usage.snapshot({MAX_ADAPTERS + 1: "a"}) == {"a": (1.0, 1.0, 0.0)}
