"""The server as a process: address, store, engine and web server put together, signals to drain.

The one place that chooses EngineProcess, one or several. No torch in this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI
from prometheus_client.registry import Collector
from starlette.types import ASGIApp

from polyadapt.adapters.registry import FILES
from polyadapt.adapters.validator import run_validator
from polyadapt.api.fleet_metrics import FleetCollector
from polyadapt.api.internal import build_internal_app
from polyadapt.api.services import Services
from polyadapt.app import StartupAdapter, build_app, stop_engine
from polyadapt.config import Config, EngineConfig, ServerConfig
from polyadapt.engine.client import EngineClient
from polyadapt.engine.fleet import EngineFleet
from polyadapt.engine.process import EngineProcess
from polyadapt.engine.routing import RoutingPolicy
from polyadapt.errors import StartupError, Unavailable
from polyadapt.tasks.marks import find_sealer
from polyadapt.tasks.stocked_engine import StockedEngine
from polyadapt.tasks.tokenizer import Tokenizer
from polyadapt_store.limits import StoreLimits
from polyadapt_store.manifest import ValidationReport
from polyadapt_store.object_store import ObjectBlobs
from polyadapt_store.sealed_files import FileSealer
from polyadapt_store.store import AdapterStore

if TYPE_CHECKING:
    from polyadapt.api.tracing import Tracing

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_CLOSE_GRACE_S = 5  # for connections to send their last bytes once the engine has stopped


def bind(config: ServerConfig) -> socket.socket:
    """Return a socket bound to the configured address; raises StartupError, with what to change."""
    return _bind(config, config.port, "--port")


def _bind(config: ServerConfig, port: int, option: str) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise StartupError(f"cannot listen on the host {config.host!r}: {error.strerror}") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise StartupError(
            f"cannot listen on {config.host}:{port}: {error.strerror}; "
            f"choose another {option} or --host"
        ) from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the address that a client on this machine uses."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def startup_adapters(config: Config) -> tuple[StartupAdapter, ...]:
    """Return the adapters to register: the demos when asked for, and the operator's own."""
    found = [StartupAdapter(name, directory) for name, directory in config.adapters.items()]
    if config.demo:
        from polyadapt.demo import DEMOS

        own = set(config.adapters)
        found += [
            StartupAdapter(demo.name, demo.directory, demo.description, demo.examples)
            for demo in DEMOS
            if demo.name not in own
        ]
    return tuple(found)


async def serve(
    config: Config,
    listener: socket.socket,
    model_dir: Path,
    announce: Callable[[Config, str], None],
) -> None:
    """Serve until a signal ends it; `announce` is called when /ready answers 200.

    The first SIGTERM or SIGINT drains: readiness turns 503, after the notice new requests are
    refused and the running ones get their grace, then the engine stops. The second one ends at
    once. A call to the internal port may have begun the same drain. Raises StartupError.
    """
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    for each in _SIGNALS:  # until the server is up, a signal ends the start
        loop.add_signal_handler(each, task.cancel)
    limits = StoreLimits(total_bytes=int(config.limits.max_upload_bytes))
    tokenizer = Tokenizer.load(model_dir)

    def validate(directory: Path) -> ValidationReport:
        if engine.info is None:
            raise Unavailable("the engine is starting; upload again shortly")
        return run_validator(directory, engine.info.base, limits)

    with (
        _bound_internally(config.server) as internal,
        open_store(config, validate, limits) as store,
    ):
        engine, collectors = _engine(config, model_dir, store.sealer)
        client = StockedEngine(engine, store) if store.is_shared else engine
        async with _tracing(config.server) as tracing:
            adapters = startup_adapters(config)
            app = build_app(
                config,
                client,
                store,
                tokenizer,
                startup_adapters=adapters,
                tracing=tracing,
                collectors=collectors,
            )
            async with app.router.lifespan_context(app):
                web = WebServer(app, config, announce=lambda: announce(config, url_of(listener)))
                async with _internal_port(app.state.services, internal):
                    await web.serve(sockets=[listener])


def open_store(
    config: Config, validate: Callable[[Path], ValidationReport], limits: StoreLimits
) -> AdapterStore:
    """Open the store where the settings say, with the key of marks' files where there is one;
    raises StartupError.
    """
    url = config.store.blob_url
    store = AdapterStore(
        config.store_dir,
        validate,
        limits,
        registry=config.registry,
        remote=None if url is None else ObjectBlobs(url),
        cache_bytes=int(config.store.blob_cache_bytes),
        forms=FILES,
    )
    with contextlib.ExitStack() as stack:
        stack.callback(store.close)
        store.use_sealer(find_sealer(config.watermark, store.marks))
        stack.pop_all()
    return store


