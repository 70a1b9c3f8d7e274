"""Text policies: the last one acts, and all of them stay."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.polyadapt_store.support import registry_of

from polyadapt.types import MarkSettings
from polyadapt_store.database import Database
from polyadapt_store.text_policies import TextPolicyBook

GREEN = MarkSettings("kgw", 2, ratio=0.5, bias=1.5)
RACE = MarkSettings("gumbel", 4, key_version=3)


@pytest.fixture
def database(tmp_path: Path):
    opened = Database(registry_of(tmp_path))
    yield opened
    opened.close()


@pytest.fixture
def book(database: Database) -> TextPolicyBook:
    ticks = iter(range(100, 1000))
    return TextPolicyBook(database, clock=lambda: next(ticks))


def test_every_generation_is_kept_and_saying_the_same_again_makes_none(book):
    first = book.put("t", [GREEN], is_required=True)
    assert (first.generation, first.settings, first.created) == (1, (GREEN,), 100)
    assert book.put("t", [GREEN], is_required=True) == first
    off = book.put("t", [GREEN], is_required=False)
    both = book.put("t", [RACE, GREEN], is_required=True)
    other = book.put("a", [RACE], is_required=True)
    assert book.list() == (other, first, off, both)
    assert [policy.generation for policy in (first, off, both, other)] == [1, 2, 3, 1]


def test_they_are_the_same_after_a_restart(book, database, tmp_path):
    book.put("t", [RACE, GREEN], is_required=True)
    expected, before = book.list(), database.num_writes
    again = Database(registry_of(tmp_path))
    try:
        assert TextPolicyBook(again).list() == expected
    finally:
        again.close()
    book.put("t", [GREEN], is_required=False)
    assert database.num_writes > before
