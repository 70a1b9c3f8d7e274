"""The store of adapters: uploads become validated, immutable, named versions, or leave no trace.

Ties together staging, validation, bytes (blobs.py) and names (registry.py); knows no tensors and no
HTTP.
"""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import math
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

from polyadapt.errors import (
    AdapterRejected,
    AdapterUnavailable,
    Conflict,
    InvalidRequest,
    SecretsUnavailable,
    StartupError,
    Unavailable,
)
from polyadapt.types import AdapterId
from polyadapt_store.blobs import BlobStore, Failpoint, no_failpoint, sync_directory
from polyadapt_store.database import Database
from polyadapt_store.idempotency import AnswerBook
from polyadapt_store.imports import ImportBook
from polyadapt_store.keys import KeyRing
from polyadapt_store.leftovers import GRACE_S, Leftovers
from polyadapt_store.limits import StoreLimits
from polyadapt_store.manifest import (
    NAME,
    PEFT_FORM,
    WEIGHTS_SUFFIX,
    AdapterManifest,
    AdapterRecord,
    FileForm,
    ValidationReport,
    list_shallow,
)
from polyadapt_store.marks import MarkBook
from polyadapt_store.node_cache import NodeCache
from polyadapt_store.object_store import ObjectBlobs
from polyadapt_store.policies import PolicyBook
from polyadapt_store.profiles import Profile, ProfileBook
from polyadapt_store.registry import Page, Registry
from polyadapt_store.replicas import ReplicaBoard
from polyadapt_store.sealed_files import FileSealer, is_sealed_or_gone
from polyadapt_store.signatures import SignatureBook
from polyadapt_store.staging import StagedUpload
from polyadapt_store.strict_json import shown
from polyadapt_store.text_policies import TextPolicyBook
from polyadapt_store.workflows import WorkflowShelf

logger = logging.getLogger(__name__)

# Every step at which a crash is injected by the tests, in the order of an upload and a deletion.
FAILPOINTS = (
    "stage.created",
    "stage.file_written",
    "publish.validated",
    "blob.before_rename",
    "blob.after_rename",
    "publish.prepared",
    "registry.before_flip",
    "registry.before_commit",
    "registry.after_commit",
    "delete.before_commit",
    "delete.after_commit",
    "blob.before_delete",
    "blob.after_delete",
)

# Those of a mark, whose weights are sealed on their way in, or later where they lay in the clear.
MARK_FAILPOINTS = ("seal.before_replace", "seal.after_replace")

# Those of an upload whose bytes go to an object store, besides.
REMOTE_FAILPOINTS = ("remote.before_put", "remote.file_put", "remote.after_put")

_MAX_DESCRIPTION = 4096
_MAX_TAGS = 32
_MAX_TAG = 64
_COPY_CHUNK = 1 << 20
_NUM_CHECKED = 8  # adapters that are looked for in the object store at the start
_LOCK_WAIT_S = 30.0  # for another server's sweep at its start


def _nothing_to_prepare(digest: str) -> None:
    """Publish without asking anybody."""


def _no_profile() -> None:
    """Publish without learning what the adapter is for."""


