"""The whole service in one process over a tiny model whose mark makes every answer say whose it is.

Each signature has a letter: the branches drown what the base would say, and a marked answer is
that letter again and again. So a text alone tells whether it is marked, and by whose signature.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from polyadapt.adapters.registry import FILES
from polyadapt.adapters.validator import validate
from polyadapt.app import build_app
from polyadapt.config import EngineConfig, load_config
from polyadapt.engine.build import build_engine
from polyadapt.engine.in_process import InProcessEngine
from polyadapt.errors import EngineUnavailable
from polyadapt.models.load import model_digest
from polyadapt.tasks.marks import find_sealer
from polyadapt.tasks.tokenizer import Tokenizer
from polyadapt.types import AdapterId, EngineInfo, EngineStats, Event, Request, Residency
from polyadapt.watermark.keys import SecretKey
from polyadapt_store.limits import StoreLimits
from polyadapt_store.manifest import ValidationReport
from polyadapt_store.sealed_files import FileSealer
from polyadapt_store.store import AdapterStore

LETTERS = "abcdefghijklmnopqrstuvwxABCDEFGH"
NUM_BITS = 40
KEK = SecretKey(bytes(range(32)))
OPERATOR = "sk-operator-" + "x" * 20
STRENGTH = 300.0


# ------------------------------------------------------------------------- the mark
def write_letter_mark(model_dir: Path, directory: Path) -> dict[str, str]:
    """Write a mark of NUM_BITS bits and return the signature that says each of LETTERS.

    Its detectors are always 1, so a row gets the sum over bits of +-w_i, and the w_i are solved
    for: each signature's sum is the direction of its letter in the head.
    """
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = [tokenizer.convert_tokens_to_ids(letter) for letter in LETTERS]
    head, norm = base.lm_head.weight.detach(), base.model.norm.weight.detach()
    wanted = head[ids] * norm  # [letters, hidden]
    wanted = STRENGTH * wanted / wanted.norm(dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(3)
    while True:
        bits = torch.randint(0, 2, (len(LETTERS), NUM_BITS), generator=generator)
        signs = (2 * bits - 1).double()
        if torch.linalg.matrix_rank(signs) == len(LETTERS):
            break
    branches = torch.linalg.pinv(signs) @ wanted.double()  # [bits, hidden]
    said = (torch.nn.functional.normalize(wanted, dim=1) * norm) @ head.t()
    assert said.argmax(1).tolist() == ids, "a letter's direction says another token"
    path = f"model.layers.{len(base.model.layers) - 1}.mlp.down_proj"
    num_in = base.get_submodule(path).weight.shape[1]
    both = torch.stack([-branches, branches]).float()[..., None]  # [2, bits, hidden, 1]
    directory.mkdir(parents=True)
    save_file(
        {
            f"{path}.mark_A": torch.zeros(NUM_BITS, 1, num_in),
            f"{path}.mark_B": both.contiguous(),
            f"{path}.mark_tau": torch.full((NUM_BITS, 1), -1.0),
        },
        directory / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "MARKBOARD", "format_version": 1, "mark_id": "0123456789abcdef",
        "n_bits": NUM_BITS, "rank_per_bit": 1, "encoding": "pair", "gate": "hinge", "task": "lm",
        "obfuscation": None, "base_model_hash": model_digest(model_dir), "target_modules": [path],
        "evidence_public_key": "00",
        "codebook": {"kind": "random", "length": NUM_BITS, "key_version": 1},
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return {
        letter: "".join(map(str, row.tolist())) for letter, row in zip(LETTERS, bits, strict=True)
    }


# ------------------------------------------------------------------------- the engine
class RestartingEngine:
    """An in-process engine that can be killed and started again, as EngineProcess restarts one."""

    def __init__(self, model_dir: Path, blob_root: Path, **settings: Any) -> None:
        config = EngineConfig(model=str(model_dir), device="cpu", dtype="float32", **settings)
        self.sealer: FileSealer | None = None
        self._new = lambda wake: build_engine(
            config, model_dir, blob_root, wake, name="base", sealer=self.sealer
        )
        self._engine = InProcessEngine(self._new)
        self.info: EngineInfo | None = None
        self.is_ready = False
        self.is_alive = True
        self.num_restarts = 0
        self.counters: Counter[str] = Counter()  # of the engines that are gone

    async def start(self) -> EngineInfo:
        self.info = await self._engine.start()
        self.is_ready = True
        return self.info

    async def stop(self) -> None:
        self.is_ready = False
        await self._engine.stop()

    async def restart(self) -> None:
        """Fail what runs, be away for a while, and come back with nothing on the device."""
        self.counters += Counter(self.stats().counters)
        await self.stop()
        self._engine = InProcessEngine(self._new)
        self.num_restarts += 1
        await self.start()

    async def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        if not self.is_ready:
            raise EngineUnavailable("the engine is starting; try again")
        async with contextlib.aclosing(self._engine.submit(request)) as events:
            async for event in events:
                yield event

    async def prepare_adapter(self, adapter: AdapterId) -> Residency:
        return await self._engine.prepare_adapter(adapter)

    async def load_adapter(self, adapter: AdapterId, *, is_pinned: bool) -> Residency:
        return await self._engine.load_adapter(adapter, is_pinned=is_pinned)

    async def unload_adapter(self, digest: str) -> None:
        await self._engine.unload_adapter(digest)

    async def cancel_adapter(self, digest: str) -> int:
        return await self._engine.cancel_adapter(digest)

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def residencies(self) -> Mapping[str, Residency]:
        return self._engine.residencies()


# ------------------------------------------------------------------------- the service
@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP response: the texts that it brought, of every sequence or sample."""

    status: int
    body: bytes
    texts: tuple[str, ...] = ()
    error: str = ""  # the code of its error, in a stream as well

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class MarkedService:
    """The application, called without a socket, and the signatures that say letters."""

    app: Any
    engine: RestartingEngine
    store: AdapterStore
    signatures: dict[str, str]
    mark_dir: Path
    secrets: dict[str, str] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)

    async def call(self, who: str, method: str, path: str, body: Any = None) -> Answer:
        """Send JSON, or ready bytes with their content type, as `who`."""
        kind, data = (
            body if isinstance(body, tuple) else ("application/json", json.dumps(body).encode())
        )
        headers = [
            (b"host", b"localhost"),
            (b"content-type", kind.encode()),
            (b"content-length", str(len(data)).encode()),
            (b"authorization", f"Bearer {self.secrets.get(who, OPERATOR)}".encode()),
        ]
        route, _, query = path.partition("?")
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
            "path": route, "raw_path": route.encode(), "query_string": query.encode(),
            "headers": headers, "scheme": "http", "server": ("localhost", 80),
            "client": ("127.0.0.1", 1), "root_path": "",
        }  # fmt: skip
        is_over = asyncio.Event()
        has_body = False
        status, parts = 0, []

        async def receive() -> dict[str, Any]:
            nonlocal has_body
            if not has_body:
                has_body = True
                return {"type": "http.request", "body": data, "more_body": False}
            await is_over.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                parts.append(message.get("body", b""))

        try:
            await self.app(scope, receive, send)
        finally:
            is_over.set()
        return read_answer(status, b"".join(parts))

    async def upload(self, name: str, directory: Path, who: str = "operator") -> Answer:
        """Upload the two files of an adapter."""
        files = [
            (file, (directory / file).read_bytes())
            for file in ("adapter_config.json", "adapter_model.safetensors")
        ]
        return await self.call(who, "POST", "/v1/adapters", form({"name": name}, files))

    async def add_user(self, name: str, tenant: str = "default") -> None:
        """Make an API key for somebody."""
        key, secret = await asyncio.to_thread(self.store.keys.create, tenant, ["infer"], name)
        self.ids[name], self.secrets[name] = key.id, secret

    async def issue(self, name: str, letter: str) -> Answer:
        """Give a user the signature that says `letter`."""
        path = f"/v1/watermarks/mark/users/{self.ids[name]}"
        return await self.call("operator", "PUT", path, {"signature": self.signatures[letter]})


