"""The RayService against what KubeRay takes and what the code has; no cluster has seen it.

KubeRay's fields are those of ray.io/v1 in ray-project/kuberay 1.7; pods are held to Kubernetes' own
schema. The fields that are not used here are not listed.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from tests.deploy.test_chart import RELEASES

from polyadapt.config import load_config
from polyadapt.ray_serve.settings import load

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "deploy" / "ray" / "rayservice.yaml"

Manifest = dict[str, Any]
GROUP = {"rayStartParams": dict, "template": dict}
SHAPES: dict[str, dict[str, type]] = {
    "": {"apiVersion": str, "kind": str, "metadata": dict, "spec": dict},
    "spec": {"serveConfigV2": str, "rayClusterConfig": dict},
    "cluster": {
        "rayVersion": str,
        "authOptions": dict,
        "enableInTreeAutoscaling": bool,
        "headGroupSpec": dict,
        "workerGroupSpecs": list,
    },
    "head": GROUP,
    "worker": GROUP | {"groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int},
    # Of Ray Serve's configuration, https://docs.ray.io/en/releases-2.60.0/serve/production-guide
    "serve": {"proxy_location": str, "http_options": dict, "applications": list},
    "application": {"name": str, "route_prefix": str, "import_path": str, "args": dict},
}


def the_manifest() -> Manifest:
    found: Manifest = yaml.safe_load(MANIFEST.read_text())
    return found


def has_shape(value: Manifest, shape: dict[str, type]) -> None:
    assert {name: type(each) for name, each in value.items()} == shape


def check_shape(manifest: Manifest) -> None:
    has_shape(manifest, SHAPES[""])
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    has_shape(manifest["spec"], SHAPES["spec"])
    has_shape(cluster(manifest), SHAPES["cluster"])
    has_shape(cluster(manifest)["headGroupSpec"], SHAPES["head"])
    assert cluster(manifest)["authOptions"] == {"mode": "token"}
    for worker in cluster(manifest)["workerGroupSpecs"]:
        has_shape(worker, SHAPES["worker"])
        assert worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]
    for group in groups(manifest):
        assert all(type(each) is str for each in group["rayStartParams"].values())
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, **group["template"]}
        for release in RELEASES:
            kubernetes_validate.validate(copy.deepcopy(pod), release, strict=True)
    has_shape(serve_config(manifest), SHAPES["serve"])
    has_shape(application(manifest), SHAPES["application"])


def check_import_path(manifest: Manifest) -> None:
    module, _, name = application(manifest)["import_path"].partition(":")
    source = ROOT / "server" / Path(*module.split(".")).with_suffix(".py")
    functions = [n for n in ast.parse(source.read_text()).body if isinstance(n, ast.FunctionDef)]
    (found,) = [function for function in functions if function.name == name]
    # With this type of its one argument Ray hands the `args` over as they are.
    assert [ast.unparse(a.annotation) for a in found.args.args if a.annotation] == [
        "dict[str, Any]"
    ]


def check_settings(manifest: Manifest) -> None:
    """Every name of `args` and of a variable is a setting, and the devices are enough."""
    config = load(application(manifest)["args"])
    (worker,) = cluster(manifest)["workerGroupSpecs"]
    gpus = int(container(worker)["resources"]["limits"]["nvidia.com/gpu"])
    for engines, nodes in (("min_engines", "replicas"), ("max_engines", "maxReplicas")):
        assert getattr(config.ray, engines) * config.ray.engine_gpus <= worker[nodes] * gpus
    for group in groups(manifest):
        names = [each["name"] for each in container(group)["env"]]
        assert {"POLYADAPT_API_KEY", "POLYADAPT_DATABASE_URL"} <= set(names)
        load_config({}, environ=dict.fromkeys(names, "postgresql://database/polyadapt"))


def check_ports(manifest: Manifest) -> None:
    config = load(application(manifest)["args"])
    options = serve_config(manifest)["http_options"]
    assert options == {"host": config.server.host, "port": config.server.port}
    for group in groups(manifest):
        ports = {each["name"]: each["containerPort"] for each in container(group)["ports"]}
        assert ports["serve"] == config.server.port
        # Where Ray's agent listens without --dashboard-agent-listen-port.
        assert ports["dashboard-agent"] == 52365
        assert container(group)["livenessProbe"]["httpGet"] == {
            "path": "/api/healthz",
            "port": "dashboard-agent",
        }
    (worker,) = cluster(manifest)["workerGroupSpecs"]
    probe = container(worker)["readinessProbe"]
    assert probe["httpGet"] == {"path": "/-/healthz", "port": "serve"}


def check_release(manifest: Manifest) -> None:
    pins = (ROOT / "constraints" / "cpu.txt").read_text()
    assert re.findall(r"^ray==(.+)$", pins, re.M) == [cluster(manifest)["rayVersion"]]


CHECKS = (check_shape, check_import_path, check_settings, check_ports, check_release)

# An edit of the manifest (from, to), and the check that must see it.
EDITS: dict[str, tuple[str, str, Callable[[Manifest], None]]] = {
    "field": ("enableInTreeAutoscaling:", "enableAutoscaling:", check_shape),
    "open ports": ("mode: token", "mode: disabled", check_shape),
    "pod's field": ("volumeMounts:", "volumeMount:", check_shape),
    "import path": ("application:build", "application:create", check_import_path),
    "setting": ("queued_tokens:", "queue_tokens:", check_settings),
    "secret as setting": ("model: smollm2", "api_key: sk-1", check_settings),
    "variable": ("name: POLYADAPT_API_KEY", "name: POLYADAPT_KEY", check_settings),
    "devices": ("max_engines: 8", "max_engines: 9", check_settings),
    "port": ("containerPort: 8000", "containerPort: 8001", check_ports),
    "proxies' port": ("port: 8000\n    applications", "port: 80\n    applications", check_ports),
    "probe": ("path: /-/healthz", "path: /-/health", check_ports),
    "release": ('rayVersion: "2.60.0"', 'rayVersion: "2.59.0"', check_release),
}


def cluster(manifest: Manifest) -> Manifest:
    found: Manifest = manifest["spec"]["rayClusterConfig"]
    return found


def groups(manifest: Manifest) -> list[Manifest]:
    return [cluster(manifest)["headGroupSpec"], *cluster(manifest)["workerGroupSpecs"]]


def container(group: Manifest) -> Manifest:
    (found,) = group["template"]["spec"]["containers"]
    return dict(found)


def serve_config(manifest: Manifest) -> Manifest:
    found: Manifest = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    return found


def application(manifest: Manifest) -> Manifest:
    (found,) = serve_config(manifest)["applications"]
    return dict(found)


@pytest.mark.parametrize("check", CHECKS, ids=[check.__name__ for check in CHECKS])
def test_the_manifest_is_what_kuberay_takes_and_the_code_has(check: Callable[[Manifest], None]):
    check(the_manifest())


@pytest.mark.parametrize(("before", "after", "check"), EDITS.values(), ids=EDITS)
def test_an_edit_is_found(before: str, after: str, check: Callable[[Manifest], None]):
    text = MANIFEST.read_text()
    assert text.count(before) == 1
    with pytest.raises(Exception):  # noqa: B017, PT011  # whatever it breaks
        check(yaml.safe_load(text.replace(before, after)))
