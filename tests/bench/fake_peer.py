"""A peer server for tests that streams its tokens at once; it can die or start a child."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    bodies: Path

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.bodies.open("a") as out:
            out.write(json.dumps({k: body[k] for k in ("model", "adapter") if k in body}) + "\n")
        chunks = [{"choices": [{"text": "a"}]} for _ in range(body["max_tokens"])]
        chunks.append({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
        self.send_response(200)
        self.end_headers()
        for chunk in chunks:
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--bodies", type=Path)
    parser.add_argument("--child", type=Path)
    parser.add_argument("--die", action="store_true")
    args = parser.parse_args()
    if args.die:
        sys.exit("this machine lacks an instruction")
    if args.child:
        child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
        args.child.write_text(str(child.pid))
    Handler.bodies = args.bodies
    ThreadingHTTPServer(("127.0.0.1", args.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
