"""What operators and clerks change: policies, required marks, and who is told by which bits.

What of it holds for a request is in tasks/mandatory.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from polyadapt.adapters.gates import read_bits
from polyadapt.errors import InvalidRequest, PolicyConflict, SecretsUnavailable
from polyadapt.tasks.directory import AdapterDirectory, AdapterRef, Store, check_together
from polyadapt.tasks.mandatory import bits_of, tenant_user
from polyadapt.types import MAX_ADAPTERS, AppliedAdapter, Options
from polyadapt_store.manifest import AdapterRecord, OfferedOption
from polyadapt_store.policies import Policy, PolicyEntry
from polyadapt_store.signatures import Signature

logger = logging.getLogger(__name__)

# In a policy, in place of bits: they are issued to the tenant as to a user.
ISSUED = "issued"
_PAGE = 500


class PolicyAdmin:
    """Changes what is mandatory; it holds from the next request on, for every server."""

    def __init__(self, store: Store, directory: AdapterDirectory) -> None:
        self.policies = directory.mandatory.policies
        self.signatures = directory.mandatory.signatures
        self._store = store
        self._directory = directory

    async def set(self, tenant: str, adapters: Sequence[AdapterRef]) -> Policy:
        """Have every request of the tenant served through these adapters, in the versions that the
        tenant's names stand for now. Raises ModelNotFound, and InvalidRequest for what no request
        could be served with.
        """
        await self._directory.warm(tenant, self._directory.base_name, adapters)
        records = [self._directory.named(tenant, ref, i) for i, ref in enumerate(adapters)]
        check_together([AppliedAdapter(record.adapter_id) for record in records], None)
        for position, ref in enumerate(adapters):
            if ref.scale == 0.0:
                raise InvalidRequest(
                    "scale 0 serves nothing; leave the adapter out of the policy",
                    param=f"adapters[{position}].scale",
                )
        entries = [
            PolicyEntry(record, ref.scale, ref.rank, await self._issued(tenant, record, ref, i))
            for i, (record, ref) in enumerate(zip(records, adapters, strict=True))
        ]
        return await asyncio.to_thread(self.policies.put, tenant, entries)

    async def remove(self, tenant: str) -> None:
        """Let the tenant's next requests be served as they ask; raises NotFound."""
        await asyncio.to_thread(self.policies.remove, tenant)

    async def issue_signature(
        self, tenant: str, name: str, user: str, bits: str
    ) -> tuple[Signature, bool]:
        """Have a user's answers told by these bits of the mark `name` from its next request on;
        return them and whether they are new. Raises ModelNotFound, InvalidRequest, Conflict.
        """
        record, option = await self.mark(tenant, name)
        read = read_bits(bits, option.num_bits)
        if read is None:
            raise InvalidRequest(f"the signature is not {option.expected}", param="signature")
        return await asyncio.to_thread(self.signatures.book.issue, record.digest, user, read)

    async def revoke_signature(self, tenant: str, name: str, user: str) -> Signature:
        """Take a user's signature back; raises ModelNotFound, InvalidRequest, NotFound."""
        record, _ = await self.mark(tenant, name)
        return await asyncio.to_thread(self.signatures.book.revoke, record.digest, user)

    async def list_signatures(
        self, tenant: str, name: str, *, has_bits: bool = False
    ) -> tuple[Signature, ...]:
        """Return all that were ever issued under a mark, with their bits if those are wanted;
        raises ModelNotFound, InvalidRequest, SecretsUnavailable.
        """
        record, _ = await self.mark(tenant, name)
        book = self.signatures.book
        return await asyncio.to_thread(book.list, record.digest, has_bits=has_bits)

    async def require_mark(self, tenant: str, name: str, marked: str, *, is_required: bool) -> None:
        """Have every request of the tenant `marked` served through its user's branches of a mark
        that `tenant` sees, or refused; or no more. What else its policy names stays. Raises
        ModelNotFound, InvalidRequest, and PolicyConflict for more adapters than one request has.
        """
        digest = (await self.mark(tenant, name))[0].digest
        await self._directory.warm(marked, name)
        record = self._directory.find(marked, name)
        if record is None or record.digest != digest:
            raise InvalidRequest(
                f"the tenant {marked[:200]!r} does not see the mark {name!r}; share it, or give it "
                "that tenant as an adapter of its own",
                param="tenant",
            )

        def change(before: tuple[PolicyEntry, ...]) -> list[PolicyEntry]:
            kept = [entry for entry in before if entry.record.digest != digest]
            if is_required:
                kept.append(PolicyEntry(record))
            if len(kept) > MAX_ADAPTERS:
                raise PolicyConflict(
                    f"the policy of {marked!r} names {len(kept) - 1} adapters already, and a "
                    f"request has at most {MAX_ADAPTERS}; take one out"
                )
            return kept

        await asyncio.to_thread(self.policies.change, marked, change)

    async def mark(self, tenant: str, name: str) -> tuple[AdapterRecord, OfferedOption]:
        """Return the adapter of a mark and its option that tells users apart, whatever base it was
        made for: a leak may be of a base that is not resident any more.

        Raises ModelNotFound, and InvalidRequest for what is no mark.
        """
        await self._directory.warm(tenant, name)
        record = self._directory.read(tenant, name)
        option = None if record is None else bits_of(record)
        if record is None or option is None:
            raise InvalidRequest(f"{name[:200]!r} is no mark: nothing in it tells users apart")
        return record, option

    async def list_marks(self, tenant: str) -> tuple[tuple[AdapterRecord, OfferedOption], ...]:
        """Return the marks that the tenant sees, by name, each as `mark` does."""

        def read() -> list[tuple[AdapterRecord, OfferedOption]]:
            found: list[tuple[AdapterRecord, OfferedOption]] = []
            after: str | None = None
            while True:
                page = self._store.list(tenant, limit=_PAGE, after=after)
                for record in page.records:
                    if (option := bits_of(record)) is not None:
                        found.append((record, option))
                if not page.has_more:
                    return found
                after = page.records[-1].id

        return tuple(await asyncio.to_thread(read))

    async def seal_signatures(self) -> None:
        """Seal what an older release wrote in the clear, in rows and in policies; without the key
        say that there is such, which is served to nobody.
        """
        book = self.signatures.book
        try:
            num = await asyncio.to_thread(book.seal_clear)
            for policy in await asyncio.to_thread(self.policies.list):
                refs = [
                    AdapterRef(f"{e.record.name}@{e.record.version}", e.scale, e.rank, e.options)
                    for e in policy.entries
                ]
                pairs = zip(policy.entries, refs, strict=True)
                kept = [
                    replace(entry, options=await self._issued(policy.tenant, entry.record, ref, i))
                    for i, (entry, ref) in enumerate(pairs)
                ]
                if tuple(kept) != policy.entries:
                    sealed = list(zip(policy.entries, kept, strict=True))
                    change = partial(_replaced, sealed)
                    await asyncio.to_thread(self.policies.change, policy.tenant, change)
                    num += 1
        except SecretsUnavailable as error:
            logger.error("no request that a mark is required for is answered: %s", error.message)
        else:
            if num:
                logger.info("%d signatures that were stored in the clear are sealed", num)

    async def _issued(
        self, tenant: str, record: AdapterRecord, ref: AdapterRef, position: int
    ) -> Options:
        """Return the options as the policy keeps them: bits that all of the tenant's answers have
        are issued to it as to a user, and not written there.
        """
        secret = bits_of(record)
        given = dict(ref.options)
        if secret is None:
            return ref.options
        bits_given = given.get(secret.name, ISSUED)
        if bits_given == ISSUED:
            return ref.options
        bits = read_bits(bits_given, secret.num_bits)
        if bits is None:
            raise InvalidRequest(
                f"the {secret.name} is not {secret.expected}",
                param=f"adapters[{position}].options.{secret.name}",
            )
        book = self.signatures.book
        await asyncio.to_thread(book.issue, record.digest, tenant_user(tenant), bits)
        return tuple((given | {secret.name: ISSUED}).items())


def _replaced(
    changes: Sequence[tuple[PolicyEntry, PolicyEntry]], entries: Sequence[PolicyEntry]
) -> list[PolicyEntry]:
    """Return the entries with every old one that is still among them in its new form."""
    return [next((new for old, new in changes if old == entry), entry) for entry in entries]
