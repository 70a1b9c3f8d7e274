"""What every request of a tenant is served through besides its own adapters.

Knows no engine: tasks/mandatory.py applies it, so that nobody who asks for adapters passes it by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from polyadapt_store.policies import Policy, PolicyEntry, no_policy
from polyadapt_store.since_write import SinceWrite


class Book(Protocol):
    """What is needed of polyadapt_store's PolicyBook."""

    @property
    def num_writes(self) -> int: ...

    def put(self, tenant: str, entries: Sequence[PolicyEntry]) -> Policy: ...

    def change(
        self, tenant: str, new: Callable[[tuple[PolicyEntry, ...]], Sequence[PolicyEntry]]
    ) -> None: ...

    def list(self) -> tuple[Policy, ...]: ...

    def delete(self, tenant: str) -> None: ...


class Policies:
    """The policies as the registry holds them now, at hand for every request."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._known: SinceWrite[None, dict[str, Policy]] = SinceWrite(lambda: book.num_writes)

    @property
    def is_at_hand(self) -> bool:
        """Whether what is asked for is in memory."""
        return None in self._known

    def of(self, tenant: str) -> Policy | None:
        """Return the tenant's policy, as the last write left it, and None if it has none."""
        return self._all().get(tenant)

    def get(self, tenant: str) -> Policy:
        """Return the tenant's policy; raises NotFound."""
        policy = self.of(tenant)
        if policy is None:
            raise no_policy(tenant)
        return policy

    def list(self) -> tuple[Policy, ...]:
        """Return all policies, by tenant."""
        return tuple(self._all().values())

    def put(self, tenant: str, entries: Sequence[PolicyEntry]) -> Policy:
        """Replace the tenant's policy; it holds from the next request on. Raises ModelNotFound."""
        return self._book.put(tenant, entries)

    def change(
        self, tenant: str, new: Callable[[tuple[PolicyEntry, ...]], Sequence[PolicyEntry]]
    ) -> None:
        """Have the policy name what `new` makes of what it names as it is written, whoever else
        changes it; see PolicyBook.
        """
        self._book.change(tenant, new)

    def remove(self, tenant: str) -> None:
        """Remove the tenant's policy; raises NotFound."""
        self._book.delete(tenant)

    def _all(self) -> dict[str, Policy]:
        return self._known.get(
            None, lambda: {policy.tenant: policy for policy in self._book.list()}
        )
