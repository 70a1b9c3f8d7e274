"""Which adapter a name stands for, and who is using it: names resolve and count in one step.

Also the way in (upload) and the way out (delete). Knows no HTTP, no tokens and no files' contents.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

from polyadapt.adapters.gates import read_bits
from polyadapt.engine.client import EngineClient
from polyadapt.errors import (
    AdapterDeleted,
    AdapterUnavailable,
    EngineUnavailable,
    Forbidden,
    InvalidRequest,
    ModelNotFound,
    PolicyConflict,
    PolicyUnavailable,
    SecretsUnavailable,
)
from polyadapt.tasks.model_name import AUTO, NamedAdapter, parse_adapter, split_base
from polyadapt.tasks.policies import Policies
from polyadapt.tasks.signatures import Signatures
from polyadapt.types import MAX_ADAPTERS, AdapterId, AppliedAdapter, Options, Residency, WhenCold
from polyadapt_store.manifest import AdapterRecord, OfferedOption
from polyadapt_store.policies import Policy, PolicyBook, PolicyEntry
from polyadapt_store.profiles import Profile, ProfileBook
from polyadapt_store.registry import Page
from polyadapt_store.signatures import RowCipher, Signature, SignatureBook
from polyadapt_store.staging import StagedUpload

logger = logging.getLogger(__name__)

DEFAULT_TENANT = "default"
WAIT = WhenCold()
# In a policy, in place of bits: they are issued to the tenant as to a user.
ISSUED = "issued"
_TENANT_USER = "tenant:"
DeleteMode = Literal["drain", "now"]
_COPY_CHUNK = 1 << 20
_PAGE = 500
# The publishing thread must not outlive an engine that never answers.
_PREPARE_TIMEOUT_S = 120.0
_PROFILE_TIMEOUT_S = 600.0
_CLOSE_TIMEOUT_S = 5.0


# Learns what an upload is for, while nobody can see it yet; None leaves the name as it is.
NewProfile = Callable[[], Awaitable[Profile | None]]


class Store(Protocol):
    """What the edge needs of polyadapt_store.AdapterStore."""

    profiles: ProfileBook
    policies: PolicyBook
    signatures: SignatureBook

    def stage(self) -> AbstractContextManager[StagedUpload]: ...

    def publish(
        self,
        staged: StagedUpload,
        name: str,
        tenant: str,
        description: str = "",
        tags: Sequence[str] = (),
        *,
        prepare: Callable[[str], object] = ...,
        profile: Callable[[], Profile | None] = ...,
    ) -> tuple[AdapterRecord, bool]: ...

    def publish_directory(
        self,
        path: Path,
        name: str,
        tenant: str,
        description: str = "",
        tags: Sequence[str] = (),
        *,
        prepare: Callable[[str], object] = ...,
        profile: Callable[[], Profile | None] = ...,
    ) -> tuple[AdapterRecord, bool]: ...

    def resolve(self, tenant: str, name: str, version: int | None = None) -> AdapterRecord: ...

    def knows(self, tenant: str, name: str, version: int | None = None) -> bool: ...

    def list(
        self,
        tenant: str,
        *,
        limit: int = 20,
        after: str | None = None,
        status: str | None = None,
        tag: str | None = None,
    ) -> Page: ...

    def versions(self, tenant: str, name: str) -> tuple[AdapterRecord, ...]: ...

    def delete(
        self, tenant: str, name: str, version: int | None = None
    ) -> tuple[AdapterRecord, ...]: ...

    def live_ids(self) -> frozenset[AdapterId]: ...

    def is_live(self, digest: str) -> bool: ...

    def delete_bytes(self, digest: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One adapter as the caller wrote it: `name` or `name@version`, how strongly it applies, with
    how many of its components, and what else it lets a request choose.
    """

    name: str
    scale: float = 1.0
    rank: int | None = None
    options: Options = ()


@dataclass(frozen=True, slots=True)
class OnCold:
    """What the caller wants done when its adapters are not on the device.

    They are waited for, as long as it takes or `timeout_ms`; then `action`: wait and fail are an
    error, base the base alone, fallback the adapter of that name. Without a timeout those that do
    not wait are done at once.
    """

    action: Literal["wait", "base", "fallback", "fail"] = "wait"
    fallback: str = ""
    timeout_ms: int | None = None


