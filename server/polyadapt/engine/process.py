"""The EngineClient of the server: the engine in its own process, and the supervisor that restarts
it.

Torch-free. A dead or stuck engine fails its requests at once, the edge answers 503 meanwhile, and
a new engine starts; after too many deaths in a short time the supervisor gives up and says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from polyadapt.config import EngineConfig
from polyadapt.engine import wire
from polyadapt.engine.output import Command
from polyadapt.engine.streams import Streams
from polyadapt.errors import EngineUnavailable, StartupError
from polyadapt.logs import LogFormat
from polyadapt.types import AdapterId, EngineInfo, EngineStats, Event, Request, Residency
from polyadapt_store.sealed_files import FileSealer

logger = logging.getLogger(__name__)

_MAX_DEATHS, _DEATH_WINDOW_S = 5, 60.0
_STOP_GRACE_S = 10.0


class EngineProcess:
    """Starts, watches and restarts one engine process."""

    def __init__(
        self,
        config: EngineConfig,
        model_dir: Path,
        blob_root: Path,
        *,
        base_name: str | None = None,
        log_level: str = "info",
        log_format: LogFormat = "text",
        name: str = "",
        num_sharing: int = 1,
        sealer: FileSealer | None = None,
    ) -> None:
        """name: of one among several, for the log; num_sharing, sealer: see build_engine. The
        sealer's key goes through the pipe to each process, in which it starts, and nowhere else.
        """
        self._label = f"engine {name}" if name else "the engine"
        self._config = config
        self._setup = {
            "config": config.model_dump(mode="json"),
            "model_dir": str(model_dir),
            "blob_root": str(blob_root),
            "base_name": base_name or model_dir.name,
            "log_level": log_level,
            "log_format": log_format,
            "num_sharing": num_sharing,
            "parent_pid": os.getpid(),
        }
        self._sealer = sealer
        self._streams = Streams(self._send)
        self._context = zmq.asyncio.Context()
        self._commands: Any = None
        self._outputs: Any = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._sockets_dir: Path | None = None
        self._last_output = 0.0
        self._deaths: deque[float] = deque(maxlen=_MAX_DEATHS)
        self._pins: dict[str, AdapterId] = {}
        self._is_ready = False
        self._has_given_up = False
        self._is_stopping = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self.info: EngineInfo | None = None
        self.num_restarts = 0

    @property
    def pid(self) -> int | None:
        """The engine's process id while it runs."""
        return self._process.pid if self._process else None

    @property
    def is_ready(self) -> bool:
        """Whether the engine takes requests now."""
        return self._is_ready

    @property
    def is_alive(self) -> bool:
        """False once the supervisor has given up; a restarting engine counts as alive."""
        return not self._has_given_up

    # ------------------------------------------------------------------ life
    async def start(self) -> EngineInfo:
        """Start the engine and wait until it is ready; raises StartupError."""
        info = await self._launch()
        self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")
        return info

    async def stop(self) -> None:
        """End every request with an error, then the process: politely first."""
        self._is_stopping, self._is_ready = True, False
        self._streams.fail_all(EngineUnavailable("the server is shutting down"))
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        await self._end_process()
        self._context.destroy(linger=0)

    async def _launch(self) -> EngineInfo:
        self._sockets_dir = Path(tempfile.mkdtemp(prefix="polyadapt-"))  # mode 0700
        addresses = {
            "command_address": f"ipc://{self._sockets_dir}/commands",
            "output_address": f"ipc://{self._sockets_dir}/outputs",
        }
        self._commands = self._context.socket(zmq.PUSH)
        self._outputs = self._context.socket(zmq.PULL)
        for socket, address in zip(
            (self._commands, self._outputs), addresses.values(), strict=True
        ):
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDHWM, 0)  # the edge bounds the queue, not the socket
            socket.bind(address)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "polyadapt.engine.worker",
            stdin=asyncio.subprocess.PIPE, env=_environment(),
        )  # fmt: skip
        assert self._process.stdin is not None
        key = {"file_key": None if self._sealer is None else self._sealer.to_text()}
        self._process.stdin.write(json.dumps(self._setup | addresses | key).encode() + b"\n")
        await self._process.stdin.drain()
        info = await self._first_message()
        self.info = info
        self._streams.capacity = info.max_num_seqs + info.max_waiting
        self._last_output = time.monotonic()
        self._is_ready = True
        logger.info("%s is ready in process %d", self._label, self._process.pid)
        for adapter in self._pins.values():
            on_its_way = Residency(adapter.digest, "store", is_pinned=True)
            self._streams.residencies[adapter.digest] = on_its_way
            self._spawn(self._repin(adapter))
        return info

    async def _first_message(self) -> EngineInfo:
        assert self._process is not None
        message = asyncio.ensure_future(self._outputs.recv())
        exit_ = asyncio.ensure_future(self._process.wait())
        done, _ = await asyncio.wait({message, exit_}, return_when=asyncio.FIRST_COMPLETED)
        if message not in done:
            # Its last words may still be on the way.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(message), 0.5)
        if message.done():
            exit_.cancel()
            first = wire.decode_output(message.result())
            if isinstance(first, EngineInfo):
                return first
            await self._end_process()
            raise StartupError(str(first))
        message.cancel()
        status = exit_.result()
        await self._end_process()
        raise StartupError(f"the engine process ended with status {status} before it was ready")

    async def _end_process(self) -> None:
        """Close the sockets and make sure that the process is gone."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            assert process.stdin is not None
            process.stdin.close()
            try:
                await asyncio.wait_for(process.wait(), _STOP_GRACE_S)
            except TimeoutError:
                logger.warning("the engine did not stop within %g s: killed", _STOP_GRACE_S)
                process.kill()
                await process.wait()
        for socket in (self._commands, self._outputs):
            if socket is not None:
                socket.close()
        self._commands = self._outputs = None
        if self._sockets_dir is not None:
            shutil.rmtree(self._sockets_dir, ignore_errors=True)

    # ------------------------------------------------------------------ supervision
    async def _supervise(self) -> None:
        """Keep an engine running; whatever ends this leaves the server openly dead, not waiting."""
        try:
            await self._keep_running()
        except asyncio.CancelledError:
            raise
        except Exception:
            logger.critical("the engine's supervisor has failed: giving up", exc_info=True)
            self._is_ready, self._has_given_up = False, True
            self._streams.fail_all(EngineUnavailable("the engine has failed", retry_after_s=60))

    async def _keep_running(self) -> None:
        while True:
            reason = await self._watch()
            self._is_ready = False
            logger.error("%s: %s; starting it again", self._label, reason)
            self._streams.fail_all(
                EngineUnavailable("the engine has failed and is being restarted; try again")
            )
            if self._process is not None and self._process.returncode is None:
                self._process.kill()
                await self._process.wait()
            await self._end_process()
            if not await self._relaunch():
                return

    async def _relaunch(self) -> bool:
        """Start again until it works; False when it died too often to go on."""
        while True:
            self._deaths.append(time.monotonic())
            if len(self._deaths) == _MAX_DEATHS and (
                self._deaths[-1] - self._deaths[0] < _DEATH_WINDOW_S
            ):
                self._has_given_up = True
                logger.critical(
                    "%s died %d times within %g s: giving up; restart the server once the cause in "
                    "the log above is mended", self._label, _MAX_DEATHS, _DEATH_WINDOW_S,
                )  # fmt: skip
                return False
            self.num_restarts += 1
            try:
                await self._launch()
            except (StartupError, OSError) as error:
                logger.error("%s could not be restarted: %s", self._label, error)
                await self._end_process()
                await asyncio.sleep(1.0)
            else:
                return True

    async def _watch(self) -> str:
        """Pass outputs on until the engine dies or hangs; returns what happened."""
        assert self._process is not None
        exit_ = asyncio.ensure_future(self._process.wait())
        message: asyncio.Future[bytes] = asyncio.ensure_future(self._outputs.recv())
        try:
            while True:
                waiters: set[asyncio.Future[Any]] = {message, exit_}
                await asyncio.wait(waiters, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
                if message.done():
                    self._absorb(message.result())
                    message = asyncio.ensure_future(self._outputs.recv())
                elif exit_.done():
                    return f"the engine process ended with status {exit_.result()}"
                elif self._is_stuck():
                    return f"the engine made no step for {self._config.step_timeout_s:g} s"
        finally:
            exit_.cancel()
            message.cancel()

    def _absorb(self, message: bytes) -> None:
        output = wire.decode_output(message)
        assert not isinstance(output, EngineInfo | str), "an engine introduces itself once"
        self._last_output = time.monotonic()
        self._streams.absorb(output)

    def _is_stuck(self) -> bool:
        if not self._streams.is_busy:
            self._last_output = time.monotonic()
        return time.monotonic() - self._last_output > self._config.step_timeout_s

    async def _repin(self, adapter: AdapterId) -> None:
        if adapter.digest not in self._pins:  # taken before this task began
            self._streams.residencies.pop(adapter.digest, None)
            return
        try:
            await self._streams.load(adapter.digest, is_pinned=True)
        except Exception:
            logger.exception("adapter %s could not be pinned again", adapter.name)

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ------------------------------------------------------------------ EngineClient
    def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        """See EngineClient."""
        return self._streams.submit(request)

    async def prepare_adapter(self, adapter: AdapterId) -> Residency:
        """See EngineClient."""
        return await self._streams.prepare(adapter.digest)

    async def load_adapter(self, adapter: AdapterId, *, is_pinned: bool) -> Residency:
        """See EngineClient. An engine that is down forgets a pin, and raises EngineUnavailable."""
        if not is_pinned:
            self._pins.pop(adapter.digest, None)
        residency = await self._streams.load(adapter.digest, is_pinned=is_pinned)
        if is_pinned:
            self._pins[adapter.digest] = adapter
        return residency

    async def unload_adapter(self, digest: str) -> None:
        """See EngineClient."""
        self._pins.pop(digest, None)
        await self._streams.unload(digest)

    async def cancel_adapter(self, digest: str) -> int:
        """See EngineClient."""
        return await self._streams.cancel_adapter(digest)

    def stats(self) -> EngineStats:
        """See EngineClient."""
        return self._streams.stats

    def residencies(self) -> Mapping[str, Residency]:
        """See EngineClient."""
        return self._streams.residencies

    def _send(self, command: Command) -> None:
        if not self._is_ready or self._commands is None:
            if self._has_given_up:
                raise EngineUnavailable("the engine has failed too often", retry_after_s=60)
            raise EngineUnavailable("the engine is starting; try again", retry_after_s=2)
        # Without a high-water mark a send never blocks, so that no await is needed.
        self._commands.send(wire.encode_command(command), zmq.NOBLOCK)


# Parts of names of variables that the engine has no use for.
_SECRETS = ("API_KEY", "MARK_KEK", "TEXT_MARK_KEY", "DATABASE_URL", "AWS_", "AZURE_", "GOOGLE_")


def _is_secret(name: str) -> bool:
    return any(part in name for part in _SECRETS)


def _environment() -> dict[str, str]:
    """The engine's environment: without the operator's secrets, and with an OpenMP that spins a
    little.

    A step is a few hundred parallel regions: a worker that slept between two of them doubled a
    step's time on two cores. One that spins until the next step takes the edge's core.
    """
    kept = {key: value for key, value in os.environ.items() if not _is_secret(key)}
    if "OMP_WAIT_POLICY" not in kept:
        kept.setdefault("GOMP_SPINCOUNT", "10000")  # tens of microseconds
    kept.setdefault("TOKENIZERS_PARALLELISM", "false")
    return kept
