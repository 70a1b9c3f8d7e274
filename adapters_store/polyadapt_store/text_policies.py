"""How the texts of a tenant are marked, now and before. Knows no keys and no requests.

A policy is issued by one row and none is ever changed: a text that turns up years later may be
marked as any of them said.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import sqlalchemy as sa

from polyadapt.types import MarkSettings
from polyadapt_store.database import Database, text_policies


@dataclass(frozen=True, slots=True)
class TextPolicy:
    """What holds for a tenant's texts: the first of `settings`, or the second for draws that leave
    the first no choice. Not required: they are not marked.
    """

    tenant: str
    generation: int  # counted from 1; the last one acts
    is_required: bool
    settings: tuple[MarkSettings, ...]
    created: int  # unix seconds


class TextPolicyBook:
    """Owns the text policies of one Database. Thread-safe."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    @property
    def num_writes(self) -> int:
        """See Database: what was read is still so while this does not change."""
        return self._database.num_writes

    def put(
        self, tenant: str, settings: Sequence[MarkSettings], *, is_required: bool
    ) -> TextPolicy:
        """Have this hold from now on; return it, the one that holds already if it says the same."""
        with self._database.write() as connection:
            rows = sa.select(text_policies).where(text_policies.c.tenant == tenant)
            last_first = rows.order_by(text_policies.c.generation.desc()).limit(1)
            row = connection.execute(last_first).first()
            last = None if row is None else _policy(row)
            says = (is_required, tuple(settings))
            if last is not None and (last.is_required, last.settings) == says:
                return last
            generation = 1 if last is None else last.generation + 1
            made = TextPolicy(tenant, generation, is_required, tuple(settings), int(self._clock()))
            connection.execute(
                text_policies.insert().values(
                    tenant=tenant,
                    generation=generation,
                    is_required=int(is_required),
                    settings=msgspec.json.encode(made.settings).decode(),
                    created=made.created,
                )
            )
        return made

    def list(self) -> tuple[TextPolicy, ...]:
        """Return every policy that ever held, by tenant and generation."""
        query = sa.select(text_policies).order_by(
            text_policies.c.tenant, text_policies.c.generation
        )
        with self._database.read() as connection:
            return tuple(map(_policy, connection.execute(query)))


def _policy(row: sa.Row[Any]) -> TextPolicy:
    settings = msgspec.json.decode(row.settings, type=tuple[MarkSettings, ...])
    return TextPolicy(row.tenant, row.generation, bool(row.is_required), settings, row.created)
