"""`polyadapt apply` brings a server to a file: what is there stays, and one bad entry blocks no
other.
"""

from __future__ import annotations

import hashlib
import json
from email.message import Message
from email.parser import BytesParser
from email.policy import HTTP
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from polyadapt.errors import StartupError
from polyadapt.offline.apply import MANAGED, Server
from polyadapt.offline.apply_command import Run, apply, apply_once


class FakeServer:
    """The calls that apply makes, over dicts."""

    def __init__(self) -> None:
        self.adapters: dict[str, dict[str, Any]] = {}
        self.changes: list[str] = []
        self.imports: dict[str, dict[str, Any]] = {}
        self.num_not_ready = 0
        self.does_list = True

    def client(self) -> httpx.Client:
        return httpx.Client(transport=httpx.MockTransport(self.answer), base_url="http://test")

    def answer(self, request: httpx.Request) -> httpx.Response:
        path, name = request.url.path, request.url.path.rpartition("/")[2]
        if path == "/ready":
            self.num_not_ready -= 1
            return httpx.Response(503 if self.num_not_ready >= 0 else 200)
        if path.startswith("/v1/imports/"):
            return httpx.Response(200, json=self.imports[name])
        if request.method == "POST":
            return self.take(request)
        if path == "/v1/adapters" and not self.does_list:
            return httpx.Response(503, json={"error": {"message": "later"}})
        if path == "/v1/adapters":
            tag = request.url.params["tag"]
            data = [a for a in self.adapters.values() if tag in a["tags"]]
            return httpx.Response(200, json={"data": data, "has_more": False, "last_id": None})
        if name not in self.adapters:
            return httpx.Response(404, json={"error": {"message": "none"}})
        if request.method == "DELETE":
            self.changes.append(f"delete {name}")
            del self.adapters[name]
            return httpx.Response(200, json={})
        return httpx.Response(200, json=self.adapters[name])

    def take(self, request: httpx.Request) -> httpx.Response:
        if request.headers["content-type"].startswith("application/json"):
            body = json.loads(request.content)
            self.adapters[body["name"]] = made(body["name"], "uri", body["tags"])
            self.changes.append(f"fetch {body['source']['uri']}")
            self.imports["import-1"] = {"id": "import-1", "status": "ready"}
            return httpx.Response(202, json={"id": "import-1", "status": "validating"})
        form = parts(request)
        name = form["name"][0][1].decode()
        about = json.loads(form["metadata"][0][1])
        files = dict(form["files"])
        if b"bad" in files.values():
            problems = [{"message": "no tensors"}, {"message": "no rank"}]
            return httpx.Response(422, json={"error": {"message": "x", "problems": problems}})
        self.changes.append(f"upload {name}")
        self.adapters[name] = made(name, digest_of(files), about["tags"], about["description"])
        return httpx.Response(201, json=self.adapters[name])


def parts(request: httpx.Request) -> dict[str, list[tuple[str, bytes]]]:
    head = f"content-type: {request.headers['content-type']}\r\n\r\n".encode()
    found: dict[str, list[tuple[str, bytes]]] = {}
    for part in BytesParser(policy=HTTP).parsebytes(head + request.content).iter_parts():
        assert isinstance(part, Message)
        field = str(part.get_param("name", header="content-disposition"))
        content = part.get_payload(decode=True)
        assert isinstance(content, bytes)
        found.setdefault(field, []).append((part.get_filename() or "", content))
    return found


def digest_of(files: dict[str, bytes]) -> str:
    """As manifest.digest_of defines it, over the files that a PEFT directory is read from."""
    lines = [
        f"{len(name)}:{name} {len(content)} {hashlib.sha256(content).hexdigest()}\n"
        for name, content in sorted(files.items())
        if name.endswith((".json", ".safetensors"))
    ]
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def made(name: str, digest: str, tags: list[str], description: str = "") -> dict[str, Any]:
    return {
        "name": name, "version": 1, "digest": digest, "tags": tags, "description": description
    }  # fmt: skip


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


def write(root: Path, *entries: object) -> Path:
    file = root / "adapters.yaml"
    file.write_text(yaml.safe_dump({"adapters": list(entries)}))
    return file


def adapter(root: Path, name: str, weights: bytes = b"1") -> dict[str, str]:
    directory = root / name
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_bytes(b"{}")
    (directory / "adapter_model.safetensors").write_bytes(weights)
    (directory / "README.md").write_bytes(b"not stored")
    return {"name": name, "source": name}


def run(server: FakeServer, file: Path, **options: bool) -> tuple[bool, list[str]]:
    said: list[str] = []
    with server.client() as client:
        good = apply_once(Run(file, "http://test", None, **options), Server(client), said.append)
    return good, said


def test_what_is_missing_is_made_and_what_is_there_stays(
    server: FakeServer, tmp_path: Path
) -> None:
    file = write(tmp_path, adapter(tmp_path, "poet"), adapter(tmp_path, "bard"))
    assert run(server, file)[0]
    assert server.changes == ["upload poet", "upload bard"]
    good, said = run(server, file)
    assert good
    assert len(server.changes) == 2, "nothing has changed"
    assert said[-1] == "2 unchanged"
    adapter(tmp_path, "poet", b"2")
    run(server, file)
    assert server.changes[2:] == ["upload poet"]


