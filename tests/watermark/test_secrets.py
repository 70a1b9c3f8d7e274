"""Secrets at rest: another key, a cut or a changed file is said so; nothing shows in the clear."""

from __future__ import annotations

import base64
import json
import logging
import stat

import pytest

from polyadapt.config import WatermarkConfig, load_config
from polyadapt.errors import InvalidRequest, SecretsUnavailable, StartupError
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.keyset import Keyset
from polyadapt.watermark.secrets import (
    kek_id_of,
    kek_of,
    read_kek,
    rewrap,
    seal,
    unseal,
    write_file,
    write_kek,
)

KEK, OTHER = SecretKey(bytes(range(32))), SecretKey(bytes(32))
PAYLOAD = b"canary-7f3a: the codebook"


def test_what_was_sealed_comes_back_and_never_looks_the_same_twice():
    sealed = seal(PAYLOAD, KEK, "mark")
    assert unseal(sealed, KEK, "mark") == PAYLOAD
    assert seal(PAYLOAD, KEK, "mark") != sealed
    for clear in (PAYLOAD, base64.b64encode(PAYLOAD), KEK.to_text().encode()):
        assert clear not in sealed


def test_another_kek_is_named_by_its_id_and_not_shown():
    sealed = seal(PAYLOAD, KEK, "mark")
    with pytest.raises(SecretsUnavailable, match=f"not under the key {OTHER.id}") as caught:
        unseal(sealed, OTHER, "mark")
    assert OTHER.to_text() not in str(caught.value)
    assert kek_id_of(sealed, "mark") == KEK.id


def test_several_keks_open_what_each_sealed_and_the_first_one_seals():
    both = Keyset([OTHER, KEK])
    assert unseal(seal(PAYLOAD, KEK, "mark"), both, "mark") == PAYLOAD
    sealed = seal(PAYLOAD, both, "mark")
    assert kek_id_of(sealed, "mark") == OTHER.id
    assert unseal(sealed, OTHER, "mark") == PAYLOAD
    third = SecretKey(b"3" * 32)
    with pytest.raises(SecretsUnavailable, match=f"{KEK.id} or {third.id}.*give '{OTHER.id}'"):
        unseal(sealed, Keyset([KEK, third]), "mark")
    assert KEK.to_text() not in repr(both)


def test_a_kek_that_only_claims_the_id_opens_nothing():
    fields = json.loads(seal(PAYLOAD, KEK, "mark"))
    fields["kek_id"] = OTHER.id
    with pytest.raises(SecretsUnavailable, match="changed or cut"):
        unseal(json.dumps(fields).encode(), OTHER, "mark")


def test_every_cut_of_the_file_is_refused():
    sealed = seal(PAYLOAD, KEK, "mark")
    for length in range(len(sealed) - 1):
        if sealed[:length].strip() != sealed.strip():
            with pytest.raises(SecretsUnavailable):
                unseal(sealed[:length], KEK, "mark")


@pytest.mark.parametrize("field", ["wrapped_key", "sealed"])
def test_every_changed_byte_is_found(field):
    fields = json.loads(seal(PAYLOAD, KEK, "mark"))
    data = base64.b64decode(fields[field])
    for index in range(len(data)):
        changed = bytearray(data)
        changed[index] ^= 1
        with pytest.raises(SecretsUnavailable, match="changed or cut"):
            unseal(_with(fields, field, base64.b64encode(bytes(changed)).decode()), KEK, "mark")
    for short in ("", "AA==", "no base64!"):
        with pytest.raises(SecretsUnavailable, match="changed or cut"):
            unseal(_with(fields, field, short), KEK, "mark")


def test_a_secret_opens_for_its_purpose_alone():
    sealed = seal(PAYLOAD, KEK, "queries")
    with pytest.raises(SecretsUnavailable, match="something else than a sealed mark"):
        unseal(sealed, KEK, "mark")
    renamed = _with(json.loads(sealed), "purpose", "mark")
    with pytest.raises(SecretsUnavailable, match="changed or cut"):
        unseal(renamed, KEK, "mark")


def test_parts_of_two_files_do_not_make_one():
    one, two = (json.loads(seal(PAYLOAD, KEK, "mark")) for _ in range(2))
    with pytest.raises(SecretsUnavailable, match="changed or cut"):
        unseal(_with(one, "sealed", two["sealed"]), KEK, "mark")


