"""One engine replica: a Ray actor that owns one engine process, and so one device.

Torch stays in the engine's own process, which its supervisor starts again; a replica whose
supervisor has given up fails its health check, and Ray puts another one in its place. The process
ends with the actor, however that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from ray import serve

from polyadapt.config import Config
from polyadapt.engine import wire
from polyadapt.engine.client import EngineClient
from polyadapt.engine.output import Call, Reply, StepOutput, Submit
from polyadapt.engine.remaining import Remaining
from polyadapt.errors import AdapterRejected, EngineUnavailable, PolyadaptError, Unavailable
from polyadapt.ray_serve.board import Statement, encode_statement
from polyadapt.ray_serve.router import ANYONE, STATEMENT
from polyadapt.ray_serve.settings import Settings, read_settings
from polyadapt.types import AdapterId
from polyadapt_store.limits import StoreLimits
from polyadapt_store.manifest import ValidationReport
from polyadapt_store.sealed_files import FileSealer


class EngineReplica:
    """What the ingress replicas call, through HandleCalls."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Ray awaits it
        self._name = serve.get_replica_context().replica_id.unique_id
        config = read_settings(settings, "engine")
        self._loads: Counter[str] = Counter()  # by edge, see Statement
        self._engine = await asyncio.to_thread(_engine, config, self._name)
        self._info = await self._engine.start()

    # ------------------------------------------------------------------ what Ray asks
    async def check_health(self) -> None:
        """Raise when the engine has died too often."""
        if not self._engine.is_alive:
            raise EngineUnavailable("the engine has failed too often")

    async def record_routing_stats(self) -> Mapping[str, Any]:
        """Return what EngineRouter posts to every edge's board."""
        engine = self._engine
        statement = Statement(
            engine.is_ready,
            engine.is_alive,
            engine.num_restarts,
            +self._loads,
            engine.stats(),
            tuple(engine.residencies().values()),
        )
        return {STATEMENT: encode_statement(statement)}

    async def record_autoscaling_stats(self) -> Mapping[str, float]:
        """Return what QueuedTokens scales on."""
        return {"queued_tokens": float(self._loads.total())}

    # ------------------------------------------------------------------ what edges ask
    async def describe(self, replica: str) -> bytes:
        """Return what the engine is."""
        refusal = self._refusal(replica)
        return refusal if refusal is not None else wire.encode_info(self._info)

    async def call(self, replica: str, message: bytes) -> bytes:
        """Carry a Call out; errors are in the Reply."""
        refusal = self._refusal(replica)
        if refusal is not None:
            return refusal
        command = wire.decode_command(message)
        assert isinstance(command, Call)
        try:
            return _encoded(await self._carry_out(command))
        except PolyadaptError as error:
            return _encoded(_failed(error))

    async def submit(
        self, replica: str, message: bytes, edge: str, num_tokens: int
    ) -> AsyncGenerator[bytes, None]:
        """Yield an empty output at once, then one for each event; or one that refuses."""
        refusal = self._refusal(replica)
        if refusal is not None:
            yield refusal
            return
        command = wire.decode_command(message)
        assert isinstance(command, Submit)
        remaining = Remaining(command.request, num_tokens)
        self._loads[edge] += num_tokens
        try:
            yield wire.encode_output(StepOutput())
            events = self._engine.submit(command.request)
            async with contextlib.aclosing(events):
                async for event in events:
                    self._loads[edge] -= remaining.take(event)
                    yield wire.encode_output(StepOutput([event]))
        except PolyadaptError as error:
            yield _encoded(_failed(error))
        finally:
            self._loads[edge] -= remaining.take_all()

    async def _carry_out(self, command: Call) -> Reply:
        engine, adapter = self._engine, AdapterId(command.digest, 0, command.digest)
        match command.name:
            case "prepare":
                return Reply(0, await engine.prepare_adapter(adapter))
            case "load":
                loaded = await engine.load_adapter(adapter, is_pinned=command.is_pinned)
                return Reply(0, loaded)
            case "unload":
                await engine.unload_adapter(command.digest)
                return Reply(0)
            case "cancel_adapter":
                return Reply(0, count=await engine.cancel_adapter(command.digest))

    def _refusal(self, replica: str) -> bytes | None:
        """What to answer when another replica was meant."""
        if replica in (ANYONE, self._name):
            return None
        return _encoded(_failed(EngineUnavailable(f"replica {replica} is gone; try again")))


def _engine(config: Config, name: str) -> EngineClient:
    """Return the engine, with its adapters' bytes brought to this machine where they lie elsewhere.

    Raises StartupError.
    """
    from polyadapt.models.fetch import obtain_model
    from polyadapt.serve import engine_process, open_store
    from polyadapt.tasks.stocked_engine import StockedEngine

    model_dir = obtain_model(config.engine.model, config.home, lambda stage, done, total: None)
    if config.store.blob_url is None:
        return engine_process(config, config.engine, model_dir, _sealer_beside(config), name)
    limits = StoreLimits(total_bytes=int(config.limits.max_upload_bytes))
    store = open_store(config, _refuse, limits)
    return StockedEngine(
        engine_process(config, config.engine, model_dir, store.sealer, name), store
    )


def _sealer_beside(config: Config) -> FileSealer | None:
    """Return what opens marks' files of a store that the ingress has open; raises StartupError."""
    from polyadapt.tasks.marks import find_sealer
    from polyadapt_store.database import Database
    from polyadapt_store.marks import MarkBook

    if config.watermark.mark_kek is None and config.watermark.mark_kek_file is None:
        return None
    config.store_dir.mkdir(mode=0o700, parents=True, exist_ok=True)  # whoever comes first
    with contextlib.closing(Database(config.registry)) as database:
        return find_sealer(config.watermark, MarkBook(database))


def _refuse(directory: object) -> ValidationReport:
    raise Unavailable("an engine replica takes no uploads")


def _failed(error: PolyadaptError) -> Reply:
    problems: tuple[tuple[str, str, str | None], ...] = ()
    if isinstance(error, AdapterRejected):
        problems = tuple((each.code, each.message, each.where) for each in error.problems)
    return Reply(0, error_code=error.code, error_message=error.message, problems=problems)


def _encoded(reply: Reply) -> bytes:
    return wire.encode_output(StepOutput(replies=[reply]))
