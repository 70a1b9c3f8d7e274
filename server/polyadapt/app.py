"""The web application, put together from its parts: settings, engine, store and tokenizer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fastapi import FastAPI
from prometheus_client.registry import Collector
from starlette.middleware import Middleware

import polyadapt
from polyadapt.api import (
    adapters,
    capabilities,
    keys,
    openai,
    ops,
    policies,
    profiles,
    text_marks,
    watermarks,
    workflows,
)
from polyadapt.api.access import Authenticator, KeylessGuard
from polyadapt.api.document import install_document
from polyadapt.api.errors import install_handlers
from polyadapt.api.metrics import Metrics
from polyadapt.api.middleware import BodyLimit, RequestContext
from polyadapt.api.services import Lifecycle, Services
from polyadapt.config import Config, LimitsConfig
from polyadapt.engine.client import EngineClient
from polyadapt.errors import AdapterRejected, PolyadaptError, StartupError
from polyadapt.tasks.auto import AutoService
from polyadapt.tasks.directory import DEFAULT_TENANT, AdapterDirectory, Store
from polyadapt.tasks.embed import Embedder
from polyadapt.tasks.following import Follower
from polyadapt.tasks.importing import Importer
from polyadapt.tasks.marks import MarkService, read_kek
from polyadapt.tasks.model_name import AUTO
from polyadapt.tasks.policy_admin import PolicyAdmin
from polyadapt.tasks.text import TextService
from polyadapt.tasks.text_marks import TextMarks
from polyadapt.tasks.tokenizer import Tokenizer
from polyadapt.tasks.workflows.library import Shelf, WorkflowLibrary
from polyadapt.tasks.workflows.runner import WorkflowRunner
from polyadapt.watermark.rows import RowSealer
from polyadapt.watermark.secrets import text_master_of
from polyadapt_store.idempotency import AnswerBook
from polyadapt_store.imports import ImportBook
from polyadapt_store.keys import KeyRing
from polyadapt_store.marks import MarkBook
from polyadapt_store.replicas import ReplicaBoard
from polyadapt_store.sources import Sources
from polyadapt_store.staging import StagedUpload
from polyadapt_store.text_policies import TextPolicyBook

if TYPE_CHECKING:
    from polyadapt.api.tracing import Tracing

logger = logging.getLogger(__name__)

_NUM_TOLD = 3  # problems of an adapter that stops the start
_FORM_OVERHEAD = 1 << 20  # boundaries and part headers of an upload


class StoreWithKeys(Store, Protocol):
    """An adapter store that also holds the API keys, the workflows and what servers tell."""

    keys: KeyRing

    replicas: ReplicaBoard
    imports: ImportBook
    answers: AnswerBook
    marks: MarkBook
    text_policies: TextPolicyBook

    def stage(self) -> StagedUpload: ...

    @property
    def workflows(self) -> Shelf: ...

    def refresh(self) -> int: ...

    def sweep(self) -> Sequence[str]: ...

    def seal_marks(self) -> int: ...


@dataclass(frozen=True, slots=True)
class StartupAdapter:
    """An adapter that the operator wants registered before the server is ready."""

    name: str
    directory: Path
    description: str = ""
    examples: tuple[str, ...] = ()  # see AutoService


def build_app(
    config: Config,
    engine: EngineClient,
    store: StoreWithKeys,
    tokenizer: Tokenizer,
    *,
    startup_adapters: tuple[StartupAdapter, ...] = (),
    tracing: Tracing | None = None,
    collectors: tuple[Collector, ...] = (),
) -> FastAPI:
    """Return the application; its lifespan starts and stops the engine; the store is the caller's,
    and so is `tracing`, which requests are traced with unless it is None.

    collectors: more metrics, of what stands behind `engine`.
    Raises StartupError when the address may not be served without a key, or the key that texts are
    marked with cannot be read.
    """
    authenticator = Authenticator(config.server, store.keys)
    authenticator.check_exposure()
    kek = read_kek(config.watermark)
    rows = None if kek is None else RowSealer(kek, store.marks)
    directory = AdapterDirectory(store, engine, rows)
    policy_admin = PolicyAdmin(store, directory)
    marks_of_texts = TextMarks(store.text_policies, text_master_of(config.watermark))
    lifecycle = Lifecycle()
    text = TextService(
        engine, directory, marks_of_texts, tokenizer, config.limits, config.prefix_pools
    )
    embedder = Embedder(engine, config.limits)

    def is_ready() -> bool:
        return lifecycle.is_open and engine.is_ready

    metrics = Metrics(engine, directory, is_ready=is_ready)
    for collector in collectors:
        metrics.registry.register(collector)
    library = WorkflowLibrary(store.workflows, directory)
    uploads = asyncio.Semaphore(config.limits.max_concurrent_uploads)
    services = Services(
        config=config,
        engine=engine,
        store=store,
        keys=store.keys,
        directory=directory,
        policies=policy_admin,
        text=text,
        text_marks=marks_of_texts,
        workflows=library,
        workflow_runner=WorkflowRunner(text, library, config.limits.request_timeout_s),
        marks=MarkService(directory, policy_admin, store, config.watermark, kek),
        auto=AutoService(text, embedder, store.profiles, config.server.auto_threshold),
        authenticator=authenticator,
        replicas=store.replicas,
        follower=Follower(
            store,
            (directory.follow, library.read),
            lambda: {digest: at.tier for digest, at in engine.residencies().items()},
        ),
        importer=Importer(
            directory, store, Sources(config.store.allowed_sources), store.imports, uploads
        ),
        answers=store.answers,
        metrics=metrics,
        lifecycle=lifecycle,
        is_ready=is_ready,
        uploads=uploads,
        readings=asyncio.Semaphore(1),
        started=int(time.time()),
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with running(services, startup_adapters):
            yield

    app = FastAPI(
        title="Polyadapt",
        version=polyadapt.__version__,
        description="One resident model, many adapters, one batch.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        middleware=[
            Middleware(
                RequestContext,
                observe=metrics.observe,
                is_leaving=lambda: lifecycle.is_leaving,
                tracing=tracing,
            ),
            Middleware(KeylessGuard, authenticator=authenticator, config=config.server),
            Middleware(BodyLimit, max_bytes_of=_BodyCaps(config.limits)),
        ],
    )
    app.state.services = services
    install_handlers(app)
    install_document(app)
    for module in (
        openai, adapters, profiles, policies, text_marks, watermarks, workflows, capabilities, keys,
        ops,
    ):  # fmt: skip
        module.add_routes(app.router)
    return app


@contextlib.asynccontextmanager
async def running(
    services: Services, startup_adapters: tuple[StartupAdapter, ...]
) -> AsyncIterator[None]:
    """Start the engine, register the operator's adapters, be open; stop on the way out."""
    began = time.monotonic()
    stack = contextlib.AsyncExitStack()
    try:
        info = await services.engine.start()
        if info.base.name == AUTO:
            raise StartupError(
                f"the model's name is {AUTO!r}, which asks for a choice among adapters; rename its "
                "directory"
            )
        await services.marks.report_keys()
        await services.marks.seal_branches()
        await services.policies.seal_signatures()
        await services.workflows.read()
        known = await services.directory.follow()
        for adapter in startup_adapters:
            known += await _register(services, adapter)
        follower = asyncio.create_task(services.follower.run(), name="follower")
        stack.push_async_callback(_end, follower)
        services.lifecycle.is_started = True
        logger.info(
            "serving %s (%s, %s; %s) and %d adapters after %.1f s",
            info.base.name,
            info.device,
            info.dtype,
            info.strategy,
            known,
            time.monotonic() - began,
        )
        yield
    finally:
        services.lifecycle.close()
        await stack.aclose()
        await services.follower.leave()
        await services.importer.close()
        await services.workflows.close()
        await services.directory.close()
        await stop_engine(services)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def stop_engine(services: Services) -> None:
    """Stop the engine, which ends every stream that is left with an error; once."""
    if not services.lifecycle.is_engine_stopped:
        services.lifecycle.is_engine_stopped = True
        await services.engine.stop()


