"""Uploads become named versions or leave no trace."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.polyadapt_store.support import REPORT, accept, files_below, open_store, upload

from polyadapt.errors import (
    AdapterRejected,
    InvalidRequest,
    ModelNotFound,
    PayloadTooLarge,
    Problem,
    StartupError,
)
from polyadapt_store.blobs import BlobStore
from polyadapt_store.limits import StoreLimits
from polyadapt_store.manifest import (
    PEFT_FORM,
    AdapterRecord,
    FileEntry,
    FileForm,
    ValidationReport,
    digest_of,
    list_names,
)
from polyadapt_store.staging import StagedUpload
from polyadapt_store.store import AdapterStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    with open_store(tmp_path / "store") as opened:
        yield opened


def test_an_upload_is_visible_with_its_bytes(store: AdapterStore) -> None:
    record, is_new = upload(store, content=b"weights", description="a poet", tags=["verse", "en"])

    assert is_new
    assert store.resolve("a", "poet") == record
    assert (record.name, record.version, record.status) == ("poet", 1, "ready")
    assert (record.description, record.tags, record.nbytes) == ("a poet", ("en", "verse"), 9)
    assert (record.family, record.rank, record.base_model) == ("lora", 4, "tiny")
    directory = store.path(record.digest)
    assert (directory / "adapter_config.json").read_bytes() == b"{}"
    assert (directory / "adapter_model.safetensors").read_bytes() == b"weights"
    assert store.verify(record.digest)


def test_the_digest_depends_on_names_and_bytes_alone(store: AdapterStore) -> None:
    first, _ = upload(store, "poet", "a", b"1")
    second, _ = upload(store, "bard", "b", b"1")
    third, _ = upload(store, "poet", "a", b"2")
    assert first.digest == second.digest != third.digest


def test_digests_of_different_listings_differ() -> None:
    one = FileEntry("a", 1, "0" * 64)
    other = FileEntry("a", 1, "1" * 64)
    listings = [
        [],
        [one],
        [other],
        [one, FileEntry("b", 1, "0" * 64)],
        [FileEntry("b", 1, "0" * 64)],
    ]
    listings.append([FileEntry("a", 11, "0" * 64)])
    assert len({digest_of(files) for files in listings}) == len(listings)
    two = [one, FileEntry("b", 2, "2" * 64)]
    assert digest_of(two) == digest_of(reversed(two))


def test_the_same_bytes_under_the_same_name_are_the_same_version(store: AdapterStore) -> None:
    first, _ = upload(store)
    again, is_new = upload(store)
    assert (again, is_new) == (first, False)
    assert len(store.versions("a", "poet")) == 1


def test_new_bytes_under_the_same_name_are_the_next_version(store: AdapterStore) -> None:
    upload(store, content=b"1")
    second, _ = upload(store, content=b"2")
    assert second.version == 2
    assert store.resolve("a", "poet").version == 2
    assert store.resolve("a", "poet", 1).version == 1
    assert [record.version for record in store.versions("a", "poet")] == [2, 1]


def test_the_same_bytes_checked_against_another_base_are_another_version(tmp_path: Path) -> None:
    with open_store(tmp_path) as opened:
        upload(opened)
    other = dataclasses.replace(REPORT, base_digest="sha256:" + "1" * 64)
    with open_store(tmp_path, lambda directory: other) as opened:
        record, is_new = upload(opened)
    assert is_new
    assert record.version == 2
    assert record.base_digest == other.base_digest


def test_everything_survives_a_restart(tmp_path: Path) -> None:
    with open_store(tmp_path) as opened:
        record, _ = upload(opened, tags=["t"])
    with open_store(tmp_path) as opened:
        assert opened.resolve("a", "poet") == record
        assert opened.verify(record.digest)


def test_a_second_process_may_not_open_the_store(tmp_path: Path) -> None:
    with open_store(tmp_path), pytest.raises(StartupError, match="in use"):
        open_store(tmp_path)
    open_store(tmp_path).close()


@pytest.mark.usefixtures("sqlite_only")
def test_a_damaged_registry_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "registry.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(StartupError, match="restore"):
        open_store(tmp_path)


@pytest.mark.usefixtures("sqlite_only")
def test_a_registry_of_a_newer_release_stops_the_start(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "registry.sqlite")) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(StartupError, match="schema 99"):
        open_store(tmp_path)


# --------------------------------------------------------------------------- refusals
def test_a_rejected_upload_leaves_no_trace(tmp_path: Path) -> None:
    def reject(directory: Path) -> ValidationReport:
        raise AdapterRejected([Problem("non_finite", "bad")])

    with open_store(tmp_path, reject) as opened:
        with pytest.raises(AdapterRejected):
            upload(opened)
        assert files_below(tmp_path) == set()
        with pytest.raises(ModelNotFound):
            opened.resolve("a", "poet")


class Cut(Exception):
    """The client went away."""


def break_off(staged: StagedUpload, name: str) -> None:
    with staged.add_file(name) as writer:
        writer.write(b"half")
        raise Cut


def test_an_upload_cut_off_leaves_no_trace(tmp_path: Path) -> None:
    with open_store(tmp_path) as opened:
        with opened.stage() as staged:
            with pytest.raises(Cut):
                break_off(staged, "adapter_model.safetensors")
            assert len(files_below(tmp_path)) == 1
        assert files_below(tmp_path) == set()


def test_a_file_that_broke_off_counts_as_missing(store: AdapterStore) -> None:
    with store.stage() as staged:
        with pytest.raises(Cut):
            break_off(staged, "adapter_config.json")
        assert [problem.code for problem in staged.problems] == ["missing_file", "missing_file"]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        "../adapter_config.json",
        "a/../adapter_config.json",
        "/adapter_config.json",
        "//adapter_config.json",
        "./adapter_config.json",
        "a//b",
        "a/",
        "a/b/adapter_config.json",
        "a\\adapter_config.json",
        "..\\adapter_config.json",
        "C:\\adapter_config.json",
        "adapter_config.json\0",
        "adapter\nconfig.json",
        "adapter_config.json\x7f",
        "\ud800.json",
        "a\u202econfig.json",
        "a" * 600,
        "ä" * 200,
    ],
)
def test_tricks_in_file_names_are_refused(name: str, store: AdapterStore, tmp_path: Path) -> None:
    with store.stage() as staged, pytest.raises(InvalidRequest) as caught:
        staged.add_file(name)
    assert caught.value.param == "files"
    assert files_below(tmp_path) == set()


def test_a_file_sent_twice_is_refused(store: AdapterStore) -> None:
    with store.stage() as staged:
        staged.add_file("README.md")
        with pytest.raises(InvalidRequest, match="twice"):
            staged.add_file("readme.md")


@pytest.mark.parametrize(
    "name",
    ["adapter_model.bin", "x.pt", "x.pth", "x.pkl", "x.ckpt", "0/x.BIN", "pytorch_model.bin"],
)
def test_pickles_are_refused_and_not_stored(name: str, store: AdapterStore, tmp_path: Path) -> None:
    with store.stage() as staged:
        with staged.add_file("adapter_config.json") as writer:
            writer.write(b"{}")
        with staged.add_file(name) as writer:
            writer.write(b"\x80\x04pickle")
        assert len(files_below(tmp_path)) == 1
        with pytest.raises(AdapterRejected) as caught:
            store.publish(staged, "poet", "a")
    found = {(problem.code, problem.where) for problem in caught.value.problems}
    assert found == {("pickle_refused", name), ("missing_file", "adapter_model.safetensors")}


def test_weights_under_an_unknown_name_are_refused(store: AdapterStore) -> None:
    with store.stage() as staged:
        staged.add_file("new_embeddings.safetensors")
        assert staged.problems[0].code == "unknown_weights_file"


def test_problems_of_files_and_of_contents_come_together(tmp_path: Path) -> None:
    def reject(directory: Path) -> ValidationReport:
        raise AdapterRejected([Problem("non_finite", "bad")])

    with open_store(tmp_path, reject) as opened, opened.stage() as staged:
        for name in ("adapter_config.json", "adapter_model.safetensors", "extra.pt"):
            with staged.add_file(name) as writer:
                writer.write(b"{}")
        with pytest.raises(AdapterRejected) as caught:
            opened.publish(staged, "poet", "a")
    assert [problem.code for problem in caught.value.problems] == ["pickle_refused", "non_finite"]


def test_files_without_effect_are_listed_and_not_stored(store: AdapterStore) -> None:
    unused = [
        "README.md",
        "tokenizer.json",
        "trainer_state.json",
        "training_args.bin",
        "0/notes.txt",
    ]
    with store.stage() as staged:
        for name in [*unused, "adapter_config.json", "adapter_model.safetensors"]:
            with staged.add_file(name) as writer:
                writer.write(b"text")
        record, _ = store.publish(staged, "poet", "a")
    assert record.report.unused_files == tuple(unused)
    assert {path.name for path in store.path(record.digest).iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


FORMS = (
    PEFT_FORM,
    FileForm(("whole.json", "whole.safetensors"), ("*/adapter_config.json", "*order.json")),
)


def publish_files(
    opened: AdapterStore, files: dict[str, bytes], name: str = "poet"
) -> tuple[AdapterRecord, bool]:
    with opened.stage() as staged:
        for path, content in files.items():
            with staged.add_file(path) as writer:
                writer.write(content)
        return opened.publish(staged, name, "a")


def test_files_of_every_form_are_stored_and_count_in_the_digest(tmp_path: Path) -> None:
    files = {
        "whole.json": b"{}",
        "whole.safetensors": b"w",
        "0/adapter_config.json": b"1",
        "my-order.json": b"2",
    }
    with open_store(tmp_path, forms=FORMS) as opened:
        record, _ = publish_files(opened, files | {"0/notes.json": b"3", "0/my-order.json": b"4"})
        assert record.report.unused_files == ("0/notes.json", "0/my-order.json")
        stored = {p.as_posix(): (opened.path(record.digest) / p).read_bytes()
                  for p in map(Path, list_names(opened.path(record.digest)))}  # fmt: skip
        assert stored == files
        assert opened.verify(record.digest)
        digests = {record.digest}
        for path in files:
            digests.add(publish_files(opened, files | {path: b"other"})[0].digest)
        moved = {path.replace("0/", "1/"): content for path, content in files.items()}
        digests.add(publish_files(opened, moved)[0].digest)
        assert len(digests) == len(files) + 2
        (opened.path(record.digest) / "0" / "adapter_config.json").write_bytes(b"x")
        assert not opened.verify(record.digest)


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        ([], {"adapter_config.json", "adapter_model.safetensors"}),
        (["adapter_config.json", "whole.json"], {"adapter_model.safetensors"}),
        (["whole.json"], {"whole.safetensors"}),
        (["0/adapter_config.json"], {"adapter_config.json", "adapter_model.safetensors"}),
        (["whole.json", "whole.safetensors"], set()),
    ],
)
def test_what_is_missing_is_said_of_the_form_that_comes_closest(
    names: list[str], missing: set[str], tmp_path: Path
) -> None:
    with open_store(tmp_path, forms=FORMS) as opened, opened.stage() as staged:
        for name in names:
            with staged.add_file(name) as writer:
                writer.write(b"{}")
        assert {problem.where for problem in staged.problems} == missing


def test_weights_in_a_folder_that_no_form_has_are_refused(tmp_path: Path) -> None:
    with open_store(tmp_path, forms=FORMS) as opened, opened.stage() as staged:
        staged.add_file("0/adapter_model.safetensors")
        assert staged.problems[0].code == "unknown_weights_file"


def test_sizes_are_limited(tmp_path: Path) -> None:
    limits = StoreLimits(config_bytes=10, file_bytes=20, total_bytes=30, num_files=3)
    with AdapterStore(tmp_path, accept, limits) as opened, opened.stage() as staged:
        with staged.add_file("adapter_config.json") as writer:
            writer.write(b"x" * 10)
            with pytest.raises(PayloadTooLarge, match="adapter_config"):
                writer.write(b"x")
        with staged.add_file("adapter_model.safetensors") as writer:
            writer.write(b"x" * 20)
            with pytest.raises(PayloadTooLarge, match="adapter_model"):
                writer.write(b"x")
        with (
            staged.add_file("README.md") as writer,
            pytest.raises(PayloadTooLarge, match="the upload"),
        ):
            writer.write(b"x")
        with pytest.raises(PayloadTooLarge, match="3 files"):
            staged.add_file("more.md")


@pytest.mark.parametrize(
    "name", ["", "-a", ".a", "a,b", "a b", "a/b", "a@1", "a:b", "é", "a" * 129, "a\n", "..", "a\0"]
)
def test_bad_names_are_refused(name: str, store: AdapterStore) -> None:
    with pytest.raises(InvalidRequest) as caught:
        upload(store, name)
    assert caught.value.param == "name"


@pytest.mark.parametrize("name", ["a", "0", "A.b_c-d", "a" * 128])
def test_good_names_are_accepted(name: str, store: AdapterStore) -> None:
    assert upload(store, name)[0].name == name


def test_bad_tags_and_descriptions_are_refused(store: AdapterStore) -> None:
    for tags in (["x" * 65], [""], ["a\nb"], ["t"] * 33):
        with pytest.raises(InvalidRequest, match="tags"):
            upload(store, tags=tags)
    with pytest.raises(InvalidRequest, match="description"):
        upload(store, description="x" * 5000)


def test_an_upload_is_published_once(store: AdapterStore) -> None:
    with store.stage() as staged:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            with staged.add_file(name) as writer:
                writer.write(b"{}")
        store.publish(staged, "poet", "a")
        with pytest.raises(ValueError, match="already"):
            store.publish(staged, "poet", "a")


def test_a_directory_is_published_as_a_copy(store: AdapterStore, tmp_path: Path) -> None:
    source = tmp_path / "mine"
    (source / "deep" / "er").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md", "deep/er/x.bin"):
        (source / name).write_bytes(b"{}")
    record, _ = store.publish_directory(source, "poet", "shared")
    (source / "adapter_config.json").write_bytes(b"changed")
    assert store.verify(record.digest)
    assert record.report.unused_files == ("README.md",)
    with pytest.raises(InvalidRequest, match="no directory"):
        store.publish_directory(tmp_path / "absent", "poet", "shared")


def test_bytes_are_prepared_before_the_name_is_visible(store: AdapterStore) -> None:
    seen: list[str] = []

    def prepare(digest: str) -> None:
        assert store.verify(digest)
        assert not store.delete_bytes(digest)  # claimed by this upload
        with pytest.raises(ModelNotFound):
            store.resolve("a", "poet")
        seen.append(digest)

    record, _ = upload(store, prepare=prepare)
    assert seen == [record.digest]
    assert store.resolve("a", "poet") == record


def test_an_upload_that_cannot_be_prepared_leaves_no_trace(
    store: AdapterStore, tmp_path: Path
) -> None:
    def refuse(digest: str) -> None:
        raise AdapterRejected([Problem("base_weight_differs", "another base")])

    with pytest.raises(AdapterRejected):
        upload(store, prepare=refuse)
    assert files_below(tmp_path) == set()
    kept, _ = upload(store, "bard")
    with pytest.raises(AdapterRejected):
        upload(store, "poet", prepare=refuse)
    assert store.verify(kept.digest)  # the same bytes under another name


# --------------------------------------------------------------------------- bytes
def test_bytes_go_when_no_live_version_uses_them(store: AdapterStore) -> None:
    record, _ = upload(store, "poet", "a")
    upload(store, "bard", "b")
    store.delete("a", "poet")
    assert not store.delete_bytes(record.digest)
    assert store.verify(record.digest)
    store.delete("b", "bard")
    assert store.delete_bytes(record.digest)
    assert not store.path(record.digest).exists()
    assert not store.delete_bytes(record.digest)


@pytest.mark.parametrize(
    "digest", ["", "sha256:", "sha256:../../etc", "sha256:" + "A" * 64, "md5:" + "0" * 64, "0" * 64]
)
def test_a_digest_is_checked_before_it_becomes_a_path(digest: str, store: AdapterStore) -> None:
    with pytest.raises(ValueError, match="digest"):
        store.path(digest)


def test_damaged_bytes_are_noticed_and_healed_by_an_upload(store: AdapterStore) -> None:
    record, _ = upload(store, content=b"weights")
    (store.path(record.digest) / "adapter_model.safetensors").write_bytes(b"wEights")
    assert not store.verify(record.digest)
    again, is_new = upload(store, content=b"weights")
    assert (again, is_new) == (record, False)
    assert store.verify(record.digest)


@pytest.mark.parametrize("bit", range(0, 56, 5))
def test_any_flipped_bit_is_noticed(bit: int, store: AdapterStore) -> None:
    record, _ = upload(store, content=b"weights")
    path = store.path(record.digest) / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    assert not store.verify(record.digest)


def test_a_file_added_or_lost_at_rest_is_noticed(store: AdapterStore) -> None:
    record, _ = upload(store)
    extra = store.path(record.digest) / "extra"
    extra.write_bytes(b"")
    assert not store.verify(record.digest)
    extra.unlink()
    (store.path(record.digest) / "adapter_config.json").unlink()
    assert not store.verify(record.digest)


def test_orphans_and_unfinished_uploads_are_swept_at_start(tmp_path: Path) -> None:
    with open_store(tmp_path) as opened:
        record, _ = upload(opened)
    orphan = tmp_path / "sha256" / ("f" * 64)
    orphan.mkdir()
    (orphan / "adapter_config.json").write_bytes(b"{}")
    (tmp_path / "staging" / "half").mkdir()
    (tmp_path / "staging" / "half" / "x").write_bytes(b"{}")
    with open_store(tmp_path) as opened:
        assert not orphan.exists()
        assert list((tmp_path / "staging").iterdir()) == []
        assert opened.verify(record.digest)


# --------------------------------------------------------------------------- many at once
def test_64_identical_uploads_at_once_make_one_version(store: AdapterStore) -> None:
    with ThreadPoolExecutor(64) as pool:
        results = list(pool.map(lambda _: upload(store), range(64)))
    assert {record.digest for record, _ in results} == {results[0][0].digest}
    assert sum(is_new for _, is_new in results) == 1
    assert [record.version for record in store.versions("a", "poet")] == [1]
    assert store.verify(results[0][0].digest)


def test_different_uploads_at_once_get_different_versions(store: AdapterStore) -> None:
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda i: upload(store, content=b"%d" % i), range(16)))
    assert sorted(record.version for record, _ in results) == list(range(1, 17))


def test_uploads_and_deletions_at_once_never_lose_live_bytes(store: AdapterStore) -> None:
    def churn(i: int) -> None:
        record, _ = upload(store, f"n{i % 4}", content=b"%d" % (i % 3))
        if i % 2:
            with contextlib.suppress(ModelNotFound):  # another thread may be quicker
                store.delete("a", f"n{i % 4}")
            store.delete_bytes(record.digest)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(churn, range(80)))
    for record in store.list("a").records:
        assert store.verify(record.digest)


def test_validators_do_not_outnumber_the_processors(tmp_path: Path) -> None:
    running, most, lock = 0, 0, threading.Lock()
    first = threading.Event()

    def validate(directory: Path) -> ValidationReport:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        first.wait(0.02)
        with lock:
            running -= 1
        return REPORT

    with open_store(tmp_path, validate) as opened, ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: upload(opened, content=b"%d" % i), range(16)))
    assert 1 <= most <= (os.cpu_count() or 1)


def test_what_is_derived_from_a_blob_leaves_with_it(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    kept, gone = "sha256:" + "a" * 64, "sha256:" + "b" * 64
    for digest in (kept, gone):
        blobs.derived(digest).mkdir()
        (blobs.derived(digest) / "form").write_bytes(b"1")
    blobs.sweep({kept})
    assert [path.name for path in blobs.derived_root.iterdir()] == ["a" * 64]
    blobs.path(kept).mkdir()
    assert blobs.delete(kept)
    assert list(blobs.derived_root.iterdir()) == []
    assert list((tmp_path / "staging").iterdir()) == []
