"""What is secret of a mark is nowhere to be seen while a real server works with it: not in files,
logs, metrics and replies, nor in what the system tells of the server's processes.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.marked_suspect import lm_mark
from tests.support.servers import RunningServer, running_server

from polyadapt.models.load import model_digest
from polyadapt.watermark.file_key import open_sealer
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.mark_directory import BRANCHES_NAME, BUNDLE_FILES, MarkDirectory
from polyadapt.watermark.secrets import write_kek
from polyadapt_store.database import Database
from polyadapt_store.marks import MarkBook

NUM_BITS = 40
OPERATOR = "sk-operator-" + "k" * 24


def write_bundle(model_dir: Path, directory: Path, kek: SecretKey) -> MarkDirectory:
    path, num_in, num_out = "model.layers.2.mlp.down_proj", 112, 64
    mark = lm_mark(directory, NUM_BITS, base_hash=model_digest(model_dir), module=path, kek=kek)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"{path}.mark_A": torch.randn(NUM_BITS, 1, num_in, generator=generator),
        f"{path}.mark_B": torch.randn(2, NUM_BITS, num_out, 1, generator=generator),
        f"{path}.mark_tau": torch.zeros(NUM_BITS, 1),
    }
    save_file(tensors, directory / BRANCHES_NAME)
    return mark


class Place:
    """A running server with a mark and a user of it; `bucket` has the adapters' bytes."""

    def __init__(
        self, server: RunningServer, root: Path, mark: MarkDirectory, model_dir: Path
    ) -> None:
        self.server, self.mark, self.model_dir = server, mark, model_dir
        self.home, self.bucket, self.config = root / "home", root / "bucket", root / "config.yaml"
        self.replies: list[bytes] = []

    def call(
        self,
        method: str,
        path: str,
        key: str = OPERATOR,
        *,
        is_shown: bool = True,
        **options: object,
    ) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"}
        reply = httpx.request(
            method, f"{self.server.url}{path}", headers=headers, timeout=120, **options,  # type: ignore[arg-type]
        )  # fmt: skip
        if is_shown:
            self.replies.append(reply.content + repr(reply.headers).encode())
        return reply


@pytest.fixture(scope="module")
def kek() -> SecretKey:
    return SecretKey.generate()


@pytest.fixture(scope="module")
def place(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, kek: SecretKey
) -> Iterator[Place]:
    root, model_dir = tmp_path_factory.mktemp("secrets"), tiny_model("llama")
    mark = write_bundle(model_dir, root / "mark", kek)
    write_kek(kek, root / "kek")
    config = root / "config.yaml"
    config.write_text(
        json.dumps(
            {
                "server": {"api_key": OPERATOR, "log_level": "debug"},
                "watermark": {"mark_kek_file": str(root / "kek")},
                "store": {
                    "blob_url": f"file://{root / 'bucket'}",
                    "database_url": f"sqlite:///{root / 'home' / 'registry.sqlite'}",
                },
                "engine": {"kv_cache_bytes": 8 << 20, "max_adapter_bytes": 8 << 20},
            }
        )
    )
    with running_server(root / "home", model_dir, "--config", str(config)) as server:
        yield Place(server, root, mark, model_dir)


def forms_of(secret: bytes) -> list[bytes]:
    return [secret, base64.b64encode(secret).rstrip(b"="), secret.hex().encode()]


def branches_of(mark: MarkDirectory) -> list[bytes]:
    """Parts of rows of every branch, as files have them."""
    tensors = load_file(mark.path / BRANCHES_NAME)
    rows = [
        tensor.reshape(NUM_BITS, -1)[bit, start : start + 8]
        for name, tensor in tensors.items()
        if not name.endswith("mark_tau")
        for bit, start in ((0, 0), (17, 24), (39, 40))
    ]
    return [row.contiguous().numpy().tobytes() for row in rows]


def file_key_of(registry: Path, kek: SecretKey) -> bytes:
    """Open the key of files out of the registry, as the server does."""
    with contextlib.closing(Database(registry)) as database:
        return base64.b64decode(open_sealer(kek, MarkBook(database)).to_text())


