"""Build the image and run it as deploy/ does: read-only root, no capabilities, another user.

python -m tools.image_trial [--base IMAGE] [--keep]

Then the chart's Deployment once more from its manifest, by `podman play kube`. Needs root and
Debian's buildah, podman, catatonit, runc and, where no --base is given, debootstrap. Without a
daemon and without a registry: the base is then made of Debian's packages, by debootstrap. pip
inside the build is configured as it is here, by mounts, so that nothing of this machine is in the
image. Prints what was seen; status 1 with the reason when anything differs.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import re
import resource
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx
import yaml
from tools.kubernetes_tools import obtain_tools

from polyadapt.config import default_home
from polyadapt.models.fetch import fetch_model

ROOT = Path(__file__).parents[1]
BASE = "localhost/polyadapt-python:bookworm"
IMAGE = "localhost/polyadapt:trial"
USER = 10001  # of the Dockerfile
GRACE_S = 150  # a busy machine takes long for LONG, too
LONG = {"model": "smollm2", "prompt": "Once upon a time", "max_tokens": 60, "ignore_eos": True}


def main() -> None:
    """Build, run, use and end one container."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="an image with Python 3.11 instead of one made here")
    parser.add_argument("--keep", action="store_true", help="leave the built image")
    options = parser.parse_args()
    needed = ["buildah", "podman", "catatonit", "runc", *([] if options.base else ["debootstrap"])]
    missing = [name for name in needed if shutil.which(name) is None]
    if missing:
        sys.exit(f"missing: {' '.join(missing)}; apt-get install {' '.join(missing)}")
    if os.geteuid() != 0:
        sys.exit("this needs root: buildah's chroot isolation and podman's containers")
    with tempfile.TemporaryDirectory(prefix="polyadapt-image-") as name:
        work = Path(name)
        base = options.base or _base_image(work)
        _timed("built", lambda: _build(base, work))
        _limit_processes(work)
        home = work / "home"
        shutil.copytree(
            fetch_model("smollm2", default_home(os.environ)), home / "models" / "smollm2"
        )
        _run("chown", "-R", f"{USER}:{USER}", str(home))
        try:
            _try_image(home)
            _try_manifest(work, home / "models")
        finally:
            if not options.keep:
                _run("buildah", "rmi", IMAGE)
    print("the image serves, drains and ends with status 0")


# --------------------------------------------------------------------------- build
def _base_image(work: Path) -> str:
    """Return a base with Debian's Python 3.11; made once and kept."""
    if subprocess.run(["buildah", "inspect", BASE], capture_output=True, check=False).returncode:
        folder = work / "base"
        packages = "--include=python3,python3-venv,ca-certificates"
        _run("debootstrap", "--variant=minbase", packages, "bookworm", str(folder))
        for stale in (
            *folder.glob("var/cache/apt/archives/*.deb"),
            *folder.glob("var/lib/apt/lists/*"),
        ):
            if stale.is_file():
                stale.unlink()
        container = _run("buildah", "from", "scratch").strip()
        _run("buildah", "add", "--quiet", container, str(folder), "/")
        _run("buildah", "commit", "--quiet", "--rm", "--format", "docker", container, BASE)
        shutil.rmtree(folder)
    return BASE


def _build(base: str, work: Path) -> None:
    config, mounts = _pip_configuration()
    file = work / "pip.conf"
    file.write_text(config)
    volumes = [f"{file}:/etc/pip.conf:ro", *(f"{path}:{path}:ro" for path in mounts)]
    _run(
        "buildah", "bud", "--isolation", "chroot", "--network", "host", "--format", "docker",
        "--layers", "--build-arg", f"PYTHON_IMAGE={base}", "--build-arg", "TORCH_INDEX_URL=",
        *(part for volume in volumes for part in ("--volume", volume)), "--tag", IMAGE, str(ROOT),
    )  # fmt: skip


def _pip_configuration() -> tuple[str, list[Path]]:
    """Return this machine's settings of pip as one file, and the local paths that they name."""
    listed = _run(sys.executable, "-m", "pip", "config", "list")
    settings: dict[str, str] = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        _, _, name = key.rpartition(".")
        if name in (
            "index-url",
            "extra-index-url",
            "find-links",
            "cert",
            "trusted-host",
            "no-index",
        ):
            settings[name] = value.strip().strip("'").replace("\\n", " ")
    paths = set()
    for word in " ".join(settings.values()).split():
        path = Path(unquote(urlsplit(word).path)) if word.startswith("file:") else Path(word)
        if not path.is_absolute() or not path.exists():
            continue
        # An index of files has its links beside it.
        paths.add(path.parent if word.startswith("file:") or path.is_file() else path)
    lines = ["[global]", *(f"{name} = {value}" for name, value in settings.items())]
    return "\n".join(lines) + "\n", sorted(paths)


