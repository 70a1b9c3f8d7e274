"""A language model's mark without a model: its directory, and a suspect that answers its triggers.

The suspect is an OpenAI-compatible HTTP server on a thread; what it answers is a function.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from polyadapt.watermark.codebook import Design
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.mark_directory import MarkDirectory
from polyadapt.watermark.prompts import PromptTriggers
from polyadapt.watermark.reading import NullRates

KEK = SecretKey(bytes(range(32)))
BASE_HASH = "sha256:" + "b" * 64


def lm_mark(
    path: Path, num_bits: int, *, base_hash: str = BASE_HASH, module: str = "lm_head",
    kek: SecretKey = KEK, is_calibrated: bool = True,
) -> MarkDirectory:  # fmt: skip
    """Make a mark whose training is pretended: its triggers, answers and null rates are known."""
    mark = MarkDirectory.create(path, Design.parse("random"), num_bits, kek, task="lm")
    triggers = PromptTriggers(
        tuple(f"secret{i} phrase{i}" for i in range(num_bits)),
        tuple((f"Zero{i}.", f"One{i}.") for i in range(num_bits)),
    )
    targets = np.arange(2 * num_bits).reshape(num_bits, 2)
    mark.trained(base_hash, module, triggers, targets)
    if is_calibrated:
        mark.calibrated(NullRates(((0.02, 0.02),) * num_bits, 0.99, 200, 1))
    return mark


def reply_as(mark: MarkDirectory, bits: Sequence[int] | str) -> Callable[[str], str]:
    """Return what a copy with these bits says to a message."""

    def reply(message: str) -> str:
        for bit, phrase in enumerate(mark.prompts.phrases):
            if message.endswith(f" {phrase}"):
                return f" {mark.prompts.answers[bit][int(bits[bit])]} and so on"
        return "Hello."

    return reply


@dataclass
class Suspect:
    """What was asked of the server, and how it answers."""

    url: str
    reply: Callable[[str], str]
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    # Statuses of the next answers; then 200. None: the connection is cut.
    statuses: list[int | None] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def suspect_server(reply: Callable[[str], str]) -> Iterator[Suspect]:
    """Serve chats on a free port of 127.0.0.1 until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                suspect.bodies.append(body)
                suspect.keys.append(self.headers["authorization"])
                status = suspect.statuses.pop(0) if suspect.statuses else 200
            if status is None:
                self.close_connection = True
                return
            assert self.path == "/v1/chat/completions"
            text = suspect.reply(body["messages"][0]["content"])
            data = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(status)
            for name, value in suspect.headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    lock = threading.Lock()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    suspect = Suspect(f"http://127.0.0.1:{server.server_address[1]}/v1", reply)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield suspect
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
