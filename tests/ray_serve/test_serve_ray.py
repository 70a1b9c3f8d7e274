"""`polyadapt serve-ray` as a command, on a cluster of one simulated node: `make test-ray` alone.

Two ingress replicas and up to two engines share a real PostgreSQL and a real S3 process.
"""

from __future__ import annotations

import concurrent.futures
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.e2e.test_openai_client import upload
from tests.oracle.adapters import make_lora
from tests.support.postgres import MISSING, find_binaries, running_postgres
from tests.support.ray_client import RayClient, Stream, wait_until
from tests.support.s3 import MISSING_WEED, find_weed, running_seaweed
from tests.support.servers import RunningServer, running_server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("default"),
]

ray = pytest.importorskip("ray", reason="make test-ray installs polyadapt[ray]")

# One engine until 60 tokens wait; Ray takes the mean of its last half minute.
SETTINGS = """
engine: {dtype: float32, num_threads: 1, kv_cache_bytes: 2MiB, max_adapter_bytes: 4MiB}
ray: {upscale_delay_s: 1, downscale_delay_s: 2, statement_s: 0.5}
"""


@pytest.fixture(scope="module")
def blob_url(monkeypatch_module: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the adapters' bytes go; the secrets are in the environment that nodes will have."""
    binaries, weed = find_binaries(), find_weed()
    if binaries is None:
        pytest.skip(MISSING)
    if weed is None:
        pytest.skip(MISSING_WEED)
    with running_postgres(binaries) as postgres, running_seaweed(weed) as s3:
        monkeypatch_module.setenv("POLYADAPT_DATABASE_URL", postgres.url)
        for name, value in s3.environment().items():
            monkeypatch_module.setenv(name, value)
        yield s3.new_bucket("ray")


@pytest.fixture(scope="module")
def cluster(make_cluster: Callable[..., Any], blob_url: str) -> Any:
    return make_cluster(num_cpus=6)


@pytest.fixture(scope="module")
def served(
    cluster: Any,
    blob_url: str,
    tiny_model: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
    free_port: int,
) -> Iterator[RunningServer]:
    home = tmp_path_factory.mktemp("home")
    settings = home / "settings.yaml"
    settings.write_text(SETTINGS)
    options = {
        "--config": settings, "--port": free_port, "--ray-address": cluster.address,
        "--device": "cpu", "--engine-cpus": 2, "--max-engines": 2, "--queued-tokens": 60,
        "--ingress-replicas": 2, "--blob-url": blob_url,
    }  # fmt: skip
    words = [str(word) for option in options.items() for word in option]
    with running_server(home, tiny_model("llama"), *words, subcommand="serve-ray") as running:
        yield running
    # Its end took the application away, and ended well.
    assert running.process.returncode == 0
    with pytest.raises((httpx.HTTPError, AssertionError)):
        assert httpx.get(f"{running.url}/health", timeout=5).status_code == 200


def test_an_adapter_is_uploaded_asked_and_streamed(
    served: RunningServer, tiny_model: Callable[[str], Path], tmp_path: Path
):
    directory = make_lora(tiny_model("llama"), tmp_path / "mine", 4, seed=1)
    assert upload(served, "mine", directory).status_code == 201
    client = RayClient(served.url)
    time.sleep(3)  # the other ingress replica follows the registry
    for number in range(8):  # whichever answers
        answer = client.complete("mine", number, max_tokens=8, ignore_eos=True)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 8
    stream = Stream().run(served.url, "mine", 0, 8)
    assert stream.is_done
    assert stream.num_chunks > 1
    wait_until("the engine states it", lambda: set(client.where("mine").values()) == {"device"})
    client.client.close()


def test_a_caller_who_leaves_frees_the_engine(served: RunningServer):
    before = served.event("cancelled_requests")
    body = {"model": "llama", "prompt": "one", "stream": True, "ignore_eos": True}
    with httpx.stream(
        "POST", f"{served.url}/v1/completions", json=body | {"n": 4, "max_tokens": 450}, timeout=60
    ) as answer:
        assert next(answer.iter_lines()).startswith("data: ")
    wait_until(
        "the engine says that it was cancelled",
        lambda: served.event("cancelled_requests") == before + 1,
        20,
    )


def test_queued_tokens_start_an_engine_and_an_idle_one_goes(served: RunningServer):
    client, is_enough = RayClient(served.url), threading.Event()

    def ask(number: int) -> int:
        while not is_enough.is_set():
            answer = client.complete("llama", number, max_tokens=256, ignore_eos=True)
            assert answer.status_code == 200, answer.text
        return number

    assert client.num_ready() == 1
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(ask, number) for number in range(6)]
        try:
            wait_until(
                "a second engine has come",
                lambda: client.num_ready() == 2 or any(each.done() for each in asking),
                300,
            )
        finally:
            is_enough.set()
        assert [each.result() for each in asking] == list(range(6))
    wait_until("it has gone again", lambda: client.num_ready() == 1, 300)
    assert client.complete("llama").status_code == 200
    client.client.close()


def test_streams_end_well_when_the_command_is_told_to_stop(served: RunningServer):
    streams = [Stream() for _ in range(4)]
    with concurrent.futures.ThreadPoolExecutor(len(streams)) as pool:
        running = [
            pool.submit(stream.run, served.url, "llama", number, 440)
            for number, stream in enumerate(streams)
        ]
        wait_until("all have begun", lambda: all(stream.num_chunks for stream in streams))
        served.process.send_signal(signal.SIGTERM)
        for each in running:
            each.result()
    assert all(stream.is_done for stream in streams)
    assert served.process.wait(60) == 0
