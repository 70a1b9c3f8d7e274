"""Secrets at rest: sealed with AES-256-GCM under a key of their own, which is wrapped in the KEK.

The KEK (key-encrypting key) comes from a file or the environment and is never stored beside what it
opens. Changing it wraps the small inner key anew and leaves the rest as it is; meanwhile several
may be given, and what is sealed names its own. Torch-free.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from polyadapt.config import WatermarkConfig
from polyadapt.errors import SecretsUnavailable, StartupError
from polyadapt.watermark.keys import KEY_BYTES, SecretKey
from polyadapt.watermark.keyset import Keyset
from polyadapt_store.blobs import sync_directory
from polyadapt_store.strict_json import StrictJsonError, parse_object

_FORMAT = "polyadapt sealed 1"
_FIELDS = frozenset({"format", "purpose", "kek_id", "wrapped_key", "sealed"})
_NONCE_BYTES = 12
_ID_CHARS = 16
MAX_BYTES = 64 << 20

Kek = SecretKey | Keyset


def kek_of(config: WatermarkConfig) -> Keyset:
    """Return the KEKs that the settings name, newest first; raises StartupError if there is none,
    or InvalidRequest for a bad one.
    """
    if config.mark_kek is not None:
        return Keyset.from_text(config.mark_kek.get_secret_value())
    if config.mark_kek_file is None:
        raise StartupError(
            "no key to open the mark's secrets with; give --kek-file FILE, or set "
            "POLYADAPT_MARK_KEK_FILE, or POLYADAPT_MARK_KEK to 32 random bytes in base64"
        )
    return Keyset.from_text(_read_text(config.mark_kek_file))


def text_master_of(config: WatermarkConfig) -> SecretKey | None:
    """Return the key that texts are marked with, None where the settings name none; raises
    StartupError or InvalidRequest for a bad one.
    """
    if config.text_mark_key is not None:
        return SecretKey.from_text(config.text_mark_key.get_secret_value())
    return None if config.text_mark_key_file is None else read_kek(config.text_mark_key_file)


def read_kek(file: Path) -> SecretKey:
    """Return the one key in a file of base64; raises StartupError, InvalidRequest."""
    return SecretKey.from_text(_read_text(file))


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        raise StartupError(
            f"the key file {file} cannot be read as text; `polyadapt mark keygen` writes one"
        ) from None


def write_kek(kek: SecretKey, file: Path) -> None:
    """Write the key for its owner alone; raises StartupError if the file is there."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise StartupError(f"the key file {file} is there already; name another one") from None
    except OSError as error:
        raise StartupError(f"the key file {file} cannot be written: {error.strerror}") from None
    with open(descriptor, "w", encoding="ascii") as out:
        out.write(kek.to_text() + "\n")


def seal(payload: bytes, kek: Kek, purpose: str) -> bytes:
    """Return `payload` sealed under the first KEK, as JSON in UTF-8. `purpose` is bound to it and
    stays readable.
    """
    inner = secrets.token_bytes(KEY_BYTES)
    first = kek.primary if isinstance(kek, Keyset) else kek
    return _pack(purpose, first, inner, _encrypt(inner, payload, _bound(purpose, "payload")))


def unseal(sealed: bytes, kek: Kek, purpose: str) -> bytes:
    """Return what was sealed; raises SecretsUnavailable: another KEK, a truncated or changed file,
    or something that was sealed for another purpose.
    """
    fields = _parse(sealed, purpose)
    inner = _unwrap(fields, kek, purpose)
    payload = _decrypt(inner, fields["sealed"], _bound(purpose, "payload"))
    if payload is None:
        raise _damaged(purpose)
    return payload


def rewrap(sealed: bytes, old: Kek, new: SecretKey, purpose: str) -> bytes:
    """Return the same secret under another KEK; raises SecretsUnavailable as `unseal`."""
    unseal(sealed, old, purpose)  # a file that could not be opened later is said to be so now
    fields = _parse(sealed, purpose)
    return _pack(purpose, new, _unwrap(fields, old, purpose), _decode(fields["sealed"]))


def kek_id_of(sealed: bytes, purpose: str) -> str:
    """Return the id of the KEK that opens this; raises SecretsUnavailable."""
    return _parse(sealed, purpose)["kek_id"]


def write_file(path: Path, data: bytes) -> None:
    """Replace the file at once, readable by its owner alone: after a crash it is the old or the new
    one. Raises StartupError.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StartupError(f"{path} cannot be written: {error.strerror}") from None


def _pack(purpose: str, kek: SecretKey, inner: bytes, sealed: bytes) -> bytes:
    wrapped = _encrypt(_wrapping_key(kek), inner, _bound(purpose, "key"))
    fields = {
        "format": _FORMAT,
        "purpose": purpose,
        "kek_id": kek.id,
        "wrapped_key": _encode(wrapped),
        "sealed": _encode(sealed),
    }
    return (json.dumps(fields, indent=1) + "\n").encode()


def _parse(sealed: bytes, purpose: str) -> Mapping[str, str]:
    if len(sealed) > MAX_BYTES:
        raise SecretsUnavailable(f"the sealed {purpose} has more than {MAX_BYTES} bytes")
    try:
        fields = parse_object(sealed, where=f"the sealed {purpose}", max_depth=1)
    except StrictJsonError as error:
        raise SecretsUnavailable(
            f"{error}; the file is truncated or was changed: restore it from a backup"
        ) from None
    if set(fields) != _FIELDS or any(not isinstance(value, str) for value in fields.values()):
        raise _damaged(purpose)
    if fields["format"] != _FORMAT:
        raise SecretsUnavailable(
            f"the sealed {purpose} is of another format, expected {_FORMAT!r}; it was written by "
            "another release"
        )
    if fields["purpose"] != purpose:
        raise SecretsUnavailable(f"the file holds something else than a sealed {purpose}")
    return fields


def _unwrap(fields: Mapping[str, str], kek: Kek, purpose: str) -> bytes:
    given = kek if isinstance(kek, Keyset) else Keyset([kek])
    named = given.find(fields["kek_id"])
    if named is None:
        raise SecretsUnavailable(
            f"the sealed {purpose} is not under the key {' or '.join(given.ids)} that was given; "
            f"give {fields['kek_id'][:_ID_CHARS]!r}, which it was sealed under or re-wrapped to"
        )
    inner = _decrypt(_wrapping_key(named), fields["wrapped_key"], _bound(purpose, "key"))
    if inner is None:
        raise _damaged(purpose)
    return inner


def _damaged(purpose: str) -> SecretsUnavailable:
    return SecretsUnavailable(
        f"the sealed {purpose} was changed or cut after it was written: restore it from a backup"
    )


def _wrapping_key(kek: SecretKey) -> bytes:
    return kek.derive("wrap")


def _bound(purpose: str, part: str) -> bytes:
    # What is authenticated beside the bytes: neither part opens as the other, or as another secret.
    return json.dumps([_FORMAT, purpose, part]).encode()


def _encrypt(key: bytes, payload: bytes, bound: bytes) -> bytes:
    # Random nonces are safe: an inner key seals once, and a KEK far fewer times than 2^32.
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, payload, bound)


def _decrypt(key: bytes, text: str, bound: bytes) -> bytes | None:
    data = _decode(text)
    try:
        return AESGCM(key).decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], bound)
    except (InvalidTag, ValueError):  # ValueError: a nonce that is too short
        return None


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""
