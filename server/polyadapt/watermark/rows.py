"""Seals the bits of users at rest: AES-256-GCM under a key per mark, which is wrapped in the KEK.

What is bound to each row is its mark, its user and its generation, so that no row passes for
another. Torch-free; knows no database but what keeps the wrapped keys.
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
from collections.abc import Callable
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from polyadapt.errors import SecretsUnavailable
from polyadapt.watermark.keys import KEY_BYTES
from polyadapt.watermark.secrets import Kek, seal, unseal

_FORMAT = "polyadapt row 1"
_PREFIX = "sealed:"
_NONCE_BYTES = 12


def row_key_purpose(digest: str) -> str:
    """Return what the key of a mark's rows is sealed for."""
    return f"key of signatures {digest}"


class KeyStore(Protocol):
    """What is needed of polyadapt_store's MarkBook."""

    def row_key(self, digest: str, make: Callable[[], str]) -> str: ...


class RowSealer:
    """A RowCipher; see polyadapt_store.signatures. Keeps the opened keys."""

    def __init__(self, kek: Kek, keys: KeyStore) -> None:
        self._kek = kek
        self._keys = keys
        self._opened: dict[str, MarkRows] = {}

    def of(self, digest: str) -> MarkRows:
        """Return what seals the rows of a mark, with a new key if it has none yet.

        Raises SecretsUnavailable where its key is sealed under another KEK, or was changed.
        """
        known = self._opened.get(digest)
        if known is None:
            purpose = row_key_purpose(digest)

            def make() -> str:
                return seal(secrets.token_bytes(KEY_BYTES), self._kek, purpose).decode()

            sealed = self._keys.row_key(digest, make)
            known = MarkRows(digest, unseal(sealed.encode(), self._kek, purpose))
            self._opened[digest] = known
        return known

    def __repr__(self) -> str:
        return f"RowSealer({self._kek!r})"


class MarkRows:
    """The rows of one mark."""

    def __init__(self, digest: str, key: bytes) -> None:
        self._digest = digest
        self._cipher = AESGCM(key)

    def seal(self, user: str, generation: int, bits: str) -> str:
        """Return the bits sealed, as text."""
        # Random nonces are safe: a mark has far fewer than 2^32 rows.
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed = nonce + self._cipher.encrypt(nonce, bits.encode(), self._bound(user, generation))
        return _PREFIX + base64.b64encode(sealed).decode("ascii")

    def open(self, user: str, generation: int, text: str) -> str:
        """Return the bits; raises SecretsUnavailable, without the text, for any other row's and for
        what was changed or never sealed.
        """
        try:
            if not text.startswith(_PREFIX):
                raise ValueError("not sealed")
            data = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
            nonce, sealed = data[:_NONCE_BYTES], data[_NONCE_BYTES:]
            return self._cipher.decrypt(nonce, sealed, self._bound(user, generation)).decode()
        except (InvalidTag, ValueError, binascii.Error):
            raise SecretsUnavailable(
                "a signature does not open: it was changed after it was issued, or is another's; "
                "restore the registry from a backup or issue another one"
            ) from None

    def _bound(self, user: str, generation: int) -> bytes:
        return json.dumps([_FORMAT, self._digest, user, generation]).encode()