@pytest.mark.parametrize(
    ("change", "words"),
    [({"format": "polyadapt sealed 2"}, "another format"), ({"more": "x"}, "changed or cut")],
)
def test_another_form_is_refused(change, words):
    fields = {**json.loads(seal(PAYLOAD, KEK, "mark")), **change}
    with pytest.raises(SecretsUnavailable, match=words):
        unseal(json.dumps(fields).encode(), KEK, "mark")


def test_rewrapping_changes_the_kek_and_leaves_the_sealed_bytes_alone():
    sealed = seal(PAYLOAD, KEK, "mark")
    again = rewrap(sealed, KEK, OTHER, "mark")
    assert unseal(again, OTHER, "mark") == PAYLOAD
    assert json.loads(again)["sealed"] == json.loads(sealed)["sealed"]
    with pytest.raises(SecretsUnavailable, match="not under the key"):
        unseal(again, KEK, "mark")


def test_a_damaged_secret_is_not_rewrapped():
    fields = json.loads(seal(PAYLOAD, KEK, "mark"))
    with pytest.raises(SecretsUnavailable):
        rewrap(_with(fields, "sealed", "AAAA"), KEK, OTHER, "mark")


# ------------------------------------------------------------------------------- where the KEK is
def test_the_kek_comes_from_a_file_that_only_its_owner_reads(tmp_path):
    file = tmp_path / "kek"
    write_kek(KEK, file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert read_kek(file) == KEK
    found = kek_of(WatermarkConfig(mark_kek_file=file))
    assert (found.primary, found.ids) == (KEK, (KEK.id,))
    with pytest.raises(StartupError, match="is there already"):
        write_kek(OTHER, file)


def test_the_kek_comes_from_the_environment():
    environ = {"POLYADAPT_MARK_KEK": KEK.to_text()}
    config = load_config({}, environ=environ)
    assert kek_of(config.watermark).primary == KEK
    assert KEK.to_text() not in repr(config)
    assert KEK.to_text() not in config.model_dump_json()


@pytest.mark.parametrize("space", ["\n", " ", "\r\n\n"])
def test_several_keks_are_given_newest_first(tmp_path, space):
    text = f"{OTHER.to_text()}{space}{KEK.to_text()}\n"
    file = tmp_path / "keks"
    file.write_text(text)
    given = load_config({}, environ={"POLYADAPT_MARK_KEK": text}).watermark
    for config in (WatermarkConfig(mark_kek_file=file), given):
        found = kek_of(config)
        assert (found.primary, found.ids) == (OTHER, (OTHER.id, KEK.id))


def test_a_bad_key_among_several_is_refused_without_showing_any(tmp_path):
    for text in (f"{KEK.to_text()}\nhunter2-hunter2\n", f"{KEK.to_text()} {KEK.to_text()}", " "):
        config = load_config({}, environ={"POLYADAPT_MARK_KEK": text}).watermark
        with pytest.raises(InvalidRequest) as caught:
            kek_of(config)
        assert "hunter2" not in str(caught.value)
        assert KEK.to_text() not in str(caught.value)


def test_without_a_kek_both_ways_to_give_one_are_named():
    with pytest.raises(StartupError, match=r"--kek-file FILE.*POLYADAPT_MARK_KEK"):
        kek_of(WatermarkConfig())


def test_a_bad_kek_file_is_refused_without_showing_it(tmp_path):
    with pytest.raises(StartupError, match="cannot be read"):
        read_kek(tmp_path / "none")
    file = tmp_path / "kek"
    file.write_text("hunter2-hunter2")
    with pytest.raises(InvalidRequest, match="openssl rand") as caught:
        read_kek(file)
    assert "hunter2" not in str(caught.value)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "secret"
    write_file(file, b"one")
    write_file(file, b"two")
    assert file.read_bytes() == b"two"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    with pytest.raises(StartupError, match="cannot be written"):
        write_file(tmp_path / "no" / "such", b"")


def test_nothing_is_logged(caplog):
    with caplog.at_level(logging.DEBUG):
        unseal(seal(PAYLOAD, KEK, "mark"), KEK, "mark")
    assert caplog.text == ""


def _with(fields: dict[str, str], field: str, value: str) -> bytes:
    return json.dumps({**fields, field: value}).encode()
