"""The KEK of a registry changed: whatever interrupts it, both keys open everything, and in the end
the new one alone does. Row keys and bundles are re-wrapped, signatures stay as they lie.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.marked_suspect import lm_mark

from polyadapt.errors import SecretsUnavailable
from polyadapt.watermark.file_key import open_sealer
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.keyset import Keyset
from polyadapt.watermark.mark_directory import SECRETS_PURPOSE, MarkDirectory
from polyadapt.watermark.rotation import report_keys, rotate
from polyadapt.watermark.rows import RowSealer
from polyadapt.watermark.secrets import Kek, kek_id_of, seal, unseal
from polyadapt_store.database import Database
from polyadapt_store.marks import MarkBook, SealedText
from polyadapt_store.signatures import SignatureBook

OLD, NEW, OTHER = (SecretKey(bytes([i]) * 32) for i in range(3))
BOTH = Keyset([NEW, OLD])
DIGESTS = [f"sha256:{i:064x}" for i in range(3)]
BITS = {"ann": "01101001", "bob": "11110000"}
# A bundle and a row key of two marks, and a row key alone; the key of files.
NUM_SEALED = 6
FILE = b"the branches"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> MarkDirectory:
    return lm_mark(tmp_path_factory.mktemp("bundle") / "mark", 8, kek=OLD)


class Registry:
    """A registry with three marks and their signatures under OLD, opened anew each time."""

    def __init__(self, file: Path, bundle: MarkDirectory) -> None:
        self.path, self.bundle = file, bundle
        config = (bundle.path / "config.json").read_text()
        secrets = (bundle.path / "triggers.enc").read_text()
        with self.book() as book:
            for digest in DIGESTS[:2]:
                book.put(digest, config, secrets)
            self.file = open_sealer(OLD, book).seal(FILE, DIGESTS[0], "a")
        with self.signatures(OLD) as signatures:
            for digest in DIGESTS:
                signatures.issue_all(digest, BITS)

    @contextlib.contextmanager
    def book(self) -> Iterator[MarkBook]:
        with contextlib.closing(Database(self.path)) as database:
            yield MarkBook(database)

    @contextlib.contextmanager
    def signatures(self, kek: Kek) -> Iterator[SignatureBook]:
        with contextlib.closing(Database(self.path)) as database:
            yield SignatureBook(database, RowSealer(kek, MarkBook(database)))

    def texts(self) -> list[SealedText]:
        with self.book() as book:
            return list(book.sealed())

    def opens_with(self, kek: Kek) -> bool:
        """Whether every bundle, every signature and a sealed file say what was put there."""
        key = self.bundle.secrets.key
        try:
            for one in self.texts():
                if one.kind == "secrets":
                    config = (self.bundle.path / "config.json").read_bytes()
                    mark = MarkDirectory.of(self.path, config, one.text.encode(), kek)
                    assert mark.secrets.key == key
            with self.book() as book:
                assert open_sealer(kek, book).open(self.file, DIGESTS[0], "a") == FILE
            with self.signatures(kek) as signatures:
                for digest in DIGESTS:
                    for user, bits in BITS.items():
                        found = signatures.find(digest, user)
                        assert found is not None
                        assert found.bits == bits
        except SecretsUnavailable:
            return False
        return True


@pytest.fixture
def registry(tmp_path: Path, bundle: MarkDirectory) -> Registry:
    return Registry(tmp_path / "registry.sqlite", bundle)


def test_afterwards_the_new_key_alone_opens_everything(registry: Registry) -> None:
    assert registry.opens_with(OLD)
    with registry.book() as book:
        found = rotate(book, BOTH)
    assert (found.num_rewrapped, found.num_current, found.problems) == (NUM_SEALED, 0, ())
    assert registry.opens_with(NEW)
    assert not registry.opens_with(OLD)
    with registry.book() as book:
        again = rotate(book, BOTH)
    assert (again.num_rewrapped, again.num_current, again.problems) == (0, NUM_SEALED, ())


def test_what_was_sealed_is_not_sealed_again(registry: Registry) -> None:
    with contextlib.closing(Database(registry.path)) as database:
        query = "SELECT bits FROM signatures ORDER BY digest, user"
        with database.read() as connection:
            before = connection.exec_driver_sql(query).all()
        rotate(MarkBook(database), BOTH)
        with database.read() as connection:
            assert connection.exec_driver_sql(query).all() == before


class PowerCut(BaseException):
    """Ends a rotation as nothing in it expects."""


@pytest.mark.parametrize("is_after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", range(NUM_SEALED))
def test_interrupted_at_any_text_both_keys_open_everything_and_the_same_call_goes_on(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, step: int, is_after: bool
) -> None:
    kept: Callable[[MarkBook, SealedText, str], bool] = MarkBook.reseal
    num = 0

    def reseal(book: MarkBook, old: SealedText, text: str) -> bool:
        nonlocal num
        num += 1
        if num - 1 < step:
            return kept(book, old, text)
        if is_after:
            kept(book, old, text)
        raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(MarkBook, "reseal", reseal)
        with registry.book() as book, pytest.raises(PowerCut):
            rotate(book, BOTH)
    under = [kek_id_of(one.text.encode(), _purpose(one)) for one in registry.texts()]
    assert under.count(NEW.id) == step + is_after
    assert registry.opens_with(BOTH)
    assert registry.opens_with(Keyset([OLD, NEW]))
    assert not registry.opens_with(OLD) or under.count(NEW.id) == 0
    with registry.book() as book:
        found = rotate(book, BOTH)
    assert found.num_rewrapped + found.num_current == NUM_SEALED
    assert registry.opens_with(NEW)


def test_a_text_that_is_half_written_is_the_old_one(registry: Registry) -> None:
    class Cut(Database):
        @contextlib.contextmanager
        def write(self):  # type: ignore[no-untyped-def]
            with super().write() as connection:
                yield connection
                raise PowerCut

    before = registry.texts()
    with contextlib.closing(Cut(registry.path)) as database, pytest.raises(PowerCut):
        rotate(MarkBook(database), BOTH)
    assert registry.texts() == before
    assert registry.opens_with(BOTH)


def test_what_a_server_writes_meanwhile_is_not_lost(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: Callable[[MarkBook, SealedText, str], bool] = MarkBook.reseal
    written = seal(b"another bundle", OLD, SECRETS_PURPOSE).decode()
    config = (registry.bundle.path / "config.json").read_text()

    def reseal(book: MarkBook, old: SealedText, text: str) -> bool:
        if old.kind == "secrets" and old.text != written:
            book.put(old.digest, config, written)
        return kept(book, old, text)

    monkeypatch.setattr(MarkBook, "reseal", reseal)
    with registry.book() as book:
        found = rotate(book, BOTH)
        assert (found.num_rewrapped, found.problems) == (NUM_SEALED, ())
        for digest in DIGESTS[:2]:
            record = book.find(digest)
            assert record is not None
            assert record.secrets is not None
            assert unseal(record.secrets.encode(), NEW, SECRETS_PURPOSE) == b"another bundle"


def test_what_opens_under_no_given_key_is_left_and_told(registry: Registry) -> None:
    before = registry.texts()
    with registry.book() as book:
        found = rotate(book, Keyset([NEW, OTHER]))
    assert (found.num_rewrapped, found.num_current, len(found.problems)) == (0, 0, NUM_SEALED)
    assert all(OLD.id in problem for problem in found.problems)
    assert registry.texts() == before


def test_a_damaged_text_keeps_no_other_from_being_done(registry: Registry) -> None:
    first, second = registry.texts()[1:3]
    with registry.book() as book:
        assert book.reseal(first, first.text.replace('"sealed": "', '"sealed": "AAAA'))
        assert book.reseal(second, "{}")
        found = rotate(book, BOTH)
    assert (found.num_rewrapped, len(found.problems)) == (NUM_SEALED - 2, 2)


def test_nothing_secret_is_logged_or_told(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), registry.book() as book:
        told = repr([rotate(book, Keyset([OTHER, NEW])), rotate(book, BOTH), BOTH])
        report_keys(book, Keyset([OLD]))
        report_keys(book, None)
    assert "sealed under keys that this server was not given" in caplog.text
    for secret in (OLD, NEW, OTHER, registry.bundle.secrets.key):
        assert secret.to_text() not in caplog.text + told


def _purpose(one: SealedText) -> str:
    known = {"secrets": "mark", "file_key": "key of marks' files"}
    return known.get(one.kind, f"key of signatures {one.digest}")