@dataclass(frozen=True, slots=True)
class UploadedFile:
    """One file of an upload: the name the caller gave it and its bytes, read once."""

    name: str
    content: BinaryIO


class Lease:
    """The adapter versions of one request, counted as used until `release`: those that it is to
    be served with, and those that `when_cold` names instead.
    """

    def __init__(
        self,
        applied: tuple[AppliedAdapter, ...],
        on_release: Callable[[Lease], None],
        when_cold: WhenCold = WAIT,
    ) -> None:
        self.applied = applied
        self.when_cold = when_cold
        self._on_release = on_release
        self._is_released = False

    @property
    def ids(self) -> tuple[AdapterId, ...]:
        """Every adapter version that is counted, in the caller's order."""
        held = (*self.applied, *(self.when_cold.instead or ()))
        return tuple(applied.adapter for applied in held)

    def release(self) -> None:
        """Give the use back; the second time is an error of ours."""
        assert not self._is_released, "a lease is released once"
        self._is_released = True
        self._on_release(self)


class AdapterDirectory:
    """Owns the count of uses of every adapter version. Lives on one event loop."""

    def __init__(
        self,
        store: Store,
        engine: EngineClient,
        rows: RowCipher | None = None,
    ) -> None:
        """rows: seals signatures; None: this server has no key for them."""
        self._store = store
        self._engine = engine
        self._uses: Counter[AdapterId] = Counter()
        self._unused: dict[AdapterId, asyncio.Event] = {}
        self._live: dict[str, set[AdapterId]] = {}  # digest -> the versions that have it
        # (tenant, name) -> its newest version among them; None: to be looked for.
        self._newest: dict[tuple[str, str], int] | None = None
        self._deletions: set[asyncio.Task[tuple[AdapterRecord, ...]]] = set()
        self._drops: set[asyncio.Task[None]] = set()
        self._ending: set[AdapterId] = set()  # deleted with mode=now while somebody held them
        self._is_closing = False
        # Requests that nobody could be told by, by why; each is a refusal.
        self.mark_refusals = dict.fromkeys(("no_user", "no_signature", "not_opened"), 0)
        self.policies = Policies(store.policies)
        book = store.signatures if rows is None else store.signatures.sealed_by(rows)
        self.signatures = Signatures(book)

    async def follow(self) -> int:
        """Learn which versions there are, at the start and when others have written; return how
        many. What others have deleted leaves this machine when its last request here has ended.
        """
        found = await asyncio.to_thread(self._store.live_ids)
        live: dict[str, set[AdapterId]] = {}
        for adapter in found:
            live.setdefault(adapter.digest, set()).add(adapter)
        gone = self._live.keys() - live.keys()
        self._live, self._newest = live, None
        for digest in sorted(gone):
            task = asyncio.create_task(self._drop(digest))
            self._drops.add(task)
            task.add_done_callback(self._drops.discard)
        return len(found)

    async def _drop(self, digest: str) -> None:
        if await asyncio.to_thread(self._store.is_live, digest):
            return  # an upload of this server's own, of which the reading did not know
        await self._ask_engine(self._engine.unload_adapter, digest)
        await asyncio.to_thread(self._store.delete_bytes, digest)

    # ----------------------------------------------------------------------------- use
    async def warm(
        self,
        tenant: str,
        model: str,
        adapters: Sequence[AdapterRef] | None = None,
        on_cold: OnCold | None = None,
        user: str | None = None,
    ) -> None:
        """Read in a thread what `acquire` of the same goes by and is not in memory: the event loop,
        which serves all streams, does not wait for a database. What is wrong `acquire` says.
        """
        texts = [model, *(ref.name for ref in adapters or ())]
        if on_cold is not None:
            texts.append(on_cold.fallback)
        rests = [split_base(text, self.base_name) for text in texts]
        names = [named for rest in rests if rest and (named := parse_adapter(rest)) is not None]
        if (
            self.policies.is_at_hand
            and all(self._store.knows(tenant, of.name, of.version) for of in names)
            and all(self.signatures.knows(*told) for told in self._told(tenant, user))
        ):
            return

        def read() -> None:
            for named in names:
                with contextlib.suppress(ModelNotFound):
                    self._store.resolve(tenant, named.name, named.version)
            for told in self._told(tenant, user):
                with contextlib.suppress(SecretsUnavailable):
                    self.signatures.of(*told)

        await asyncio.to_thread(read)

    def acquire(
        self,
        tenant: str,
        model: str,
        adapters: Sequence[AdapterRef] | None = None,
        on_cold: OnCold | None = None,
        user: str | None = None,
    ) -> Lease:
        """Resolve what a request names and count its use; raises ModelNotFound, and InvalidRequest
        for what contradicts itself.

        `adapters` replaces the adapter that `model` would choose; the model must exist all the
        same, and both may not name two versions of one adapter. The adapters of the tenant's
        policy come behind them, also behind what `on_cold` names; raises PolicyConflict or
        PolicyUnavailable where that cannot be. Where they tell who asks, `user` is who; raises
        Forbidden for a user without a signature.
        Nothing awaits between resolving and counting, so no deletion can pass in between; `warm`
        comes first.
        """
        chosen = self.find(tenant, model)
        own: tuple[AppliedAdapter, ...] = ()
        if adapters is None and chosen is not None:
            own = (AppliedAdapter(chosen.adapter_id),)
        elif adapters is not None:
            own = tuple(self._apply(tenant, ref, i) for i, ref in enumerate(adapters))
            _check_together(own, chosen)
        mandatory = self._mandatory(tenant, user)
        applied = _with_mandatory(own, mandatory, "adapters")
        return self._hold(applied, self._when_cold(tenant, on_cold, own, mandatory))

    def _hold(self, applied: tuple[AppliedAdapter, ...], when_cold: WhenCold = WAIT) -> Lease:
        lease = Lease(applied, self._release, when_cold)
        for adapter in lease.ids:
            self._uses[adapter] += 1
        return lease

    def again(self, held: Lease) -> Lease:
        """Count the use of what a lease holds once more, whatever its names stand for by now.

        Raises AdapterDeleted when any of it was deleted with mode=now since.
        """
        for adapter in held.ids:
            assert self._uses[adapter] > 0, "only a lease that is held can be held again"
            if adapter in self._ending:
                raise AdapterDeleted(f"the adapter {adapter.name!r} was deleted while it was used")
        return self._hold(held.applied, held.when_cold)

    def owns(self, tenant: str, name: str) -> bool:
        """Whether the tenant has an adapter of this name of its own, not a shared one."""
        try:
            return self._store.resolve(tenant, name).tenant == tenant
        except ModelNotFound:
            return False

    def find(self, tenant: str, model: str) -> AdapterRecord | None:
        """Return the adapter that `model` names, None for the base; raises ModelNotFound."""
        named = self._parse(model)
        return None if named is None else self._resolve(tenant, named, param="model")

    @property
    def base_name(self) -> str:
        """The name of the resident base; raises EngineUnavailable before the first start."""
        info = self._engine.info
        if info is None:
            raise EngineUnavailable("the engine is starting; try again shortly", retry_after_s=2)
        return info.base.name

    def num_uses(self, adapter: AdapterId) -> int:
        """How many requests hold a lease on this version."""
        return self._uses[adapter]

    def ids_of(self, digest: str) -> frozenset[AdapterId]:
        """Return the live versions that have these bytes."""
        return frozenset(self._live.get(digest, ()))

    def names_of(self, digests: Iterable[str]) -> set[str]:
        """Return what requests call the live versions of these bytes: by the bare name the newest
        live version that its tenant has of it, by name@version any other.
        """
        if self._newest is None:
            self._newest = {}
            for adapter in itertools.chain.from_iterable(self._live.values()):
                name = adapter.tenant, adapter.name
                self._newest[name] = max(adapter.version, self._newest.get(name, 0))
        ids = (adapter for digest in digests for adapter in self._live.get(digest, ()))
        return {
            a.name if self._newest[a.tenant, a.name] == a.version else f"{a.name}@{a.version}"
            for a in ids
        }

    def check_integrity(self) -> None:
        """Raise AssertionError unless counts are positive and waiters have something to await."""
        assert all(count > 0 for count in self._uses.values())
        assert all(self._uses[adapter] > 0 for adapter in self._unused)

    def _apply(self, tenant: str, ref: AdapterRef, position: int) -> AppliedAdapter:
        record = self._named(tenant, ref, position)
        # Here and not in the engine alone: what equals the policy's own would pass there, and so
        # tell a caller that it guessed right.
        secret = _bits_of(record)
        if secret is not None and secret.name in dict(ref.options):
            raise InvalidRequest(
                f"adapter {record.name!r} tells who asks, and its {secret.name} is the server's to "
                "choose; leave it out",
                param=f"adapters[{position}].options.{secret.name}",
            )
        return AppliedAdapter(record.adapter_id, ref.scale, ref.rank, ref.options)

    def _named(self, tenant: str, ref: AdapterRef, position: int) -> AdapterRecord:
        param = f"adapters[{position}].name"
        named = parse_adapter(ref.name)
        if named is None:
            raise _model_not_found(ref.name, param)
        record = self._resolve(tenant, named, param=param)
        if ref.scale not in (0.0, 1.0) and not record.report.is_scalable:
            raise InvalidRequest(
                f"adapter {named.name!r} ({record.family}) is not linear in a scale; "
                f"scale is {ref.scale:g}, expected 0 or 1",
                param=f"adapters[{position}].scale",
            )
        return record

    def _when_cold(
        self,
        tenant: str,
        on_cold: OnCold | None,
        own: tuple[AppliedAdapter, ...],
        mandatory: tuple[AppliedAdapter, ...],
    ) -> WhenCold:
        if on_cold is None:
            return WAIT
        when_cold = self._read_on_cold(tenant, on_cold, own)
        if when_cold.instead is None:
            return when_cold if own or mandatory else WAIT
        if not own:  # what would be turned to is what is asked for
            return WAIT
        return replace(when_cold, instead=_with_mandatory(when_cold.instead, mandatory, "on_cold"))

    def _read_on_cold(
        self, tenant: str, on_cold: OnCold, applied: tuple[AppliedAdapter, ...]
    ) -> WhenCold:
        if on_cold.action == "wait":
            return WhenCold(on_cold.timeout_ms)
        wait_ms = on_cold.timeout_ms or 0
        if on_cold.action == "fail":
            return WhenCold(wait_ms)
        if on_cold.action == "base":
            return WhenCold(wait_ms, instead=())
        if on_cold.fallback == self.base_name:
            raise InvalidRequest(
                "the fallback is the base model; send on_cold: base", param="on_cold"
            )
        named = parse_adapter(on_cold.fallback)
        if named is None:
            raise _model_not_found(on_cold.fallback, "on_cold")
        fallback = self._resolve(tenant, named, param="on_cold").adapter_id
        if any(fallback.digest == other.adapter.digest for other in applied):
            raise InvalidRequest(
                f"the fallback {named.name!r} is one of the request's own adapters; "
                "name another one",
                param="on_cold",
            )
        return WhenCold(wait_ms, instead=(AppliedAdapter(fallback),))

    def _parse(self, model: str) -> NamedAdapter | None:
        """Return what `model` names besides the base; raises ModelNotFound."""
        rest = split_base(model, self.base_name)
        if rest is None:
            return None
        named = parse_adapter(rest)
        if named is None:
            raise _model_not_found(model)
        return named

    def _read(self, tenant: str, named: NamedAdapter, *, param: str) -> AdapterRecord:
        try:
            return self._store.resolve(tenant, named.name, named.version)
        except ModelNotFound as error:
            raise ModelNotFound(error.message, param=param) from None

    def _resolve(self, tenant: str, named: NamedAdapter, *, param: str) -> AdapterRecord:
        """Read what can be served here; raises ModelNotFound also for another base's."""
        record = self._read(tenant, named, param=param)
        info = self._engine.info
        if info is not None and record.base_digest != info.base.digest:
            raise ModelNotFound(
                f"the adapter {named.name!r} was made for {record.base_model!r}; "
                f"this server's base is {info.base.name!r}, upload it again for this one",
                param=param,
            )
        return record

    def _release(self, lease: Lease) -> None:
        for adapter in lease.ids:
            self._uses[adapter] -= 1
            assert self._uses[adapter] >= 0
            if self._uses[adapter] == 0:
                del self._uses[adapter]
                if (waiting := self._unused.pop(adapter, None)) is not None:
                    waiting.set()

    # ----------------------------------------------------------------------------- policies
    async def set_policy(self, tenant: str, adapters: Sequence[AdapterRef]) -> Policy:
        """Have every request of the tenant served through these adapters, in the versions that the
        tenant's names stand for now. Raises ModelNotFound, and InvalidRequest for what no request
        could be served with.
        """
        await self.warm(tenant, self.base_name, adapters)
        records = [self._named(tenant, ref, i) for i, ref in enumerate(adapters)]
        _check_together([AppliedAdapter(record.adapter_id) for record in records], None)
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

    async def _issued(
        self, tenant: str, record: AdapterRecord, ref: AdapterRef, position: int
    ) -> Options:
        """The options as the policy keeps them: bits that all of the tenant's answers have are
        issued to it as to a user, and not written there.
        """
        secret = _bits_of(record)
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

    async def remove_policy(self, tenant: str) -> None:
        """Let the tenant's next requests be served as they ask; raises NotFound."""
        await asyncio.to_thread(self.policies.remove, tenant)

    def _mandatory(self, tenant: str, user: str | None) -> tuple[AppliedAdapter, ...]:
        """The adapters of the tenant's policy; raises PolicyUnavailable if one is not to be had,
        and Forbidden for a user whom one of them could not tell.
        """
        policy = self.policies.of(tenant)
        if policy is None:
            return ()
        info = self._engine.info
        for entry in policy.entries:
            record = entry.record
            if info is not None and record.base_digest != info.base.digest:
                raise PolicyUnavailable(
                    f"{record.name}@{record.version}, mandatory for the tenant {tenant!r}, was "
                    f"made for {record.base_model!r} and this server's base is "
                    f"{info.base.name!r}; its operator has to change the policy",
                    retry_after_s=60,
                )
        return tuple(
            AppliedAdapter(
                entry.record.adapter_id,
                entry.scale,
                entry.rank,
                self._options(entry, tenant, user),
                is_mandatory=True,
            )
            for entry in policy.entries
        )

    def _options(self, entry: PolicyEntry, tenant: str, user: str | None) -> Options:
        """The policy's, and with them the user's signature, or the tenant's where the policy has
        one for all.
        """
        secret = _bits_of(entry.record)
        if secret is None:
            return entry.options
        given = dict(entry.options)
        user = _told_by(entry, secret, tenant, user)
        try:
            bits = None if user is None else self.signatures.of(entry.record.digest, user)
        except SecretsUnavailable:
            self.mark_refusals["not_opened"] += 1
            raise
        if bits is None:
            self.mark_refusals["no_user" if user is None else "no_signature"] += 1
            who = "a caller without a key of its own" if user is None else f"the key {user!r}"
            raise Forbidden(
                f"by policy every answer is marked by {entry.record.name!r}, and {who} has no "
                "signature; ask the operator for one"
            )
        return tuple(sorted((given | {secret.name: bits}).items()))

    def _told(self, tenant: str, user: str | None) -> list[tuple[str, str]]:
        """The signatures that a request needs: of which mark and whose."""
        policy = self.policies.of(tenant)
        needed: list[tuple[str, str]] = []
        for entry in () if policy is None else policy.entries:
            secret = _bits_of(entry.record)
            who = None if secret is None else _told_by(entry, secret, tenant, user)
            if who is not None:
                needed.append((entry.record.digest, who))
        return needed

    # ----------------------------------------------------------------------------- signatures
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
        await self.warm(marked, name)
        record = self.find(marked, name)
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
        await self.warm(tenant, name)
        named = self._parse(name)
        record = None if named is None else self._read(tenant, named, param="model")
        option = None if record is None else _bits_of(record)
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
                    if (option := _bits_of(record)) is not None:
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

    # ----------------------------------------------------------------------------- in
    async def upload(
        self,
        tenant: str,
        name: str,
        files: Sequence[UploadedFile],
        *,
        description: str = "",
        tags: Sequence[str] = (),
        new_profile: NewProfile | None = None,
    ) -> tuple[AdapterRecord, bool]:
        """Stage, validate, try in the engine, publish; return the record and whether it is new.

        Nothing is visible under the name before all of that succeeded. Raises InvalidRequest,
        PayloadTooLarge, AdapterRejected with every problem, Unavailable, or what `new_profile`
        raises.
        """

        def fill(staged: StagedUpload) -> None:
            for file in files:
                with staged.add_file(file.name) as writer:
                    while chunk := file.content.read(_COPY_CHUNK):
                        writer.write(chunk)

        return await self.upload_from(
            tenant, name, fill, description=description, tags=tags, new_profile=new_profile
        )

    async def upload_from(
        self,
        tenant: str,
        name: str,
        fill: Callable[[StagedUpload], None],
        *,
        description: str = "",
        tags: Sequence[str] = (),
        new_profile: NewProfile | None = None,
    ) -> tuple[AdapterRecord, bool]:
        """The same, with the files that `fill` adds in a thread; raises also what that raises."""
        prepare = self._prepare_from_thread(name)
        profile = self._profile_from_thread(new_profile)
        self._check_name_is_free(name)

        def publish() -> tuple[AdapterRecord, bool]:
            with self._store.stage() as staged:
                fill(staged)
                return self._store.publish(
                    staged, name, tenant, description, tags, prepare=prepare, profile=profile
                )

        return self._remember(await asyncio.to_thread(publish))

    async def register_directory(
        self,
        tenant: str,
        name: str,
        path: Path,
        *,
        description: str = "",
        new_profile: NewProfile | None = None,
    ) -> tuple[AdapterRecord, bool]:
        """Publish a copy of a directory that the operator named; raises like upload."""
        prepare = self._prepare_from_thread(name)
        profile = self._profile_from_thread(new_profile)
        self._check_name_is_free(name)

        def publish() -> tuple[AdapterRecord, bool]:
            return self._store.publish_directory(
                path, name, tenant, description, prepare=prepare, profile=profile
            )

        return self._remember(await asyncio.to_thread(publish))

    def _prepare_from_thread(self, name: str) -> Callable[[str], object]:
        """Return a function for the publishing thread that has the engine read the staged bytes."""
        loop = asyncio.get_running_loop()

        def prepare(digest: str) -> Residency:
            # The version is given only when the name is flipped; the engine goes by the digest.
            adapter = AdapterId(name, 0, digest)
            preparing = asyncio.run_coroutine_threadsafe(
                self._engine.prepare_adapter(adapter), loop
            )
            try:
                return preparing.result(timeout=_PREPARE_TIMEOUT_S)
            except TimeoutError:
                preparing.cancel()
                raise AdapterUnavailable("the engine did not read the adapter in time") from None

        return prepare

    def _profile_from_thread(self, new_profile: NewProfile | None) -> Callable[[], Profile | None]:
        """Return a function for the publishing thread that has the profile made."""
        loop = asyncio.get_running_loop()

        async def make() -> Profile | None:
            return None if new_profile is None else await new_profile()

        def profile() -> Profile | None:
            making = asyncio.run_coroutine_threadsafe(make(), loop)
            try:
                return making.result(timeout=_PROFILE_TIMEOUT_S)
            except TimeoutError:
                making.cancel()
                raise AdapterUnavailable("the engine did not embed the examples in time") from None

        return profile

    def _check_name_is_free(self, name: str) -> None:
        if name == AUTO:
            raise InvalidRequest(
                f"{name!r} as a model asks for a choice among adapters; choose another name",
                param="name",
            )
        if name == self.base_name:
            raise InvalidRequest(
                f"{name!r} is the name of the base model; choose another", param="name"
            )

    def _remember(self, published: tuple[AdapterRecord, bool]) -> tuple[AdapterRecord, bool]:
        record = published[0]
        self._live.setdefault(record.digest, set()).add(record.adapter_id)
        self._newest = None
        return published

    # ----------------------------------------------------------------------------- where
    def residency(self, record: AdapterRecord) -> Residency:
        """Return where the adapter's weights are, with the leases that this edge counts."""
        uses = self.num_uses(record.adapter_id)
        found = self._engine.residencies().get(record.digest)
        if found is not None:
            return replace(found, num_leases=max(found.num_leases, uses))
        return Residency(digest=record.digest, tier="store", num_leases=uses)

    async def load(self, tenant: str, name: str, *, is_pinned: bool) -> AdapterRecord:
        """Bring an adapter to the device; raises ModelNotFound, AdapterRejected or Unavailable."""
        await self.warm(tenant, name)
        record = self.find(tenant, name)
        if record is None:
            raise ModelNotFound(f"{name!r} is the base model, not an adapter", param="name")
        lease = self._hold((AppliedAdapter(record.adapter_id),))
        try:
            await self._engine.load_adapter(record.adapter_id, is_pinned=is_pinned)
            await self.warm(tenant, f"{record.name}@{record.version}")
            found = self.find(tenant, f"{record.name}@{record.version}")
            assert found is not None
            return found
        finally:
            lease.release()

    async def unload(self, tenant: str, name: str) -> AdapterRecord:
        """Release every tier of an adapter once its running requests have ended."""
        await self.warm(tenant, name)
        record = self.find(tenant, name)
        if record is None:
            raise ModelNotFound(f"{name!r} is the base model, not an adapter", param="name")
        await self._engine.unload_adapter(record.digest)
        return record

    # ----------------------------------------------------------------------------- out
    async def delete(
        self, tenant: str, name: str, version: int | None, mode: DeleteMode
    ) -> tuple[AdapterRecord, ...]:
        """Delete a name or one version; returns when its last request and its bytes are gone.

        The name is gone at once. `now` ends running requests with AdapterDeleted, unless another
        live name or version has the same bytes: those stay, and so do the requests. It is carried
        out even when the caller goes away while waiting. Raises ModelNotFound, Forbidden, or
        Conflict for what a policy names.
        """
        deletion = asyncio.create_task(self._delete(tenant, name, version, mode))
        self._deletions.add(deletion)
        deletion.add_done_callback(self._deletions.discard)
        return await asyncio.shield(deletion)

    async def close(self) -> None:
        """Stop waiting for requests of deleted names; the store sweeps at its next start."""
        self._is_closing = True
        for event in self._unused.values():
            event.set()
        if self._deletions:
            _, late = await asyncio.wait(self._deletions, timeout=_CLOSE_TIMEOUT_S)
            for deletion in late:
                deletion.cancel()
        for drop in self._drops:
            drop.cancel()

    async def _delete(
        self, tenant: str, name: str, version: int | None, mode: DeleteMode
    ) -> tuple[AdapterRecord, ...]:
        records = await asyncio.to_thread(self._store.delete, tenant, name, version)
        for record in records:
            ids = self._live.get(record.digest, set())
            ids.discard(record.adapter_id)
            if not ids:
                self._live.pop(record.digest, None)
        self._newest = None
        await self._free(records, mode)
        return records

    async def _free(self, records: Sequence[AdapterRecord], mode: DeleteMode) -> None:
        for record in records if mode == "now" else ():
            if not await asyncio.to_thread(self._store.is_live, record.digest):
                # Before the engine is asked: a request of several generations may have none there.
                self._ending.add(record.adapter_id)
                await self._ask_engine(self._engine.cancel_adapter, record.digest)
        for record in records:
            await self._wait_unused(record.adapter_id)
            self._ending.discard(record.adapter_id)
            if self._is_closing:
                return
            if await asyncio.to_thread(self._store.is_live, record.digest):
                continue
            # An upload of the same bytes may come in between: then the store keeps them, and the
            # engine reads them again at their next use.
            await self._ask_engine(self._engine.unload_adapter, record.digest)
            await asyncio.to_thread(self._store.delete_bytes, record.digest)

    async def _ask_engine(self, call: Callable[[str], Awaitable[object]], digest: str) -> None:
        try:
            await call(digest)
        except EngineUnavailable:
            # An engine that is gone holds nothing, and a new one knows no deleted name.
            logger.info("the engine is down while %s is deleted", digest)

    async def _wait_unused(self, adapter: AdapterId) -> None:
        while self._uses[adapter] and not self._is_closing:
            await self._unused.setdefault(adapter, asyncio.Event()).wait()