class AdapterStore:
    """Owns everything below `root`; only one process at a time may, unless the bytes lie in an
    object store: then `root` is this machine's cache of them. Thread-safe.

    `validate(directory)` judges a staged directory: it returns a report or raises AdapterRejected.
    """

    def __init__(
        self,
        root: Path,
        validate: Callable[[Path], ValidationReport],
        limits: StoreLimits | None = None,
        *,
        registry: Path | str | None = None,
        remote: ObjectBlobs | None = None,
        cache_bytes: float = math.inf,
        forms: Sequence[FileForm] = (PEFT_FORM,),
        failpoint: Failpoint = no_failpoint,
    ) -> None:
        """Open the store, remove what a crash left behind; raises StartupError if it is in use or
        damaged. registry: see Database; None is a file below `root`. remote: where the bytes lie,
        None is `root`; cache_bytes of them, by default all, are kept there. forms: files of uploads
        that belong to one of them are stored.
        """
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock_file, is_alone = _lock(root, is_shared=remote is not None)
        try:
            self._database = Database(registry or root / "registry.sqlite")
        except StartupError:
            os.close(self._lock_file)
            raise
        sync_directory(root)
        self._limits = limits or StoreLimits()
        self._forms = tuple(forms)
        self._failpoint = failpoint
        self._validate = validate
        self._blobs = BlobStore(root, failpoint)
        self._remote = remote
        self._cache: NodeCache | None = None
        if remote is not None:
            self._cache = NodeCache(root, self._blobs, remote, cache_bytes)
        self._leftovers = Leftovers(self._database)
        self._registry = Registry(
            self._database, keeps_leftovers=remote is not None, failpoint=failpoint
        )
        self.keys = KeyRing(self._database)
        self.workflows = WorkflowShelf(self._database)
        self.profiles = ProfileBook(self._database)
        self.policies = PolicyBook(self._database)
        self.marks = MarkBook(self._database)
        self.signatures = SignatureBook(self._database)
        self.replicas = ReplicaBoard(self._database)
        self.imports = ImportBook(self._database)
        self.answers = AnswerBook(self._database)
        self.text_policies = TextPolicyBook(self._database)
        # Bytes change under this lock, and not while they are claimed: else a deletion could take
        # what a publication is about to name.
        self._bytes_lock = threading.Lock()
        self._claims: Counter[str] = Counter()
        self._validators = threading.BoundedSemaphore(max(1, os.cpu_count() or 1))
        try:
            if remote is not None:
                self._check_remote(remote)
            if is_alone:
                self._blobs.sweep(self._registry.live_digests())
        except BaseException:
            self.close()
            raise
        if remote is not None:
            fcntl.flock(self._lock_file, fcntl.LOCK_SH)  # let others in

    def close(self) -> None:
        """Close the database and give the directory free."""
        if self._cache is not None:
            self._cache.close()
        self._database.close()
        os.close(self._lock_file)

    def __enter__(self) -> AdapterStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ upload
    def stage(self) -> StagedUpload:
        """Begin an upload; use it as a context manager, so that nothing stays if it is not
        published.
        """
        return StagedUpload(self._blobs, self._limits, self._failpoint, self._forms)

    def publish(
        self,
        staged: StagedUpload,
        name: str,
        tenant: str,
        description: str = "",
        tags: Sequence[str] = (),
        *,
        prepare: Callable[[str], object] = _nothing_to_prepare,
        profile: Callable[[], Profile | None] = _no_profile,
    ) -> tuple[AdapterRecord, bool]:
        """Validate the upload and make it the current version of `name`; durable when it returns.

        `prepare(digest)` and then `profile()`, which gives the name's new profile, are called when
        the bytes are in place and nobody can see them yet; what they raise ends the upload, which
        then leaves no trace.

        Returns the record, and False instead of True if these bytes were a version of this name
        before. Raises InvalidRequest (name, description, tags), Conflict for a workflow's name and
        for a mark where there is no key to seal its weights with, and AdapterRejected with every
        problem of the files. Nothing is visible to anybody before it returns.
        """
        check_name(name)
        self._registry.check_free(tenant, name)
        _check_metadata(description, tags)
        report = self._judge(staged)
        self._failpoint("publish.validated")
        manifest = AdapterManifest(
            staged.files, dataclasses.replace(report, unused_files=staged.unused)
        )
        digest = manifest.digest
        with self._claimed(digest), ExitStack() as stack:
            if report.is_mark:
                names = _weights(file.name for file in staged.files)
                self._blobs.seal(staged.directory, digest, names, self._sealer())
            if self._remote is None or self._cache is None:
                with self._bytes_lock:
                    staged.move_to(lambda directory: self._blobs.put(directory, digest))
            else:
                cache = self._cache
                staged.move_to(lambda directory: cache.adopt(directory, digest))
                stack.callback(cache.release, digest)
                self._remote.put(self._blobs.path(digest), digest)
            prepare(digest)
            made = profile()
            self._failpoint("publish.prepared")
            record, is_new = self._registry.publish(
                tenant, name, manifest, description=description, tags=tags, profile=made
            )
        logger.info(
            "adapter %s@%d is %s (%s, %s)",
            name,
            record.version,
            digest,
            report.family,
            "new" if is_new else "known",
        )
        return record, is_new

    def publish_directory(
        self,
        path: Path,
        name: str,
        tenant: str,
        description: str = "",
        tags: Sequence[str] = (),
        *,
        prepare: Callable[[str], object] = _nothing_to_prepare,
        profile: Callable[[], Profile | None] = _no_profile,
    ) -> tuple[AdapterRecord, bool]:
        """Publish a copy of a directory of the operator's; links are followed. Raises like
        publish().
        """
        if not path.is_dir():
            raise InvalidRequest(
                f"{path} is no directory, expected a PEFT adapter's", param="files"
            )
        with self.stage() as staged:
            for file_name in list_shallow(path):
                with staged.add_file(file_name) as writer, (path / file_name).open("rb") as file:
                    while chunk := file.read(_COPY_CHUNK):
                        writer.write(chunk)
            return self.publish(
                staged, name, tenant, description, tags, prepare=prepare, profile=profile
            )

    # ------------------------------------------------------------------ names
    def resolve(self, tenant: str, name: str, version: int | None = None) -> AdapterRecord:
        """See Registry.resolve."""
        return self._registry.resolve(tenant, name, version)

    def knows(self, tenant: str, name: str, version: int | None = None) -> bool:
        """See Registry.knows."""
        return self._registry.knows(tenant, name, version)

    def list(
        self,
        tenant: str,
        *,
        limit: int = 20,
        after: str | None = None,
        status: str | None = None,
        tag: str | None = None,
    ) -> Page:
        """See Registry.list."""
        return self._registry.list(tenant, limit=limit, after=after, status=status, tag=tag)

    def versions(self, tenant: str, name: str) -> tuple[AdapterRecord, ...]:
        """See Registry.versions."""
        return self._registry.versions(tenant, name)

    def live_ids(self) -> frozenset[AdapterId]:
        """See Registry.live_ids."""
        return self._registry.live_ids()

    def delete(
        self, tenant: str, name: str, version: int | None = None
    ) -> tuple[AdapterRecord, ...]:
        """See Registry.delete; follow it with delete_bytes of each digest once nobody reads it."""
        return self._registry.delete(tenant, name, version)

    # ------------------------------------------------------------------ bytes
    def path(self, digest: str) -> Path:
        """Return the directory with the adapter's files; it never changes while a version
        names it.
        """
        return self._blobs.path(digest)

    def verify(self, digest: str) -> bool:
        """Whether the bytes at rest are still what was uploaded."""
        return self._blobs.verify(digest)

    @property
    def sealer(self) -> FileSealer | None:
        """What seals and opens marks' files; see use_sealer."""
        return self._blobs.sealer

    def use_sealer(self, sealer: FileSealer | None) -> None:
        """Seal and open marks' files with this; None, as it is at first: marks are refused, and
        those that lie sealed cannot be brought here.
        """
        self._blobs.sealer = sealer

    def seal_marks(self) -> int:
        """Seal the weights of every live mark that lie in the clear, as an older release left them,
        on this machine and in the object store; return of how many. Those without a key, or of
        which a file is damaged, stay as they are with a line in the log. Raises Unavailable.
        """
        num = 0
        sealer = self._blobs.sealer
        for digest, files in sorted(self._registry.live_marks().items()):
            names = _weights(files)
            if self._lies_sealed(digest, names):
                continue
            if sealer is None:
                logger.error("the branches of %s lie in the clear: there is no key", digest)
                continue
            try:
                self._seal_blob(digest, names, sealer)
            except (AdapterUnavailable, SecretsUnavailable, InvalidRequest) as error:
                logger.error("the branches of %s stay in the clear: %s", digest, error.message)
                continue
            num += 1
        return num

    def _lies_sealed(self, digest: str, names: Sequence[str]) -> bool:
        local = self._blobs.path(digest)
        if not all(is_sealed_or_gone(local / name) for name in names):
            return False
        if self._blobs.derived(digest).exists():  # nothing is derived from sealed files
            return False
        return self._remote is None or all(self._remote.is_sealed(digest, name) for name in names)

    def _seal_blob(self, digest: str, names: Sequence[str], sealer: FileSealer) -> None:
        self.hold(digest)
        try:
            with self._bytes_lock:
                # Only what is known to be right: sealed damage would look like an adapter.
                if not self._blobs.verify(digest):
                    raise AdapterUnavailable("the stored files are damaged; upload it again")
                self._blobs.seal(self._blobs.path(digest), digest, names, sealer)
            if self._remote is not None:
                self._remote.put(self._blobs.path(digest), digest)
        finally:
            self.release(digest)

    def _sealer(self) -> FileSealer:
        if self._blobs.sealer is None:
            raise Conflict(
                "the adapter is a mark, whose branches are kept sealed, and this server has no key "
                "for them; start it with the registry's POLYADAPT_MARK_KEK_FILE, or "
                "POLYADAPT_MARK_KEK"
            )
        return self._blobs.sealer

    def is_live(self, digest: str) -> bool:
        """Whether any tenant's live version has these bytes."""
        return self._registry.is_live(digest)

    def delete_bytes(self, digest: str) -> bool:
        """Remove the bytes unless a live version or an upload of anybody uses them; return whether
        they went. From an object store they go at a sweep(), and now from this machine.
        """
        with self._bytes_lock:
            return self._delete_unused(digest)

    @property
    def is_shared(self) -> bool:
        """Whether the bytes lie in an object store."""
        return self._remote is not None

    def try_hold(self, digest: str) -> bool:
        """Keep the bytes on this machine if they are here, until release(digest)."""
        return self._cache is None or self._cache.try_hold(digest)

    def hold(self, digest: str) -> None:
        """Keep the bytes on this machine until release(digest), and fetch them if they are not
        here. Raises AdapterUnavailable or Unavailable.
        """
        if self._cache is not None:
            self._cache.hold(digest)

    def release(self, digest: str) -> None:
        """End one hold."""
        if self._cache is not None:
            self._cache.release(digest)

    def sweep(self, grace_s: float = GRACE_S) -> Sequence[str]:
        """Remove from the object store what nobody has named for grace_s; return the digests.
        Raises Unavailable.
        """
        if self._remote is None:
            return []
        return self._leftovers.sweep(self._remote.delete, grace_s)

    # ------------------------------------------------------------------ others
    @property
    def num_writes(self) -> int:
        """See Database."""
        return self._database.num_writes

    def refresh(self) -> int:
        """See Database."""
        return self._database.refresh()

    @contextmanager
    def _claimed(self, digest: str) -> Iterator[None]:
        """Keep the bytes of `digest` while an upload may name them; drop them if none does."""
        with self._bytes_lock:
            self._claims[digest] += 1
        try:
            if self._remote is not None:
                self._leftovers.claim(digest)
            yield
        finally:
            with self._bytes_lock:
                self._claims[digest] -= 1
                if not self._claims[digest]:
                    del self._claims[digest]
                # Whatever failed, the registry knows whether anybody wants the bytes.
                self._delete_unused(digest)

    def _delete_unused(self, digest: str) -> bool:
        if self._claims[digest] or self._registry.is_live(digest):
            return False
        return self._blobs.delete(digest) if self._cache is None else self._cache.remove(digest)

    def _check_remote(self, remote: ObjectBlobs) -> None:
        """Raise StartupError if the object store is another registry's."""
        some = sorted(self._registry.live_digests())[:_NUM_CHECKED]
        try:
            if some and not any(map(remote.exists, some)):
                raise StartupError(
                    f"{remote.url} holds none of the adapters that the registry names; give the "
                    "--blob-url that they were uploaded to, or copy them there"
                )
        except Unavailable as error:
            raise StartupError(f"{remote.url}: {error.message}") from error

    def _judge(self, staged: StagedUpload) -> ValidationReport:
        """Return the report, or raise AdapterRejected with the problems of the file set and of the
        contents.
        """
        problems = staged.problems
        missing = [problem for problem in problems if problem.code == "missing_file"]
        if missing:
            raise AdapterRejected(problems)
        try:
            with self._validators:
                report = self._validate(staged.directory)
        except AdapterRejected as error:
            raise AdapterRejected([*problems, *error.problems]) from None
        if problems:
            raise AdapterRejected(problems)
        return report


