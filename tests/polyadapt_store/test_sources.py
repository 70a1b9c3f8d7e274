"""Adapters from elsewhere: nothing that was not allowed is fetched, and nothing in its stead."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import httpx2
import huggingface_hub
import obstore
import pytest
from huggingface_hub.utils._http import default_client_factory
from obstore.store import MemoryStore
from tests.polyadapt_store.support import open_store, upload

from polyadapt.errors import (
    Forbidden,
    InvalidRequest,
    PayloadTooLarge,
    PolyadaptError,
    StartupError,
    Unavailable,
)
from polyadapt_store.blobs import BlobStore
from polyadapt_store.limits import StoreLimits
from polyadapt_store.sources import Sources, read_uri
from polyadapt_store.staging import StagedUpload

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}


@pytest.fixture(autouse=True)
def registry() -> None:
    """No registry is needed here."""


def staged_by(
    sources: Sources, uri: str, root: Path, limits: StoreLimits | None = None
) -> dict[str, bytes]:
    """Check and fetch; return what would be stored."""
    blobs = BlobStore(root / "staged-store")
    source = sources.check(uri)
    with StagedUpload(blobs, limits or StoreLimits(), lambda step: None) as staged:
        sources.fetch(source, staged)
        return {file.name: (staged.directory / file.name).read_bytes() for file in staged.files}


BAD_URIS = [
    "",
    "adapters",
    "ftp://host/x",
    "http://host/x",
    "file://host/x",
    "file:////etc",
    "file:///a/../b",
    "file:///a//b",
    "file:///a/./b",
    "file:///a%2e%2e/b",
    "https://user@host/x",
    "https://user:pw@host/x",
    "https://host/x?y",
    "https://host/x#y",
    "https://host\\@other/x",
    "https://host:port/x",
    "https:///x",
    "https://./x",
    "https://ho st/x",
    "https://h\u00f6st/x",
    "https://host/x\n",
    "https://[::1]/x",
    "s3://bucket/../x",
    "s3://b:1/x",
    "hf://owner/repo/folder",
    "hf://owner/repo@a@b",
    "hf://owner/repo@",
    "hf://owner/repo@../x",
    "https://host/" + "x" * 2000,
]


@pytest.mark.parametrize("uri", BAD_URIS)
def test_what_can_be_read_in_two_ways_is_refused(uri: str) -> None:
    with pytest.raises(InvalidRequest, match="source"):
        read_uri(uri)


@pytest.mark.parametrize(
    "uri",
    ["file:///srv/a", "hf://me/it@v1.0", "s3://bucket/a/b", "gs://b", "https://host:8443/a/b"],
)
def test_a_uri_is_read_as_it_is_written(uri: str) -> None:
    assert read_uri(uri).uri == uri


def test_everything_is_off_until_it_is_allowed() -> None:
    with pytest.raises(Forbidden, match="--allow-source"):
        Sources().check("s3://bucket/a")


ALLOWED = (
    "s3://bucket/team",
    "https://good.example/a",
    "hf://me",
    "hf://you/poet@v1",
    "file:///srv/adapters",
)


@pytest.mark.parametrize(
    ("uri", "is_allowed"),
    [
        ("s3://bucket/team", True),
        ("s3://bucket/team/poet", True),
        ("s3://bucket/team2/poet", False),
        ("s3://bucket", False),
        ("gs://bucket/team/poet", False),
        ("https://good.example/a/b", True),
        ("https://GOOD.example/a/b", True),
        ("https://good.example.evil.example/a/b", False),
        ("https://good.example:8443/a", False),
        ("https://good.example/b", False),
        ("hf://me/poet", True),
        ("hf://me/poet@main", True),
        ("hf://meow/poet", False),
        ("hf://you/poet@v1", True),
        ("hf://you/poet@v2", False),
        ("hf://you/poet", False),
        ("file:///srv/adapters/poet", True),
        ("file:///srv/adapters2", False),
        ("file:///etc", False),
    ],
)
def test_only_what_lies_below_an_allowed_one_is_allowed(uri: str, is_allowed: bool) -> None:
    sources = Sources(ALLOWED)
    if is_allowed:
        sources.check(uri)
    else:
        with pytest.raises(Forbidden, match="not among"):
            sources.check(uri)


@pytest.mark.parametrize("allowed", ["nonsense", "file:///", "s3://a/../b"])
def test_a_bad_allow_list_stops_the_start(allowed: str) -> None:
    with pytest.raises(StartupError, match="--allow-source"):
        Sources((allowed,))


# --------------------------------------------------------------------------- file
def make(directory: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def test_a_directory_is_copied(tmp_path: Path) -> None:
    make(tmp_path / "srv" / "poet", FILES | {"README.md": b"no", "deep/er/x.json": b"no"})
    sources = Sources((f"file://{tmp_path}/srv",))
    assert staged_by(sources, f"file://{tmp_path}/srv/poet", tmp_path) == FILES


def test_links_may_not_lead_outside(tmp_path: Path) -> None:
    make(tmp_path / "secret")
    make(tmp_path / "srv" / "poet")
    (tmp_path / "srv" / "out").symlink_to(tmp_path / "secret")
    (tmp_path / "srv" / "poet" / "0").symlink_to(tmp_path / "srv")
    sources = Sources((f"file://{tmp_path}/srv",))
    with pytest.raises(Forbidden, match="outside"):
        staged_by(sources, f"file://{tmp_path}/srv/out", tmp_path)
    (tmp_path / "srv" / "poet" / "adapter_config.json").unlink()
    (tmp_path / "srv" / "poet" / "adapter_config.json").symlink_to(
        tmp_path / "secret" / "adapter_config.json"
    )
    with pytest.raises(Forbidden, match="outside"):
        staged_by(sources, f"file://{tmp_path}/srv/poet", tmp_path)


# --------------------------------------------------------------------------- buckets
def test_objects_below_a_prefix_are_read(tmp_path: Path) -> None:
    bucket, asked = MemoryStore(), []
    for name, content in (FILES | {"0/adapter_config.json": b"[]", "a/b/c.json": b"no"}).items():
        obstore.put(bucket, f"team/poet/{name}", content)
    obstore.put(bucket, "team/poet2/adapter_config.json", b"another's")

    def open_bucket(url: str) -> MemoryStore:
        asked.append(url)
        return bucket

    sources = Sources(("s3://bucket/team", "gs://other"), open_bucket=open_bucket)
    found = staged_by(sources, "s3://bucket/team/poet", tmp_path)
    assert found == FILES, "what no family reads is not stored"
    with pytest.raises(InvalidRequest, match="no objects"):
        staged_by(sources, "gs://other/nothing", tmp_path)
    assert asked == ["s3://bucket", "gs://other"]


def test_a_source_that_is_too_large_ends_the_fetch(tmp_path: Path) -> None:
    bucket = MemoryStore()
    for name, content in FILES.items():
        obstore.put(bucket, name, content * 1000)
    sources = Sources(("s3://bucket",), open_bucket=lambda url: bucket)
    with pytest.raises(PayloadTooLarge):
        staged_by(sources, "s3://bucket", tmp_path, StoreLimits(total_bytes=5000))


def test_closing_ends_a_fetch_at_its_next_bytes(tmp_path: Path) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        sources.close()
        return serve(request)

    sources, requests = https(answer, "93.184.215.14")
    with pytest.raises(Unavailable, match="ended"):
        staged_by(sources, "https://good.example/a/poet", tmp_path)
    assert len(requests) == 1


def test_an_object_that_cannot_be_read_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = MemoryStore()
    for name, content in FILES.items():
        obstore.put(bucket, name, content)
    sources = Sources(("s3://bucket",), open_bucket=lambda url: bucket)
    get = obstore.get

    def late(bucket: MemoryStore, path: str) -> obstore.GetResult:
        obstore.delete(bucket, path)  # by somebody else, between the listing and this
        return get(bucket, path)

    monkeypatch.setattr(obstore, "get", late)
    with pytest.raises(InvalidRequest, match="may not read it"):
        staged_by(sources, "s3://bucket", tmp_path)


def test_a_bucket_without_obstore_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    Sources(("hf://me",))
    with pytest.raises(StartupError, match=r"s3://bucket.*polyadapt\[object-store\]"):
        Sources(("s3://bucket/team",))


# --------------------------------------------------------------------------- https
def https(
    answer: Callable[[httpx.Request], httpx.Response], *addresses: str
) -> tuple[Sources, list[httpx.Request]]:
    requests: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return answer(request)

    sources = Sources(
        ("https://good.example/a",),
        transport=httpx.MockTransport(handle),
        resolve=lambda host, port: addresses,
    )
    return sources, requests


def serve(request: httpx.Request) -> httpx.Response:
    content = FILES[request.url.path.rpartition("/")[2]]
    return httpx.Response(200, stream=httpx.ByteStream(content))


def test_two_files_are_fetched_from_the_address_that_was_judged(tmp_path: Path) -> None:
    sources, requests = https(serve, "93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c")
    assert staged_by(sources, "https://good.example/a/poet", tmp_path) == FILES
    assert [str(request.url) for request in requests] == [
        f"https://93.184.215.14/a/poet/{name}" for name in FILES
    ]
    for request in requests:
        assert request.headers["host"] == "good.example"
        assert request.extensions["sni_hostname"] == "good.example", "whom the certificate names"
        assert "authorization" not in request.headers


PRIVATE = [
    "127.0.0.1",
    "10.0.0.1",
    "169.254.169.254",
    "192.168.1.1",
    "100.64.0.1",
    "0.0.0.0",
    "224.0.0.1",
    "::1",
    "fd00::1",
    "fe80::1",
    "::ffff:127.0.0.1",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_no_name_may_stand_for_a_private_address(address: str, tmp_path: Path) -> None:
    for addresses in ([address], ["93.184.215.14", address]):
        sources, requests = https(serve, *addresses)
        with pytest.raises(Forbidden, match="private"):
            staged_by(sources, "https://good.example/a/poet", tmp_path)
        assert requests == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(status: int, tmp_path: Path) -> None:
    sources, requests = https(
        lambda request: httpx.Response(status, headers={"location": "https://good.example/a/b"}),
        "93.184.215.14",
    )
    with pytest.raises(Forbidden, match="redirects"):
        staged_by(sources, "https://good.example/a/poet", tmp_path)
    assert len(requests) == 1


def drop(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused")


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda request: httpx.Response(404), InvalidRequest),
        (lambda request: httpx.Response(500), InvalidRequest),
        (
            lambda request: httpx.Response(
                200, headers={"content-encoding": "gzip"}, stream=httpx.ByteStream(b"x")
            ),
            InvalidRequest,
        ),
        (drop, Unavailable),
    ],
)
def test_other_answers_are_errors(
    answer: Callable[[httpx.Request], httpx.Response],
    error: type[PolyadaptError],
    tmp_path: Path,
) -> None:
    sources, _ = https(answer, "93.184.215.14")
    with pytest.raises(error, match=r"good\.example"):
        staged_by(sources, "https://good.example/a/poet", tmp_path)


def test_an_unknown_host_is_an_error(tmp_path: Path) -> None:
    sources, _ = https(serve)
    with pytest.raises(InvalidRequest, match="not known"):
        staged_by(sources, "https://good.example/a/poet", tmp_path)


class Trickle:
    """Bytes that come one by one, for seconds."""

    def __init__(self) -> None:
        self.num_sent = 0

    def __len__(self) -> int:
        return 1000

    def __iter__(self) -> Iterator[bytes]:
        while self.num_sent < len(self):
            self.num_sent += 1
            time.sleep(0.005)
            yield b" "


def test_a_source_that_trickles_is_ended_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyadapt_store.sources.FETCH_TIMEOUT_S", 0.05)
    slow = Trickle()
    sources, _ = https(lambda request: httpx.Response(200, content=slow), "93.184.215.14")
    with pytest.raises(Unavailable, match="was not read in"):
        staged_by(sources, "https://good.example/a/poet", tmp_path)
    assert slow.num_sent < 100


# --------------------------------------------------------------------------- hub
COMMIT = "c" * 40


@dataclass
class FakeHub:
    """What the hub's own client talks to; weights lie elsewhere, as large files do."""

    files: dict[str, bytes | Trickle] = field(default_factory=lambda: dict(FILES))
    requests: list[httpx2.Request] = field(default_factory=list)
    error: Exception | None = None

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        at = f"{request.url.host}{request.url.path}"
        if at == "huggingface.co/api/models/me/poet/revision/v1":
            siblings = [{"rfilename": n, "size": len(c)} for n, c in self.files.items()]
            return httpx2.Response(200, json={"id": "me/poet", "sha": COMMIT, "siblings": siblings})
        if "/api/" in at:
            code = "RevisionNotFound" if "/me/poet/" in at else "RepoNotFound"
            return httpx2.Response(404, headers={"x-error-code": code})
        name = at.removeprefix(f"huggingface.co/me/poet/resolve/{COMMIT}/")
        if name == "adapter_model.safetensors":
            return httpx2.Response(302, headers={"location": f"https://cdn.example/{name}"})
        return httpx2.Response(200, content=self.files[name.removeprefix("cdn.example/")])


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    fake = FakeHub()
    transport = httpx2.MockTransport(fake)
    huggingface_hub.set_client_factory(lambda: httpx2.Client(transport=transport))
    yield fake
    huggingface_hub.set_client_factory(default_client_factory)


