"""Which mark a request's text gets, and whose a text is: policies, and users' keys from the master.

The master key stays here, in the edge; what goes to an engine is one user's key. Knows no tokens'
meaning and no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from polyadapt.errors import (
    Forbidden,
    InvalidRequest,
    NotFound,
    PolicyUnavailable,
    SecretsUnavailable,
)
from polyadapt.types import MarkSettings, SamplingParams, TextMark
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.text import scheme_of, user_key
from polyadapt_store.since_write import SinceWrite
from polyadapt_store.text_policies import TextPolicy

# What a scheme that reshapes draws needs of them; sharper ones leave it next to nothing to choose.
MIN_TEMPERATURE = 0.2
MIN_TOP_P = 0.1
MAX_MIN_P = 0.5


class Book(Protocol):
    """What is needed of polyadapt_store's TextPolicyBook."""

    @property
    def num_writes(self) -> int: ...

    def put(
        self, tenant: str, settings: Sequence[MarkSettings], *, is_required: bool
    ) -> TextPolicy: ...

    def list(self) -> tuple[TextPolicy, ...]: ...


class TextMarks:
    """The policies as the registry holds them now, and the key that all users' keys come from."""

    def __init__(self, book: Book, master: SecretKey | None) -> None:
        self._book = book
        self._master = master
        self._known: SinceWrite[None, dict[str, tuple[TextPolicy, ...]]] = SinceWrite(
            lambda: book.num_writes
        )

    @property
    def master(self) -> SecretKey:
        """The key that users' keys come from; raises SecretsUnavailable without one."""
        if self._master is None:
            raise SecretsUnavailable(
                "this server has no key to mark texts with; start it with "
                "POLYADAPT_TEXT_MARK_KEY_FILE (`polyadapt mark text-keygen` makes one)"
            )
        return self._master

    async def warm(self) -> None:
        """Read what `of` goes by off the event loop, unless it is in memory."""
        if None not in self._known:
            await asyncio.to_thread(self._all)

    def of(self, tenant: str, user: str | None, sampling: SamplingParams) -> TextMark | None:
        """Return what a request's tokens are marked with, None where no policy asks for it.

        Never None where one does: raises Forbidden for a caller who is no user, PolicyUnavailable
        without the master key, InvalidRequest for a draw that the policy's scheme cannot mark.
        """
        policies = self._all().get(tenant)
        if policies is None or not policies[-1].is_required:
            return None
        if user is None:
            raise Forbidden(
                "by policy every text is marked as its user's, and a caller without a key of its "
                "own is none; send a tenant's API key"
            )
        if self._master is None:
            raise PolicyUnavailable(
                "by policy every text is marked, and this server has no key to do it with; its "
                "operator has to set POLYADAPT_TEXT_MARK_KEY_FILE",
                retry_after_s=60,
            )
        settings = policies[-1].settings
        fitting = [own for own in settings if own.scheme == "kgw" or _leaves_choice(sampling)]
        if not fitting:
            raise InvalidRequest(
                f"by policy every text is marked by {settings[0].scheme}, which needs a choice: "
                f"temperature from {MIN_TEMPERATURE:g}, top_k 0 or above 1, top_p from "
                f"{MIN_TOP_P:g}, min_p up to {MAX_MIN_P:g}",
                param="temperature",
            )
        first, second = user_key(self._master, user, key_version=fitting[0].key_version).tolist()
        return TextMark(fitting[0], (first, second))

    def put(
        self, tenant: str, settings: Sequence[MarkSettings], *, is_required: bool
    ) -> TextPolicy:
        """Have the tenant's texts marked so from its next request on; raises InvalidRequest for
        settings that mean nothing, SecretsUnavailable where they could not be marked.
        """
        for own in settings:
            if not own.is_lefthash:
                scheme_of(own)
        if is_required:
            _ = self.master
        return self._book.put(tenant, settings, is_required=is_required)

    def list(self, tenant: str | None = None) -> tuple[TextPolicy, ...]:
        """Return the policies that hold, of all tenants or of one."""
        return tuple(
            policies[-1]
            for name, policies in self._all().items()
            if tenant is None or name == tenant
        )

    def settings_of(self, tenant: str) -> tuple[MarkSettings, ...]:
        """Return all that the tenant's texts were ever marked by; raises NotFound for nothing."""
        found = [
            own
            for policy in self._all().get(tenant, ())
            if policy.is_required
            for own in policy.settings
        ]
        if not found:
            raise NotFound(
                f"no text of the tenant {tenant[:200]!r} was ever marked; "
                "PUT /v1/watermarks/text/policy says that they are"
            )
        return tuple(dict.fromkeys(found))

    def _all(self) -> dict[str, tuple[TextPolicy, ...]]:
        return self._known.get(None, self._read)

    def _read(self) -> dict[str, tuple[TextPolicy, ...]]:
        found: dict[str, list[TextPolicy]] = {}
        for policy in self._book.list():
            found.setdefault(policy.tenant, []).append(policy)
        return {tenant: tuple(own) for tenant, own in found.items()}


def _leaves_choice(sampling: SamplingParams) -> bool:
    return (
        sampling.temperature >= MIN_TEMPERATURE
        and sampling.top_k != 1
        and sampling.top_p >= MIN_TOP_P
        and sampling.min_p <= MAX_MIN_P
    )
