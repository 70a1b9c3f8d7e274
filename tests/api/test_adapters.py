"""Adapters over HTTP: upload to deletion, vLLM's two calls, and everything that is refused."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.api.conftest import Maker, Server, peft_files
from tests.support.fake_engine import FakeEngine

from polyadapt.api.schemas.adapters import AdapterObject
from polyadapt.app import StartupAdapter
from polyadapt.errors import AdapterRejected, EngineUnavailable, Problem, StartupError

pytestmark = pytest.mark.anyio


def error_of(reply: httpx.Response) -> tuple[int, str, str | None]:
    error = reply.json()["error"]
    return reply.status_code, error["code"], error["param"]


async def upload(server: Server, name: str = "poet", **options: Any) -> httpx.Response:
    options.setdefault("files", peft_files())
    options.setdefault("data", {"name": name})
    return await server.client.post("/v1/adapters", **options)


async def test_an_upload_answers_with_the_adapter(server: Server) -> None:
    metadata = json.dumps({"description": "rhymes", "tags": ["style", "fun"]})
    reply = await upload(server, data={"name": "poet", "metadata": metadata})
    assert reply.status_code == 201
    body = AdapterObject.model_validate(reply.json(), extra="forbid")
    assert (body.name, body.version, body.status, body.family) == ("poet", 1, "ready", "lora")
    assert (body.description, sorted(body.tags)) == ("rhymes", ["fun", "style"])
    assert body.digest.startswith("sha256:")
    assert body.residency.tier == "store"
    assert [adapter.digest for adapter in server.engine.prepared] == [body.digest]


async def test_an_adapter_says_what_a_request_may_choose_of_it(server: Server) -> None:
    option = {"name": "tasks", "kind": "words", "summary": "which tasks", "expected": "a list"}
    traits = {
        "ranks": [1, 8],
        "invocation_tokens": [5, 7],
        "options": [{**option, "default": ["a", "b"]}, {**option, "name": "k", "default": 2}],
    }
    await upload(server, files=peft_files(traits=traits))
    await upload(server, "unknown")
    await upload(server, "plain", files=peft_files("c", traits={}))
    found = {}
    for name in ("poet", "unknown", "plain"):
        body = (await server.client.get(f"/v1/adapters/{name}")).json()
        AdapterObject.model_validate(body, extra="forbid")
        found[name] = body["traits"]
    assert found["poet"] == {**traits, "ranks": {"least": 1, "most": 8}}
    assert found["unknown"] is None
    assert found["plain"] == {"ranks": None, "invocation_tokens": [], "options": []}
    listed = (await server.client.get("/v1/adapters")).json()["data"]
    assert {adapter["name"]: adapter["traits"] for adapter in listed} == found


async def test_the_same_bytes_make_no_new_version(server: Server) -> None:
    first, again = await upload(server), await upload(server)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["digest"] == again.json()["digest"]
    assert again.json()["version"] == 1
    other = await upload(server, files=peft_files("b"))
    assert (other.status_code, other.json()["version"]) == (201, 2)


async def test_a_refused_upload_lists_every_problem_and_leaves_nothing(server: Server) -> None:
    reply = await upload(server, files=peft_files(reject=["key one", "key two"]))
    assert error_of(reply) == (422, "adapter_rejected", None)
    assert reply.json()["error"]["problems"] == [
        {"code": "bad_key", "message": "no key one", "where": "key one"},
        {"code": "bad_key", "message": "no key two", "where": "key two"},
    ]
    assert (await server.client.get("/v1/adapters")).json()["data"] == []
    assert server.engine.prepared == []


async def test_a_pickle_is_refused(server: Server) -> None:
    files = [*peft_files(), ("files", ("adapter_model.bin", b"\x80\x04."))]
    reply = await upload(server, files=files)
    assert reply.status_code == 422
    assert reply.json()["error"]["problems"][0]["code"] == "pickle_refused"


async def test_an_adapter_that_the_engine_refuses_is_not_published(server: Server) -> None:
    server.engine.prepare_error = AdapterRejected([Problem("nan", "a weight is NaN", "lora_A")])
    reply = await upload(server)
    assert reply.status_code == 422
    assert reply.json()["error"]["problems"][0]["where"] == "lora_A"
    assert (await server.client.get("/v1/adapters/poet")).status_code == 404


async def test_an_upload_while_the_engine_is_down_can_be_repeated(server: Server) -> None:
    server.engine.prepare_error = EngineUnavailable("restarting", retry_after_s=3)
    reply = await upload(server)
    assert error_of(reply) == (503, "engine_unavailable", None)
    assert reply.headers["retry-after"] == "3"
    server.engine.prepare_error = None
    assert (await upload(server)).status_code == 201


@pytest.mark.parametrize(
    "name",
    ["", "../x", "a/b", ".hidden", "a b", "a,b", "a@1", "x" * 129, "fake-base", "é", "a\n"],
)
async def test_a_bad_name_is_refused(server: Server, name: str) -> None:
    assert error_of(await upload(server, name)) == (400, "invalid_request", "name")


@pytest.mark.parametrize(
    "file_name",
    ["../adapter_config.json", "/etc/adapter_config.json", "a/b/adapter_config.json",
     "a\\\\adapter_config.json", "..", "a/../adapter_config.json", "a//b"],
)  # fmt: skip
async def test_path_tricks_in_file_names_are_refused(server: Server, file_name: str) -> None:
    # Written by hand: clients clean such names.
    body = (
        '--B\r\nContent-Disposition: form-data; name="name"\r\n\r\npoet\r\n'
        f'--B\r\nContent-Disposition: form-data; name="files"; filename="{file_name}"\r\n\r\n'
        "{}\r\n--B--\r\n"
    )
    reply = await server.client.post(
        "/v1/adapters",
        content=body.encode(),
        headers={"content-type": "multipart/form-data; boundary=B"},
    )
    assert error_of(reply) == (400, "invalid_request", "files")


@pytest.mark.parametrize(
    ("data", "files", "param"),
    [
        ({}, peft_files(), "name"),
        ({"name": ["a", "b"]}, peft_files(), "name"),
        ({"name": "poet", "extra": "x"}, peft_files(), "extra"),
        ({"name": "poet", "files": "text"}, peft_files(), "files"),
        ({"name": "poet", "metadata": "{"}, peft_files(), "metadata"),
        ({"name": "poet", "metadata": '{"mood": 1}'}, peft_files(), "metadata"),
        ({"name": "poet", "metadata": '{"tags": "x"}'}, peft_files(), "metadata"),
        ({"name": "poet", "metadata": '{"tags": [""]}'}, peft_files(), "tags"),
        ({"name": "poet"}, [("name", ("x", b""))], "name"),
        ({"name": "poet"}, [*peft_files(), *peft_files()], "files"),
    ],
)
async def test_a_wrong_form_is_refused(
    server: Server, data: dict[str, Any], files: Any, param: str
) -> None:
    reply = await upload(server, data=data, files=files)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text


async def test_an_upload_without_files_is_refused(server: Server) -> None:
    # A form with a boundary and one field, which httpx does not make by itself.
    body = '--B\r\nContent-Disposition: form-data; name="name"\r\n\r\npoet\r\n--B--\r\n'
    reply = await server.client.post(
        "/v1/adapters", content=body, headers={"content-type": "multipart/form-data; boundary=B"}
    )
    assert error_of(reply) == (400, "invalid_request", "files")


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        ("application/json", (400, "invalid_request", "name")),
        ("application/octet-stream", (415, "unsupported_media_type", None)),
        ("multipart/form-data", (400, "invalid_request", None)),
    ],
)
async def test_a_body_that_is_no_form_and_no_source_is_refused(
    server: Server, content_type: str, expected: tuple[int, str, str | None]
) -> None:
    reply = await server.client.post(
        "/v1/adapters", content=b"{}", headers={"content-type": content_type}
    )
    assert error_of(reply) == expected


async def test_too_many_files_and_too_many_bytes_are_refused(make_server: Maker) -> None:
    server = await make_server(max_upload_files=3, max_upload_bytes=1 << 20)
    many = [("files", (f"f{i}", b"")) for i in range(4)]
    assert (await upload(server, files=many)).status_code == 400
    large = [("files", ("adapter_model.safetensors", b"x" * (3 << 20)))]
    assert error_of(await upload(server, files=large)) == (413, "payload_too_large", None)


async def test_identical_uploads_at_once_make_one_version(server: Server) -> None:
    replies = await asyncio.gather(*(upload(server) for _ in range(16)))
    assert sorted(reply.status_code for reply in replies) == [200] * 15 + [201]
    assert {reply.json()["version"] for reply in replies} == {1}


async def test_adapters_are_listed_in_pages(server: Server) -> None:
    for name in ("c", "a", "b"):
        await server.upload(name)
    names: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = (await server.client.get("/v1/adapters", params={"limit": 2, **after})).json()
        names += [item["name"] for item in page["data"]]
        assert page["last_id"] == page["data"][-1]["id"]
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}
    assert names == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("params", "param"),
    [({"limit": 0}, "limit"), ({"limit": 1001}, "limit"), ({"limit": "x"}, "limit"),
     ({"after": "nothing"}, "after"), ({"status": "odd"}, "status")],
)  # fmt: skip
async def test_a_wrong_page_is_refused(server: Server, params: dict[str, Any], param: str) -> None:
    reply = await server.client.get("/v1/adapters", params=params)
    assert error_of(reply) == (400, "invalid_request", param)


async def test_one_adapter_and_its_versions_are_found(server: Server) -> None:
    await server.upload("poet", "one")
    await server.upload("poet", "two")
    get = server.client.get
    assert (await get("/v1/adapters/poet")).json()["version"] == 2
    assert (await get("/v1/adapters/poet@1")).json()["version"] == 1
    versions = (await get("/v1/adapters/poet/versions")).json()["data"]
    assert [item["version"] for item in versions] == [2, 1]
    for path in ("nobody", "poet@3", "po%20et", "nobody/versions"):
        reply = await get(f"/v1/adapters/{path}")
        assert error_of(reply)[:2] == (404, "model_not_found"), path


async def test_loading_and_unloading_move_an_adapter(server: Server) -> None:
    await server.upload("poet")
    post, get = server.client.post, server.client.get
    loaded = (await post("/v1/adapters/poet/load", json={"pin": True})).json()
    assert (loaded["residency"]["tier"], loaded["residency"]["pinned"]) == ("device", True)
    assert (await post("/v1/adapters/poet/load")).json()["residency"]["pinned"] is False
    await post("/v1/adapters/poet/unload")
    assert (await get("/v1/adapters/poet")).json()["residency"]["tier"] == "store"
    assert (await post("/v1/adapters/nobody/load")).status_code == 404
    assert (await post("/v1/adapters/nobody/unload")).status_code == 404
    wrong = await post("/v1/adapters/poet/load", json={"pin": "yes"})
    assert error_of(wrong) == (400, "invalid_request", "pin")


async def test_a_deletion_waits_for_the_last_stream(server: Server) -> None:
    await server.upload("poet")
    server.engine.gate = asyncio.Semaphore(0)
    body = {"model": "poet", "messages": [{"role": "user", "content": "hi"}]}
    running = asyncio.create_task(server.client.post("/v1/chat/completions", json=body))
    while not server.engine.running:
        await asyncio.sleep(0.001)
    deletion = asyncio.create_task(server.client.delete("/v1/adapters/poet"))
    while (await server.client.get("/v1/adapters/poet")).status_code != 404:
        await asyncio.sleep(0.001)
    assert (await server.client.post("/v1/chat/completions", json=body)).status_code == 404
    assert not deletion.done()
    for _ in range(50):
        server.engine.gate.release()
    assert (await running).json()["choices"][0]["message"]["content"] == "I am poet 0."
    assert (await deletion).json() == {
        "object": "adapter.deleted", "name": "poet", "versions": [1], "deleted": True
    }  # fmt: skip


async def test_deleting_now_ends_running_requests(server: Server) -> None:
    await server.upload("poet")
    server.engine.gate = asyncio.Semaphore(2)
    body = {"model": "poet", "messages": [{"role": "user", "content": "hi"}]}
    running = asyncio.create_task(server.client.post("/v1/chat/completions", json=body))
    while not server.engine.running:
        await asyncio.sleep(0.001)
    deletion = asyncio.create_task(
        server.client.delete("/v1/adapters/poet", params={"mode": "now"})
    )
    while not server.engine.deleted:
        await asyncio.sleep(0.001)
    server.engine.gate.release()
    assert error_of(await running) == (410, "adapter_deleted", None)
    assert (await deletion).status_code == 200


async def test_a_wrong_mode_is_refused(server: Server) -> None:
    reply = await server.client.delete("/v1/adapters/poet", params={"mode": "soon"})
    assert error_of(reply) == (400, "invalid_request", "mode")


async def test_vllms_calls_answer_in_its_words(make_server: Maker, tmp_path: Path) -> None:
    root = tmp_path / "loras"
    folder = write_adapter(root / "sql")
    server = await make_server(adapter_roots=[root])
    post = server.client.post
    load = {"lora_name": "sql", "lora_path": str(folder)}
    reply = await post("/v1/load_lora_adapter", json=load)
    assert reply.text == "Success: LoRA adapter 'sql' added successfully."
    again = await post("/v1/load_lora_adapter", json=load)
    assert error_of(again) == (400, "invalid_request", "lora_name")
    assert "already been loaded" in again.json()["error"]["message"]
    inplace = await post("/v1/load_lora_adapter", json={**load, "load_inplace": True})
    assert inplace.status_code == 200
    gone = await post("/v1/unload_lora_adapter", json={"lora_name": "sql"})
    assert gone.text == "Success: LoRA adapter 'sql' removed successfully."
    missing = await post("/v1/unload_lora_adapter", json={"lora_name": "sql"})
    assert missing.status_code == 404


@pytest.mark.parametrize("path", ["/etc", "../outside", "sql/../../outside", "link"])
async def test_paths_outside_the_roots_are_refused(
    make_server: Maker, tmp_path: Path, path: str
) -> None:
    root = tmp_path / "loras"
    write_adapter(root / "sql")
    write_adapter(tmp_path / "outside")
    (root / "link").symlink_to(tmp_path / "outside")
    server = await make_server(adapter_roots=[root])
    reply = await server.client.post(
        "/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path}
    )
    assert error_of(reply) == (403, "forbidden", "lora_path")


@pytest.mark.parametrize(("path", "status"), [("none", 404), ("sql", 200), ("a\0b", 400)])
async def test_paths_below_a_root_may_be_relative(
    make_server: Maker, tmp_path: Path, path: str, status: int
) -> None:
    write_adapter(tmp_path / "loras" / "sql")
    server = await make_server(adapter_roots=[tmp_path / "loras"])
    reply = await server.client.post(
        "/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path}
    )
    assert reply.status_code == status


async def test_loading_from_a_path_is_off_by_default(server: Server) -> None:
    reply = await server.client.post(
        "/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/tmp"}
    )
    assert error_of(reply) == (403, "forbidden", "lora_path")


async def test_the_operators_adapters_are_there_when_the_server_is_ready(
    make_server: Maker, tmp_path: Path
) -> None:
    own = StartupAdapter("own", write_adapter(tmp_path / "own"), "mine")
    server = await make_server(startup=(own,))
    body = (await server.client.get("/v1/adapters/own")).json()
    assert (body["version"], body["description"]) == (1, "mine")


async def test_an_operators_adapter_that_is_refused_stops_the_start(
    make_server: Maker, tmp_path: Path
) -> None:
    engine = FakeEngine()
    bad = StartupAdapter("bad", write_adapter(tmp_path / "bad", reject=["key one"]))
    with pytest.raises(StartupError, match=r"'bad'.*no key one"):
        await make_server(engine, startup=(bad,))
    assert engine.num_stops == 1
    with pytest.raises(StartupError, match="no directory"):
        await make_server(FakeEngine(), startup=(StartupAdapter("x", tmp_path / "none"),))


def write_adapter(folder: Path, **config: Any) -> Path:
    """Write the two files of an adapter."""
    folder.mkdir(parents=True)
    for _, (name, content) in peft_files(folder.name, **config):
        (folder / name).write_bytes(content)
    return folder
