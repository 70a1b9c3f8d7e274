"""Serves mistral.rs' Python Runner over HTTP, so that the same load generator drives it.

    python mistralrs_driver.py --port 8000 --model DIR [--adapters DIR ...]

Runs in the peer's own environment: the standard library and `mistralrs` only. It knows the two
requests of bench/loadgen.py: GET /health and a streamed POST /v1/completions with token ids. The
Runner takes text only, so ids become words that are one token each (`_words`).
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mistralrs import ChatCompletionRequest, ModelDType, Runner, Which

# A space and lower-case letters: byte-level BPE splits text before such a word, never inside a run
# of them, so text made of words that are one token alone has as many tokens as words.
_WORD = re.compile(r"\u0120[a-z]{3,}")


def main() -> None:
    """Load the model and serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--max-seqs", type=int, default=64)
    parser.add_argument("--adapters", type=Path, nargs="*", default=[], help="PEFT directories")
    parser.add_argument("--max-rank", type=int, default=64)
    args = parser.parse_args()
    dtype = {"float32": ModelDType.F32, "bfloat16": ModelDType.BF16}[args.dtype]
    if args.adapters:
        which = Which.Lora(
            model_id=str(args.model),
            adapters=[],
            max_adapters=len(args.adapters),
            max_rank=args.max_rank,
            dtype=dtype,
        )
    else:
        which = Which.Plain(model_id=str(args.model), dtype=dtype)
    with tempfile.NamedTemporaryFile("w", suffix=".jinja") as template:
        # The Runner streams chats only; the prompt must arrive as it is, without a chat's frame.
        template.write("{% for message in messages %}{{ message['content'] }}{% endfor %}")
        template.flush()
        runner = Runner(
            which=which,
            max_seqs=args.max_seqs,
            prefix_cache_n=0,
            token_source="none",
            jinja_explicit=template.name,
        )
    for path in args.adapters:
        runner.load_lora_adapter(path.name, str(path))

    _Handler.runner = runner
    _Handler.words = _words(args.model)
    _Handler.adapters = frozenset(path.name for path in args.adapters)
    server = ThreadingHTTPServer(("127.0.0.1", args.port), _Handler)
    server.daemon_threads = True
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server.serve_forever()


def _words(model: Path) -> list[str]:
    """Return the words of the vocabulary that are one token each when they follow a space."""
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    words = [" " + token[1:] for token in vocabulary if _WORD.fullmatch(token)]
    if len(words) < 1000:
        sys.exit(f"{model}: the tokenizer is no byte-level BPE with words; prompts cannot be made")
    return words


class _Handler(BaseHTTPRequestHandler):
    """One request; the class attributes are set once, before the first."""

    runner: Runner
    words: list[str]
    adapters: frozenset[str]
    lock = threading.Lock()
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer any path: it listens only once the model is loaded."""
        self._reply(200, {"status": "ok"})

    def do_POST(self) -> None:
        """Stream one completion as server-sent events."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = "".join(self.words[token % len(self.words)] for token in body["prompt"])
        request = ChatCompletionRequest(
            messages=prompt,
            model="default",
            max_tokens=body["max_tokens"],
            temperature=0.0,
            ignore_eos=True,
            stream=True,
            adapter=body["model"] if body["model"] in self.adapters else None,
        )
        try:
            # The Runner refuses a call while another one is being entered.
            with self.lock:
                chunks = self.runner.send_chat_completion_request(request)
        except ValueError as error:
            self._reply(500, {"error": str(error)})
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        usage: dict[str, int] = {}
        for chunk in chunks:
            if chunk.usage is not None:
                usage = {
                    "prompt_tokens": chunk.usage.prompt_tokens,
                    "completion_tokens": chunk.usage.completion_tokens,
                }
            self._event({"choices": [{"text": chunk.choices[0].delta.content or ""}]})
        self._event({"choices": [], "usage": usage or None})
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Keep requests out of the log: writing them costs time that is being measured."""

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")

    def _reply(self, status: int, value: dict[str, str]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    main()
