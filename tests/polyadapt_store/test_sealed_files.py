"""Files at rest: each opens as itself under its key alone; nothing shows in the clear."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

from polyadapt.errors import AdapterRejected, AdapterUnavailable, InvalidRequest, SecretsUnavailable
from polyadapt_store import sealed_files
from polyadapt_store.checkpoint import read_header
from polyadapt_store.limits import StoreLimits
from polyadapt_store.sealed_files import FileSealer, begins_sealed, is_sealed, read_file

SEALER, OTHER = FileSealer(bytes(range(32))), FileSealer(bytes(32))
DIGEST, NAME = "sha256:" + "a" * 64, "adapter_model.safetensors"
PLAIN = b"canary-5d1e: the branches of a mark" * 9


@pytest.fixture(autouse=True)
def registry() -> None:
    """Nothing here has one."""


@pytest.mark.parametrize("plain", [b"", b"x", PLAIN], ids=["empty", "one byte", "some"])
def test_what_was_sealed_comes_back(plain: bytes) -> None:
    sealed = SEALER.seal(plain, DIGEST, NAME)
    assert SEALER.open(sealed, DIGEST, NAME) == plain
    assert begins_sealed(sealed)
    assert FileSealer.from_text(SEALER.to_text()).open(sealed, DIGEST, NAME) == plain


def test_the_same_file_is_sealed_to_the_same_bytes_as_a_store_by_content_needs() -> None:
    assert SEALER.seal(PLAIN, DIGEST, NAME) == SEALER.seal(PLAIN, DIGEST, NAME)


def test_no_two_files_share_a_key_stream() -> None:
    """With one, the difference of two sealed files would be that of what they hold."""
    head = sealed_files._HEAD.size
    zeros, ones = bytes(64), b"\1" * 64
    streams = {
        SEALER.seal(zeros, DIGEST, NAME)[head : head + 64],
        bytes(b ^ 1 for b in SEALER.seal(ones, DIGEST, NAME)[head : head + 64]),
        SEALER.seal(zeros + b"more", DIGEST, NAME)[head : head + 64],
        SEALER.seal(zeros, DIGEST, "0/" + NAME)[head : head + 64],
        SEALER.seal(zeros, "sha256:" + "b" * 64, NAME)[head : head + 64],
        OTHER.seal(zeros, DIGEST, NAME)[head : head + 64],
    }
    assert len(streams) == 6


def test_nothing_shows_in_the_clear() -> None:
    sealed = SEALER.seal(PLAIN, DIGEST, NAME)
    assert not any(PLAIN[i : i + 8] in sealed for i in range(len(PLAIN) - 8))
    assert SEALER.to_text().encode() not in sealed


@pytest.mark.parametrize("where", range(0, 56 + 40 + 16, 3))
def test_every_changed_byte_is_found(where: int) -> None:
    sealed = bytearray(SEALER.seal(PLAIN[:40], DIGEST, NAME))
    sealed[where] ^= 4
    with pytest.raises((SecretsUnavailable, AdapterUnavailable)):
        SEALER.open(bytes(sealed), DIGEST, NAME)


@pytest.mark.parametrize("length", [0, 7, 8, 55, 56, 71, 72, 95])
def test_every_cut_is_found(length: int) -> None:
    with pytest.raises(AdapterUnavailable, match="changed or cut"):
        SEALER.open(SEALER.seal(PLAIN[:24], DIGEST, NAME)[:length], DIGEST, NAME)


def test_a_file_opens_as_itself_alone() -> None:
    sealed = SEALER.seal(PLAIN, DIGEST, NAME)
    for digest, name in (("sha256:" + "b" * 64, NAME), (DIGEST, "0/" + NAME)):
        with pytest.raises(AdapterUnavailable):
            SEALER.open(sealed, digest, name)
    with pytest.raises(SecretsUnavailable, match="another registry's key"):
        OTHER.open(sealed, DIGEST, NAME)


def test_without_the_key_a_sealed_file_says_what_to_give(tmp_path: Path) -> None:
    file = tmp_path / NAME
    file.write_bytes(SEALER.seal(PLAIN, DIGEST, NAME))
    assert is_sealed(file)
    assert read_file(file, DIGEST, NAME, SEALER) == PLAIN
    with pytest.raises(SecretsUnavailable, match="POLYADAPT_MARK_KEK_FILE"):
        read_file(file, DIGEST, NAME, None)
    with pytest.raises(AdapterRejected) as caught:
        read_header(file, StoreLimits())
    assert [problem.code for problem in caught.value.problems] == ["sealed_file"]
    file.write_bytes(PLAIN)
    assert read_file(file, DIGEST, NAME, None) is None


def test_the_key_shows_nowhere() -> None:
    text = SEALER.to_text()
    assert text not in f"{SEALER!r} {SEALER} {SEALER.id!r}"
    for leave in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="not pickled or copied"):
            leave(SEALER)
    for bad in ("hunter2-hunter2", text[:-8]):
        with pytest.raises(InvalidRequest) as caught:
            FileSealer.from_text(bad)
        assert bad not in str(caught.value)


def test_what_the_cipher_does_not_take_at_once_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed_files, "MAX_BYTES", 10)
    with pytest.raises(InvalidRequest, match=r"has 11 bytes.*may have 10"):
        SEALER.seal(bytes(11), DIGEST, NAME)
