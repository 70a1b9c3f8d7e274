"""A load balancer small enough to be trusted: it asks every backend whether it is ready, sends
requests in turn to those that are, and tries nothing twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import AsyncIterator, Iterator

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

PROBE_PERIOD_S = 2.0
_HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "date", "server", "content-length"}


class LoadBalancer:
    """Sends each request to the next backend that was ready when it was last asked."""

    def __init__(self, backends: list[str]) -> None:
        self.backends = backends
        self.num_sent = dict.fromkeys(backends, 0)
        self.num_probes = 0  # of all backends
        self.url = ""
        self._ready: set[str] = set()
        self._turn = itertools.count()
        self._client = httpx.AsyncClient(timeout=300)

    async def forward(self, request: Request) -> Response:
        """Send one request on and its answer back, as it comes; 503 where nobody is ready."""
        ready = [backend for backend in self.backends if backend in self._ready]
        if not ready:
            return Response("no backend is ready", 503)
        backend = ready[next(self._turn) % len(ready)]
        self.num_sent[backend] += 1
        sent = self._client.build_request(
            request.method,
            backend + request.url.path,
            content=await request.body(),
            headers={"content-type": request.headers.get("content-type", "")},
        )
        try:
            reply = await self._client.send(sent, stream=True)
        except httpx.TransportError as error:
            return Response(f"{backend}: {error!r}", 502)

        async def body() -> AsyncIterator[bytes]:
            try:
                async for chunk in reply.aiter_raw():
                    yield chunk
            finally:
                await reply.aclose()

        headers = {k: v for k, v in reply.headers.items() if k not in _HOP_BY_HOP}
        return StreamingResponse(body(), reply.status_code, headers=headers)

    def await_probe(self) -> None:
        """Return when all backends have just been asked: for a period it will know nothing new."""
        before = self.num_probes
        while self.num_probes == before:
            time.sleep(0.01)

    async def _probe(self) -> None:
        async with httpx.AsyncClient(timeout=5) as client:
            while True:
                await asyncio.gather(*(self._ask(client, each) for each in self.backends))
                self.num_probes += 1
                await asyncio.sleep(PROBE_PERIOD_S)

    async def _ask(self, client: httpx.AsyncClient, backend: str) -> None:
        try:
            is_ready = (await client.get(f"{backend}/ready")).status_code == 200
        except httpx.TransportError:
            is_ready = False
        (self._ready.add if is_ready else self._ready.discard)(backend)

    @contextlib.contextmanager
    def running(self) -> Iterator[LoadBalancer]:
        """Serve on a free port, in a thread, until the block ends."""

        @contextlib.asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            probing = asyncio.create_task(self._probe())
            yield
            probing.cancel()
            await self._client.aclose()

        app = Starlette(
            routes=[Route("/{path:path}", self.forward, methods=["GET", "POST"])],
            lifespan=lifespan,
        )
        server = uvicorn.Server(
            uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, access_log=False)
        )
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not (server.started and self._ready):
                assert thread.is_alive()
                threading.Event().wait(0.05)
            port = server.servers[0].sockets[0].getsockname()[1]
            self.url = f"http://127.0.0.1:{port}"
            yield self
        finally:
            server.should_exit = True
            thread.join()
