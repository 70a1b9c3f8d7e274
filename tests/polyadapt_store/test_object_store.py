"""Bytes in an object store: made once, verified on the way in and out, kept while they are used."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore
import pytest
from tests.polyadapt_store.conftest import use_bucket
from tests.polyadapt_store.support import accept, open_store, registry_of, remote_of, upload
from tests.support.s3 import S3Server

from polyadapt.errors import AdapterUnavailable, StartupError, Unavailable
from polyadapt_store.blobs import BlobStore, list_files
from polyadapt_store.manifest import digest_of
from polyadapt_store.node_cache import NodeCache
from polyadapt_store.object_store import ObjectBlobs
from polyadapt_store.store import AdapterStore

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["moto", "file", "memory"])
def remote(request: pytest.FixtureRequest, registry: str, tmp_path: Path) -> ObjectBlobs:
    if registry == "postgresql":
        pytest.skip("no registry is in it")
    if request.param == "moto":
        monkeypatch = request.getfixturevalue("monkeypatch")
        url = use_bucket(request.getfixturevalue("moto"), "blobs", monkeypatch)
        return ObjectBlobs(f"{url}/{tmp_path.name}")
    return ObjectBlobs("memory:///" if request.param == "memory" else f"file://{tmp_path}/bucket")


def make_blob(directory: Path, content: bytes = b"weights") -> str:
    (directory / "0").mkdir(parents=True)
    (directory / "adapter_config.json").write_bytes(b"{}")
    (directory / "0" / "adapter_model.safetensors").write_bytes(content)
    return digest_of(list_files(directory))


def test_what_is_put_is_fetched(remote: ObjectBlobs, tmp_path: Path) -> None:
    digest = make_blob(tmp_path / "a")
    assert not remote.exists(digest)
    remote.put(tmp_path / "a", digest)
    remote.put(tmp_path / "a", digest)
    assert remote.exists(digest)
    (tmp_path / "b").mkdir()
    remote.fetch(digest, tmp_path / "b")
    assert digest_of(list_files(tmp_path / "b")) == digest


def test_what_is_deleted_is_gone(remote: ObjectBlobs, tmp_path: Path) -> None:
    digest = make_blob(tmp_path / "a")
    remote.put(tmp_path / "a", digest)
    assert remote.delete(digest)
    assert not remote.exists(digest)
    assert not remote.delete(digest)
    with pytest.raises(AdapterUnavailable, match="not in the store"):
        remote.fetch(digest, tmp_path)


def test_a_damaged_object_is_replaced_by_a_fresh_upload(
    remote: ObjectBlobs, tmp_path: Path
) -> None:
    digest = make_blob(tmp_path / "a")
    remote.put(tmp_path / "a", digest)
    path = f"sha256/{digest.removeprefix('sha256:')}/0/adapter_model.safetensors"
    obstore.put(remote._store, path, b"Weights")
    remote.put(tmp_path / "a", digest)
    (tmp_path / "b").mkdir()
    remote.fetch(digest, tmp_path / "b")
    assert digest_of(list_files(tmp_path / "b")) == digest


def test_many_upload_the_same_bytes_at_once(remote: ObjectBlobs, tmp_path: Path) -> None:
    digest = make_blob(tmp_path / "a", b"x" * 100_000)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: remote.put(tmp_path / "a", digest), range(8)))
    (tmp_path / "b").mkdir()
    remote.fetch(digest, tmp_path / "b")
    assert digest_of(list_files(tmp_path / "b")) == digest


@pytest.mark.parametrize("url", ["", "bucket", "ftp://a/b", "http://a/b", "/tmp/x"])
def test_other_urls_stop_the_start(url: str) -> None:
    with pytest.raises(StartupError, match="s3"):
        ObjectBlobs(url)


def test_a_store_that_does_not_answer_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in S3Server("http://127.0.0.1:1").environment().items():
        monkeypatch.setenv(name, value)
    import polyadapt_store.object_store as module

    monkeypatch.setattr(module, "_RETRY", {"max_retries": 0})
    with pytest.raises(Unavailable, match="try again"):
        ObjectBlobs("s3://nowhere/x").exists("sha256:" + "0" * 64)


# --------------------------------------------------------------------------- on a machine
class CountedBlobs(ObjectBlobs):
    """Counts fetches, and waits in each until it is let go."""

    def __init__(self) -> None:
        super().__init__("memory:///")
        self.num_fetches = 0
        self.may_go = threading.Event()
        self.may_go.set()

    def fetch(self, digest: str, target: Path) -> None:
        self.num_fetches += 1
        assert self.may_go.wait(30)
        super().fetch(digest, target)


@pytest.fixture
def counted() -> CountedBlobs:
    return CountedBlobs()


def node(root: Path, remote: ObjectBlobs, max_bytes: int = 1 << 30) -> NodeCache:
    return NodeCache(root, BlobStore(root), remote, max_bytes)


def put(remote: ObjectBlobs, directory: Path, content: bytes) -> str:
    digest = make_blob(directory, content)
    remote.put(directory, digest)
    return digest


def test_a_blob_is_fetched_once_for_all_who_ask(counted: CountedBlobs, tmp_path: Path) -> None:
    digest = put(counted, tmp_path / "a", b"w")
    caches = [node(tmp_path / "node", counted) for _ in range(2)]  # as two processes have
    counted.may_go.clear()
    with ThreadPoolExecutor(8) as pool:
        holds = [pool.submit(caches[i % 2].hold, digest) for i in range(8)]
        assert not any(hold.done() for hold in holds)
        counted.may_go.set()
        for hold in holds:
            hold.result(30)
    assert counted.num_fetches == 1
    assert BlobStore(tmp_path / "node").verify(digest)


def test_what_is_leased_by_any_process_is_not_removed(
    counted: CountedBlobs, tmp_path: Path
) -> None:
    digest = put(counted, tmp_path / "a", b"w")
    one, other = node(tmp_path / "node", counted), node(tmp_path / "node", counted)
    one.hold(digest)
    one.hold(digest)
    assert not one.remove(digest)
    assert not other.remove(digest)
    one.release(digest)
    assert not other.remove(digest)
    one.release(digest)
    assert other.remove(digest)
    assert not one.try_hold(digest)


def test_the_longest_unused_leave_when_there_is_no_room(
    counted: CountedBlobs, tmp_path: Path
) -> None:
    digests = [put(counted, tmp_path / str(i), bytes([i]) * 1000) for i in range(4)]
    cache = node(tmp_path / "node", counted, max_bytes=2500)
    for i, digest in enumerate(digests[:2]):
        cache.hold(digest)
        cache.release(digest)
        lock = tmp_path / "node" / "locks" / digest.removeprefix("sha256:")
        os.utime(lock, (i, i))
    cache.hold(digests[1])  # in use, and the second oldest
    cache.hold(digests[2])
    assert set(BlobStore(tmp_path / "node").digests()) == {digests[1], digests[2]}
    cache.hold(digests[3])
    assert len(BlobStore(tmp_path / "node").digests()) == 3, "all are in use: nothing may leave"
    cache.release(digests[1])
    cache.trim()
    assert set(BlobStore(tmp_path / "node").digests()) == {digests[2], digests[3]}


def test_a_blob_larger_than_the_bound_is_held_all_the_same(
    counted: CountedBlobs, tmp_path: Path
) -> None:
    digest = put(counted, tmp_path / "a", b"w" * 1000)
    cache = node(tmp_path / "node", counted, max_bytes=10)
    cache.hold(digest)
    assert BlobStore(tmp_path / "node").verify(digest)


def test_damaged_bytes_are_never_put_in_place(counted: CountedBlobs, tmp_path: Path) -> None:
    digest = put(counted, tmp_path / "a", b"w")
    path = f"sha256/{digest.removeprefix('sha256:')}/adapter_config.json"
    obstore.put(counted._store, path, b"[]")
    cache = node(tmp_path / "node", counted)
    with pytest.raises(AdapterUnavailable, match="damaged"):
        cache.hold(digest)
    assert BlobStore(tmp_path / "node").digests() == []
    assert list((tmp_path / "node" / "staging").iterdir()) == []
    obstore.put(counted._store, path, b"{}")
    cache.hold(digest)


def test_a_process_that_dies_leaves_no_lease(counted: CountedBlobs, tmp_path: Path) -> None:
    digest = put(counted, tmp_path / "a", b"w")
    cache = node(tmp_path / "node", counted)
    cache.hold(digest)
    cache.release(digest)
    program = (
        "import sys, os, pathlib; from polyadapt_store.blobs import BlobStore\n"
        "from polyadapt_store.node_cache import NodeCache\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "assert NodeCache(root, BlobStore(root), None, 1).try_hold(sys.argv[2])\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "node"), digest],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
    ) as holder:  # fmt: skip
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert not cache.remove(digest)
        holder.kill()
        holder.wait()
    assert cache.remove(digest)


# --------------------------------------------------------------------------- a store on it
@pytest.mark.usefixtures("bucket")
def test_an_upload_to_one_is_had_by_another(tmp_path: Path) -> None:
    shared = registry_of(tmp_path)
    with (
        AdapterStore(tmp_path / "a", accept, registry=shared, remote=_remote(tmp_path)) as one,
        AdapterStore(tmp_path / "b", accept, registry=shared, remote=_remote(tmp_path)) as other,
    ):
        record, _ = upload(one, content=b"shared")
        assert other.resolve("a", "poet") == record
        assert not other.try_hold(record.digest)
        other.hold(record.digest)
        assert other.verify(record.digest)
        other.release(record.digest)
        one.delete("a", "poet")
        one.delete_bytes(record.digest)
        assert not one.path(record.digest).exists()
        assert other.sweep(grace_s=60) == [], "others may still read it"
        assert other.sweep(grace_s=-1) == [record.digest]
        assert other.sweep(grace_s=-1) == []
        with pytest.raises(AdapterUnavailable):
            one.hold(record.digest)


@pytest.mark.usefixtures("bucket")
def test_two_servers_may_share_one_directory(tmp_path: Path) -> None:
    with open_store(tmp_path) as one, open_store(tmp_path) as other:
        record, _ = upload(one)
        assert other.try_hold(record.digest)
        other.release(record.digest)


@pytest.mark.usefixtures("bucket")
def test_bytes_that_got_a_name_again_are_not_swept(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        first, _ = upload(store)
        store.delete("a", "poet")
        again, _ = upload(store, "bard")
        assert again.digest == first.digest
        assert store.sweep(grace_s=-1) == []
        store.hold(first.digest)


@pytest.mark.usefixtures("bucket")
def test_bytes_that_are_swept_during_an_upload_are_not_named(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, pytest.raises(Unavailable, match="send it again"):
        upload(store, prepare=lambda digest: store.sweep(grace_s=-1))
    with open_store(tmp_path) as store:
        upload(store)


@pytest.mark.usefixtures("bucket")
def test_a_rejected_upload_leaves_nothing_in_the_bucket(tmp_path: Path) -> None:
    def fail(digest: str) -> None:
        raise Unavailable("the engine is down")

    with open_store(tmp_path) as store:
        with pytest.raises(Unavailable, match="engine"):
            upload(store, prepare=fail)
        remote = remote_of(tmp_path, lambda step: None)
        assert remote is not None
        (digest,) = store.sweep(grace_s=-1)
        assert not remote.exists(digest)


@pytest.mark.usefixtures("bucket")
def test_another_registrys_bucket_stops_the_start(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        upload(store)
    empty = ObjectBlobs("memory:///")
    with pytest.raises(StartupError, match="none of the adapters"):
        AdapterStore(tmp_path, accept, registry=registry_of(tmp_path), remote=empty)
    with open_store(tmp_path):
        pass


def test_a_real_s3_process_serves_as_well(
    seaweed: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_bucket(seaweed, f"b-{tmp_path.name}".replace("_", "-").lower()[:60], monkeypatch)
    remote = remote_of(tmp_path, lambda step: None)
    assert remote is not None
    digest = make_blob(tmp_path / "a", b"x" * 300_000)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: remote.put(tmp_path / "a", digest), range(4)))
    (tmp_path / "b").mkdir()
    remote.fetch(digest, tmp_path / "b")
    assert digest_of(list_files(tmp_path / "b")) == digest
    with open_store(tmp_path / "store") as store:
        record, _ = upload(store, content=b"y" * 100_000)
        store.delete("a", "poet")
        assert store.delete_bytes(record.digest)
        assert store.sweep(grace_s=-1) == [record.digest]


def _remote(root: Path) -> ObjectBlobs | None:
    return remote_of(root, lambda step: None)