def test_a_repository_is_read_at_the_commit_that_was_listed(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.files |= {"README.md": b"unused", "a/b/c.json": b"too deep"}
    sources = Sources(("hf://me",))
    assert staged_by(sources, "hf://me/poet@v1", tmp_path) == FILES
    asked = [(request.url.host, "authorization" in request.headers) for request in hub.requests]
    assert asked == [("huggingface.co", True)] * 3 + [("cdn.example", False)], "nothing unused"
    with pytest.raises(PayloadTooLarge):
        staged_by(sources, "hf://me/poet@v1", tmp_path, StoreLimits(file_bytes=3))
    assert len(hub.requests) == 6, "too large a file is not downloaded"


def test_a_repository_that_trickles_is_ended_in_time(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyadapt_store.sources.FETCH_TIMEOUT_S", 0.05)
    hub.files["adapter_model.safetensors"] = slow = Trickle()
    with pytest.raises(Unavailable, match="was not read in"):
        staged_by(Sources(("hf://me",)), "hf://me/poet@v1", tmp_path)
    assert slow.num_sent < 100


@pytest.mark.parametrize("uri", ["hf://me/prose@v1", "hf://me/poet@v2", "hf://me/a+b", "hf://me/-"])
def test_a_repository_that_is_not_there_is_told_so(uri: str, hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="not there"):
        staged_by(Sources(("hf://me",)), uri, tmp_path)


def test_a_hub_that_cannot_be_reached_is_asked_again_later(hub: FakeHub, tmp_path: Path) -> None:
    hub.error = httpx2.ConnectError("refused")
    with pytest.raises(Unavailable, match="cannot be read now"):
        staged_by(Sources(("hf://me",)), "hf://me/poet@v1", tmp_path)


def test_what_was_fetched_is_published_like_an_upload(tmp_path: Path) -> None:
    make(tmp_path / "srv" / "poet")
    sources = Sources((f"file://{tmp_path}/srv",))
    with open_store(tmp_path / "store") as store:
        with store.stage() as staged:
            sources.fetch(sources.check(f"file://{tmp_path}/srv/poet"), staged)
            record, is_new = store.publish(staged, "poet", "a")
        assert is_new
        assert upload(store, content=b"weights")[0].digest == record.digest
