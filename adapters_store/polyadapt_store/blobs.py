"""Content-addressed bytes in a local directory: one immutable directory per digest. Knows no names
or tenants. A file may lie sealed; the digest is of what it holds, in the clear.

root/sha256/<hex>/adapter_config.json, adapter_model.safetensors, ...
root/derived/<hex>/...         what others made of a blob and can make again; leaves with it
root/staging/<random>/...      on its way in or out; swept at start
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from polyadapt.errors import AdapterUnavailable, SecretsUnavailable
from polyadapt_store.manifest import FileEntry, digest_of
from polyadapt_store.sealed_files import FileSealer, is_sealed, plain_entry

logger = logging.getLogger(__name__)

Failpoint = Callable[[str], None]

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")  # our own constant; never a stranger's pattern
_CHUNK = 1 << 20


def no_failpoint(name: str) -> None:
    """Do nothing; tests pass a function that raises or kills at the named step."""


class BlobStore:
    """Owns the directory `root`. Several threads may use one BlobStore; the caller serialises put
    and delete.
    """

    def __init__(self, root: Path, failpoint: Failpoint = no_failpoint) -> None:
        self._blobs = root / "sha256"
        self._derived = root / "derived"
        self._staging = root / "staging"
        self._failpoint = failpoint
        self.sealer: FileSealer | None = None  # opens and seals files; None: nothing can
        for directory in (root, self._blobs, self._derived, self._staging):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        sync_directory(root)

    def path(self, digest: str) -> Path:
        """Return the directory of the blob, whether or not it exists; raises ValueError for a bad
        digest.
        """
        match = _DIGEST.fullmatch(digest)
        if match is None:
            raise ValueError(f"{digest!r} is no digest, expected 'sha256:' and 64 hex digits")
        return self._blobs / match.group(1)

    @property
    def derived_root(self) -> Path:
        """The directory of what is derived from blobs: `<hex>/<any file>`."""
        return self._derived

    def derived(self, digest: str) -> Path:
        """Return the directory for what is derived from the blob, whether or not it exists; it is
        removed with the blob. Raises like path().
        """
        return self._derived / self.path(digest).name

    def new_staging(self) -> Path:
        """Return a new empty directory on the same file system; put() or discard() ends it."""
        directory = self._staging / secrets.token_hex(16)
        directory.mkdir(mode=0o700)
        return directory

    def put(self, staged: Path, digest: str) -> Path:
        """Move the directory `staged`, whose files are synced, to its digest; return the blob's
        path.

        If the digest is stored already, its bytes are verified and kept, or replaced when they are
        damaged, sealed under a key that is lost, or in the clear and `staged` has them sealed.
        Durable when it returns.
        """
        target = self.path(digest)
        if target.exists():
            if self._is_as_good(target, staged, digest):
                self.discard(staged)
                return target
            logger.warning("replacing damaged or clear blob %s by a fresh upload", digest)
            self._remove_blob(target)
        for directory in [*(d for d in staged.rglob("*") if d.is_dir()), staged]:
            sync_directory(directory)
        self._failpoint("blob.before_rename")
        os.rename(staged, target)
        self._failpoint("blob.after_rename")
        sync_directory(self._blobs)
        return target

    def verify(self, digest: str) -> bool:
        """Whether the stored files are exactly those that were put; reads every byte. False if
        absent. Raises like is_blob().
        """
        directory = self.path(digest)
        return directory.is_dir() and self.is_blob(directory, digest)

    def is_blob(self, directory: Path, digest: str) -> bool:
        """Whether the files below `directory` are exactly those of the digest. Raises
        SecretsUnavailable for a sealed file that there is no key for.
        """
        try:
            entries = [
                plain_entry(entry, directory / entry.name, digest, self.sealer)
                for entry in list_files(directory)
            ]
        except AdapterUnavailable:  # sealed, and changed since
            return False
        return digest_of(entries) == digest

    def _is_as_good(self, target: Path, staged: Path, digest: str) -> bool:
        try:
            return _sealed_names(target) >= _sealed_names(staged) and self.verify(digest)
        except SecretsUnavailable:
            return False

    def seal(self, directory: Path, digest: str, names: Iterable[str], sealer: FileSealer) -> bool:
        """Seal those files of the adapter that lie in the clear in `directory`, a staged one or the
        blob; return whether there were any. Each is replaced at once: after a crash it is one of
        both. What was derived from the blob leaves. Raises InvalidRequest for a file too large.
        """
        clear = [name for name in names if not is_sealed(directory / name)]
        for name in clear:
            sealed = sealer.seal((directory / name).read_bytes(), digest, name)
            scratch = self.new_staging()
            try:
                with open(scratch / "sealed", "xb") as file:
                    file.write(sealed)
                    file.flush()
                    os.fsync(file.fileno())
                self._failpoint("seal.before_replace")
                os.replace(scratch / "sealed", directory / name)
                self._failpoint("seal.after_replace")
                sync_directory((directory / name).parent)
            finally:
                self.discard(scratch)
        if self.derived(digest).exists():  # also of a blob that was sealed before a crash
            self._remove(self.derived(digest))
        return bool(clear)

    def digests(self) -> list[str]:
        """Return the digests of all blobs that are here."""
        return [f"sha256:{directory.name}" for directory in self._blobs.iterdir()]

    def delete(self, digest: str) -> bool:
        """Remove the blob; return whether there was one. Open files of running readers stay
        readable.
        """
        directory = self.path(digest)
        if not directory.exists():
            return False
        self._failpoint("blob.before_delete")
        self._remove_blob(directory)
        self._failpoint("blob.after_delete")
        return True

    def discard(self, staged: Path) -> None:
        """Remove a staging directory that is not wanted any more."""
        shutil.rmtree(staged)

    def sweep(self, live: Collection[str]) -> list[str]:
        """Remove every staging directory and every blob whose digest is not in `live`; return those
        digests.

        Only for the start, before anything is staged.
        """
        for leftover in self._staging.iterdir():
            logger.info("removing unfinished upload %s", leftover.name)
            shutil.rmtree(leftover)
        orphans = []
        for directory in self._blobs.iterdir():
            digest = f"sha256:{directory.name}"
            if digest not in live:
                logger.info("removing blob without a name %s", digest)
                self._remove(directory)
                orphans.append(digest)
        for directory in self._derived.iterdir():
            if f"sha256:{directory.name}" not in live:
                self._remove(directory)
        return orphans

    def _remove_blob(self, directory: Path) -> None:
        # What is derived leaves first: nothing of a blob may outlive its bytes.
        derived = self._derived / directory.name
        if derived.exists():
            self._remove(derived)
        self._remove(directory)

    def _remove(self, directory: Path) -> None:
        # Renamed first: a crash half-way must not leave a blob with some of its files.
        doomed = self._staging / secrets.token_hex(16)
        os.rename(directory, doomed)
        sync_directory(directory.parent)
        shutil.rmtree(doomed)


def _sealed_names(directory: Path) -> frozenset[str]:
    files = (path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
    return frozenset(str(path.relative_to(directory)) for path in files if is_sealed(path))


def list_files(directory: Path) -> list[FileEntry]:
    """Return every regular file below `directory` with its size and sha256; links are not
    followed.
    """
    entries = []
    for path in sorted(directory.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        digest, size = hashlib.sha256(), 0
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
        entries.append(FileEntry(path.relative_to(directory).as_posix(), size, digest.hexdigest()))
    return entries


def sync_directory(directory: Path) -> None:
    """Make the directory's entries durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a directory; their renames are durable by
        # themselves.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