@contextlib.contextmanager
def _bound_internally(config: ServerConfig) -> Generator[socket.socket | None, None, None]:
    """Hold the socket of the internal port, or None where it is off; raises StartupError."""
    if config.internal_port is None:
        yield None
        return
    with contextlib.closing(_bind(config, config.internal_port, "--internal-port")) as listener:
        yield listener


@contextlib.asynccontextmanager
async def _internal_port(services: Services, listener: socket.socket | None) -> AsyncIterator[None]:
    """Serve the internal application until the block ends; nothing where there is no listener."""
    if listener is None:
        yield
        return
    server = _InternalServer(build_internal_app(services))
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="internal-port")
    logger.info("metrics and drain without a key at %s", url_of(listener))
    try:
        yield
    finally:
        server.should_exit = True
        await serving


class _InternalServer(uvicorn.Server):
    """uvicorn beside the WebServer, which alone handles signals."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                timeout_graceful_shutdown=1,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave the signals alone."""
        yield


@contextlib.asynccontextmanager
async def _tracing(config: ServerConfig) -> AsyncGenerator[Tracing | None, None]:
    """Trace as configured, and send what is left at the end; raises StartupError."""
    if config.otlp_endpoint is None:
        yield None
        return
    try:
        from polyadapt.api.tracing import open_tracing
    except ImportError as error:
        raise StartupError(
            f"--otlp-endpoint needs OpenTelemetry ({error}); install polyadapt[otel]"
        ) from None
    tracing = open_tracing(config.otlp_endpoint, config.trace_ratio)
    logger.info("tracing %g of the requests to %s", config.trace_ratio, config.otlp_endpoint)
    try:
        yield tracing
    finally:
        await asyncio.to_thread(tracing.close)


def _engine(
    config: Config, model_dir: Path, sealer: FileSealer | None
) -> tuple[EngineClient, tuple[Collector, ...]]:
    """Return the engine, or several as one, and what else is measured of them."""
    configs = config.engine_configs()
    engines = {
        name: engine_process(config, each, model_dir, sealer, name if len(configs) > 1 else "")
        for name, each in configs.items()
    }
    if len(engines) == 1:
        return next(iter(engines.values())), ()
    fleet = EngineFleet(engines, RoutingPolicy(least_bound=config.engine.max_num_batched_tokens))
    return fleet, (FleetCollector(fleet),)


def engine_process(
    config: Config,
    engine: EngineConfig,
    model_dir: Path,
    sealer: FileSealer | None,
    name: str = "",
) -> EngineProcess:
    """Return an engine that is not started yet; sealer: opens marks' files; name: of one among
    several.
    """
    return EngineProcess(
        engine,
        model_dir,
        config.store_dir,
        base_name=_base_name(config.engine.model),
        log_level=config.server.log_level,
        log_format=config.server.log_format,
        name=name,
        num_sharing=config.fleet.engines,
        sealer=sealer,
    )


class WebServer(uvicorn.Server):
    """uvicorn with our end of life: it listens while it drains, so that /ready can say 503."""

    def __init__(self, app: FastAPI, config: Config, *, announce: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",  # entered by the caller, where its errors are one clear line
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                timeout_graceful_shutdown=_CLOSE_GRACE_S,
            )
        )
        self._services: Services = app.state.services
        self._settings = config.server
        self._announce = announce
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then announce."""
        await super().startup(sockets=sockets)
        self._announce()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handle signals by draining, and end with status 0."""
        loop = asyncio.get_running_loop()
        for each in _SIGNALS:
            loop.add_signal_handler(each, self._on_signal)
        try:
            yield
        finally:
            for each in _SIGNALS:
                loop.remove_signal_handler(each)

    def _on_signal(self) -> None:
        if self._drain is None:
            self._drain = asyncio.create_task(self._drain_and_exit())
        else:
            self.force_exit = True
            self.should_exit = True

    async def _drain_and_exit(self) -> None:
        lifecycle, config = self._services.lifecycle, self._settings
        if not await lifecycle.drain(config.drain_grace_s, notice_s=config.drain_notice_s):
            await stop_engine(self._services)
        self.should_exit = True


def _base_name(model: str) -> str | None:
    """Return the hub id as the base's name; None for a directory, which gives its own name."""
    is_hub_id = "/" in model and not Path(model).expanduser().is_dir()
    return model if is_hub_id else None
