"""What a registry holds sealed, put under another KEK: one text after the other, each in a
transaction of its own. Torch-free; knows no names and no requests.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Protocol

from polyadapt.errors import SecretsUnavailable
from polyadapt.watermark.file_key import FILE_KEY_PURPOSE
from polyadapt.watermark.keyset import Keyset
from polyadapt.watermark.mark_directory import SECRETS_PURPOSE
from polyadapt.watermark.rows import row_key_purpose
from polyadapt.watermark.secrets import kek_id_of, rewrap
from polyadapt_store.marks import SealedText

logger = logging.getLogger(__name__)


class Book(Protocol):
    """What is needed of polyadapt_store's MarkBook."""

    def sealed(self) -> tuple[SealedText, ...]: ...

    def reseal(self, old: SealedText, text: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class Rotation:
    """What became of everything that is sealed in a registry."""

    num_rewrapped: int  # now
    num_current: int  # before
    problems: tuple[str, ...]  # why others did not open; no secret is in them


def rotate(book: Book, keys: Keyset) -> Rotation:
    """Wrap the key of every sealed text in the first KEK; what was sealed stays as it is.

    Interrupted anywhere, each text is under its old KEK or under the first one, and the same call
    goes on. What opens under none of the keys, or is damaged, is left and told.
    """
    num_rewrapped, num_current = 0, 0
    problems: list[str] = []
    for known in book.sealed():
        found: SealedText | None = known
        # A text that a server writes at the same moment is looked at again, as that one left it.
        while found is not None:
            try:
                if _kek_id(found) == keys.primary.id:
                    num_current += 1
                    break
                sealed = rewrap(found.text.encode(), keys, keys.primary, purpose_of(found))
            except SecretsUnavailable as error:
                problems.append(f"{_words(found)}: {error.message}")
                break
            if book.reseal(found, sealed.decode()):
                num_rewrapped += 1
                break
            found = _again(book, found)
    return Rotation(num_rewrapped, num_current, tuple(problems))


def report_keys(book: Book, keys: Keyset | None) -> None:
    """Log what is sealed under a KEK that is not among `keys`, and what under an older one."""
    given = () if keys is None else keys.ids
    under: Counter[str] = Counter()
    for found in book.sealed():
        try:
            under[_kek_id(found)] += 1
        except SecretsUnavailable as error:
            logger.error("%s: %s", _words(found), error.message)
    closed = {key: num for key, num in under.items() if key not in given}
    if closed:
        logger.error(
            "%d of %d secrets of marks in the registry are sealed under keys that this server was "
            "not given (%s; given: %s), and nothing that needs them is served; give those keys too "
            "in POLYADAPT_MARK_KEK_FILE or POLYADAPT_MARK_KEK",
            sum(closed.values()),
            under.total(),
            ", ".join(sorted(closed)),
            ", ".join(given) or "none",
        )
    older = sum(under[key] for key in given[1:])
    if older:
        logger.warning(
            "%d of %d secrets of marks in the registry are sealed under older keys; `polyadapt "
            "mark rekey` puts them under %s, and then the older keys can go",
            older,
            under.total(),
            given[0],
        )


def purpose_of(found: SealedText) -> str:
    """Return what a text is sealed for."""
    purposes = {"secrets": SECRETS_PURPOSE, "file_key": FILE_KEY_PURPOSE}
    return purposes.get(found.kind) or row_key_purpose(found.digest)


def _words(found: SealedText) -> str:
    if found.kind == "file_key":
        return "the key of marks' files"
    what = "the secrets" if found.kind == "secrets" else "the key of the signatures"
    return f"{what} of {found.digest}"


def _again(book: Book, old: SealedText) -> SealedText | None:
    same = (one for one in book.sealed() if (one.kind, one.digest) == (old.kind, old.digest))
    return next(same, None)


def _kek_id(found: SealedText) -> str:
    return kek_id_of(found.text.encode(), purpose_of(found))