def _weights(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(WEIGHTS_SUFFIX))


def check_name(name: str) -> None:
    """Raise InvalidRequest unless `name` may name an adapter."""
    if not re.fullmatch(NAME, name):
        raise InvalidRequest(
            f"adapter name {shown(name)} must begin with a letter or digit and have at most 128 of "
            "letters, digits, '.', '_' and '-'",
            param="name",
        )


def _check_metadata(description: str, tags: Sequence[str]) -> None:
    if len(description) > _MAX_DESCRIPTION or "\0" in description:
        raise InvalidRequest(
            f"description has {len(description)} characters, at most {_MAX_DESCRIPTION} are "
            "accepted",
            param="description",
        )
    if len(tags) > _MAX_TAGS or any(
        not tag or len(tag) > _MAX_TAG or not tag.isprintable() for tag in tags
    ):
        raise InvalidRequest(
            f"tags must be at most {_MAX_TAGS} printable texts of 1 to {_MAX_TAG} characters",
            param="tags",
        )


def _lock(root: Path, *, is_shared: bool) -> tuple[int, bool]:
    """Return a descriptor that holds the store's lock until it is closed, and whether nobody else
    holds it now. A shared one is to be made LOCK_SH once what only one may do is done.
    """
    descriptor = os.open(root / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    until = time.monotonic() + _LOCK_WAIT_S
    while True:
        for how in (fcntl.LOCK_EX, fcntl.LOCK_SH) if is_shared else (fcntl.LOCK_EX,):
            try:
                fcntl.flock(descriptor, how | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            return descriptor, how == fcntl.LOCK_EX
        if not is_shared or time.monotonic() > until:
            os.close(descriptor)
            raise StartupError(
                f"the store {root} is in use by another process; stop that server or choose "
                "another --home"
            )
        time.sleep(0.05)