async def _register(services: Services, adapter: StartupAdapter) -> bool:
    """Return whether it is a new version; raises StartupError."""
    try:
        record, is_new = await services.directory.register_directory(
            DEFAULT_TENANT,
            adapter.name,
            adapter.directory,
            description=adapter.description,
            new_profile=services.auto.new_profile(DEFAULT_TENANT, adapter.name, adapter.examples),
        )
    except AdapterRejected as error:
        problems = "; ".join(problem.message for problem in error.problems[:_NUM_TOLD])
        if (num_more := len(error.problems) - _NUM_TOLD) > 0:
            problems += f"; and {num_more} more"
        raise StartupError(f"the adapter {adapter.name!r} cannot be served: {problems}") from None
    except PolyadaptError as error:
        raise StartupError(
            f"the adapter {adapter.name!r} cannot be registered: {error.message}"
        ) from None
    logger.info("%s %s@%d", "registered" if is_new else "found", record.name, record.version)
    return is_new


class _BodyCaps:
    """The largest body of each call."""

    def __init__(self, limits: LimitsConfig) -> None:
        self._default = int(limits.max_body_bytes)
        self._special: Mapping[tuple[str, str], int] = {
            ("POST", path): int(limits.max_upload_bytes) + _FORM_OVERHEAD
            for path in ("/v1/adapters", "/v1/watermarks")
        }

    def __call__(self, method: str, path: str) -> int:
        return self._special.get((method, path), self._default)
