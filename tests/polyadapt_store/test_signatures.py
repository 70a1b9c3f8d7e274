"""Signatures: one row each, sealed, kept for ever, and never two users with the same bits."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from tests.polyadapt_store.support import registry_of

from polyadapt.errors import Conflict, NotFound, SecretsUnavailable
from polyadapt_store.database import Database
from polyadapt_store.signatures import SignatureBook

MARK, OTHER = "sha256:mark", "sha256:other"


class Reversed:
    """A cipher for the eye: the mark, the user, the generation, and a letter for each bit."""

    def __init__(self, digest: str = "") -> None:
        self.digest = digest

    def of(self, digest: str) -> Reversed:
        return Reversed(digest)

    def seal(self, user: str, generation: int, bits: str) -> str:
        return f"{self.digest} {user} {generation} " + bits.translate({48: "o", 49: "l"})

    def open(self, user: str, generation: int, text: str) -> str:
        bits = text.rpartition(" ")[2].translate({ord("o"): "0", ord("l"): "1"})
        if text != self.seal(user, generation, bits):
            raise SecretsUnavailable("changed")
        return bits


@pytest.fixture
def database(tmp_path: Path):
    opened = Database(registry_of(tmp_path))
    yield opened
    opened.close()


@pytest.fixture
def book(database: Database) -> SignatureBook:
    ticks = iter(range(100, 1000))
    return SignatureBook(database, Reversed(), clock=lambda: next(ticks))


def test_the_last_generation_acts_and_all_of_them_stay(book):
    first, is_new = book.issue(MARK, "ann", "0101")
    assert (is_new, first.generation, first.bits, first.revoked_at) == (True, 1, "0101", None)
    assert book.issue(MARK, "ann", "0101") == (first, False)
    second, is_new = book.issue(MARK, "ann", "0110")
    assert (is_new, second.generation) == (True, 2)
    assert book.find(MARK, "ann") == second
    assert book.list(MARK, has_bits=True) == (first, second)
    assert [one.bits for one in book.list(MARK)] == [None, None]
    assert book.find(OTHER, "ann") is None
    assert book.list(OTHER) == ()


def test_a_revoked_one_does_not_come_back_by_itself(book):
    issued, _ = book.issue(MARK, "ann", "0101")
    revoked = book.revoke(MARK, "ann")
    assert revoked.revoked_at is not None
    assert (revoked.bits, revoked.issued_at) == (None, issued.issued_at)
    assert book.find(MARK, "ann") == revoked
    with pytest.raises(NotFound):
        book.revoke(MARK, "ann")
    again, is_new = book.issue(MARK, "ann", "0101")
    assert (is_new, again.generation, again.revoked_at) == (True, 2, None)
    found = book.list(MARK, has_bits=True)
    assert [(one.generation, one.bits) for one in found] == [(1, "0101"), (2, "0101")]


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
    found = book.list(MARK, has_bits=True)
    database.close()
    again = Database(registry_of(tmp_path))
    try:
        assert SignatureBook(again, Reversed()).list(MARK, has_bits=True) == found
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


def stored(database: Database) -> list[str]:
    with database.read() as connection:
        return [row[0] for row in connection.exec_driver_sql("SELECT bits FROM signatures")]


def change(database: Database, sql: str) -> None:
    with database.write() as connection:
        connection.exec_driver_sql(sql)


def test_what_is_stored_is_what_the_cipher_gave(database, book):
    book.issue(MARK, "ann", "0101")
    assert stored(database) == [f"{MARK} ann 1 olol"]


def test_a_row_of_another_user_generation_or_mark_does_not_open(database, book):
    for user, bits in (("ann", "0101"), ("bob", "0110")):
        book.issue(MARK, user, bits)
    change(database, "UPDATE signatures SET bits = 'sha256:mark ann 1 olol' WHERE \"user\" = 'bob'")
    with pytest.raises(SecretsUnavailable):
        book.find(MARK, "bob")
    assert book.find(MARK, "ann").bits == "0101"
    assert [one.bits for one in book.list(MARK, has_bits=True)] == ["0101", None]
    # It keeps nobody from being issued bits, itself included.
    assert book.issue(MARK, "bob", "1111")[0].generation == 2
    assert book.issue(MARK, "eve", "0001")[1]


def test_many_are_issued_at_once_or_none(book):
    issued = book.issue_all(MARK, {f"u{i}": f"{i:06b}" for i in range(50)})
    assert [one.bits for one, _ in issued.values()] == [f"{i:06b}" for i in range(50)]
    assert all(is_new for _, is_new in issued.values())
    again = book.issue_all(MARK, {"u3": "000011", "new": "111111"})
    assert [is_new for _, is_new in again.values()] == [False, True]
    with pytest.raises(Conflict):
        book.issue_all(MARK, {"a": "111110", "b": "000001"})
    with pytest.raises(Conflict):
        book.issue_all(MARK, {"a": "111110", "b": "111110"})
    assert book.find(MARK, "a") is None


def test_without_a_key_nothing_is_issued_or_opened_and_revoking_works(database, book):
    book.issue(MARK, "ann", "0101")
    keyless = SignatureBook(database)
    for call in (
        lambda: keyless.issue(MARK, "bob", "0110"),
        lambda: keyless.find(MARK, "ann"),
        lambda: keyless.list(MARK, has_bits=True),
        keyless.seal_clear,
    ):
        with pytest.raises(SecretsUnavailable, match="POLYADAPT_MARK_KEK_FILE"):
            call()
    assert keyless.list(MARK)[0].user == "ann"
    assert keyless.revoke(MARK, "ann").revoked_at is not None
    assert keyless.list(OTHER, has_bits=True) == ()


def test_rows_of_an_older_release_are_sealed_and_leave_no_trace(database, book, tmp_path):
    bits = "0110100110010110" * 8
    clear = f"VALUES ('{MARK}', 'old', 1, '{bits}', 5)"
    change(
        database,
        f'INSERT INTO signatures (digest, "user", generation, bits, issued_at) {clear}',
    )
    with pytest.raises(SecretsUnavailable):
        book.find(MARK, "old")
    assert book.seal_clear() == 1
    assert book.seal_clear() == 0
    found = book.find(MARK, "old")
    assert (found.bits, found.generation, found.issued_at) == (bits, 1, 5)
    database.close()
    for file in tmp_path.iterdir():
        assert bits.encode() not in file.read_bytes()