def tenant_user(tenant: str) -> str:
    """Return whom bits are issued to that all answers of a tenant have; no key has such an id."""
    return f"{_TENANT_USER}{tenant}"


def is_tenant_user(user: str) -> bool:
    """Whether `tenant_user` gave this id."""
    return user.startswith(_TENANT_USER)


def _told_by(
    entry: PolicyEntry, secret: OfferedOption, tenant: str, user: str | None
) -> str | None:
    """Return whose bits a mandatory mark gets: the user's, or the tenant's where those are for all
    its answers.
    """
    return tenant_user(tenant) if secret.name in dict(entry.options) else user


def _replaced(
    changes: Sequence[tuple[PolicyEntry, PolicyEntry]], entries: Sequence[PolicyEntry]
) -> list[PolicyEntry]:
    """Return the entries with every old one that is still among them in its new form."""
    return [next((new for old, new in changes if old == entry), entry) for entry in entries]


def _bits_of(record: AdapterRecord) -> OfferedOption | None:
    """The option that tells who asks, of an adapter that is a mark."""
    traits = record.report.traits
    offered = () if traits is None else traits.options
    return next((option for option in offered if option.kind == "bits"), None)


def _with_mandatory(
    own: tuple[AppliedAdapter, ...], mandatory: tuple[AppliedAdapter, ...], param: str
) -> tuple[AppliedAdapter, ...]:
    """Return a request's own adapters and behind them the mandatory ones; one that is both stands
    in its own place, as the policy says. Raises PolicyConflict.
    """
    left = {rule.adapter.digest: rule for rule in mandatory}
    together: list[AppliedAdapter] = []
    for applied in own:
        rule = left.pop(applied.adapter.digest, None)
        if rule is None:
            together.append(applied)
            continue
        named = replace(applied, adapter=rule.adapter, is_mandatory=True)
        if named not in (rule, AppliedAdapter(rule.adapter, is_mandatory=True)):
            raise PolicyConflict(
                f"{rule.adapter.name!r} is mandatory by policy and applied as that says, at scale "
                f"{rule.scale:g}; leave it out, it is served all the same",
                param=param,
            )
        together.append(rule)
    together += left.values()
    if len(together) > MAX_ADAPTERS:
        names = ", ".join(repr(rule.adapter.name) for rule in mandatory)
        raise PolicyConflict(
            f"{len(own)} adapters and those that are mandatory by policy ({names}) make "
            f"{len(together)}, expected at most {MAX_ADAPTERS}; name fewer",
            param=param,
        )
    return tuple(together)


def _check_together(applied: Sequence[AppliedAdapter], chosen: AdapterRecord | None) -> None:
    """Raise InvalidRequest for one adapter that is named twice, or in two versions."""
    for i, own in enumerate(applied):
        adapter = own.adapter
        for j, earlier in enumerate(applied[:i]):
            if adapter.digest == earlier.adapter.digest:
                raise InvalidRequest(
                    f"adapters[{i}] {adapter.name!r} and adapters[{j}] {earlier.adapter.name!r} "
                    "are the same adapter; name it once and add up the scales",
                    param=f"adapters[{i}].name",
                )
        if chosen is not None and chosen.name == adapter.name and chosen.version != adapter.version:
            raise InvalidRequest(
                f"model names version {chosen.version} of {adapter.name!r} and adapters[{i}] "
                f"version {adapter.version}; name one of them",
                param=f"adapters[{i}].name",
            )


def _model_not_found(model: str, param: str = "model") -> ModelNotFound:
    return ModelNotFound(
        f"no model or adapter {model[:200]!r}; GET /v1/models lists what there is", param=param
    )
