"""Signatures: one row each, kept for ever, and never two users with the same bits."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from tests.polyadapt_store.support import registry_of

from polyadapt.errors import Conflict, NotFound
from polyadapt_store.database import Database
from polyadapt_store.signatures import SignatureBook

MARK, OTHER = "sha256:mark", "sha256:other"


@pytest.fixture
def database(tmp_path: Path):
    opened = Database(registry_of(tmp_path))
    yield opened
    opened.close()


@pytest.fixture
def book(database: Database) -> SignatureBook:
    ticks = iter(range(100, 1000))
    return SignatureBook(database, clock=lambda: next(ticks))


def test_the_last_generation_acts_and_all_of_them_stay(book):
    first, is_new = book.issue(MARK, "ann", "0101")
    assert (is_new, first.generation, first.bits, first.revoked_at) == (True, 1, "0101", None)
    assert book.issue(MARK, "ann", "0101") == (first, False)
    second, is_new = book.issue(MARK, "ann", "0110")
    assert (is_new, second.generation) == (True, 2)
    assert book.find(MARK, "ann") == second
    assert book.list(MARK) == (first, second)
    assert book.find(OTHER, "ann") is None
    assert book.list(OTHER) == ()


def test_a_revoked_one_does_not_come_back_by_itself(book):
    issued, _ = book.issue(MARK, "ann", "0101")
    revoked = book.revoke(MARK, "ann")
    assert revoked.revoked_at is not None
    assert (revoked.bits, revoked.issued_at) == (issued.bits, issued.issued_at)
    assert book.find(MARK, "ann") == revoked
    with pytest.raises(NotFound):
        book.revoke(MARK, "ann")
    again, is_new = book.issue(MARK, "ann", "0101")
    assert (is_new, again.generation, again.revoked_at) == (True, 2, None)
    assert book.list(MARK) == (revoked, again)


def test_no_two_users_have_or_had_the_same_bits(book):
    book.issue(MARK, "ann", "0101")
    book.issue(MARK, "ann", "0110")
    book.revoke(MARK, "ann")
    for bits in ("0101", "0110"):
        with pytest.raises(Conflict) as caught:
            book.issue(MARK, "bob", bits)
        assert bits not in caught.value.message
    assert book.issue(OTHER, "bob", "0101")[1]
    assert book.find(MARK, "bob") is None


def test_a_signature_shows_its_bits_to_nobody_by_accident(book):
    assert "0101" not in repr(book.issue(MARK, "ann", "0101")[0])


def test_they_are_there_after_a_restart(database, book, tmp_path):
    book.issue(MARK, "ann", "0101")
    found = book.list(MARK)
    database.close()
    again = Database(registry_of(tmp_path))
    try:
        assert SignatureBook(again).list(MARK) == found
    finally:
        again.close()


def test_many_at_once_are_each_one_row(book):
    def issue(number: int) -> None:
        book.issue(MARK, "ann", f"{number:08b}")
        book.issue(MARK, f"u{number}", f"1{number:08b}")

    threads = [threading.Thread(target=issue, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    own = [one for one in book.list(MARK) if one.user == "ann"]
    assert [one.generation for one in own] == list(range(1, 13))
    assert len(book.list(MARK)) == 24
