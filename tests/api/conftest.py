"""The application over a fake engine, in process and on a socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.routing import Match
from tests.support import byte_tokenizer
from tests.support.fake_engine import BASE_DIGEST, FakeEngine

from polyadapt.api.routing import ScopedRoute
from polyadapt.api.tracing import Tracing
from polyadapt.app import StartupAdapter, build_app
from polyadapt.config import Config, load_config
from polyadapt.errors import AdapterRejected, Problem
from polyadapt.tasks.marks import find_sealer
from polyadapt_store.manifest import OfferedOption, ReportedTraits, ValidationReport
from polyadapt_store.store import AdapterStore

REPORT = ValidationReport(
    family="lora",
    rank=4,
    target_modules=("q_proj",),
    num_elements=1000,
    num_tensors=2,
    is_scalable=True,
    base_model="fake-base",
    base_digest=BASE_DIGEST,
)


@pytest.fixture
def anyio_backend() -> str:
    """Run async tests on asyncio."""
    return "asyncio"


def judge(directory: Path) -> ValidationReport:
    """Accept everything but a config that says otherwise."""
    config = json.loads((directory / "adapter_config.json").read_text())
    if config.get("reject"):
        raise AdapterRejected([Problem("bad_key", f"no {key}", key) for key in config["reject"]])
    if "n_bits" in config:  # a mark's bundle
        bits = f"{config['n_bits']} bits"
        signature = OfferedOption("signature", "bits", "whose", bits, num_bits=config["n_bits"])
        return replace(REPORT, traits=ReportedTraits(options=(signature,)))
    if "traits" in config:
        return replace(REPORT, traits=msgspec.convert(config["traits"], ReportedTraits))
    return REPORT


def peft_files(marker: str = "a", **config: Any) -> list[tuple[str, tuple[str, bytes]]]:
    """Return the form fields of an upload; other markers make other digests."""
    return [
        ("files", ("adapter_config.json", json.dumps({"marker": marker, **config}).encode())),
        ("files", ("adapter_model.safetensors", b"weights of " + marker.encode())),
    ]


@dataclass
class Server:
    """One application and what it was made of."""

    app: FastAPI
    engine: FakeEngine
    store: AdapterStore
    client: httpx.AsyncClient
    config: Config

    async def upload(self, name: str, marker: str | None = None) -> dict[str, Any]:
        """Upload an adapter; return its object."""
        reply = await self.client.post(
            "/v1/adapters", data={"name": name}, files=peft_files(marker or name)
        )
        assert reply.status_code in (200, 201), reply.text
        body: dict[str, Any] = reply.json()
        return body


class _Declared:
    """Checks that a reply's status is one that its route declares."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    async def __call__(self, reply: httpx.Response) -> None:
        scope = {"type": "http", "method": reply.request.method, "path": reply.request.url.path}
        for route in self._app.routes:
            if isinstance(route, ScopedRoute) and route.matches(scope)[0] is Match.FULL:
                declared = {route.status_code, *(int(code) for code in route.responses)}
                assert reply.status_code in declared, (route.path, reply.status_code)
                return


@dataclass
class Maker:
    """Makes servers below one directory."""

    root: Path
    stack: contextlib.AsyncExitStack
    num_made: int = 0
    stores: dict[Path, AdapterStore] = field(default_factory=dict)

    async def __call__(
        self,
        engine: FakeEngine | None = None,
        *,
        startup: tuple[StartupAdapter, ...] = (),
        tracing: Tracing | None = None,
        **settings: Any,
    ) -> Server:
        engine = engine or FakeEngine()
        home = self.root / f"home{self.num_made}"
        self.num_made += 1
        config = load_config({"home": home, **settings}, environ={})
        store = self.stack.enter_context(
            AdapterStore(config.store_dir, judge, registry=config.registry)
        )
        store.use_sealer(find_sealer(config.watermark, store.marks))
        tokenizer = byte_tokenizer.load(home / "model")
        app = build_app(config, engine, store, tokenizer, startup_adapters=startup, tracing=tracing)
        await self.stack.enter_async_context(app.router.lifespan_context(app))
        client = await self.stack.enter_async_context(
            httpx.AsyncClient(
                transport=httpx.ASGITransport(app=app, raise_app_exceptions=False),
                base_url="http://localhost",
                event_hooks={"response": [_Declared(app)]},
            )
        )
        return Server(app, engine, store, client, config)


@pytest.fixture
async def make_server(tmp_path: Path) -> AsyncIterator[Maker]:
    """A function that makes an application over a fake engine."""
    async with contextlib.AsyncExitStack() as stack:
        yield Maker(tmp_path, stack)


@pytest.fixture
async def server(make_server: Maker) -> Server:
    """An application with default settings."""
    return await make_server()


@contextlib.asynccontextmanager
async def listening(app: FastAPI) -> AsyncIterator[int]:
    """Serve the app, whose lifespan runs already, on a free port of 127.0.0.1."""
    web = uvicorn.Server(
        uvicorn.Config(app, port=0, lifespan="off", log_config=None, timeout_graceful_shutdown=1)
    )
    started = asyncio.Event()
    original: Callable[..., Any] = web.startup

    async def startup(sockets: Any = None) -> None:
        await original(sockets)
        started.set()

    web.startup = startup  # type: ignore[method-assign]
    web.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    task = asyncio.create_task(web.serve())
    await started.wait()
    try:
        yield web.servers[0].sockets[0].getsockname()[1]
    finally:
        web.should_exit = True
        await task
