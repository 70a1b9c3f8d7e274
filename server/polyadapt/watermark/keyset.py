"""Several keys of which one seals and each opens, so that the one that seals can be changed. Knows
neither envelopes nor files.
"""

from __future__ import annotations

from collections.abc import Sequence

from polyadapt.errors import InvalidRequest
from polyadapt.watermark.keys import SecretKey


class Keyset:
    """KEKs, newest first: the first one seals, all of them open what is sealed under them."""

    __slots__ = ("_keys",)

    def __init__(self, keys: Sequence[SecretKey]) -> None:
        """Raise InvalidRequest for no key, and for one that is given twice."""
        if not keys:
            raise InvalidRequest("there is no key; expected at least one")
        self._keys = {key.id: key for key in keys}
        if len(self._keys) != len(keys):
            raise InvalidRequest("a key is given twice; give each once, the newest first")

    @classmethod
    def from_text(cls, text: str) -> Keyset:
        """Return the keys of a text: each as `SecretKey.from_text` reads it, with white space
        between them. Raises InvalidRequest, without the text.
        """
        return cls([SecretKey.from_text(word) for word in text.split() or [""]])

    @property
    def primary(self) -> SecretKey:
        """The key that new things are sealed under."""
        return next(iter(self._keys.values()))

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of all keys, newest first; they reveal nothing of them."""
        return tuple(self._keys)

    def find(self, key_id: str) -> SecretKey | None:
        """Return the key of this id, None where it was not given."""
        return self._keys.get(key_id)

    def __repr__(self) -> str:
        return f"Keyset({', '.join(self._keys)})"