# --------------------------------------------------------------------------- use
def _limit_processes(work: Path) -> None:
    """Ask podman for no more than this process has itself, where it may not raise its limits."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    processes = min(resource.getrlimit(resource.RLIMIT_NPROC)[1], 4096)
    limits = [f"nofile={files}:{files}", f"nproc={processes}:{processes}"]
    file = work / "containers.conf"
    file.write_text(f"[containers]\ndefault_ulimits = {json.dumps(limits)}\n")
    os.environ["CONTAINERS_CONF"] = str(file)


def _try_image(home: Path) -> None:
    """Run it as compose.yaml does; use it, and end it in the middle of a stream."""
    key, port = f"sk-{secrets.token_hex(16)}", _free_port()
    with _container(home, port, key) as name, _client(port, key) as client:
        _timed("ready", lambda: _await_ready(client, name))
        _check_inside(name)
        _use(client)
        _drain(client, name)


def _try_manifest(work: Path, models: Path) -> None:
    """Run what helm makes of the chart: Deployment and ConfigMap; use it and end it.

    podman 4 knows no startup or readiness probe and no hook, gives a liveness probe to systemd, and
    takes no ports on the host's network:
    tests/deploy/test_contract.py is where those are held to what they promise.
    """
    key, port = f"sk-{secrets.token_hex(16)}", _free_port()
    repository, _, tag = IMAGE.rpartition(":")
    values = {
        "image": {"repository": repository, "tag": tag},
        "model": "/models/smollm2",
        "host": "127.0.0.1",
        "ports": {"http": port, "internal": _free_port()},
        "drain": {"noticeSeconds": 1, "graceSeconds": 120},
        "extraVolumes": [{"name": "models", "hostPath": {"path": str(models)}}],
        "extraVolumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
    }
    helm = obtain_tools(default_home(os.environ)) / "helm"
    chart = ROOT / "deploy" / "helm" / "polyadapt"
    rendered = _run(str(helm), "template", "trial", str(chart), "--set-json", json.dumps(values))
    objects = [each for each in yaml.safe_load_all(rendered) if each]
    kept = [each for each in objects if each["kind"] in ("Deployment", "ConfigMap")]
    (deployment,) = [each for each in kept if each["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    del container["livenessProbe"], container["ports"]
    secret = work / "secret.json"  # as podman keeps what Kubernetes has as a Secret's data
    secret.write_text(json.dumps({"api-key": base64.b64encode(key.encode()).decode()}))
    file = work / "manifest.yaml"
    file.write_text(yaml.safe_dump_all(kept))
    podman = ("podman", "--runtime", "runc")
    try:
        _run("podman", "secret", "create", "polyadapt", str(secret))
        _run(*podman, "play", "kube", "--network", "host", str(file))
        names = _run("podman", "ps", "--format", "{{.Names}}").split()
        (name,) = [each for each in names if each.endswith("-server")]
        with _client(port, key) as client:
            _timed("the manifest's pod ready", lambda: _await_ready(client, name))
            _use(client)
            _drain(client, name)
    finally:
        down = [*podman, "play", "kube", "--down", str(file)]
        for command in (down, ["podman", "secret", "rm", "polyadapt"]):
            subprocess.run(command, capture_output=True, check=False)


def _client(port: int, key: str) -> httpx.Client:
    return httpx.Client(
        base_url=f"http://127.0.0.1:{port}",
        headers={"authorization": f"Bearer {key}"},
        timeout=300,
    )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextlib.contextmanager
def _container(home: Path, port: int, key: str) -> Iterator[str]:
    """Run the image as compose.yaml does, on the loopback interface of this machine."""
    name = f"polyadapt-trial-{os.getpid()}"
    command = ["podman", "run", "--detach", "--name", name, "--runtime", "runc", "--no-healthcheck"]
    command += ["--network", "host", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "all"]
    command += ["--security-opt", "no-new-privileges", "--volume", f"{home}:/data"]
    drain = ("DRAIN_NOTICE_S=1", "DRAIN_GRACE_S=120")
    for setting in (f"API_KEY={key}", "HOST=127.0.0.1", f"PORT={port}", *drain):
        command += ["--env", f"POLYADAPT_{setting}"]
    _run(*command, IMAGE, "--model", "smollm2")
    try:
        yield name
    finally:
        _run("podman", "rm", "--force", "--time", "0", name)


def _await_ready(client: httpx.Client, name: str) -> None:
    deadline = time.monotonic() + 900
    while True:
        with contextlib.suppress(httpx.TransportError):
            if client.get("/ready").status_code == 200:
                return
        state = json.loads(_run("podman", "inspect", name))[0]["State"]
        if state["Status"] not in ("running", "created") or time.monotonic() > deadline:
            sys.exit(f"it did not get ready: {state['Status']}\n{_logs(name)}")
        time.sleep(0.5)


def _check_inside(name: str) -> None:
    """The user, what it may write, and the health check of the Dockerfile."""
    identity = _run("podman", "exec", name, "id", "-u").strip()
    _expect(identity == str(USER), f"it runs as user {identity}")
    for path, is_writable in (("/opt/polyadapt/x", False), ("/x", False), ("/data/x", True)):
        done = subprocess.run(
            ["podman", "exec", name, "touch", path], capture_output=True, check=False
        )
        _expect((done.returncode == 0) == is_writable, f"{path}: writable is not {is_writable}")
    inspected = json.loads(_run("podman", "inspect", "--type", "image", IMAGE))[0]
    health = (inspected.get("HealthCheck") or inspected.get("Healthcheck"))["Test"]
    _run("podman", "exec", name, *health[1:])
    print(f"image: {inspected['Size'] / 1e6:.0f} MB in {len(inspected['RootFS']['Layers'])} layers")


def _use(client: httpx.Client) -> None:
    folder = ROOT / "server" / "polyadapt" / "demo"
    adapter = next(folder.glob("**/adapter_config.json")).parent
    files = [
        ("files", (name, (adapter / name).read_bytes()))
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    reply = client.post("/v1/adapters", data={"name": "mine"}, files=files)
    _expect(reply.status_code == 201, f"upload: {reply.status_code} {reply.text}")
    chat = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 16}
    reply = client.post("/v1/chat/completions", json={"model": "mine", **chat})
    _expect(reply.status_code == 200, f"chat: {reply.status_code} {reply.text}")
    body = reply.json()
    _expect(body["adapters"][0]["name"] == "mine", "another adapter answered")
    print(f"{adapter.name} answers {body['choices'][0]['message']['content']!r}")
    kernels = client.get("/version").json()["strategy"]
    print(f"kernels: {kernels}")


def _drain(client: httpx.Client, name: str) -> None:
    """Stop it while a stream runs: the stream ends whole, new work is refused, status 0."""
    stop = threading.Thread(target=_run, args=("podman", "stop", "--time", str(GRACE_S), name))
    with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as stream:
        lines = (line for line in stream.iter_lines() if line.startswith("data:"))
        next(lines)
        began = time.monotonic()
        stop.start()
        while client.get("/ready").status_code != 503:
            _expect(time.monotonic() < began + GRACE_S, "it stayed ready")
        while (reply := client.post("/tokenize", json={"prompt": "x"})).status_code != 503:
            _expect(time.monotonic() < began + GRACE_S, "it went on taking work")
        _expect(int(reply.headers["retry-after"]) > 0, "no Retry-After")
        last = list(lines)[-1]
    stop.join()
    _expect(last == "data: [DONE]", f"the stream ended with {last}")
    status = json.loads(_run("podman", "inspect", name))[0]["State"]["ExitCode"]
    _expect(status == 0, f"it ended with status {status}\n{_logs(name)}")
    print(f"ended {time.monotonic() - began:.1f} s after SIGTERM, the stream whole")


# --------------------------------------------------------------------------- helpers
def _expect(is_so: bool, otherwise: str) -> None:
    if not is_so:
        sys.exit(otherwise)


def _logs(name: str) -> str:
    done = subprocess.run(["podman", "logs", name], capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr)[-4000:]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = re.sub(r"//[^/@\s]*@", "//", (done.stdout + done.stderr)[-4000:])  # no passwords
        sys.exit(f"{' '.join(command[:3])} ended with status {done.returncode}:\n{tail}")
    return done.stdout


def _timed(what: str, work: object) -> None:
    began = time.monotonic()
    work()  # type: ignore[operator]
    print(f"{what} after {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
