"""A secret of 32 bytes and what is derived from it. Knows neither codes nor files.

A key never shows its bytes: not in repr, str, format, errors, pickles or copies.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from typing import NoReturn

from polyadapt.errors import InvalidRequest

KEY_BYTES = 32
_DOMAIN = b"polyadapt mark 1"


class SecretKey:
    """The root of everything secret of one mark, or the key that other keys are wrapped in."""

    __slots__ = ("_secret", "id")

    def __init__(self, secret: bytes) -> None:
        """Raise InvalidRequest, without the bytes, for any length other than KEY_BYTES."""
        num_bytes = len(secret)
        if num_bytes != KEY_BYTES:
            raise InvalidRequest(f"the secret key has {num_bytes} bytes, expected {KEY_BYTES}")
        self._secret = bytes(secret)
        # Public: 64 bits of a digest of 256 random bits say which key it is and nothing about it.
        self.id = self.derive("id").hex()[:16]

    @classmethod
    def generate(cls) -> SecretKey:
        """Return a new key from the system's randomness."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def from_text(cls, text: str) -> SecretKey:
        """Return the key that `to_text` wrote; raises InvalidRequest, without the text."""
        try:
            secret = base64.b64decode(text.strip(), validate=True)
        except (binascii.Error, ValueError):
            raise InvalidRequest(
                f"the secret key is not base64; give {KEY_BYTES} random bytes in base64, such as "
                f"`openssl rand -base64 {KEY_BYTES}` prints"
            ) from None
        return cls(secret)

    def to_text(self) -> str:
        """Return the secret in base64. Only what seals it or writes a key file may ask for it."""
        return base64.b64encode(self._secret).decode("ascii")

    def derive(self, purpose: str, *parts: str | int) -> bytes:
        """Return 32 bytes: HMAC-SHA256 (RFC 2104) of the purpose and the parts.

        Each part carries its type and length, so that different lists never give the same message.
        """
        message = bytearray(_DOMAIN)
        for part in (purpose, *parts):
            kind = b"i" if isinstance(part, int) else b"s"
            data = str(part).encode("utf-8")
            message += kind + len(data).to_bytes(8, "big") + data
        return hmac.new(self._secret, message, hashlib.sha256).digest()

    def stream(self, num_bytes: int, purpose: str, *parts: str | int) -> bytes:
        """Return `num_bytes` pseudo-random bytes: SHAKE-256 (FIPS 202) of `derive`."""
        return hashlib.shake_256(self.derive(purpose, *parts)).digest(num_bytes)

    def subkey(self, purpose: str, *parts: str | int) -> SecretKey:
        """Return a key of its own for one purpose, which tells nothing of this one."""
        return SecretKey(self.derive("subkey", purpose, *parts))

    def __repr__(self) -> str:
        return f"SecretKey(id={self.id})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SecretKey):
            return NotImplemented
        return hmac.compare_digest(self._secret, other._secret)

    def __hash__(self) -> int:
        return hash(self.id)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a SecretKey is not pickled or copied; seal it with watermark.secrets")
