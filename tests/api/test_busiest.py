"""The busiest names keep counts of their own, and no count ever shrinks without beginning anew."""

from __future__ import annotations

from polyadapt.api.busiest import OTHER, Busiest


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def counts(busiest: Busiest) -> dict[str, tuple[int, int]]:
    return {name: (requests, tokens) for name, requests, tokens in busiest}


def test_the_first_names_have_counts_of_their_own_and_the_rest_share_one() -> None:
    busiest = Busiest(2, Clock())
    for name in ("a", "b", "c", "d", "a"):
        busiest.add(name, 3)
    assert counts(busiest) == {"a": (2, 6), "b": (1, 3), OTHER: (2, 6)}


def test_a_name_that_asks_more_often_takes_the_place_of_the_least_busy() -> None:
    clock = Clock()
    busiest = Busiest(2, clock)
    for name in ("a", "b"):
        busiest.add(name, 1)
    for _ in range(9):
        busiest.add("late", 1)
        busiest.add("a", 1)
    clock.now = 61.0
    busiest.add("late", 5)
    found = counts(busiest)
    assert set(found) == {"a", "late", OTHER}
    assert found["late"] == (1, 5)
    assert found[OTHER] == (9, 9)
    busiest.add("b", 1)
    assert counts(busiest)[OTHER] == (10, 10)


def test_a_little_more_traffic_moves_nobody() -> None:
    clock = Clock()
    busiest = Busiest(1, clock)
    for _ in range(3):
        busiest.add("a", 1)
        busiest.add("b", 1)
    busiest.add("b", 1)
    clock.now = 61.0
    busiest.add("a", 1)
    assert set(counts(busiest)) == {"a", OTHER}


def test_names_without_number_take_bounded_memory_and_labels() -> None:
    clock = Clock()
    busiest = Busiest(4, clock)
    for i in range(5000):
        clock.now += 0.1
        busiest.add(f"n{i}", 1)
        assert len(busiest._rates) <= 16 * 4
    found = counts(busiest)
    assert len(found) <= 5
    assert sum(requests for requests, _ in found.values()) <= 5000


def test_an_adapter_of_that_name_is_counted_with_the_others() -> None:
    busiest = Busiest(4, Clock())
    busiest.add(OTHER, 1)
    busiest.add("a", 1)
    assert counts(busiest) == {"a": (1, 1), OTHER: (1, 1)}
