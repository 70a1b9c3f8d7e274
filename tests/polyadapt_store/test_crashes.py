"""A failure or a kill at any named step leaves the store as it was before or as it is after, never
between; with the bytes in a directory and in S3.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest
from tests.polyadapt_store.conftest import use_bucket
from tests.polyadapt_store.crashing import Crasher, running_crasher, scenario
from tests.polyadapt_store.support import (
    files_below,
    open_store,
    remote_of,
    upload,
)

from polyadapt.errors import ModelNotFound
from polyadapt_store.store import FAILPOINTS, REMOTE_FAILPOINTS

UPLOAD = FAILPOINTS[: FAILPOINTS.index("delete.before_commit")] + REMOTE_FAILPOINTS
DELETION = FAILPOINTS[FAILPOINTS.index("delete.before_commit") :]
# As it is deployed: a file and a directory, or PostgreSQL and S3.
EVERYWHERE = [("sqlite", name) for name in FAILPOINTS]
EVERYWHERE += [("postgresql", name) for name in FAILPOINTS + REMOTE_FAILPOINTS]
# Of the long trial, `make test-crashes`; otherwise a few.
NUM_TRIALS = int(os.environ.get("POLYADAPT_TEST_CRASH_TRIALS", "8"))


class Crash(BaseException):
    """Not an Exception: nothing may catch it to go on."""


@pytest.fixture(scope="session")
def crasher() -> Iterator[Crasher]:
    with running_crasher() as running:
        yield running


@pytest.fixture
def place(registry: str, request: pytest.FixtureRequest) -> str:
    """Where the bytes are."""
    if registry == "sqlite":
        return "directory"
    request.getfixturevalue("bucket")
    return "s3"


def prepare(root: Path) -> str:
    with open_store(root) as store:
        return upload(store, content=b"first")[0].digest


def check(root: Path, failed_at: str, first_digest: str) -> None:
    """Open the store again and require one of the allowed states, with its bytes and
    nothing else.
    """
    with open_store(root) as store:
        versions = [record.version for record in store.versions("a", "poet")]
        published = failed_at not in UPLOAD or failed_at == "registry.after_commit"
        deleted = failed_at in DELETION and failed_at != "delete.before_commit"
        assert versions == ([2] if published else []) + ([] if deleted else [1])
        assert store.resolve("a", "poet").version == versions[0]
        digests = {record.digest for record in store.versions("a", "poet")}
        assert all(store.verify(digest) for digest in digests)
        expected = {
            f"sha256/{digest.removeprefix('sha256:')}/{name}"
            for digest in digests
            for name in ("adapter_config.json", "adapter_model.safetensors")
        }
        assert files_below(root) == expected
        if store.is_shared:
            store.sweep(grace_s=-1)
            assert objects_of(root) == expected
        assert (first_digest in digests) != deleted
        again, is_new = upload(store, content=b"second")
        assert is_new != published
        assert again.version == 2


def objects_of(root: Path) -> set[str]:
    remote = remote_of(root, lambda step: None)
    assert remote is not None
    return {str(entry["path"]) for page in obstore.list(remote._store) for entry in page}


def test_the_scenario_passes_every_failpoint(place: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    passed: list[str] = []
    scenario(tmp_path, passed.append)
    assert set(passed) == set(FAILPOINTS + (REMOTE_FAILPOINTS if place == "s3" else ()))


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(("registry", "name"), EVERYWHERE, indirect=["registry"])
def test_an_exception_at_any_step_leaves_nothing_between(name: str, tmp_path: Path) -> None:
    digest = prepare(tmp_path)

    def fail(step: str) -> None:
        if step == name:
            raise Crash(step)

    with pytest.raises(Crash):
        scenario(tmp_path, fail)
    check(tmp_path, name, digest)


@pytest.mark.parametrize("name", [name for name in UPLOAD if name in FAILPOINTS])
def test_a_failed_upload_is_cleaned_up_without_a_restart(name: str, tmp_path: Path) -> None:
    def fail(step: str) -> None:
        if step == name:
            raise Crash(step)

    with open_store(tmp_path, failpoint=fail) as store:
        with pytest.raises(Crash):
            upload(store)
        if name == "registry.after_commit":
            assert store.verify(store.resolve("a", "poet").digest)
        else:
            with pytest.raises(ModelNotFound):
                store.resolve("a", "poet")
            assert files_below(tmp_path) == set()


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(("registry", "name"), EVERYWHERE, indirect=["registry"])
def test_a_kill_at_any_step_leaves_nothing_between(
    name: str, crasher: Crasher, tmp_path: Path
) -> None:
    digest = prepare(tmp_path)
    assert crasher.run(tmp_path, name) == -signal.SIGKILL
    check(tmp_path, name, digest)


@pytest.mark.parametrize("registry", ["postgresql"], indirect=True)
def test_nothing_is_half_visible_to_another_server_whenever_one_is_killed(
    crasher: Crasher,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Kills at every step in turn and at random times, on one PostgreSQL and one S3 process. A
    server on a machine of its own, which never saw the uploads, has to have all that is visible.
    """
    use_bucket(request.getfixturevalue("seaweed"), f"trials-{os.getpid()}", monkeypatch)
    steps = list(dict.fromkeys([*UPLOAD, *DELETION]))
    chance = random.Random(0)
    num_killed = 0
    for trial in range(NUM_TRIALS):
        root = tmp_path / str(trial)
        prepare(root)
        if trial % 2:
            status = crasher.run(root, after_s=chance.uniform(0.0, 0.8))
        else:
            status = crasher.run(root, steps[trial // 2 % len(steps)])
        assert status in (0, -signal.SIGKILL)
        num_killed += status != 0
        shutil.rmtree(root)  # that machine is gone with its disk
        with open_store(root) as other:
            seen = other.versions("a", "poet")
            assert [record.version for record in seen] in ([1], [2, 1], [2])
            assert other.resolve("a", "poet").version == seen[0].version
            for record in seen:
                other.hold(record.digest)
                assert other.verify(record.digest)
            other.sweep(grace_s=-1)
            digests = {record.digest.removeprefix("sha256:") for record in seen}
            assert {path.split("/")[1] for path in objects_of(root)} == digests
            other.delete("a", "poet")
        shutil.rmtree(root)
    assert num_killed >= NUM_TRIALS // 2
    print(f"{num_killed} processes of {NUM_TRIALS} were killed, 0 left anything half-visible")


@pytest.mark.parametrize("name", ["blob.before_rename", "registry.before_commit"])
@pytest.mark.parametrize("number", [28, 5], ids=["ENOSPC", "EIO"])
def test_a_full_or_broken_disk_leaves_nothing_between(
    name: str, number: int, tmp_path: Path
) -> None:
    digest = prepare(tmp_path)

    def fail(step: str) -> None:
        if step == name:
            raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match=os.strerror(number)):
        scenario(tmp_path, fail)
    check(tmp_path, name, digest)
