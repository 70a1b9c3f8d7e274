"""The keys of cached KV pages: what must be equal for one sequence to read another's page.

Torch-free. Knows no pages and no queue, and no names: adapters are digests here.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from polyadapt.adapters.gates import NEVER, GatedAdapter

_LENGTH = struct.Struct(">Q")
_FLOAT = struct.Struct(">d")
_KEY_BYTES = 32


class PageKeys:
    """Makes keys for one engine: its base, its KV dtype, its page size, its exact mode."""

    def __init__(
        self, *, base_digest: str, kv_dtype: str, page_size: int, is_exact: bool = False
    ) -> None:
        self._engine = (base_digest, kv_dtype, is_exact)
        self._page_size = page_size
        self._pack = struct.Struct(f"<{page_size}i").pack
        # encode((parent, tokens)) around its two contents, whose lengths never change: a page's key
        # costs one hash and no walk.
        self._head = b"(" + _LENGTH.pack(2) + b"b" + _LENGTH.pack(_KEY_BYTES)
        self._middle = b"b" + _LENGTH.pack(4 * page_size)

    def root(self, cache_salt: tuple[str, ...], lanes: Sequence[GatedAdapter]) -> bytes:
        """The parent of a request's first page: everything but its tokens and its turns.

        Adapters that leave every key and value as the base's, and those at scale 0, are left out,
        so that such a request shares pages with the base; so are those that act from a position
        on, see `turns`.
        """
        adapters = tuple(_identity(lane) for lane in lanes if _counts(lane) and not lane.is_invoked)
        return _sha256(encode((*self._engine, cache_salt, adapters)))

    def turns(self, lanes: Sequence[GatedAdapter]) -> dict[int, bytes]:
        """What joins the chain of keys at which page: the page that holds the first position that
        an adapter acts on differs from then on, and those before it are as without the adapter.

        So it is from where on an adapter's experts keep their weights.
        The position itself counts: where the last occurrence of the invocation is depends on tokens
        behind the page.
        """
        found: dict[int, list[tuple[object, ...]]] = {}
        for lane in lanes:
            if _counts(lane) and lane.is_invoked and lane.first != NEVER:
                identity = (*_identity(lane), lane.first)
                found.setdefault(lane.first // self._page_size, []).append(identity)
            if _counts(lane) and lane.is_approximate and not lane.is_resting:
                assert lane.probing is not None
                start = lane.probing.frozen_from
                identity = (*_identity(lane), "frozen", start)
                found.setdefault(start // self._page_size, []).append(identity)
        return {number: encode(tuple(joined)) for number, joined in found.items()}

    def turn(self, parent: bytes, joined: bytes) -> bytes:
        """The parent of a page at which adapters join that `turns` gave."""
        return _sha256(encode(("turn", parent, joined)))

    def page(self, parent: bytes, token_ids: Sequence[int]) -> bytes:
        """The key of the full page that holds these page_size tokens behind the parent's tokens."""
        return _sha256(self._head + parent + self._middle + self._pack(*token_ids))


def _counts(lane: GatedAdapter) -> bool:
    """Whether the adapter changes any key or value."""
    return not lane.is_kv_neutral and lane.applied.scale != 0.0


def _identity(lane: GatedAdapter) -> tuple[object, ...]:
    rank = lane.applied.rank if lane.weights else None  # all components, however that was said
    identity = (lane.applied.adapter.digest, float(lane.applied.scale), rank, lane.options)
    return (*identity, "resting") if lane.is_resting else identity


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
