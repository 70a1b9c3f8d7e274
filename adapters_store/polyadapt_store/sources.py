"""Adapters from elsewhere: one function per scheme, behind an allow-list. Knows no names.

file:///DIRECTORY          a directory of this machine
hf://OWNER/REPO[@REVISION] a repository of the model hub
s3://BUCKET/PREFIX, gs://  objects below a prefix; credentials are the environment's
https://HOST/PATH          PATH/adapter_config.json and PATH/adapter_model.safetensors

What is fetched is what was allowed: no redirect is followed, no name may stand for a private
address, links may not leave the directory, and sizes are those of an upload.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import httpx

from polyadapt.errors import Forbidden, InvalidRequest, PayloadTooLarge, StartupError, Unavailable
from polyadapt_store.manifest import CONFIG_NAME, WEIGHTS_NAME, is_shallow, list_shallow
from polyadapt_store.object_store import open_bucket
from polyadapt_store.staging import StagedUpload
from polyadapt_store.strict_json import shown

if TYPE_CHECKING:
    from obstore.store import ObjectStore

logger = logging.getLogger(__name__)

SCHEMES = ("file", "hf", "s3", "gs", "https")
FETCH_TIMEOUT_S = 900.0

_MAX_URI = 1024
_CHUNK = 1 << 20
_MAX_LISTED = 1000
# Nothing in it is encoded, so nothing has to be decoded the same way twice.
_PLAIN = re.compile(r"[A-Za-z0-9._~:/@+=,-]+")
_TIMEOUT_S = 30.0  # without a byte
_HTTP_TIMEOUT = httpx.Timeout(_TIMEOUT_S, connect=10.0)

_Check = Callable[[], None]  # raises Unavailable when a fetch has to end


@dataclass(frozen=True, slots=True)
class Source:
    """A URI that was read: who has it, where below, and which revision."""

    scheme: str
    host: str  # or bucket, or owner; empty for file
    path: tuple[str, ...]
    revision: str | None = None

    @property
    def uri(self) -> str:
        """The URI again."""
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{self.scheme}://{'/'.join((self.host, *self.path))}{revision}"

    def is_below(self, other: Source) -> bool:
        """Whether it is the other or lies below it, at the other's revision if that has one."""
        same = (self.scheme, self.host) == (other.scheme, other.host)
        is_at_it = other.revision is None or self.revision == other.revision
        return same and is_at_it and self.path[: len(other.path)] == other.path


