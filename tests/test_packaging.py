"""What is shipped: the wheel's contents, the pins, the container files, the targets of make."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory) -> set[str]:
    """The names in a wheel that is built here, without the network."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("polyadapt-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_claims_no_generic_name(wheel_files):
    tops = {PurePosixPath(name).parts[0] for name in wheel_files}
    packages = {top for top in tops if not top.endswith(".dist-info")}
    assert packages == {"polyadapt", "polyadapt_store"}


def test_the_wheel_holds_every_file_of_both_packages(wheel_files):
    for package in (ROOT / "server" / "polyadapt", ROOT / "adapters_store" / "polyadapt_store"):
        for path in package.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert path.relative_to(package.parent).as_posix() in wheel_files


def test_the_wheel_holds_the_demo_adapters(wheel_files):
    configs = {name for name in wheel_files if re.match(r"polyadapt/demo/.*adapter_config", name)}
    assert len(configs) == 3
    for config in configs:
        weights = config.replace("adapter_config.json", "adapter_model.safetensors")
        assert weights in wheel_files
        assert (ROOT / "server" / weights).stat().st_size < 2_000_000


def test_the_wheel_holds_the_sources_of_the_native_kernels(wheel_files):
    native = {PurePosixPath(n).suffix for n in wheel_files if n.startswith("polyadapt/ops/native/")}
    assert ".c" in native


def test_the_wheel_holds_the_licence_and_the_command(wheel_files):
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel_files)
    assert any(name.endswith(".dist-info/entry_points.txt") for name in wheel_files)


def test_every_requirement_is_pinned_within_its_range():
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints" / "cpu.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    assert pins["torch"] == "2.13.0"
    extras = PROJECT["optional-dependencies"].values()
    requirements = [*PROJECT["dependencies"], *(each for extra in extras for each in extra)]
    for requirement in map(Requirement, requirements):
        if requirement.name == PROJECT["name"]:  # an extra that is part of another
            continue
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} has no pin in constraints/cpu.txt"
        assert pin in requirement.specifier, f"{requirement} does not allow the pin {pin}"


def test_make_help_lists_every_target_of_the_house():
    done = subprocess.run(
        ["make", "--no-print-directory", "-C", str(ROOT), "help"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    listed = set(re.findall(r"make ([\w-]+)", done.stdout))
    assert {"install", "serve", "test", "check", "bench", "bench-peers", "clean", "help"} <= listed


_OLD = '[ "$1" = -V ] && echo Python 3.9.2 && exit 0; exit 1'
_WITHOUT_VENV = 'case "$2" in *ensurepip*) exit 1;; *) exit 0;; esac'


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (None, "was not found; install Python 3.11 or newer"),
        (_OLD, "is Python 3.9.2; Polyadapt needs Python 3.11 or newer"),
        (_WITHOUT_VENV, "apt install python3-venv"),
    ],
    ids=["missing", "too old", "without venv"],
)
def test_make_names_the_fix_when_python_cannot_be_used(script, expected, tmp_path):
    python = tmp_path / "python3"
    if script is not None:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
    done = subprocess.run(
        ["make", "-C", str(ROOT), "install", f"PYTHON={python}", f"VENV={tmp_path}/venv"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode != 0
    assert expected in done.stderr
    assert not (tmp_path / "venv").exists()


def test_the_compose_file_needs_a_key_and_publishes_on_loopback():
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    server = compose["services"]["server"]
    assert server["environment"]["POLYADAPT_API_KEY"].startswith("${POLYADAPT_API_KEY:?")
    assert server["ports"] == ["${POLYADAPT_PUBLISH:-127.0.0.1:8000}:8000"]
    assert {volume.split(":")[0] for volume in server["volumes"]} <= set(compose["volumes"])
    assert server["image"].endswith(_version()), "the image's tag is not the package's version"


def test_the_image_sets_only_settings_that_exist_and_does_not_run_as_root():
    from polyadapt.config import load_config

    text = (ROOT / "Dockerfile").read_text()
    environ = dict(re.findall(r"(POLYADAPT_\w+)=(\S+)", text))
    config = load_config({}, environ=environ | {"POLYADAPT_API_KEY": "sk-test"})
    assert (config.server.host, config.server.port) == ("0.0.0.0", 8000)
    assert str(config.home) == "/data"
    stages = text.split("\nFROM ")
    assert re.search(r"^USER [1-9]", stages[-1], re.MULTILINE)


def test_the_image_has_extras_that_exist():
    extras = re.search(r"^ARG EXTRAS=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert extras
    assert set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"])


def _version() -> str:
    text = (ROOT / "server" / "polyadapt" / "__init__.py").read_text()
    match = re.search(r'__version__ = "(.+?)"', text)
    assert match
    return match[1]
