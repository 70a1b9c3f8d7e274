"""One budget for KV pages and adapters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from polyadapt.engine.budget import Budget, Needs, reserve_nbytes, share
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


# --------------------------------------------------------------------------- a device's own memory
ON_DEVICE = replace(NEEDS, reserve_nbytes=20_000)  # of 100,000 free bytes


def shared_on_device(needs: Needs = ON_DEVICE, **given: Any) -> Budget:
    options = {"memory_bytes": None, "kv_cache_bytes": None, "max_adapter_bytes": None}
    return share(needs, free_bytes=100_000, **(options | given))


def test_on_a_device_all_that_the_reserve_leaves_is_shared():
    assert shared_on_device() == Budget(500, 30_000)
    assert shared_on_device(kv_cache_bytes=10_000) == Budget(100, 70_000)
    assert shared_on_device(max_adapter_bytes=70_000) == Budget(100, 70_000)
    few = replace(ON_DEVICE, most_pages=10)
    assert shared_on_device(few) == Budget(10, 79_000), "pages that nobody could fill"


def test_on_a_device_less_than_all_may_be_asked_for():
    assert shared_on_device(memory_bytes=16_000) == Budget(100, 6_000)
    both = shared_on_device(kv_cache_bytes=50_000, max_adapter_bytes=30_000)
    assert both == Budget(500, 30_000)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"memory_bytes": 80_001}, ["leaves 80000 bytes", "--memory-bytes 80001"]),
        (
            {"kv_cache_bytes": 50_000, "max_adapter_bytes": 30_001},
            ["--kv-cache-bytes 50000 and --max-adapter-bytes 30001"],
        ),
        ({"max_adapter_bytes": 90_000}, ["--max-adapter-bytes 90000", "100000 bytes"]),
        ({"kv_cache_bytes": 79_900}, ["leaves 79900 bytes for KV pages", "100 for adapters"]),
    ],
)
def test_more_than_a_device_has_is_refused_with_its_reserve(
    given: dict[str, int], words: list[str]
):
    with pytest.raises(StartupError) as caught:
        shared_on_device(**given)
    for word in [*words, "reserve of 20000", "--max-num-batched-tokens"]:
        assert word in caught.value.message


def test_a_device_full_of_weights_is_refused_whatever_is_asked_for():
    for given in ({}, {"memory_bytes": 1}, {"kv_cache_bytes": 200}):
        with pytest.raises(StartupError) as caught:
            shared_on_device(replace(NEEDS, reserve_nbytes=100_500), **given)
        assert "100000 bytes beside the weights" in caught.value.message


def test_the_reserve_counts_rows_logits_and_what_libraries_keep():
    sizes = {"hidden": 4096, "inner": 14336, "vocab_size": 128256, "itemsize": 2}
    base = reserve_nbytes(num_rows=0, num_outputs=0, **sizes)
    assert base == 1 << 30
    rows = reserve_nbytes(num_rows=1, num_outputs=0, **sizes) - base
    assert rows == (4 * 4096 + 3 * 14336) * 2
    assert reserve_nbytes(num_rows=0, num_outputs=1, **sizes) - base == 128256 * (2 + 4 + 4)
