"""How a real server ends by signals; tests/deploy/test_contract.py ends one as a kubelet does."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import httpx
from tests.support.servers import running_server

LONG = {"prompt": "one two", "max_tokens": 240, "ignore_eos": True, "n": 128, "stream": True}


def test_a_second_signal_aborts_what_the_first_lets_finish(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    options = ("--drain-notice-s", "0.2", "--drain-grace-s", "600", "--max-num-seqs", "2")
    with running_server(tmp_path / "home", model, *options) as running:
        with httpx.stream(
            "POST", f"{running.url}/v1/completions", json=LONG | {"model": model.name}, timeout=60
        ) as stream:
            lines = stream.iter_lines()
            next(line for line in lines if line.startswith("data:"))
            running.process.send_signal(signal.SIGTERM)
            running.wait_until("not ready", lambda: running.get("/ready").status_code == 503, 30)
            running.process.send_signal(signal.SIGTERM)
            try:
                rest = [line for line in lines if line.startswith("data:")]
            except httpx.RemoteProtocolError:
                rest = []
        assert "data: [DONE]" not in rest
        assert running.process.wait(60) == 0
