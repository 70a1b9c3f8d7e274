"""A mark's weights lie sealed wherever a store keeps them; those of an older release become so."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.polyadapt_store.support import REPORT
from tests.support.canaries import files_with

from polyadapt.errors import AdapterUnavailable, Conflict, SecretsUnavailable
from polyadapt_store.blobs import BlobStore
from polyadapt_store.manifest import OfferedOption, ReportedTraits, ValidationReport
from polyadapt_store.object_store import ObjectBlobs
from polyadapt_store.sealed_files import FileSealer, is_sealed
from polyadapt_store.store import MARK_FAILPOINTS, AdapterStore

SEALER, OTHER = FileSealer(bytes(range(32))), FileSealer(bytes(32))
CANARY = b"canary-91c4: the branches"
FILES = {"adapter_config.json": b'{"mark": 1}', "adapter_model.safetensors": CANARY * 40}
MARK = dataclasses.replace(
    REPORT, traits=ReportedTraits(options=(OfferedOption("signature", "bits", "", "", num_bits=8),))
)


@pytest.fixture(autouse=True)
def registry() -> None:
    """Names in a file: what differs between databases is tested elsewhere."""


def judge(directory: Path) -> ValidationReport:
    return MARK if b"mark" in (directory / "adapter_config.json").read_bytes() else REPORT


class PowerCut(BaseException):
    """Ends what runs as nothing in it expects."""


class Place:
    """A store below `root`, and an object store beside it where `is_shared`."""

    def __init__(self, root: Path, *, is_shared: bool) -> None:
        self.root = root
        self.remote = root / "bucket" if is_shared else None

    def open(
        self,
        sealer: FileSealer | None = SEALER,
        node: str = "node",
        failpoint: Callable[[str], None] = lambda name: None,
    ) -> AdapterStore:
        store = AdapterStore(
            self.root / node,
            judge,
            registry=self.root / "registry.sqlite",
            remote=None if self.remote is None else ObjectBlobs(f"file://{self.remote}", failpoint),
            failpoint=failpoint,
        )
        store.use_sealer(sealer)
        return store

    @property
    def clear(self) -> list[str]:
        return files_with([self.root], [CANARY])

    def fill_as_before(self, monkeypatch: pytest.MonkeyPatch) -> str:
        """Upload as an older release did; return the digest."""
        with monkeypatch.context() as patch, self.open() as store:
            patch.setattr(BlobStore, "seal", lambda *_: False)
            return upload(store)


def upload(store: AdapterStore, name: str = "mark", **files: bytes) -> str:
    with store.stage() as staged:
        for file, content in (FILES | files).items():
            with staged.add_file(file) as writer:
                writer.write(content)
        return store.publish(staged, name, "a")[0].digest


@pytest.fixture(params=[False, True], ids=["alone", "shared"])
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    return Place(tmp_path, is_shared=request.param)


def test_a_marks_weights_lie_nowhere_in_the_clear_and_its_digest_is_that_of_what_they_hold(
    place: Place, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with place.open() as store:
        digest = upload(store)
        other = upload(store, "task", **{"adapter_config.json": b"{}"})
        store.hold(digest)
        assert store.verify(digest)
        files = store.path(digest)
        assert is_sealed(files / "adapter_model.safetensors")
        assert (files / "adapter_config.json").read_bytes() == FILES["adapter_config.json"]
        assert not is_sealed(store.path(other) / "adapter_model.safetensors")
        assert store.seal_marks() == 0
        store.release(digest)
    assert all(other.removeprefix("sha256:") in file for file in place.clear)
    assert len(place.clear) == (2 if place.remote else 1)
    unsealed = Place(tmp_path_factory.mktemp("clear"), is_shared=place.remote is not None)
    with pytest.MonkeyPatch.context() as patch:
        assert unsealed.fill_as_before(patch) == digest


def test_that_nothing_is_sealed_would_be_seen(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.fill_as_before(monkeypatch)
    assert len(place.clear) == (2 if place.remote else 1)


def test_the_same_upload_again_changes_nothing(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    with place.open() as store:
        digest = upload(store)
        assert upload(store, "again") == digest
    with place.open(node="another" if place.remote else "node") as store:
        assert upload(store, "and-again") == digest
        assert store.verify(digest)
    assert "replacing" not in caplog.text
    assert place.clear == []


def test_without_a_key_a_mark_is_refused_and_leaves_no_trace(place: Place) -> None:
    with place.open(sealer=None) as store:
        with pytest.raises(Conflict, match="POLYADAPT_MARK_KEK_FILE"):
            upload(store)
        assert list((place.root / "node" / "staging").iterdir()) == []
        upload(store, "task", **{"adapter_config.json": b"{}", "adapter_model.safetensors": b"w"})
    assert place.clear == []


def test_a_machine_fetches_it_sealed_and_one_without_the_key_says_so(tmp_path: Path) -> None:
    place = Place(tmp_path, is_shared=True)
    with place.open() as store:
        digest = upload(store)
    with place.open(node="second") as store:
        store.hold(digest)
        assert is_sealed(store.path(digest) / "adapter_model.safetensors")
        assert store.verify(digest)
    for sealer, words in ((None, "has no key that opens it"), (OTHER, "another registry's key")):
        with place.open(sealer, node="third") as store:
            with pytest.raises(SecretsUnavailable, match=words):
                store.hold(digest)
            assert not store.path(digest).exists()
    assert place.clear == []


@pytest.mark.parametrize("length", [-1, 0, 60])
def test_what_was_changed_is_not_the_blob(place: Place, length: int) -> None:
    with place.open() as store:
        digest = upload(store)
        file = store.path(digest) / "adapter_model.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[:length] if length >= 0 else data[:-1] + bytes([data[-1] ^ 1]))
        assert not store.verify(digest)
        assert upload(store, "again") == digest
        assert store.verify(digest)


def test_what_is_sealed_under_a_lost_key_is_uploaded_again(place: Place) -> None:
    with place.open(OTHER) as store:
        upload(store)
    with place.open() as store:
        digest = upload(store, "again")
        assert store.verify(digest)
    if place.remote:
        with place.open(node="second") as store:
            store.hold(digest)


def test_damage_in_the_object_store_is_found_when_it_is_fetched(tmp_path: Path) -> None:
    place = Place(tmp_path, is_shared=True)
    with place.open() as store:
        digest = upload(store)
    (file,) = (tmp_path / "bucket").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with place.open(node="second") as store, pytest.raises(AdapterUnavailable, match="damaged"):
        store.hold(digest)


# ------------------------------------------------------------------------------ of an older release
def test_what_lay_in_the_clear_is_sealed_everywhere_and_what_was_derived_leaves(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = place.fill_as_before(monkeypatch)
    derived = BlobStore(place.root / "node").derived(digest)
    derived.mkdir()
    (derived / "x.packed").write_bytes(CANARY)
    with place.open() as store:
        assert store.seal_marks() == 1
        assert store.seal_marks() == 0
        assert store.verify(digest)
    assert place.clear == []
    assert not derived.exists()
    with place.open() as store:
        store.hold(digest)
        assert store.verify(digest)


def test_a_clear_copy_in_one_machines_cache_is_sealed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path, is_shared=True)
    digest = place.fill_as_before(monkeypatch)
    with place.open(node="second") as store:
        assert store.seal_marks() == 1
    assert len(place.clear) == 1, "the first machine's own"
    with place.open() as store:
        assert store.seal_marks() == 1
        assert store.verify(digest)
    assert place.clear == []


def test_a_new_upload_replaces_what_lies_in_the_clear(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.fill_as_before(monkeypatch)
    with place.open() as store:
        digest = upload(store, "again")
        assert store.verify(digest)
    assert place.clear == []


@pytest.mark.parametrize("step", [*MARK_FAILPOINTS, "remote.before_put", "remote.file_put"])
def test_a_crash_while_it_is_sealed_leaves_one_of_both_and_the_next_start_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    place = Place(tmp_path, is_shared=True)
    digest = place.fill_as_before(monkeypatch)
    derived = BlobStore(place.root / "node").derived(digest)
    derived.mkdir()
    (derived / "x.packed").write_bytes(CANARY)

    def failpoint(name: str) -> None:
        if name == step:
            raise PowerCut

    with place.open(failpoint=failpoint) as store, pytest.raises(PowerCut):
        store.seal_marks()
    for node in ("node", "second"):
        with place.open(node=node) as store:
            store.hold(digest)
            assert store.verify(digest)
            store.seal_marks()
            assert store.verify(digest)
    assert place.clear == []


@pytest.mark.parametrize("step", MARK_FAILPOINTS)
def test_a_crash_during_an_upload_leaves_nothing_in_the_clear_after_the_next_start(
    place: Place, step: str
) -> None:
    def failpoint(name: str) -> None:
        if name == step:
            raise PowerCut

    with place.open(failpoint=failpoint) as store, pytest.raises(PowerCut):
        upload(store)
    with place.open() as store:
        assert store.live_ids() == frozenset()
    assert place.clear == []


def test_without_a_key_or_damaged_it_stays_and_is_said(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    digest = place.fill_as_before(monkeypatch)
    with place.open(sealer=None) as store, caplog.at_level(logging.ERROR):
        assert store.seal_marks() == 0
        assert store.verify(digest)
    assert "lie in the clear: there is no key" in caplog.text
    with place.open() as store:
        file = store.path(digest) / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[1:])
        assert store.seal_marks() == 0
        assert not is_sealed(file)
    assert "stay in the clear: the stored files are damaged" in caplog.text
