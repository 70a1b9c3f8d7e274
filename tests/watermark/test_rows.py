"""Rows at rest: each opens for its mark, user and generation under its KEK, and no other."""

from __future__ import annotations

import base64

import pytest

from polyadapt.errors import SecretsUnavailable
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.rows import RowSealer

KEK, OTHER = SecretKey(bytes(range(32))), SecretKey(bytes(32))
MARK = "sha256:mark"
BITS = "0110100110010110"


class Keys(dict):
    def row_key(self, digest, make):
        return self.setdefault(digest, make())


@pytest.fixture
def keys() -> Keys:
    return Keys()


def test_a_row_opens_as_it_was_sealed_in_every_process_that_has_the_key(keys):
    text = RowSealer(KEK, keys).of(MARK).seal("ann", 1, BITS)
    assert RowSealer(KEK, keys).of(MARK).open("ann", 1, text) == BITS


def test_the_same_bits_are_never_the_same_text(keys):
    rows = RowSealer(KEK, keys).of(MARK)
    texts = {rows.seal("ann", 1, BITS) for _ in range(10)}
    assert len(texts) == 10
    assert not any(BITS in text for text in texts)


def test_a_row_is_bound_to_its_mark_user_and_generation(keys):
    sealer = RowSealer(KEK, keys)
    text = sealer.of(MARK).seal("ann", 1, BITS)
    keys["sha256:twin"] = keys[MARK]  # even under the same key
    for mark, user, generation in ((MARK, "bob", 1), (MARK, "ann", 2), ("sha256:x", "ann", 1)):
        with pytest.raises(SecretsUnavailable, match="does not open"):
            sealer.of(mark).open(user, generation, text)
    with pytest.raises(SecretsUnavailable):  # the key is bound to its mark as well
        RowSealer(KEK, keys).of("sha256:twin")


@pytest.mark.parametrize("change", [
    lambda text: BITS,
    lambda text: text[:-8],
    lambda text: text.removeprefix("sealed:"),
    lambda text: "sealed:!",
    lambda text: "sealed:",
    lambda text: text[:20] + ("A" if text[20] != "A" else "B") + text[21:],
])  # fmt: skip
def test_what_was_changed_or_never_sealed_does_not_open_and_is_not_shown(keys, change):
    rows = RowSealer(KEK, keys).of(MARK)
    text = change(rows.seal("ann", 1, BITS))
    with pytest.raises(SecretsUnavailable) as caught:
        rows.open("ann", 1, text)
    assert BITS not in caught.value.message
    assert caught.value.__cause__ is None


def test_another_kek_opens_nothing(keys):
    RowSealer(KEK, keys).of(MARK)
    with pytest.raises(SecretsUnavailable, match=f"not under the key {OTHER.id}"):
        RowSealer(OTHER, keys).of(MARK)


def test_what_is_kept_shows_no_key(keys):
    sealer = RowSealer(KEK, keys)
    rows = sealer.of(MARK)
    text = keys[MARK] + repr(sealer) + repr(rows)
    assert base64.b64encode(bytes(range(32))).decode() not in text
    assert KEK.to_text() not in text