class Sources:
    """What may be fetched, and how. Thread-safe."""

    def __init__(
        self,
        allowed: Sequence[str] = (),
        *,
        transport: httpx.BaseTransport | None = None,
        resolve: Callable[[str, int], Iterable[str]] | None = None,
        open_bucket: Callable[[str], ObjectStore] = open_bucket,
    ) -> None:
        """allowed: URIs; they and what lies below them may be fetched; of a repository that is
        allowed at a revision, that revision alone. The others are seams for tests. Raises
        StartupError for a URI that cannot be read, and for a bucket without obstore.
        """
        try:
            self._allowed = tuple(read_uri(uri) for uri in allowed)
        except InvalidRequest as error:
            raise StartupError(f"--allow-source: {error.message}") from None
        for source in self._allowed:
            if source.scheme == "file" and not source.path:
                raise StartupError("--allow-source: file:/// is the whole machine; name a folder")
        self._is_closed = threading.Event()
        self._transport = transport
        self._resolve = resolve or _addresses
        self._buckets = {
            (source.scheme, source.host): open_bucket(f"{source.scheme}://{source.host}")
            for source in self._allowed
            if source.scheme in ("s3", "gs")
        }

    def check(self, uri: str) -> Source:
        """Return the URI as it is understood; raises InvalidRequest, and Forbidden unless the
        operator has allowed it.
        """
        source = read_uri(uri)
        if not self._allowed:
            raise Forbidden(
                "adapters from a source are off; the operator allows some with --allow-source",
                param="source.uri",
            )
        if not any(source.is_below(allowed) for allowed in self._allowed):
            raise Forbidden(f"{shown(uri)} is not among the allowed sources", param="source.uri")
        return source

    def fetch(self, source: Source, staged: StagedUpload) -> None:
        """Add the source's files to the upload. Raises InvalidRequest, Forbidden, PayloadTooLarge
        and Unavailable; it may take FETCH_TIMEOUT_S.
        """
        deadline = time.monotonic() + FETCH_TIMEOUT_S

        def check() -> None:
            if self._is_closed.is_set():
                raise Unavailable("the server ended; ask again")
            if time.monotonic() > deadline:
                raise Unavailable(f"the source was not read in {FETCH_TIMEOUT_S:g} s")

        check()
        if source.scheme == "file":
            self._fetch_file(source, staged, check)
        elif source.scheme == "hf":
            _fetch_hub(source, staged, check)
        elif source.scheme == "https":
            self._fetch_https(source, staged, check)
        else:
            self._fetch_bucket(source, staged, check)

    def close(self) -> None:
        """Have every fetch end at its next bytes, with Unavailable."""
        self._is_closed.set()

    def _fetch_file(self, source: Source, staged: StagedUpload, check: _Check) -> None:
        directory = Path("/", *source.path)
        roots = [
            Path("/", *allowed.path).resolve()
            for allowed in self._allowed
            if source.is_below(allowed)
        ]

        def is_inside(path: Path) -> bool:
            real = path.resolve()
            return any(real.is_relative_to(root) for root in roots)

        if not is_inside(directory):
            raise Forbidden(f"{source.uri} leads outside the allowed folders", param="source.uri")
        if not directory.is_dir():
            raise InvalidRequest(f"{source.uri} is no directory", param="source.uri")
        for name in list_shallow(directory):
            path = directory / name
            if not is_inside(path):
                raise Forbidden(
                    f"{source.uri}: {name} leads outside the allowed folders", param="source.uri"
                )
            with path.open("rb") as file:
                _add(staged, name, _chunks(file), check)

    def _fetch_bucket(self, source: Source, staged: StagedUpload, check: _Check) -> None:
        import obstore
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        bucket = self._buckets[source.scheme, source.host]
        prefix = "".join(f"{part}/" for part in source.path)
        try:
            names: list[str] = []
            for page in obstore.list(bucket, prefix=prefix or None):
                names += [str(entry["path"]).removeprefix(prefix) for entry in page]
                if len(names) > _MAX_LISTED:
                    raise PayloadTooLarge(
                        f"{source.uri} holds more than {_MAX_LISTED} objects", param="source.uri"
                    )
            wanted = sorted(filter(is_shallow, names))
            if not wanted:
                raise InvalidRequest(f"{source.uri} holds no objects", param="source.uri")
            for name in wanted:
                try:
                    found = obstore.get(bucket, prefix + name)
                except (FileNotFoundError, PermissionDeniedError, UnauthenticatedError) as error:
                    raise _unreadable(source, error) from error
                _add(staged, name, (bytes(chunk) for chunk in found.stream()), check)
        except BaseError as error:
            raise _unavailable(source, error) from error

    def _fetch_https(self, source: Source, staged: StagedUpload, check: _Check) -> None:
        name, _, port = source.host.partition(":")
        address = self._public_address(source, name, int(port or 443))
        with httpx.Client(
            transport=self._transport,
            timeout=_HTTP_TIMEOUT,
            follow_redirects=False,
            trust_env=False,  # a proxy would resolve the name again
        ) as client:
            for file in (CONFIG_NAME, WEIGHTS_NAME):
                # To the address that was judged: the name could stand for another one by now.
                url = httpx.URL(
                    scheme="https",
                    host=address,
                    port=int(port) if port else None,
                    path="/" + "/".join((*source.path, file)),
                )
                try:
                    with client.stream(
                        "GET",
                        url,
                        headers={"host": source.host, "accept-encoding": "identity"},
                        extensions={"sni_hostname": name},
                    ) as reply:
                        self._take_reply(source, file, reply, staged, check)
                except httpx.TransportError as error:
                    raise _unavailable(source, error) from error

    def _take_reply(
        self,
        source: Source,
        file: str,
        reply: httpx.Response,
        staged: StagedUpload,
        check: _Check,
    ) -> None:
        if reply.is_redirect or reply.has_redirect_location:
            raise Forbidden(
                f"{source.uri} redirects; give the address that has the files", param="source.uri"
            )
        if reply.status_code != 200:
            raise InvalidRequest(
                f"{source.uri} answered {reply.status_code} for {file}", param="source.uri"
            )
        if reply.headers.get("content-encoding", "identity") != "identity":
            raise InvalidRequest(f"{source.uri} answered in an encoding", param="source.uri")
        _add(staged, file, reply.iter_raw(), check)

    def _public_address(self, source: Source, name: str, port: int) -> str:
        found = list(self._resolve(name, port))
        for text in found:
            address = ipaddress.ip_address(text)
            if not address.is_global or address.is_multicast:
                raise Forbidden(f"{source.uri} stands for a private address", param="source.uri")
        if not found:
            raise InvalidRequest(f"{source.uri}: the host is not known", param="source.uri")
        return found[0]


