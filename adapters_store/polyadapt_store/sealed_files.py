"""A file of a mark as it lies on any disk: sealed whole with AES-256-GCM, under one key of the
registry's. Knows neither where that key is kept nor what files hold.

A sealed file is one head, then the ciphertext and its tag. Each file has a key of its own, derived
from the registry's, the adapter's digest, its name, its size and its SHA-256. So the same file is
always sealed to the same bytes, as a store that goes by content needs, and no two contents ever
share a key and a nonce, even where a file was changed on a disk before it was sealed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import struct
from pathlib import Path
from typing import NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from polyadapt.errors import AdapterUnavailable, InvalidRequest, SecretsUnavailable
from polyadapt_store.manifest import FileEntry

KEY_BYTES = 32
MAX_BYTES = 2**31 - 1 - 16  # what one call of the cipher takes, with its tag

_MAGIC = b"PASEALED"  # as the length of a safetensors header, more than any file has
_HEAD = struct.Struct("<8s8sQ32s")  # magic, id of the registry's key, size and SHA-256 of the file
_DOMAIN = "polyadapt file 1"
_NONCE = bytes(12)  # a key seals one content and nothing else: see the module


class FileSealer:
    """Seals and opens files under one key, which shows its bytes nowhere."""

    __slots__ = ("_key", "id")

    def __init__(self, key: bytes) -> None:
        """Raise InvalidRequest, without the bytes, for any length other than KEY_BYTES."""
        if len(key) != KEY_BYTES:
            raise InvalidRequest(f"the key of files has {len(key)} bytes, expected {KEY_BYTES}")
        self._key = bytes(key)
        self.id = self._derive("id")[:8]  # says which key it is and nothing about it

    @classmethod
    def from_text(cls, text: str) -> FileSealer:
        """Return what `to_text` wrote; raises InvalidRequest, without the text."""
        try:
            return cls(base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError):
            raise InvalidRequest("the key of files is not base64") from None

    def to_text(self) -> str:
        """Return the key in base64: only for the pipe to an engine's process."""
        return base64.b64encode(self._key).decode("ascii")

    def seal(self, plain: bytes, digest: str, name: str) -> bytes:
        """Return the file `name` of the adapter `digest` sealed; raises InvalidRequest for more
        than MAX_BYTES.
        """
        if len(plain) > MAX_BYTES:
            raise InvalidRequest(
                f"{name} has {len(plain)} bytes, and a mark's files may have {MAX_BYTES}"
            )
        head = _HEAD.pack(_MAGIC, self.id, len(plain), hashlib.sha256(plain).digest())
        return head + self._cipher(head, digest, name).encrypt(_NONCE, plain, head)

    def open(self, sealed: bytes, digest: str, name: str) -> bytes:
        """Return the file that was sealed; raises SecretsUnavailable for another key, and
        AdapterUnavailable for what was changed, cut, or is another file.
        """
        head = sealed[: _HEAD.size]
        if len(head) == _HEAD.size and _HEAD.unpack(head)[1] != self.id:
            raise SecretsUnavailable(
                f"{name} of {digest} is sealed under another registry's key; upload it again"
            )
        try:
            if len(head) < _HEAD.size or _HEAD.unpack(head)[0] != _MAGIC:
                raise ValueError("not sealed")
            return self._cipher(head, digest, name).decrypt(_NONCE, sealed[_HEAD.size :], head)
        except (InvalidTag, ValueError):
            raise AdapterUnavailable(
                f"{name} of {digest} was changed or cut after it was sealed; upload it again"
            ) from None

    def _cipher(self, head: bytes, digest: str, name: str) -> AESGCM:
        return AESGCM(self._derive("file", digest, name, head.hex()))

    def _derive(self, *parts: str) -> bytes:
        message = json.dumps([_DOMAIN, *parts]).encode()
        return hmac.new(self._key, message, hashlib.sha256).digest()

    def __repr__(self) -> str:
        return f"FileSealer(id={self.id.hex()})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a FileSealer is not pickled or copied")


def is_sealed(path: Path) -> bool:
    """Whether the file lies sealed here, as far as its first bytes say."""
    with path.open("rb") as file:
        return begins_sealed(file.read(len(_MAGIC)))


def is_sealed_or_gone(path: Path) -> bool:
    """The same, and True where there is no file."""
    try:
        return is_sealed(path)
    except FileNotFoundError:
        return True


def begins_sealed(start: bytes) -> bool:
    """Whether a file that begins so is sealed; no safetensors file begins so."""
    return start[: len(_MAGIC)] == _MAGIC


def read_file(path: Path, digest: str, name: str, sealer: FileSealer | None) -> bytes | None:
    """Return a sealed file's content, None where the file lies in the clear; raises
    SecretsUnavailable without the key, and as FileSealer.open.
    """
    if not is_sealed(path):
        return None
    if sealer is None:
        raise SecretsUnavailable(
            f"{name} of {digest} is sealed and this server has no key that opens it; start it with "
            "the registry's POLYADAPT_MARK_KEK_FILE, or POLYADAPT_MARK_KEK"
        )
    return sealer.open(path.read_bytes(), digest, name)


def plain_entry(entry: FileEntry, path: Path, digest: str, sealer: FileSealer | None) -> FileEntry:
    """Return what a file's entry is in the clear; `entry` is of the file as it lies at `path`.
    Raises as read_file.
    """
    plain = read_file(path, digest, entry.name, sealer)
    if plain is None:
        return entry
    return FileEntry(entry.name, len(plain), hashlib.sha256(plain).hexdigest())
