"""Several demo adapters in one request, and cold ones, on the real server and model."""

from __future__ import annotations

import concurrent.futures
import time
from typing import Any

from tests.support.servers import RunningServer

PROMPT = "Question: what is a volcano?\nAnswer:"


def ask(server: RunningServer, **fields: Any) -> Any:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 10, **fields}
    return server.post("/v1/completions", json=body)


def test_compositions_and_single_adapters_answer_beside_each_other(server, base):
    pirate, json_, tea = ({"name": name} for name in ("pirate", "json", "tea-house"))
    cases: dict[str, dict[str, Any]] = {
        "base": {"model": base},
        "none": {"model": "pirate", "adapters": []},
        "all zero": {"model": base, "adapters": [pirate | {"scale": 0}, tea | {"scale": 0}]},
        "pirate": {"model": "pirate"},
        "pirate and nothing": {"model": base, "adapters": [pirate, json_ | {"scale": 0.0}]},
        "both": {"model": base, "adapters": [pirate | {"scale": 0.5}, tea | {"scale": 0.7}]},
        "swapped": {"model": base, "adapters": [tea | {"scale": 0.7}, pirate | {"scale": 0.5}]},
        "three": {"model": base, "adapters": [tea, json_ | {"scale": -0.2}, pirate]},
    }
    alone = {name: ask(server, **fields).json() for name, fields in cases.items()}
    texts = {name: reply["choices"][0]["text"] for name, reply in alone.items()}
    assert texts["none"] == texts["all zero"] == texts["base"]
    assert texts["pirate and nothing"] == texts["pirate"]
    assert texts["swapped"] == texts["both"]
    assert len({texts[name] for name in ("base", "pirate", "both", "three")}) >= 3
    named = [served["name"] for served in alone["three"]["adapters"]]
    assert named == ["tea-house", "json", "pirate"]
    assert alone["all zero"]["adapters"][0]["name"] == "pirate"
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        together = dict(
            zip(cases, pool.map(lambda f: ask(server, **f), cases.values()), strict=True)
        )
    for name, reply in together.items():
        assert reply.json()["choices"][0]["text"] == texts[name], name


def test_a_cold_adapter_fails_or_turns_and_comes_meanwhile(server, base):
    server.post("/v1/adapters/json/unload")
    reply = ask(server, model="json", on_cold="fail")
    if reply.status_code == 503:
        assert reply.json()["error"]["code"] == "adapter_cold"
        assert reply.headers["retry-after"] == "1"
    server.post("/v1/adapters/json/unload")
    turned = ask(server, model="json", on_cold="base").json()
    if not turned["adapters"]:
        assert turned["choices"] == ask(server, model=base).json()["choices"]

    def is_resident() -> bool:
        return server.get("/v1/adapters/json").json()["residency"]["tier"] == "device"

    server.wait_until("the adapter is loaded though nobody waits", is_resident, timeout_s=20)
    began = time.monotonic()
    reply = ask(server, model="json", on_cold="fail")
    assert reply.status_code == 200, reply.text
    assert [served["name"] for served in reply.json()["adapters"]] == ["json"]
    assert time.monotonic() - began < 60


def test_the_server_says_what_it_can_do(server, base):
    body = server.get("/v1/capabilities").json()
    assert body["model"] == base
    assert "lora" in [family["name"] for family in body["families"]]
    assert body["limits"]["max_rank"] >= 64
    assert body["limits"]["max_adapters_per_request"] == 4