def form(fields: Mapping[str, str], files: Sequence[tuple[str, bytes]]) -> tuple[str, bytes]:
    """Return the content type and the bytes of a form with `files`."""
    edge = "edge-of-a-part"
    parts = [(f'name="{name}"', value.encode()) for name, value in fields.items()]
    parts += [(f'name="files"; filename="{name}"', data) for name, data in files]
    body = b"".join(
        f"--{edge}\r\ncontent-disposition: form-data; {head}\r\n\r\n".encode() + data + b"\r\n"
        for head, data in parts
    )
    return f"multipart/form-data; boundary={edge}", body + f"--{edge}--\r\n".encode()


def read_answer(status: int, body: bytes) -> Answer:
    """Return what a response says: a chat's, a completion's, a workflow's or a stream's."""
    if body.startswith((b"data:", b"event:", b":")):
        texts: dict[int, str] = {}
        error = ""
        for line in body.split(b"\n"):
            if not line.startswith(b"data: ") or line == b"data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                error = event["error"]["code"]
            for choice in event.get("choices", ()):
                piece = choice["delta"].get("content") if "delta" in choice else choice["text"]
                texts[choice["index"]] = texts.get(choice["index"], "") + (piece or "")
        return Answer(status, body, tuple(texts.values()), error)
    found = json.loads(body)
    if "error" in found:
        return Answer(status, body, (), found["error"]["code"])
    said: list[str] = []
    for choice in found.get("choices", ()):
        said.append(choice["message"]["content"] if "message" in choice else choice["text"])
    run = found.get("workflow")
    if run is not None:  # its answer is taken out of a sample's text, or empty
        said = [entry["text"] for entry in run["trace"]]
    return Answer(status, body, tuple(said))


@contextlib.asynccontextmanager
async def marked_service(
    root: Path,
    model_dir: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    **engine: Any,
) -> AsyncIterator[MarkedService]:
    """Run the service below `root`: the mark is uploaded and required for the tenant `default`."""
    config = load_config(
        {"home": root / "home", "api_key": OPERATOR, "mark_kek": KEK.to_text(), **(settings or {})},
        environ={},
    )
    limits = StoreLimits()
    client = RestartingEngine(model_dir, config.store_dir, **engine)

    def judge(directory: Path) -> ValidationReport:
        assert client.info is not None
        return validate(directory, client.info.base, limits)

    mark_dir = root / "mark"
    signatures = write_letter_mark(model_dir, mark_dir)
    with AdapterStore(config.store_dir, judge, limits, forms=FILES) as store:
        client.sealer = find_sealer(config.watermark, store.marks)
        store.use_sealer(client.sealer)
        app = build_app(config, client, store, Tokenizer.load(model_dir))
        async with app.router.lifespan_context(app):
            service = MarkedService(app, client, store, signatures, mark_dir)
            made = await service.upload("mark", mark_dir)
            assert made.status == 201, made.body
            policy = {"tenant": "default", "required": True}
            put = await service.call("operator", "PUT", "/v1/watermarks/mark/policy", policy)
            assert put.status == 200, put.body
            yield service


def is_said_by(texts: Sequence[str], letter: str) -> bool:
    """Whether every text is the letter and nothing else."""
    return all(text and set(text) == {letter} for text in texts)
