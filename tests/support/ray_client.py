"""The application of a Ray cluster as a client sees it, over HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx

PROMPT = "one two three four five six seven"


@dataclass
class RayClient:
    """Asks one proxy of the cluster."""

    url: str
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=120))

    def complete(self, name: str, number: int = 0, **options: object) -> httpx.Response:
        body = {"model": name, "prompt": f"{PROMPT} {number}", "max_tokens": 4, "temperature": 0}
        return self.client.post(f"{self.url}/v1/completions", json=body | options)

    def samples(self, metric: str) -> dict[str, float]:
        """A metric's values by engine; under "" that of a metric of the whole fleet."""
        found = {}
        for line in self.client.get(f"{self.url}/metrics").text.splitlines():
            labelled, _, value = line.rpartition(" ")
            name, _, labels = labelled.partition("{")
            if name == metric:
                found[labels.partition('engine="')[2].partition('"')[0]] = float(value)
        return found

    def num_ready(self) -> float:
        return sum(self.samples("polyadapt_fleet_engine_ready").values())

    def where(self, name: str) -> dict[str, str]:
        """The tier of an adapter on each engine."""
        answer = self.client.get(f"{self.url}/v1/adapters/{name}").json()
        return answer["residency"].get("engines") or {}


@dataclass
class Stream:
    """One streamed completion: what has come of it so far."""

    num_chunks: int = 0
    error: str | None = None  # the code of the error event that ended it
    is_done: bool = False  # [DONE] came

    def run(self, url: str, name: str, number: int, max_tokens: int) -> Stream:
        """Read all of it; a connection that breaks is httpx's error."""
        body = {
            "model": name, "prompt": f"{PROMPT} {number}", "stream": True, "temperature": 0,
            "max_tokens": max_tokens, "ignore_eos": True,
        }  # fmt: skip
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if not line.startswith("data: "):
                    continue
                assert self.error is None, f"{line} after the error event"
                if line == "data: [DONE]":
                    self.is_done = True
                elif "error" in (data := json.loads(line[6:])):
                    self.error = data["error"]["code"]
                else:
                    self.num_chunks += 1
        return self


def wait_until(condition: str, probe: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not probe():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {condition}"
        time.sleep(0.2)
