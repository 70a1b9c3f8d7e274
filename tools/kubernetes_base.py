"""deploy/kubernetes/polyadapt.yaml: the chart with its defaults, for whoever has no helm.

python -m tools.kubernetes_base          write it
python -m tools.kubernetes_base --check  status 1 if it is not what is there
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from tools.kubernetes_tools import obtain_tools

from polyadapt.config import default_home

ROOT = Path(__file__).parents[1]
CHART = ROOT / "deploy" / "helm" / "polyadapt"
BASE = ROOT / "deploy" / "kubernetes" / "polyadapt.yaml"
_HEAD = "# Made from deploy/helm/polyadapt by `make kubernetes-base`; patch it, do not edit it.\n"
_HELMS_OWN = ("helm.sh/chart", "app.kubernetes.io/managed-by")


def render(helm: Path) -> str:
    """Return the chart's objects with default values, without what only helm reads."""
    done = subprocess.run(
        [str(helm), "template", "polyadapt", str(CHART)],
        capture_output=True,
        text=True,
        check=True,
    )
    objects = [found for found in yaml.safe_load_all(done.stdout) if found]
    for found in objects:
        _strip(found)
    return _HEAD + yaml.safe_dump_all(objects, sort_keys=False, width=100)


def _strip(value: Any) -> None:
    if isinstance(value, dict):
        for name in _HELMS_OWN:
            value.pop(name, None)
        for inner in value.values():
            _strip(inner)
    elif isinstance(value, list):
        for inner in value:
            _strip(inner)


def main(arguments: list[str]) -> int:
    """Write the file or, with --check, compare it."""
    text = render(obtain_tools(default_home(os.environ)) / "helm")
    if arguments == ["--check"]:
        return int(BASE.read_text() != text)
    BASE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
