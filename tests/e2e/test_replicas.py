"""Two servers on one PostgreSQL and one S3, each with an empty disk of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from tests.e2e.test_openai_client import upload
from tests.oracle.adapters import make_lora
from tests.support.postgres import MISSING, find_binaries, running_postgres
from tests.support.s3 import MISSING_WEED, find_weed, running_seaweed
from tests.support.servers import RunningServer, running_server

WITHIN_S = 3.0

# Two servers, a database and an object store start first.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def pair(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunningServer, RunningServer]]:
    binaries, weed = find_binaries(), find_weed()
    if binaries is None:
        pytest.skip(MISSING)
    if weed is None:
        pytest.skip(MISSING_WEED)
    root = tmp_path_factory.mktemp("pair")
    with (
        pytest.MonkeyPatch.context() as environment,
        running_postgres(binaries) as postgres,
        running_seaweed(weed) as s3,
    ):
        for name, value in s3.environment().items():
            environment.setenv(name, value)
        where = ("--database-url", postgres.url, "--blob-url", s3.new_bucket("pair"))
        s3.new_bucket("sources")
        where += ("--allow-source", "s3://sources/team")
        with (
            running_server(root / "a", model, *where) as one,
            running_server(root / "b", model, *where) as other,
        ):
            yield one, other


def complete(server: RunningServer, name: str) -> httpx.Response:
    body = {"model": name, "prompt": "one two three", "temperature": 0, "max_tokens": 8}
    return server.post("/v1/completions", json=body)


def test_what_is_uploaded_to_one_is_served_by_the_other_within_seconds(
    pair: tuple[RunningServer, RunningServer], model: Path, tmp_path: Path
) -> None:
    one, other = pair
    made = upload(one, "poet", make_lora(model, tmp_path / "poet", 4, seed=1))
    assert made.status_code == 201, made.text
    began = time.monotonic()
    there = complete(other, "poet")
    took = time.monotonic() - began
    assert there.status_code == 200, there.text
    assert took < WITHIN_S
    print(f"served by the other after {took:.2f} s")
    assert there.json()["choices"][0]["text"] == complete(one, "poet").json()["choices"][0]["text"]
    assert there.json()["adapters"][0]["digest"] == made.json()["digest"]


def test_each_servers_state_is_shown_by_every_server(
    pair: tuple[RunningServer, RunningServer], model: Path, tmp_path: Path
) -> None:
    one, other = pair
    upload(one, "shown", make_lora(model, tmp_path / "shown", 4, seed=2))
    one.post("/v1/adapters/shown/load", json={"pin": True})

    def states(server: RunningServer) -> list[tuple[str, bool]]:
        replicas = server.get("/v1/adapters/shown").json()["replicas"]
        return sorted((replica["tier"], replica["is_current"]) for replica in replicas)

    for server in pair:
        server.wait_until(
            "one has it on the device", lambda s=server: states(s)[0] == ("device", True), 10
        )
        server.wait_until("both are current", lambda s=server: len(states(s)) == 2 and
                          all(current for _, current in states(s)), 10)  # fmt: skip
    assert "replicas" not in one.get("/v1/adapters").json()["data"][0]
    other.post("/v1/adapters/shown/load", json={})
    one.wait_until(
        "the other has it too",
        lambda: [tier for tier, _ in states(one)] == ["device", "device"],
        10,
    )


def test_changes_at_one_hold_at_the_other_within_seconds(
    pair: tuple[RunningServer, RunningServer], model: Path, tmp_path: Path
) -> None:
    one, other = pair
    upload(one, "gone", make_lora(model, tmp_path / "gone", 4, seed=3))
    upload(one, "rule", make_lora(model, tmp_path / "rule", 4, seed=4))
    assert complete(other, "gone").status_code == 200

    assert httpx.delete(f"{one.url}/v1/adapters/gone", timeout=60).status_code == 200
    other.wait_until(
        "the adapter is gone", lambda: complete(other, "gone").status_code == 404, WITHIN_S
    )

    definition = {"kind": "self_consistency", "reasoner": {"adapter": "rule"}}
    created = one.post("/v1/workflows", json={"name": "vote", "definition": definition})
    assert created.status_code == 201, created.text
    other.wait_until(
        "the workflow is known",
        lambda: other.get("/v1/workflows/vote").status_code == 200,
        WITHIN_S,
    )

    policy = {"adapters": [{"name": "rule"}]}
    put = httpx.put(f"{one.url}/v1/policies/default", json=policy, timeout=60)
    assert put.status_code in (200, 201), put.text
    (base,) = [m["id"] for m in other.get("/v1/models").json()["data"] if not m["parent"]]
    other.wait_until(
        "the policy holds",
        lambda: [a["name"] for a in complete(other, base).json()["adapters"]] == ["rule"],
        WITHIN_S,
    )
    assert httpx.delete(f"{one.url}/v1/policies/default", timeout=60).status_code in (200, 204)
    other.wait_until(
        "the policy is gone", lambda: complete(other, base).json()["adapters"] == [], WITHIN_S
    )


def test_a_file_is_applied_and_a_bucket_is_fetched_from(
    pair: tuple[RunningServer, RunningServer], model: Path, tmp_path: Path
) -> None:
    one, other = pair
    far = make_lora(model, tmp_path / "far", 4, seed=5)
    for path in far.iterdir():
        if path.is_file():
            url = f"{os.environ['AWS_ENDPOINT_URL']}/sources/team/far/{path.name}"
            assert httpx.put(url, content=path.read_bytes(), timeout=30).status_code == 200
    make_lora(model, tmp_path / "near", 4, seed=6)
    entries = [
        {"name": "near", "source": "near"},
        {"name": "bad", "source": "nowhere"},
        {"name": "forbidden", "source": "s3://sources/other"},
        {"name": "far", "source": "s3://sources/team/far"},
    ]
    file = tmp_path / "adapters.yaml"
    file.write_text(json.dumps({"adapters": entries}))  # which is YAML, too

    def apply(*options: str) -> tuple[int, list[list[str]]]:
        done = subprocess.run(
            [sys.executable, "-m", "polyadapt", "apply", str(file), "--server", one.url, *options],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.stderr == ""
        return done.returncode, [line.split()[:2] for line in done.stdout.splitlines()[:-1]]

    status, lines = apply()
    assert (status, lines) == (
        1,
        [["create", "near"], ["failed", "bad"], ["failed", "forbidden"], ["create", "far"]],
    )
    for name in ("near", "far"):
        assert complete(other, name).status_code == 200
    file.write_text(json.dumps({"adapters": entries[:1]}))
    assert apply("--dry-run", "--prune") == (0, [["unchanged", "near"], ["delete", "far"]])
    assert apply("--prune") == (0, [["unchanged", "near"], ["delete", "far"]])
    assert complete(one, "far").status_code == 404
