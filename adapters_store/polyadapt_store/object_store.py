"""Adapters' bytes in an object store that several servers share: PREFIX/sha256/<hex>/<file>.

Objects are made once and never changed. Knows no names: what may be deleted, the registry says
(leftovers.py). Credentials are the environment's, as obstore documents them: AWS_..., GOOGLE_...,
AZURE_....
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from polyadapt.errors import AdapterUnavailable, StartupError, Unavailable
from polyadapt_store.blobs import Failpoint, list_files, no_failpoint, sync_directory
from polyadapt_store.manifest import FileEntry
from polyadapt_store.sealed_files import begins_sealed

if TYPE_CHECKING:
    from obstore.store import ObjectStore

logger = logging.getLogger(__name__)

SCHEMES = ("s3", "gs", "az", "file", "memory")

# In one piece up to here, which only then can be made create-only.
_MAX_SINGLE_PUT = 256 << 20  # bytes
_MAX_FILES = 10_000
# Plain HTTP only matters to an endpoint that the operator gave as http://.
_CLIENT: dict[str, Any] = {"timeout": "300s", "connect_timeout": "5s", "allow_http": True}
_RETRY = {"max_retries": 4, "retry_timeout": timedelta(seconds=30)}


class ObjectBlobs:
    """Owns what lies under one URL. Thread-safe."""

    def __init__(
        self, url: str, failpoint: Failpoint = no_failpoint, *, store: ObjectStore | None = None
    ) -> None:
        """url: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX, file:///DIRECTORY or
        memory:///. Raises StartupError. store: used instead of the URL's, by tests.
        """
        self.url = url
        self._failpoint = failpoint
        scheme = urlsplit(url).scheme
        if scheme not in SCHEMES:
            raise StartupError(
                f"the blob URL {url[:100]!r} has none of the schemes {', '.join(SCHEMES)}"
            )
        self._directory: Path | None = None
        if scheme == "file":
            self._directory = Path(urlsplit(url).path)
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._store = open_bucket(url) if store is None else store

    def put(self, directory: Path, digest: str) -> None:
        """Store the files of the blob; durable when it returns. What lies there already is read
        and kept, or replaced when it is damaged. Raises Unavailable.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError

        with _explained(self.url, "written"):
            self._failpoint("remote.before_put")
            for entry in list_files(directory):
                path, source = _key(digest, entry.name), directory / entry.name
                is_large = entry.size > _MAX_SINGLE_PUT
                try:
                    if is_large and self._holds(path, entry):
                        continue
                    obstore.put(
                        self._store,
                        path,
                        source,
                        mode="overwrite" if is_large else "create",
                        use_multipart=is_large,
                    )
                except AlreadyExistsError:
                    if self._holds(path, entry):
                        continue
                    logger.warning("replacing damaged object %s by a fresh upload", path)
                    obstore.put(self._store, path, source, mode="overwrite")
                self._sync(path)
                self._failpoint("remote.file_put")
            self._failpoint("remote.after_put")

    def fetch(self, digest: str, target: Path) -> None:
        """Write the blob's files below `target`, synced; the caller verifies them. Raises
        AdapterUnavailable where there are none, and Unavailable.
        """
        import obstore

        with _explained(self.url, "read"):
            names = self._names(digest)
            for name in names:
                path = target / name
                path.parent.mkdir(mode=0o700, exist_ok=True)
                with path.open("xb") as file:
                    for chunk in obstore.get(self._store, _key(digest, name)).stream():
                        file.write(chunk)
                    file.flush()
                    os.fsync(file.fileno())
        if not names:
            raise AdapterUnavailable(f"the bytes of {digest} are not in the store of this server")

    def exists(self, digest: str) -> bool:
        """Whether any file of the blob is there. Raises Unavailable."""
        with _explained(self.url, "read"):
            return bool(self._names(digest))

    def is_sealed(self, digest: str, name: str) -> bool:
        """Whether a file of the blob lies sealed there, or not at all. Raises Unavailable."""
        import obstore

        with _explained(self.url, "read"):
            try:
                start = obstore.get_range(self._store, _key(digest, name), start=0, length=8)
            except FileNotFoundError:
                return True
            return begins_sealed(bytes(start))

    def delete(self, digest: str) -> bool:
        """Remove the blob; return whether there was one. Raises Unavailable."""
        import obstore

        with _explained(self.url, "written"):
            names = self._names(digest)
            if names:
                obstore.delete(self._store, [_key(digest, name) for name in names])
            return bool(names)

    def _names(self, digest: str) -> list[str]:
        import obstore

        prefix = _key(digest, "")
        found: list[str] = []
        for page in obstore.list(self._store, prefix=prefix):
            found += [str(entry["path"]).removeprefix(prefix) for entry in page]
            if len(found) > _MAX_FILES:
                raise AdapterUnavailable(f"{digest} has more than {_MAX_FILES} objects")
        return sorted(found)

    def _holds(self, path: str, entry: FileEntry) -> bool:
        import obstore

        try:
            found = obstore.get(self._store, path)
        except FileNotFoundError:
            return False
        if found.meta["size"] != entry.size:
            return False
        digest = hashlib.sha256()
        for chunk in found.stream():
            digest.update(chunk)
        return digest.hexdigest() == entry.sha256

    def _sync(self, path: str) -> None:
        """An object store answers when an object is durable; a directory does not."""
        if self._directory is None:
            return
        written = self._directory / path
        with written.open("rb") as file:
            os.fsync(file.fileno())
        for directory in written.parents:
            sync_directory(directory)
            if directory == self._directory:
                return


@contextmanager
def _explained(url: str, done: str) -> Iterator[None]:
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, OSError) as error:
        logger.error("%s cannot be %s: %s", url, done, str(error)[:500])
        raise Unavailable(
            f"the store of the adapters' bytes cannot be {done} now; try again shortly",
            retry_after_s=5,
        ) from error


def open_bucket(url: str) -> ObjectStore:
    """Return what obstore reads and writes below a URL with; nothing is asked yet. Raises
    StartupError without obstore, and for a URL that it cannot use.
    """
    scheme = urlsplit(url).scheme
    try:
        from obstore.exceptions import BaseError
        from obstore.store import MemoryStore, from_url
    except ImportError:
        raise StartupError(
            f"{url[:100]!r} needs obstore; pip install 'polyadapt[object-store]'"
        ) from None
    if scheme == "memory":
        return MemoryStore()
    options: dict[str, Any] = {}
    if scheme != "file":
        options = {"client_options": _CLIENT, "retry_config": _RETRY}
    try:
        return from_url(url, **options)
    except (BaseError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise StartupError(f"{url[:100]!r} cannot be used: {reason}") from None


def _key(digest: str, name: str) -> str:
    return f"sha256/{digest.removeprefix('sha256:')}/{name}"
