"""A failure or a kill at any named step leaves the store as it was before or as it is after, never
between.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.polyadapt_store.support import files_below, open_store, upload

from polyadapt.errors import ModelNotFound
from polyadapt_store.store import FAILPOINTS

UPLOAD = FAILPOINTS[: FAILPOINTS.index("delete.before_commit")]
DELETION = FAILPOINTS[FAILPOINTS.index("delete.before_commit") :]


class Crash(BaseException):
    """Not an Exception: nothing may catch it to go on."""


def scenario(root: Path, failpoint) -> None:
    """Publish version 2 of a name that has one, then delete version 1 and its bytes."""
    with open_store(root, failpoint=failpoint) as store:
        upload(store, content=b"second")
        first = store.delete("a", "poet", 1)[0]
        store.delete_bytes(first.digest)


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
        assert files_below(root) == {
            f"sha256/{digest.removeprefix('sha256:')}/{name}"
            for digest in digests
            for name in ("adapter_config.json", "adapter_model.safetensors")
        }
        assert (first_digest in digests) != deleted
        again, is_new = upload(store, content=b"second")
        assert is_new != published
        assert again.version == 2


def test_the_scenario_passes_every_failpoint(tmp_path: Path) -> None:
    prepare(tmp_path)
    passed: list[str] = []
    scenario(tmp_path, passed.append)
    assert set(passed) == set(FAILPOINTS)


@pytest.mark.parametrize("name", FAILPOINTS)
def test_an_exception_at_any_step_leaves_nothing_between(name: str, tmp_path: Path) -> None:
    digest = prepare(tmp_path)

    def fail(step: str) -> None:
        if step == name:
            raise Crash(step)

    with pytest.raises(Crash):
        scenario(tmp_path, fail)
    check(tmp_path, name, digest)


@pytest.mark.parametrize("name", UPLOAD)
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


@pytest.mark.parametrize("name", FAILPOINTS)
def test_a_kill_at_any_step_leaves_nothing_between(name: str, tmp_path: Path) -> None:
    digest = prepare(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "tests.polyadapt_store.test_crashes", str(tmp_path), name],
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    check(tmp_path, name, digest)


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


def _killed(root: Path, name: str) -> None:
    def kill(step: str) -> None:
        if step == name:
            os.kill(os.getpid(), signal.SIGKILL)

    scenario(root, kill)


if __name__ == "__main__":
    _killed(Path(sys.argv[1]), sys.argv[2])