def test_a_dry_run_changes_nothing_and_says_what_would_be(
    server: FakeServer, tmp_path: Path
) -> None:
    file = write(tmp_path, adapter(tmp_path, "poet"))
    server.adapters["old"] = made("old", "d", [MANAGED])
    good, said = run(server, file, is_dry=True, prune=True)
    assert good
    assert server.changes == []
    assert [line.split()[:2] for line in said[:2]] == [["create", "poet"], ["delete", "old"]]
    assert said[-1] == "would be: 1 create, 1 delete"


BAD = [
    {"name": "lost", "source": "nowhere"},
    {"name": "no/name", "source": "poet"},
    {"source": "poet"},
    {"name": "typo", "sauce": "poet"},
    "poet",
]


@pytest.mark.parametrize("bad", BAD)
def test_one_bad_entry_blocks_no_other(bad: object, server: FakeServer, tmp_path: Path) -> None:
    good, said = run(server, write(tmp_path, bad, adapter(tmp_path, "poet")))
    assert not good
    assert server.changes == ["upload poet"]
    assert said[-1] == "1 create, 1 failed"


def test_a_refused_upload_says_every_problem_and_blocks_no_other(
    server: FakeServer, tmp_path: Path
) -> None:
    file = write(tmp_path, adapter(tmp_path, "broken", b"bad"), adapter(tmp_path, "poet"))
    good, said = run(server, file)
    assert not good
    assert "422: no tensors; no rank" in said[0]
    assert server.changes == ["upload poet"]


def test_a_name_that_is_given_twice_is_not_guessed_at(server: FakeServer, tmp_path: Path) -> None:
    poet = adapter(tmp_path, "poet")
    good, said = run(server, write(tmp_path, poet, {**poet, "source": "other"}))
    assert not good
    assert "twice" in said[0]
    assert server.changes == []


def test_only_what_apply_made_is_pruned_and_only_when_asked(
    server: FakeServer, tmp_path: Path
) -> None:
    file = write(tmp_path, adapter(tmp_path, "poet"), {"name": "unreadable", "sauce": "x"})
    for name in ("old", "unreadable"):
        server.adapters[name] = made(name, "d", [MANAGED])
    server.adapters["by-hand"] = made("by-hand", "d", [])
    run(server, file)
    assert set(server.adapters) == {"poet", "old", "unreadable", "by-hand"}
    run(server, file, prune=True)
    assert set(server.adapters) == {"poet", "unreadable", "by-hand"}


def test_a_list_that_cannot_be_had_prunes_nothing_and_blocks_no_entry(
    server: FakeServer, tmp_path: Path
) -> None:
    file = write(tmp_path, adapter(tmp_path, "poet"))
    server.adapters["old"] = made("old", "d", [MANAGED])
    server.does_list = False
    is_good, said = run(server, file, prune=True)
    assert not is_good
    assert set(server.adapters) == {"poet", "old"}
    assert said[1] == "failed     --prune  what apply made is not known: 503: later"


def test_a_uri_is_fetched_by_the_server_once(server: FakeServer, tmp_path: Path) -> None:
    file = write(tmp_path, {"name": "far", "source": "s3://bucket/far", "tags": ["t"]})
    assert run(server, file)[0]
    assert run(server, file)[0]
    assert server.changes == ["fetch s3://bucket/far"]
    assert {"t", MANAGED} < set(server.adapters["far"]["tags"])
    write(tmp_path, {"name": "far", "source": "s3://bucket/far-2"})
    run(server, file)
    assert server.changes[1:] == ["fetch s3://bucket/far-2"]


def test_files_of_a_mounted_configmap_are_read_through_their_links(
    server: FakeServer, tmp_path: Path
) -> None:
    mounted = tmp_path / "mounted"
    (mounted / "..2026_11").mkdir(parents=True)
    (mounted / "..data").symlink_to("..2026_11")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (mounted / "..2026_11" / name).write_bytes(b"{}")
        (mounted / name).symlink_to(f"..data/{name}")
    file = write(tmp_path, {"name": "poet", "source": "mounted"})
    assert run(server, file)[0]
    assert run(server, file)[1][-1] == "1 unchanged"


@pytest.mark.parametrize("text", ["", "[]", "adapters: 3", "adapters: []\nmore: 1", "a: [", "\0"])
def test_a_file_that_is_no_list_is_one_clear_error(
    text: str, server: FakeServer, tmp_path: Path
) -> None:
    file = tmp_path / "adapters.yaml"
    file.write_text(text)
    with pytest.raises(StartupError, match=r"adapters\.yaml"):
        run(server, file)


def test_a_server_that_is_away_fails_every_entry(tmp_path: Path) -> None:
    said: list[str] = []
    file = write(tmp_path, adapter(tmp_path, "poet"))
    assert not apply(Run(file, "http://127.0.0.1:1", None), 0, None, said.append)
    assert "does not answer" in said[0]


def test_a_server_that_is_not_ready_in_time_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="not ready"):
        apply(Run(tmp_path / "x", "http://127.0.0.1:1", None), 0.01, None, print)
