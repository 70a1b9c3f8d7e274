"""Adapters from sources over HTTP: asked for, polled, refused; and calls that are made once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.api.conftest import Maker, Server
from tests.support.fake_engine import FakeEngine

from polyadapt.errors import AdapterUnavailable

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def make_adapter(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(b"weights")
    return directory


async def ask(client: httpx.AsyncClient, name: str, uri: str, **more: Any) -> httpx.Response:
    body = {"name": name, "source": {"uri": uri}, **more}
    return await client.post("/v1/adapters", json=body)


async def end_of(client: httpx.AsyncClient, reply: httpx.Response) -> dict[str, Any]:
    assert reply.status_code == 202, reply.text
    assert reply.headers["location"] == f"/v1/imports/{reply.json()['id']}"
    while (job := (await client.get(reply.headers["location"])).json())["status"] == "validating":
        await asyncio.sleep(0.01)
    return dict(job)


async def test_a_source_becomes_an_adapter(make_server: Maker, tmp_path: Path) -> None:
    make_adapter(tmp_path / "srv" / "poet")
    server = await make_server(allowed_sources=(f"file://{tmp_path}/srv",))
    uri = f"file://{tmp_path}/srv/poet"
    reply = await ask(server.client, "poet", uri, description="verse", tags=["t"])
    assert reply.json()["status"] == "validating"
    job = await end_of(server.client, reply)
    assert (job["status"], job["version"], job["error"]) == ("ready", 1, None)
    assert job["source"] == {"uri": uri}
    made = (await server.client.get("/v1/adapters/poet")).json()
    assert (made["description"], made["tags"]) == ("verse", ["t"])
    assert [state["is_current"] for state in made["replicas"]] in ([], [True], [False])


async def test_why_one_failed_is_told(make_server: Maker, tmp_path: Path) -> None:
    make_adapter(tmp_path / "srv" / "poet")
    engine = FakeEngine(prepare_error=AdapterUnavailable("no room"))
    server = await make_server(engine, allowed_sources=(f"file://{tmp_path}/srv",))
    job = await end_of(
        server.client, await ask(server.client, "poet", f"file://{tmp_path}/srv/poet")
    )
    assert job["status"] == "rejected"
    assert job["error"]["code"] == "adapter_unavailable"
    (tmp_path / "srv" / "poet" / "adapter_config.json").unlink()
    job = await end_of(
        server.client, await ask(server.client, "poet", f"file://{tmp_path}/srv/poet")
    )
    assert job["error"]["code"] == "adapter_rejected"
    assert job["error"]["problems"][0]["code"] == "missing_file"
    assert (await server.client.get("/v1/adapters/poet")).status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"name": "a", "source": {"uri": "file:///etc"}}, 403, "source.uri"),
        ({"name": "a", "source": {"uri": "gopher://x"}}, 400, "source.uri"),
        ({"name": "a", "source": {}}, 400, "source.uri"),
        ({"name": "a/b", "source": {"uri": "s3://b"}}, 400, "name"),
        ({"name": "a", "source": {"uri": "s3://b"}, "colour": 1}, 400, "colour"),
        ([], 400, None),
    ],
)
async def test_what_may_not_be_fetched_is_refused_at_once(
    body: object, status: int, param: str | None, make_server: Maker
) -> None:
    server = await make_server(allowed_sources=("s3://allowed",))
    reply = await server.client.post("/v1/adapters", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param)


async def test_sources_are_off_by_default(server: Server) -> None:
    reply = await ask(server.client, "poet", "s3://bucket/poet")
    assert reply.status_code == 403
    assert "--allow-source" in reply.json()["error"]["message"]


async def test_another_tenants_import_is_not_there(server: Server) -> None:
    assert (await server.client.get("/v1/imports/import-x")).status_code == 404


# --------------------------------------------------------------------------- once
FILES = [
    ("files", ("adapter_config.json", b"{}")),
    ("files", ("adapter_model.safetensors", b"weights")),
]
KEY = {"idempotency-key": "one"}


async def test_an_upload_with_a_key_is_answered_again(server: Server) -> None:
    replies = [
        await server.client.post("/v1/adapters", data={"name": "a"}, files=FILES, headers=KEY)
        for _ in range(2)
    ]
    assert [reply.status_code for reply in replies] == [201, 201]
    assert replies[0].content == replies[1].content
    assert "idempotent-replayed" not in replies[0].headers
    assert replies[1].headers["idempotent-replayed"] == "true"
    assert len(server.engine.prepared) == 1
    other = [FILES[0], ("files", ("adapter_model.safetensors", b"WEIGHTS"))]
    reply = await server.client.post("/v1/adapters", data={"name": "a"}, files=other, headers=KEY)
    assert reply.status_code == 409, "the same key with other bytes of the same length"


async def test_a_made_keys_secret_is_not_kept(server: Server) -> None:
    body = {"scopes": ["infer"]}
    made = await server.client.post("/v1/keys", json=body, headers=KEY)
    assert made.status_code == 201
    operator = {"authorization": f"Bearer {made.json()['secret']}"}
    assert operator
    keys = server.store.keys.list()
    assert len(keys) == 1
    _, admin = server.store.keys.create("default", ["admin"])
    again = await server.client.post(
        "/v1/keys", json=body, headers={**KEY, "authorization": f"Bearer {admin}"}
    )
    assert again.status_code == 409
    assert len(server.store.keys.list()) == 2, "that and the admin's"


async def test_what_failed_may_be_tried_again(make_server: Maker) -> None:
    engine = FakeEngine(prepare_error=AdapterUnavailable("no room"))
    server = await make_server(engine)
    post = server.client.post
    failed = await post("/v1/adapters", data={"name": "a"}, files=FILES, headers=KEY)
    assert failed.status_code == 503
    engine.prepare_error = None
    done = await post("/v1/adapters", data={"name": "a"}, files=FILES, headers=KEY)
    assert done.status_code == 201


async def test_of_two_at_once_one_is_carried_out(server: Server) -> None:
    calls = [
        server.client.post("/v1/adapters", data={"name": "a"}, files=FILES, headers=KEY)
        for _ in range(2)
    ]
    statuses = sorted(reply.status_code for reply in await asyncio.gather(*calls))
    assert statuses in ([201, 201], [201, 409])
    assert len(server.engine.prepared) == 1


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb"])
async def test_a_bad_key_is_refused(key: str, server: Server) -> None:
    reply = await server.client.post(
        "/v1/adapters", data={"name": "a"}, files=FILES, headers={"idempotency-key": key}
    )
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "Idempotency-Key"
