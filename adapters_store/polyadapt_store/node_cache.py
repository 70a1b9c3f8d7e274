"""Blobs of an object store on this machine's disk: fetched once, verified, bounded, leased.

Servers of one machine may share the directory: every digest has a lock file, held shared while its
files are in use and exclusively while they are removed, and another one while they are fetched.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from polyadapt.errors import AdapterUnavailable
from polyadapt_store.blobs import BlobStore
from polyadapt_store.object_store import ObjectBlobs

logger = logging.getLogger(__name__)


class NodeCache:
    """Owns the leases of one process on the blobs below `root`. Thread-safe."""

    def __init__(self, root: Path, blobs: BlobStore, remote: ObjectBlobs, max_bytes: float) -> None:
        self._blobs = blobs
        self._remote = remote
        self._max_bytes = max_bytes
        self._locks = root / "locks"
        self._locks.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._mutex = threading.Lock()
        self._held: dict[str, tuple[int, int]] = {}  # digest -> descriptor, leases

    def try_hold(self, digest: str) -> bool:
        """Lease the blob if it lies here; nothing removes it until the lease is released."""
        with self._mutex:
            descriptor, count = self._held.get(digest, (-1, 0))
            if count == 0:
                # Before the look: what is removed is locked first.
                locked = self._lock(digest, fcntl.LOCK_SH | fcntl.LOCK_NB)
                if locked is None:
                    return False
                descriptor = locked
                if not self._blobs.path(digest).is_dir():
                    os.close(descriptor)
                    return False
            self._held[digest] = (descriptor, count + 1)
        with contextlib.suppress(OSError):
            os.utime(self._lock_path(digest))  # the longest unused leave first
        return True

    def hold(self, digest: str) -> None:
        """Lease the blob, fetched and verified if it does not lie here. Waits for whoever fetches
        it already. Raises AdapterUnavailable if it is not what its digest says, or Unavailable.
        """
        has_fetched = False
        while not self.try_hold(digest):
            with self._fetching(digest):
                if not self._blobs.path(digest).is_dir():
                    self._fetch(digest)
                    has_fetched = True
        if has_fetched:
            self.trim()

    def adopt(self, staged: Path, digest: str) -> None:
        """Take a staged directory as the blob, and lease it."""
        with self._fetching(digest):
            self._blobs.put(staged, digest)
        self.hold(digest)

    def release(self, digest: str) -> None:
        """Give one lease back."""
        with self._mutex:
            descriptor, count = self._held[digest]
            if count > 1:
                self._held[digest] = (descriptor, count - 1)
                return
            del self._held[digest]
            os.close(descriptor)

    def remove(self, digest: str) -> bool:
        """Remove the files unless anybody of this machine leases them; return whether they went."""
        descriptor = self._lock(digest, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if descriptor is None:
            return False
        try:
            return self._blobs.delete(digest)
        finally:
            with contextlib.suppress(FileNotFoundError):
                self._lock_path(digest).unlink()
            os.close(descriptor)

    def trim(self) -> None:
        """Remove what was not used for longest until at most max_bytes are left; leased blobs
        stay.
        """
        sizes = {digest: _size(self._blobs.path(digest)) for digest in self._blobs.digests()}
        total = sum(sizes.values())
        for digest in sorted(sizes, key=self._last_used):
            if total <= self._max_bytes:
                return
            if self.remove(digest):
                total -= sizes[digest]
                logger.info("removed %s from this machine, %d bytes", digest, sizes[digest])
        if total > self._max_bytes:
            logger.warning(
                "%d bytes of adapters in use lie here, more than the %.0f that are wanted",
                total,
                self._max_bytes,
            )

    def close(self) -> None:
        """Give all leases back."""
        with self._mutex:
            for descriptor, _ in self._held.values():
                os.close(descriptor)
            self._held.clear()

    def _fetch(self, digest: str) -> None:
        staging = self._blobs.new_staging()
        try:
            self._remote.fetch(digest, staging)
            if not self._blobs.is_blob(staging, digest):
                raise AdapterUnavailable(
                    f"what the object store holds of {digest} is damaged; upload it again"
                )
            self._blobs.put(staging, digest)
        finally:
            if staging.exists():
                self._blobs.discard(staging)
        logger.info("fetched %s", digest)

    @contextlib.contextmanager
    def _fetching(self, digest: str) -> Iterator[None]:
        path = self._lock_path(digest).with_suffix(".fetch")
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()  # whoever waits on it finds the files when its turn comes
            os.close(descriptor)

    def _lock(self, digest: str, how: int) -> int | None:
        """Return a descriptor that holds the digest's lock; None if somebody else does."""
        path = self._lock_path(digest)
        while True:
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, how)
                if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                return None
            except FileNotFoundError:
                pass
            os.close(descriptor)  # it was removed between the two calls

    def _lock_path(self, digest: str) -> Path:
        return self._locks / self._blobs.path(digest).name

    def _last_used(self, digest: str) -> float:
        try:
            return self._lock_path(digest).stat().st_mtime
        except FileNotFoundError:
            return 0.0


def _size(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError as error:
            if error.errno != errno.ENOENT:  # removed by another process meanwhile
                raise
    return total
