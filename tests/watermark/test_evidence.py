"""Evidence: any change of a record is found, and only the trusted key makes one."""

from __future__ import annotations

import json

import pytest

from polyadapt.errors import EvidenceRejected
from polyadapt.watermark.codebook import Codebook, Design
from polyadapt.watermark.evidence import (
    Signer,
    canonical,
    describe_readings,
    describe_trace,
    digest,
    number,
    verify,
)
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.statistics import BitRule
from polyadapt.watermark.trace import trace

KEY = SecretKey(bytes(range(32)))
SIGNER = Signer(KEY)
RECORD = {
    "kind": "trace",
    "version": 1,
    "suspect": "modèle à côté",
    "p_value": number(1.5e-7),
    "bits": [1, 0, None, True],
    "nested": {"z": 1, "a": ["x"]},
}


def test_a_signed_record_is_read_back_with_the_public_key_alone():
    signed = SIGNER.sign(RECORD)
    assert verify(signed.encode(), SIGNER.public_key) == RECORD
    assert Signer(KEY).sign(RECORD) == signed  # Ed25519 is deterministic


def test_how_the_file_is_written_does_not_matter():
    fields = json.loads(SIGNER.sign(RECORD))
    compact = json.dumps(fields, ensure_ascii=True, separators=(",", ":"))
    assert verify(compact.encode(), SIGNER.public_key) == RECORD


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"p_value": "1.5e-08"},
        {"bits": [1, 0, None, False]},
        {"bits": [1, 0, None, 1]},
        {"bits": [1, 0, 0, True]},
        {"extra": None},
        {"nested": {"z": 1, "a": ["x", "x"]}},
    ],
)
def test_any_change_of_the_record_is_found(change):
    fields = json.loads(SIGNER.sign(RECORD))
    fields["record"] |= change
    with pytest.raises(EvidenceRejected, match="changed after it was signed"):
        verify(json.dumps(fields).encode(), SIGNER.public_key)


def test_a_record_of_another_key_is_refused_even_if_it_brings_its_own():
    forged = Signer(SecretKey(bytes(32))).sign(RECORD)
    with pytest.raises(EvidenceRejected, match="another key than the one that is trusted"):
        verify(forged.encode(), SIGNER.public_key)
    fields = json.loads(forged)
    fields["signature"]["public_key"] = SIGNER.public_key
    with pytest.raises(EvidenceRejected, match="changed after it was signed"):
        verify(json.dumps(fields).encode(), SIGNER.public_key)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{}",
        b'{"record": {}}',
        b'{"record": {}, "signature": {}}',
        b'{"record": [], "signature": {}}',
        b'{"record": {}, "record": {}, "signature": {}}',
        b'{"record": {}, "signature": {"algorithm": "none", "public_key": "", "value": ""}}',
    ],
)
def test_what_is_no_record_is_refused(text):
    with pytest.raises(EvidenceRejected):
        verify(text, SIGNER.public_key)


@pytest.mark.parametrize("value", ["", "AA==", "%", None, 7])
def test_a_malformed_signature_is_refused(value):
    fields = json.loads(SIGNER.sign(RECORD))
    fields["signature"]["value"] = value
    with pytest.raises(EvidenceRejected, match="does not fit"):
        verify(json.dumps(fields).encode(), SIGNER.public_key)


def test_canonical_json_is_that_of_rfc_8785_on_what_it_takes():
    """The example of the RFC's section 3.2.3 and escapes of 3.2.2.2, without its numbers."""
    value = {"b": '\u20ac$\u000f\nA\'B"\\\\"/', "a": [None, True, False], "": 56}
    expected = '{"":56,"a":[null,true,false],"b":"\u20ac$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'
    assert canonical(value) == expected.encode()


@pytest.mark.parametrize(
    "value", [{"a": 0.5}, {"a": [1.0]}, {"a": 2**53}, {"ä": 1}, {1: 2}, {"a": b"x"}, {"a": {1}}]
)
def test_what_has_no_single_text_is_not_signed(value):
    with pytest.raises(ValueError, match="record"):
        SIGNER.sign(value)


def test_numbers_are_written_so_that_they_come_back_exactly():
    for value in (0.1, 1e-300, 1 / 3, 0.0, 1.0):
        assert float(number(value)) == value


def test_readings_and_traces_can_be_signed():
    book = Codebook(KEY, Design.parse("random"), 32)
    found = trace(book, ["ann", "bob"], book.row("ann").tolist())
    readings = (BitRule().read((0, 12), 16, (0.1, 0.1)), BitRule().read((3, 3), 16, (0.1, 0.1)))
    record = {"trace": describe_trace(found), "bits": describe_readings(readings)}
    back = verify(SIGNER.sign(record).encode(), SIGNER.public_key)
    assert back["trace"]["verdict"] == "named"
    assert back["trace"]["accused"][0]["user"] == "ann"
    assert float(back["trace"]["accused"][0]["p_value"]) == found.accused[0].p_value
    assert [entry["value"] for entry in back["bits"]] == [1, None]


def test_a_signer_shows_its_public_key_only():
    assert repr(SIGNER) == f"Signer({SIGNER.public_key})"
    assert digest(b"abc").startswith("sha256:ba7816bf")