def read_uri(uri: str) -> Source:
    """Return a URI's parts; raises InvalidRequest for anything that could be read in two ways."""
    scheme, separator, rest = uri.partition("://")
    revision = None
    if scheme not in SCHEMES or not separator:
        raise InvalidRequest(
            f"the source {shown(uri)} has none of the schemes {', '.join(SCHEMES)}",
            param="source.uri",
        )
    if scheme == "hf":
        rest, at, revision = rest.partition("@")
        revision = revision if at else None
    host, _, path = rest.partition("/")
    parts = tuple(path.rstrip("/").split("/")) if path.rstrip("/") else ()
    has_host = bool(host) != (scheme == "file")
    is_plain = len(uri) <= _MAX_URI and _PLAIN.fullmatch(uri) is not None
    revision_parts = () if revision is None else tuple(revision.split("/"))
    if (
        not is_plain
        or not has_host
        or "@" in rest + (revision or "")
        or (":" in host and not (scheme == "https" and re.fullmatch(r"[^:]+:\d{1,5}", host)))
        or any(part in ("", ".", "..") for part in (host or "x", *parts, *revision_parts))
        or (scheme == "hf" and len(parts) > 1)
    ):
        raise InvalidRequest(
            f"the source {shown(uri)} cannot be read; expected SCHEME://HOST/PATH of letters, "
            "digits and ._~:/@+=,- without users, queries, '..' and percent signs",
            param="source.uri",
        )
    return Source(scheme, host.lower() if scheme == "https" else host, parts, revision)


def _fetch_hub(source: Source, staged: StagedUpload, check: _Check) -> None:
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,  # httpx's or httpx2's, as the client's version has it
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    if not source.path:
        raise InvalidRequest("expected hf://OWNER/REPO", param="source.uri")
    repository = f"{source.host}/{source.path[0]}"
    try:
        info = HfApi().model_info(
            repository, revision=source.revision, files_metadata=True, timeout=_TIMEOUT_S
        )
        siblings = sorted(info.siblings or (), key=lambda sibling: sibling.rfilename)
        for sibling in siblings:
            name = sibling.rfilename
            if not is_shallow(name):
                continue
            if not staged.wants(name):
                _add(staged, name, iter(()), check)  # judged by its name alone
                continue
            staged.check_size(name, sibling.size or 0)
            # The commit that was listed, whatever the branch is by now. Not by hf_hub_download,
            # which nobody can end.
            with get_session().stream(
                "GET",
                hf_hub_url(repository, name, revision=info.sha),
                headers=build_hf_headers(),
                follow_redirects=True,  # to where the hub keeps large files
                timeout=_TIMEOUT_S,
            ) as reply:
                hf_raise_for_status(reply)
                _add(staged, name, reply.iter_bytes(), check)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise _unreadable(source, error) from error
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise _unavailable(source, error) from error


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk


def _add(staged: StagedUpload, name: str, chunks: Iterator[bytes], check: _Check) -> None:
    with staged.add_file(name) as writer:
        for chunk in chunks:
            check()
            writer.write(chunk)


def _addresses(host: str, port: int) -> Iterable[str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [str(entry[4][0]) for entry in found]


def _unreadable(source: Source, error: Exception) -> InvalidRequest:
    logger.warning("%s: %s", source.uri, str(error)[:500])
    return InvalidRequest(
        f"{source.uri} is not there, or this server may not read it", param="source.uri"
    )


def _unavailable(source: Source, error: Exception) -> Unavailable:
    logger.warning("%s: %s", source.uri, str(error)[:500])
    return Unavailable(f"{source.uri} cannot be read now", retry_after_s=30)
