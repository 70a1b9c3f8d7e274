"""One budget for KV pages and adapters."""

from __future__ import annotations

from typing import Any

import pytest

from polyadapt.engine.budget import Budget, Needs, share
from polyadapt.errors import StartupError

NEEDS = Needs(page_nbytes=100, most_pages=1000, adapter_nbytes=300)


def shared(**given: Any) -> Budget:
    options = {"memory_bytes": None, "kv_cache_bytes": None, "max_adapter_bytes": None}
    return share(NEEDS, free_bytes=100_000, **(options | given))


def test_pages_get_five_eighths_and_adapters_the_rest():
    assert shared(memory_bytes=16_000) == Budget(100, 6_000)


def test_pages_beyond_every_sequence_at_full_length_go_to_adapters():
    assert shared(memory_bytes=1_000_000) == Budget(1000, 900_000)


def test_a_part_that_is_given_is_taken_and_the_other_gets_the_rest():
    assert shared(memory_bytes=10_000, kv_cache_bytes=2_000) == Budget(20, 8_000)
    assert shared(memory_bytes=10_000, max_adapter_bytes=2_000) == Budget(80, 2_000)
    both = shared(memory_bytes=10_000, kv_cache_bytes=2_000, max_adapter_bytes=3_000)
    assert both == Budget(20, 3_000)


def test_without_a_budget_for_both_each_is_a_part_of_the_free_memory():
    assert shared() == Budget(250, 15_000)
    assert shared(kv_cache_bytes=500, max_adapter_bytes=7) == Budget(5, 7)


def test_the_least_budget_holds_two_pages_and_one_adapter():
    assert shared(memory_bytes=800) == Budget(5, 300)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"memory_bytes": 499}, ["--memory-bytes 499", "two pages need 200", "300"]),
        ({"memory_bytes": 900, "kv_cache_bytes": 700}, ["leaves 700", "200 for adapters"]),
        ({"memory_bytes": 900, "max_adapter_bytes": 800}, ["100 bytes for KV pages"]),
        ({"memory_bytes": 900, "kv_cache_bytes": 2000}, ["0 for adapters"]),
        (
            {"memory_bytes": 900, "kv_cache_bytes": 500, "max_adapter_bytes": 500},
            ["exceed --memory-bytes 900"],
        ),
        ({"kv_cache_bytes": 199}, ["--kv-cache-bytes 199 holds fewer than two pages"]),
    ],
)
def test_too_little_is_refused_with_the_numbers(given: dict[str, int], words: list[str]):
    with pytest.raises(StartupError) as caught:
        shared(**given)
    for word in words:
        assert word in caught.value.message
