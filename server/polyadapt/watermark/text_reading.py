"""Whose text it is, over all that a tenant's texts were marked by, and the signed record of it.

Knows token ids, users' names and the master key; no tokenizer and no registry. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from polyadapt.errors import InvalidRequest
from polyadapt.types import MarkSettings
from polyadapt.watermark import evidence
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.statistics import holm
from polyadapt.watermark.text import TextReading, read_keys, scheme_of, user_key


@dataclass(frozen=True, slots=True)
class UserReading:
    """One user's key against one text, by the settings that speak most for it."""

    user: str
    settings: MarkSettings
    reading: TextReading
    p_value: float  # over all settings that were read
    family_p_value: float  # and over all users, by Holm's method


@dataclass(frozen=True, slots=True)
class TextFinding:
    """Who wrote a text. `accused` is empty where nobody can be named."""

    accused: tuple[UserReading, ...]
    ranked: tuple[UserReading, ...]
    num_users: int
    num_tokens: int
    settings: tuple[MarkSettings, ...]  # that were read
    unread: tuple[MarkSettings, ...]  # that only another reader reads, see scheme_of
    alpha: float

    @property
    def is_nobody(self) -> bool:
        """Whether nobody can be named at this error."""
        return not self.accused


def read_text(
    master: SecretKey,
    settings: Sequence[MarkSettings],
    users: Sequence[str],
    tokens: Sequence[int],
    *,
    alpha: float = 1e-3,
    num_shown: int = 10,
) -> TextFinding:
    """Return whose keys a text speaks for; with chance at most `alpha` an innocent is named.

    One user makes it a detector. It finds whole texts: a marked passage inside a longer one is
    diluted, and is found by giving it alone. Raises InvalidRequest for no users, one twice, no
    settings, and settings of which none can be read here. What settings share beside the user's
    key changes no text's reading, and counts once.
    """
    _check_trace(users, alpha)
    if not settings:
        raise InvalidRequest("no settings were given to read the text by")
    readable = [own for own in settings if not own.is_lefthash]
    if not readable:
        scheme_of(settings[0])  # raises, and says who reads it
    # Green lists that differ in their bias alone, say, are one list to a reader.
    readable = list({_identity(own): own for own in readable}.values())
    by_settings = []
    for own in readable:
        keys = np.stack([user_key(master, user, key_version=own.key_version) for user in users])
        by_settings.append(read_keys(scheme_of(own), keys, tokens))
    best = [
        min(range(len(readable)), key=lambda i: by_settings[i][place].p_value)
        for place in range(len(users))
    ]
    readings = [by_settings[i][place] for place, i in enumerate(best)]
    p_values = [min(1.0, reading.p_value * len(readable)) for reading in readings]
    family = holm(p_values)
    z = np.array([reading.z for reading in readings])
    ranked = [
        UserReading(users[i], readable[best[i]], readings[i], p_values[i], float(family[i]))
        for i in np.lexsort((-z, family)).tolist()
    ]
    num_accused = int((family <= alpha).sum())
    return TextFinding(
        tuple(ranked[:num_accused]),
        tuple(ranked[: max(num_shown, num_accused)]),
        len(users),
        len(tokens),
        tuple(readable),
        tuple(own for own in settings if own.is_lefthash),
        alpha,
    )


def signer_of(master: SecretKey) -> evidence.Signer:
    """Return who signs what is found about texts; its public key tells nothing of the master."""
    return evidence.Signer(master.subkey("text evidence"))


def sign_finding(master: SecretKey, finding: TextFinding, text: str, base_digest: str) -> str:
    """Return the signed record of a finding. The text itself is not in it, its digest is; the base
    is named because its tokenizer made the tokens.
    """
    record = {
        **evidence.head("text reading"),
        "key_id": master.id,
        "base_digest": base_digest,
        "text_digest": evidence.digest(text.encode("utf-8")),
        "verdict": "nobody" if finding.is_nobody else "named",
        **evidence.without_floats(asdict(finding)),
    }
    return signer_of(master).sign(record)


def _check_trace(users: Sequence[str], alpha: float) -> None:
    """Raise InvalidRequest for no users, one twice, or an error that is none."""
    if not users or len(set(users)) != len(users):
        raise InvalidRequest("users must be listed, each once", param="users")
    if not 0.0 < alpha < 0.5:
        raise InvalidRequest(f"alpha is {alpha}, expected between 0 and 0.5", param="alpha")


def _identity(settings: MarkSettings) -> tuple[Any, ...]:
    """What of the settings decides a reading."""
    fixed = (settings.scheme, settings.context_width, settings.key_version)
    return (*fixed, {"kgw": settings.ratio, "synthid": settings.depth}.get(settings.scheme))
