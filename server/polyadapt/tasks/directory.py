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
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

from polyadapt.engine.client import EngineClient
from polyadapt.errors import (
    AdapterDeleted,
    AdapterUnavailable,
    EngineUnavailable,
    InvalidRequest,
    ModelNotFound,
)
from polyadapt.tasks.mandatory import Mandatory, bits_of, with_mandatory
from polyadapt.tasks.model_name import AUTO, NamedAdapter, parse_adapter, split_base
from polyadapt.tasks.policies import Policies
from polyadapt.tasks.signatures import Signatures
from polyadapt.types import AdapterId, AppliedAdapter, Options, Residency, WhenCold
from polyadapt_store.manifest import AdapterRecord
from polyadapt_store.policies import PolicyBook
from polyadapt_store.profiles import Profile, ProfileBook
from polyadapt_store.registry import Page
from polyadapt_store.signatures import RowCipher, SignatureBook
from polyadapt_store.staging import StagedUpload

logger = logging.getLogger(__name__)

DEFAULT_TENANT = "default"
WAIT = WhenCold()
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
        book = store.signatures if rows is None else store.signatures.sealed_by(rows)
        self.mandatory = Mandatory(Policies(store.policies), Signatures(book), engine)

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
        if all(
            self._store.knows(tenant, of.name, of.version) for of in names
        ) and self.mandatory.is_at_hand(tenant, user):
            return

        def read() -> None:
            for named in names:
                with contextlib.suppress(ModelNotFound):
                    self._store.resolve(tenant, named.name, named.version)
            self.mandatory.read(tenant, user)

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
            check_together(own, chosen)
        mandatory = self.mandatory.of(tenant, user)
        applied = with_mandatory(own, mandatory, "adapters")
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
        record = self.named(tenant, ref, position)
        # Here and not in the engine alone: what equals the policy's own would pass there, and so
        # tell a caller that it guessed right.
        secret = bits_of(record)
        if secret is not None and secret.name in dict(ref.options):
            raise InvalidRequest(
                f"adapter {record.name!r} tells who asks, and its {secret.name} is the server's to "
                "choose; leave it out",
                param=f"adapters[{position}].options.{secret.name}",
            )
        return AppliedAdapter(record.adapter_id, ref.scale, ref.rank, ref.options)

    def named(self, tenant: str, ref: AdapterRef, position: int) -> AdapterRecord:
        """Return the adapter at `position` of a request; raises ModelNotFound, InvalidRequest."""
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
        return replace(when_cold, instead=with_mandatory(when_cold.instead, mandatory, "on_cold"))

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

    def read(self, tenant: str, model: str) -> AdapterRecord | None:
        """Return the adapter that `model` names, be it for another base, and None for the base;
        raises ModelNotFound.
        """
        named = self._parse(model)
        return None if named is None else self._read(tenant, named, param="model")

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


def check_together(applied: Sequence[AppliedAdapter], chosen: AdapterRecord | None) -> None:
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
