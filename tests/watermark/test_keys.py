"""Keys: what is derived is fixed for ever, and nothing shows the bytes."""

from __future__ import annotations

import copy
import hashlib
import hmac
import pickle

import pytest

from polyadapt.errors import InvalidRequest
from polyadapt.watermark.keys import KEY_BYTES, SecretKey

SECRET = bytes(range(KEY_BYTES))
KEY = SecretKey(SECRET)


def test_derivation_is_hmac_sha256_over_typed_and_length_prefixed_parts():
    """Written out by hand: a change would lose every mark that was ever made."""
    message = b"polyadapt mark 1" + b"s" + (4).to_bytes(8, "big") + b"code"
    message += b"s" + (5).to_bytes(8, "big") + b"alice" + b"i" + (2).to_bytes(8, "big") + b"-7"
    expected = hmac.new(SECRET, message, hashlib.sha256).digest()
    assert KEY.derive("code", "alice", -7) == expected
    assert KEY.stream(100, "code", "alice", -7) == hashlib.shake_256(expected).digest(100)


def test_parts_that_join_to_the_same_text_give_different_keys():
    found = {
        KEY.derive("p", *parts)
        for parts in [("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ("1",), (1,), ()]
    }
    assert len(found) == 7


def test_a_subkey_is_another_key():
    assert KEY.subkey("text") != KEY
    assert KEY.subkey("text") == SecretKey(SECRET).subkey("text")


def test_text_comes_back_and_bad_text_is_refused_without_showing_it():
    assert SecretKey.from_text(f"  {KEY.to_text()}\n") == KEY
    for text in ("hunter2!", "aHVudGVyMg==", ""):
        with pytest.raises(InvalidRequest) as caught:
            SecretKey.from_text(text)
        assert not text or text not in str(caught.value)


def test_no_form_of_a_key_shows_its_bytes():
    key = SecretKey.generate()
    for shown in (repr(key), str(key), f"{key}", f"{key!r}", repr({"key": key}), repr([key])):
        assert key.to_text() not in shown
        assert SECRET.hex() not in shown
    assert key.id in repr(key)
    for act in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="not pickled"):
            act(key)
