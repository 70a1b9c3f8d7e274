"""The ingress replica: the server's own web application, without an engine of its own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve

from polyadapt.adapters.validator import run_validator
from polyadapt.api.fleet_metrics import FleetCollector
from polyadapt.app import build_app
from polyadapt.engine.routing import RoutingPolicy
from polyadapt.errors import Unavailable
from polyadapt.models.fetch import obtain_model
from polyadapt.ray_serve.board import board_of
from polyadapt.ray_serve.fleet import RayFleet
from polyadapt.ray_serve.handle import HandleCalls
from polyadapt.ray_serve.settings import Settings, read_settings
from polyadapt.serve import open_store, startup_adapters
from polyadapt.tasks.tokenizer import Tokenizer
from polyadapt_store.limits import StoreLimits
from polyadapt_store.manifest import ValidationReport


class Ingress:
    """What `serve.ingress()` wraps: it asks for the application once the replica is there."""

    def __init__(self, settings: Settings, engines: Any) -> None:
        """engines: the handle of the engine deployment."""
        self._settings = settings
        self._engines = engines

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_ingress(self._settings, self._engines)


def build_ingress(settings: Settings, engines: Any) -> FastAPI:
    """Return the application of this replica, which closes its store at the end.

    Raises StartupError.
    """
    config = read_settings(settings, "edge")
    model_dir = obtain_model(config.engine.model, config.home, lambda stage, done, total: None)
    limits = StoreLimits(total_bytes=int(config.limits.max_upload_bytes))
    here = serve.get_replica_context()
    fleet = RayFleet(
        HandleCalls(engines),
        board_of(here.app_name, engines.deployment_name),
        here.replica_id.unique_id,
        RoutingPolicy(least_bound=config.engine.max_num_batched_tokens),
    )

    def validate(directory: Path) -> ValidationReport:
        if fleet.info is None:
            raise Unavailable("no engine has started yet; upload again shortly")
        return run_validator(directory, fleet.info.base, limits)

    store = open_store(config, validate, limits)
    app = build_app(
        config,
        fleet,
        store,
        Tokenizer.load(model_dir),
        startup_adapters=startup_adapters(config),
        collectors=(FleetCollector(fleet),),
    )
    inner = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with store:
            async with inner(app):
                yield

    app.router.lifespan_context = lifespan
    return app
