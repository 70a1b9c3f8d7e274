"""The key that all marks' files of a registry are sealed under, itself sealed under the KEK.

It is one key, so that an engine's process can be given it once, at its start, and opens whatever it
is asked for; the KEK and what else is sealed under it stay with the edge. Torch-free.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Protocol

from polyadapt.watermark.secrets import Kek, seal, unseal
from polyadapt_store.sealed_files import KEY_BYTES, FileSealer

FILE_KEY_PURPOSE = "key of marks' files"


class KeyStore(Protocol):
    """What is needed of polyadapt_store's MarkBook."""

    def file_key(self, make: Callable[[], str]) -> str: ...


def open_sealer(kek: Kek, keys: KeyStore) -> FileSealer:
    """Return what seals marks' files, with a new key if the registry has none yet; raises
    SecretsUnavailable where its key is sealed under another KEK, or was changed.
    """

    def make() -> str:
        return seal(secrets.token_bytes(KEY_BYTES), kek, FILE_KEY_PURPOSE).decode()

    return FileSealer(unseal(keys.file_key(make).encode(), kek, FILE_KEY_PURPOSE))
