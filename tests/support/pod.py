"""What a kubelet does with the rendered Deployment, for one pod and without a cluster: mounts,
process, probes, hook, signal. Whatever does not go as the manifest says is a ContractBroken.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tests.support import read_only_root
from tests.support.chart import Manifest, only, server_of, settings_of


class ContractBroken(AssertionError):
    """The manifest promises what the process does not do."""


@dataclass(frozen=True)
class ProcessSpec:
    """What is started, with mount paths replaced by the folders that stand for the volumes."""

    command: tuple[str, ...]
    environ: tuple[tuple[str, str], ...]
    config: str
    writable: tuple[str, ...]


@dataclass
class Pod:
    """The one container of the Deployment among `objects`; its volumes are folders below `root`.

    `secret` holds the values of the Secret's keys.
    """

    objects: list[Manifest]
    root: Path
    secret: dict[str, str]
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.container = server_of(self.objects)
        template = only(self.objects, "Deployment")["spec"]["template"]
        self.spec: Manifest = template["spec"]
        self.log = self.root / "log"

    @property
    def process_spec(self) -> ProcessSpec:
        """Mounts, command, arguments, environment and settings, as the container gets them."""
        volumes = {volume["name"]: volume for volume in self.spec["volumes"]}
        mounts, writable = {}, []
        for mount in self.container["volumeMounts"]:
            folder = self.root / mount["name"]
            mounts[mount["mountPath"]] = str(folder)
            if not mount.get("readOnly") and "configMap" not in volumes[mount["name"]]:
                writable.append(str(folder))

        def translated(text: str) -> str:
            for path, folder in mounts.items():
                if text == path or text.startswith(f"{path}/"):
                    return folder + text.removeprefix(path)
            return text

        environ = {}
        for each in self.container["env"]:
            reference = each.get("valueFrom", {}).get("secretKeyRef")
            value = self.secret[reference["key"]] if reference else each["value"]
            environ[each["name"]] = translated(value)
        words = [*self.container["command"], *self.container["args"]]
        return ProcessSpec(
            tuple(map(translated, words)),
            tuple(environ.items()),
            settings_of(self.objects),
            tuple(writable),
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """Start the process and pass the startup probe; raises ContractBroken if it does not."""
        spec = self.process_spec
        for mount in self.container["volumeMounts"]:
            (self.root / mount["name"]).mkdir(parents=True, exist_ok=True)
        (self.root / "settings" / "config.yaml").write_text(spec.config)
        # What the image has beside the manifest: the command on PATH and the package.
        image = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        image |= {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
        command = list(spec.command)
        if read_only_root.version():
            launcher = [sys.executable, read_only_root.__file__, *spec.writable, "--"]
            command = launcher + command
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                command, env=image | dict(spec.environ), cwd=self.root / "cache",
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            self._await_startup(process)
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def _await_startup(self, process: subprocess.Popen[bytes]) -> None:
        probe = self.container["startupProbe"]
        deadline = time.monotonic() + probe["periodSeconds"] * probe["failureThreshold"]
        while not self._passes(probe):
            if process.poll() is not None:
                raise ContractBroken(f"the container ended: {self.log.read_text()[-2000:]}")
            # The server says when it serves: from then on a probe that fails is a wrong probe.
            if "Polyadapt serves" in self.log.read_text() and not self._passes(probe):
                raise ContractBroken(f"it serves, and the startup probe fails: {probe['httpGet']}")
            if time.monotonic() > deadline:
                raise ContractBroken("it did not start in the time that the startup probe gives")
            time.sleep(0.2)

    def check_probes(self) -> None:
        """Raise ContractBroken unless every probe passes."""
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            if not self._passes(self.container[name]):
                raise ContractBroken(f"{name} fails: {self.container[name]['httpGet']}")

    def is_ready(self) -> bool:
        """Whether the readiness probe passes."""
        return self._passes(self.container["readinessProbe"])

    def _passes(self, probe: Manifest) -> bool:
        try:
            reply = self._get(probe["httpGet"], timeout_s=probe["timeoutSeconds"])
        except httpx.TransportError:
            return False
        return 200 <= reply.status_code < 400

    def scrape(self) -> str:
        """Return what Prometheus gets: ServiceMonitor -> Service -> the pod's port."""
        monitor = only(self.objects, "ServiceMonitor")["spec"]
        wanted = monitor["selector"]["matchLabels"].items()
        (endpoint,) = monitor["endpoints"]
        for service in self.objects:
            if service["kind"] == "Service" and wanted <= service["metadata"]["labels"].items():
                for port in service["spec"]["ports"]:
                    if port["name"] == endpoint["port"]:
                        get = {"path": endpoint["path"], "port": port["targetPort"]}
                        return self._text(get)
        raise ContractBroken("the ServiceMonitor finds no Service with its port")

    def _text(self, get: Manifest) -> str:
        try:
            reply = self._get(get, timeout_s=30)
        except httpx.TransportError as error:
            raise ContractBroken(f"nothing answers at {get}: {error}") from None
        if reply.status_code != 200:
            raise ContractBroken(f"{get} answers {reply.status_code}")
        return reply.text

    def run_pre_stop(self) -> None:
        """Call the preStop hook and wait for its answer; raises ContractBroken."""
        self._text(self.container["lifecycle"]["preStop"]["httpGet"])

    @property
    def grace_s(self) -> float:
        """From the hook's begin to SIGKILL."""
        return float(self.spec["terminationGracePeriodSeconds"])

    def url(self, port: str = "http") -> str:
        """Return the address of a named port."""
        return f"http://127.0.0.1:{self._port(port)}"

    def _port(self, port: Any) -> int:
        if isinstance(port, int):
            return port
        for each in self.container["ports"]:
            if each["name"] == port:
                return int(each["containerPort"])
        raise ContractBroken(f"the container has no port {port!r}")

    def _get(self, get: Manifest, *, timeout_s: float) -> httpx.Response:
        headers = {each["name"]: each["value"] for each in get.get("httpHeaders", ())}
        url = f"http://127.0.0.1:{self._port(get['port'])}{get['path']}"
        return httpx.get(url, headers=headers, timeout=timeout_s)
