"""Who leaves a tier first."""

from __future__ import annotations

from polyadapt.adapters.eviction import EvictionOrder, Standing


def used(order: EvictionOrder, times: int = 1) -> Standing:
    standing = Standing()
    for _ in range(times):
        order.use(standing)
    return standing


def test_between_equals_the_least_recently_used_leaves_first():
    order = EvictionOrder()
    first, second = used(order), used(order)
    assert order.score(first, 1.0, 10) < order.score(second, 1.0, 10)
    order.use(first)
    order.use(second)
    order.use(first)
    assert order.score(first, 1.0, 10) > order.score(second, 1.0, 10)


def test_what_is_cheap_to_bring_back_leaves_before_what_is_dear():
    order = EvictionOrder()
    dear, cheap = used(order), used(order)
    assert order.score(cheap, 0.1, 10) < order.score(dear, 1.0, 10), "recency alone would keep it"


def test_the_larger_of_two_that_cost_the_same_leaves_first():
    order = EvictionOrder()
    small, large = used(order), used(order)
    assert order.score(large, 1.0, 100) < order.score(small, 1.0, 10)


def test_an_old_favourite_is_outlived_by_what_came_after_many_evictions():
    order = EvictionOrder()
    favourite = used(order, times=1000)
    rounds = 0
    while True:
        newcomer = used(order)
        if order.score(newcomer, 1.0, 10) > order.score(favourite, 1.0, 10):
            break
        order.evicted(order.score(newcomer, 1.0, 10))
        rounds += 1
        assert rounds < 100
    assert rounds > 1, "frequency counts for something"


def test_the_clock_never_runs_back():
    order = EvictionOrder()
    standing = used(order)
    order.evicted((5.0, 1))
    order.evicted((1.0, 2))
    order.use(standing)
    assert standing.floor == 5.0