def test_no_secret_of_a_mark_is_told_or_lies_about(place: Place, kek: SecretKey) -> None:
    mark, call = place.mark, place.call
    files = [("files", (name, (mark.path / name).read_bytes())) for name in BUNDLE_FILES]
    made = call("POST", "/v1/watermarks", data={"name": "mark"}, files=files)
    assert made.status_code == 201, made.text
    key = call("POST", "/v1/keys", json={"scopes": ["infer", "watermarks"]}, is_shown=False).json()
    issued = call("PUT", f"/v1/watermarks/mark/users/{key['id']}", is_shown=False)
    bits = issued.json()["signature"]
    assert bits == "".join(map(str, mark.codebook.row(key["id"]).tolist()))
    policy = {"tenant": "default", "required": True}
    assert call("PUT", "/v1/watermarks/mark/policy", json=policy).status_code == 200

    body = {"model": "llama", "prompt": "one two three", "max_tokens": 3}
    user = key["secret"]
    assert call("POST", "/v1/completions", user, json=body).status_code == 200
    assert call("POST", "/v1/completions", user, json=body | {"stream": True}).status_code == 200
    assert call("POST", "/v1/completions", json=body).status_code == 403
    bad = {"adapters": [{"name": "mark", "options": {"signature": "1" * NUM_BITS}}]}
    assert call("POST", "/v1/completions", user, json=body | bad).status_code == 400
    assert call("GET", "/v1/watermarks/mark/users", user).status_code == 200
    assert call("GET", "/v1/watermarks/mark", user).status_code == 200
    read = [int(bit) for bit in bits]
    traced = call("POST", "/v1/watermarks/mark/trace", user, json={"bits": read}, is_shown=False)
    assert [one["user"] for one in traced.json()["accused"]] == [key["id"]]
    asked = {"endpoint": "http://127.0.0.1:9/v1", "model": "m"}
    assert call("POST", "/v1/watermarks/mark/verify", user, json=asked).status_code == 403
    # Out of every tier and back, and read again by another engine's process.
    assert call("POST", "/v1/adapters/mark/unload").status_code == 200
    assert call("POST", "/v1/completions", user, json=body).status_code == 200
    engine = place.server.engine_pid()
    os.kill(engine, signal.SIGKILL)
    answer = {"status": 0}

    def is_back() -> bool:
        answer["status"] = call("POST", "/v1/completions", user, json=body).status_code
        return answer["status"] == 200

    place.server.wait_until("the new engine answers", is_back)
    assert place.server.engine_pid() != engine
    # And by another machine, which fetches it.
    other = place.home.with_name("other")
    with running_server(other, place.model_dir, "--config", str(place.config)) as second:
        headers = {"authorization": f"Bearer {user}"}
        assert second.post("/v1/completions", headers=headers, json=body).status_code == 200
        assert list(other.rglob("adapter_model.safetensors"))
    broken = [*files[:2], ("files", ("triggers.enc", files[2][1][1][:-40]))]
    again = call("POST", "/v1/watermarks", data={"name": "two"}, files=broken)
    assert again.status_code == 400
    metrics = place.server.get("/metrics", headers={"authorization": f"Bearer {OPERATOR}"})
    place.replies.append(metrics.content)

    mark_key = base64.b64decode(mark.secrets.key.to_text())
    kek_bytes = base64.b64decode(kek.to_text())
    secrets = {
        "the KEK": forms_of(kek_bytes),
        "the mark's key": forms_of(mark_key),
        "the evidence key": forms_of(mark.secrets.key.derive("evidence")),
        "bits": [bits.encode(), f"{int(bits, 2):0{NUM_BITS // 4}x}".encode()],
        "triggers": [phrase.encode() for phrase in mark.prompts.phrases[5:8]],
        "branches": branches_of(mark),
        "the key of the branches": forms_of(file_key_of(place.home / "registry.sqlite", kek)),
        "answers": [one.encode() for pair in mark.prompts.answers[5:8] for one in pair],
    }
    seen: dict[str, bytes] = {
        f"reply {number}": reply for number, reply in enumerate(place.replies)
    }
    seen |= {
        str(file.relative_to(place.home.parent)): file.read_bytes()
        for root in (place.home, place.bucket, other)
        for file in root.rglob("*")
        if file.is_file()
    }
    server = psutil.Process(place.server.process.pid)
    for process in (server, *server.children(recursive=True)):
        for name in ("cmdline", "environ"):
            content = Path(f"/proc/{process.pid}/{name}").read_bytes()
            seen[f"{name} of {process.name()} {process.pid}"] = content
    found = [
        (what, where)
        for what, forms in secrets.items()
        for where, content in seen.items()
        if any(form in content for form in forms)
    ]
    assert found == []
    # They were looked for where they could be: what is not secret is there.
    public = mark.config.mark_id.encode()
    places = [where for where, content in seen.items() if public in content]
    assert any("registry.sqlite" in where for where in places)
    assert any(where.startswith("reply") for where in places)
    assert len([where for where in seen if where.startswith("environ")]) >= 2
    assert b"PATH=" in b"".join(c for where, c in seen.items() if where.startswith("environ"))
    assert len(seen["home/server.log"]) > 500
    sealed = [where for where in seen if where.endswith("adapter_model.safetensors")]
    assert len(sealed) == 3, "the bucket's and two machines'"
    sent = (mark.path / BRANCHES_NAME).read_bytes()
    assert all(form in sent for form in secrets["branches"])
