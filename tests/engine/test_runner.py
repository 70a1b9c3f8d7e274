"""The runner's host side: the page table follows the sequences, whatever happens to them."""

from __future__ import annotations

import random

import pytest

from polyadapt.engine.request import RequestGroup, Sequence
from polyadapt.engine.runner import PageTable
from polyadapt.types import Request, SamplingParams


def new_sequence(pages: list[int]) -> Sequence:
    request = Request("r", (1, 2), SamplingParams(max_tokens=100))
    (sequence,) = RequestGroup.of(request, 0.0).sequences
    sequence.pages = pages
    return sequence


def check(table: PageTable, sequences: list[Sequence]) -> None:
    found = table.of(sequences)
    assert found.shape == (len(sequences), max(len(s.pages) for s in sequences))
    for row, sequence in zip(found.tolist(), sequences, strict=True):
        assert row[: len(sequence.pages)] == sequence.pages


@pytest.mark.parametrize("seed", range(20))
def test_the_page_table_is_what_the_sequences_hold(seed):
    rng = random.Random(seed)
    table, running = PageTable(), [new_sequence([7])]
    check(table, running)
    for _ in range(60):
        for sequence in running:
            if rng.random() < 0.3:
                sequence.pages.append(rng.randrange(5000))
            if rng.random() < 0.1:  # a page that proved to be another sequence's
                sequence.pages[rng.randrange(len(sequence.pages))] = rng.randrange(5000)
            if rng.random() < 0.05:  # preempted and admitted again
                sequence.pages = [rng.randrange(5000)]
        running = [sequence for sequence in running if rng.random() < 0.95]
        while not running or rng.random() < 0.6:
            running.append(new_sequence([rng.randrange(5000) for _ in range(rng.randrange(1, 9))]))
        if rng.random() < 0.1:
            rng.shuffle(running)
        # A step of some of them only, as when the budget ends.
        check(table, rng.sample(running, rng.randrange(1, len(running) + 1)))
        check(table, running)


def test_a_table_is_the_callers_own():
    table, sequence = PageTable(), new_sequence([1, 2])
    first = table.of([sequence])
    sequence.pages[0] = 9
    second = table.of([sequence])
    assert first.tolist() == [[1, 2]]
    assert second.tolist() == [[9, 2]]
