"""The keys of cached KV pages: what must be equal for one sequence to read another's page.

Torch-free. Knows no pages and no queue, and no names: adapters are digests here.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from polyadapt.types import Request

_LENGTH = struct.Struct(">Q")
_FLOAT = struct.Struct(">d")
_KEY_BYTES = 32


class PageKeys:
    """Makes keys for one engine: its base, its KV dtype, its page size, its exact mode."""

    def __init__(
        self, *, base_digest: str, kv_dtype: str, page_size: int, is_exact: bool = False
    ) -> None:
        self._engine = (base_digest, kv_dtype, is_exact)
        self._pack = struct.Struct(f"<{page_size}i").pack
        # encode((parent, tokens)) around its two contents, whose lengths never change: a page's key
        # costs one hash and no walk.
        self._head = b"(" + _LENGTH.pack(2) + b"b" + _LENGTH.pack(_KEY_BYTES)
        self._middle = b"b" + _LENGTH.pack(4 * page_size)

    def root(self, request: Request, kv_identities: tuple[str, ...]) -> bytes:
        """The parent of a request's first page: everything but its tokens.

        kv_identities stand beside request.adapters: the digest, or "" for an adapter that leaves
        every key and value as the base's. Those, and adapters at scale 0, are left out, so that
        such a request shares pages with the base.
        """
        adapters = tuple(
            (identity, float(applied.scale))
            for applied, identity in zip(request.adapters, kv_identities, strict=True)
            if identity and applied.scale != 0.0
        )
        return _sha256(encode((*self._engine, request.cache_salt, adapters)))

    def page(self, parent: bytes, token_ids: Sequence[int]) -> bytes:
        """The key of the full page that holds these page_size tokens behind the parent's tokens."""
        return _sha256(self._head + parent + self._middle + self._pack(*token_ids))


def encode(value: object) -> bytes:
    """Return a value as bytes that no other value has: a type letter, lengths, the content.

    Tuples of None, bool, int (64 bit), float (IEEE 754 bits), str (UTF-8), bytes and tuples; raises
    TypeError for anything else.
    """
    if value is None:
        return b"n"
    if isinstance(value, bool):
        return b"t" if value else b"f"
    if isinstance(value, int):
        return b"i" + value.to_bytes(8, "big", signed=True)
    if isinstance(value, float):
        return b"d" + _FLOAT.pack(value)
    if isinstance(value, str):
        content = value.encode()
        return b"s" + _LENGTH.pack(len(content)) + content
    if isinstance(value, bytes):
        return b"b" + _LENGTH.pack(len(value)) + value
    if isinstance(value, tuple):
        return b"(" + _LENGTH.pack(len(value)) + b"".join(map(encode, value))
    raise TypeError(f"{type(value).__name__} is no part of a page's key")


def _sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
