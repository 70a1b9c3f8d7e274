"""The chart's promises about the process, kept by a real one: started exactly as the rendered
Deployment says, probed, scraped, drained and ended as a kubelet would.
"""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from tests.support import read_only_root
from tests.support.chart import CHART, Helm, Manifest, tools_folder
from tests.support.pod import ContractBroken, Pod

from polyadapt.config import default_home

KEY = "sk-of-the-contract"
MODEL = {"model": "llama"}
LONG = {"prompt": "one two", "max_tokens": 240, "ignore_eos": True, "n": 48, "stream": True}
SHORT = {"prompt": "one two", "max_tokens": 2, "priority": -100}  # before the queue of LONG

# An edit of the chart (file, from, to), and the promise that it breaks.
PORT = "containerPort: {{ .Values.ports.%s }}"
OTHER_PORT = "containerPort: {{ add1 .Values.ports.%s }}"
EDITS: dict[str, tuple[str, str, str, Callable[[Pod], object]]] = {
    "startup path": ("deployment", "path: /health", "path: /healthz", Pod.check_probes),
    "readiness path": ("deployment", "path: /ready", "path: /readyz", Pod.check_probes),
    "port": ("deployment", PORT % "http", OTHER_PORT % "http", Pod.check_probes),
    "port name": ("deployment", "- name: http\n", "- name: web\n", Pod.check_probes),
    "internal port": ("deployment", PORT % "internal", OTHER_PORT % "internal", Pod.scrape),
    "metrics path": ("monitor", "path: /metrics", "path: /metric", Pod.scrape),
    "monitored port": ("monitor", "targetPort: internal", "targetPort: http", Pod.scrape),
    "hook's path": ("deployment", "path: /drain", "path: /drian", Pod.run_pre_stop),
    "hook's header": ("deployment", "name: x-polyadapt-drain", "name: x-drain", Pod.run_pre_stop),
}


def free_ports() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("", 0)) as other:
        return one.getsockname()[1], other.getsockname()[1]


@pytest.fixture(scope="module")
def helm() -> Helm:
    return Helm(tools_folder() / "helm")


@pytest.fixture(scope="module")
def values(tiny_model: Callable[[str], Path]) -> Manifest:
    http, internal = free_ports()
    return {
        "model": str(tiny_model("llama")),
        "settings": {"device": "cpu", "max_num_seqs": 4, "kv_cache_bytes": "8MiB"},
        "host": "127.0.0.1",
        "ports": {"http": http, "internal": internal},
        "drain": {"noticeSeconds": 5, "graceSeconds": 120},
        "serviceMonitor": {"enabled": True},
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pod's folder; its cache has the kernels already where this machine has compiled them."""
    made = tmp_path_factory.mktemp("pod")
    compiled = default_home(os.environ) / "native"
    if compiled.is_dir():
        shutil.copytree(compiled, made / "cache" / "native")
    return made


@pytest.fixture(scope="module")
def pod(helm: Helm, values: Manifest, root: Path) -> Iterator[tuple[Pod, subprocess.Popen[bytes]]]:
    """A started pod, which the last test of the file ends."""
    made = Pod(helm.template(values), root, {"api-key": KEY})
    with made.running() as process:
        yield made, process


def edited(tmp_path: Path, file: str, old: str, new: str) -> Path:
    copy = tmp_path / "chart"
    shutil.copytree(CHART, copy)
    template = copy / "templates" / f"{file}.yaml"
    text = template.read_text()
    assert old in text
    template.write_text(text.replace(old, new))
    return copy


def test_the_promises_are_kept(pod) -> None:
    running, _ = pod
    running.check_probes()
    assert "polyadapt_ready 1.0" in running.scrape()
    models = f"{running.url()}/v1/models"
    assert httpx.get(models).status_code == 401, "the Secret's key is asked for"
    assert httpx.get(models, headers=bearer()).status_code == 200
    for path in ("/v1/models", "/health", "/openapi.json"):
        reply = httpx.get(f"{running.url('internal')}{path}", headers=bearer())
        assert reply.status_code == 404, "the internal port is a way to the API"


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edit_of_the_chart_breaks_its_promise(
    pod, helm: Helm, values: Manifest, tmp_path: Path, edit
) -> None:
    running, process = pod
    file, old, new, promise = edit
    broken = Pod(
        helm.template(values, edited(tmp_path, file, old, new)), running.root, running.secret
    )
    assert broken.process_spec == running.process_spec, "it would not be the server that runs"
    with pytest.raises(ContractBroken):
        promise(broken)
    assert process.poll() is None
    assert running.is_ready()


def test_another_name_of_a_variable_breaks_the_start(
    helm: Helm, values: Manifest, tmp_path: Path
) -> None:
    chart = edited(tmp_path, "deployment", "POLYADAPT_INTERNAL_PORT", "POLYADAPT_INNER_PORT")
    http, internal = free_ports()
    own = {"ports": {"http": http, "internal": internal}}  # where no other pod answers
    broken = Pod(helm.template(values | own, chart), tmp_path, {"api-key": KEY})
    with pytest.raises(ContractBroken, match="POLYADAPT_INNER_PORT"), broken.running():
        pass


def test_a_write_outside_the_volumes_fails(tmp_path: Path) -> None:
    if not read_only_root.version():
        pytest.skip("this kernel has no Landlock: the pod's writes are not limited here")
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    launcher = [sys.executable, read_only_root.__file__, str(inside), "--", "touch"]
    assert subprocess.run([*launcher, str(inside / "file")], check=False).returncode == 0
    done = subprocess.run([*launcher, str(outside)], capture_output=True, check=False)
    assert done.returncode != 0
    assert not outside.exists()


def test_the_pod_ends_as_promised(pod) -> None:  # the last one: it ends the pod
    running, process = pod
    with (
        concurrent.futures.ThreadPoolExecutor(1) as threads,
        httpx.stream(
            "POST",
            f"{running.url()}/v1/completions",
            json=LONG | MODEL,
            headers=bearer(),
            timeout=120,
        ) as stream,
    ):
        lines = stream.iter_lines()
        next(line for line in lines if line.startswith("data:"))
        began = time.monotonic()
        hook = threads.submit(running.run_pre_stop)
        while running.is_ready():
            assert not hook.done(), "the hook answered before readiness was off"
        assert not hook.done(), "readiness and refusal came together"
        late = complete(running)
        assert late.status_code == 200
        assert late.headers["connection"] == "close", "the next one would come here again"
        hook.result(30)
        new = complete(running)
        assert new.status_code == 503
        assert int(new.headers["retry-after"]) >= 1
        assert httpx.get(f"{running.url()}/health").status_code == 200, "draining, not dead"
        assert "polyadapt_ready 0.0" in running.scrape()
        process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line.startswith("data:")]
        assert rest[-1] == "data: [DONE]"
    assert process.wait(30) == 0
    assert time.monotonic() - began < running.grace_s
    log = running.log.read_text()
    assert "Permission denied" not in log
    assert "native kernels are off" not in log, "the cache cannot be written"


def complete(pod: Pod) -> httpx.Response:
    url = f"{pod.url()}/v1/completions"
    return httpx.post(url, json=SHORT | MODEL, headers=bearer(), timeout=60)


def bearer() -> dict[str, str]:
    return {"authorization": f"Bearer {KEY}"}
