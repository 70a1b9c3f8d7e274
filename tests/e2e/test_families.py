"""Many families, base rows and compositions on one server process over HTTP, in one step."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file
from tests.support.family_samples import NAMES, make_sample
from tests.support.servers import RunningServer, running_server
from transformers import AutoConfig

NUM_TOKENS = 24
STORED = (".json", ".safetensors")
BODY = {"prompt": [5, 8, 17, 30, 41, 9, 77], "temperature": 0, "max_tokens": NUM_TOKENS,
        "ignore_eos": True, "return_token_ids": True, "logprobs": 1}  # fmt: skip


@pytest.fixture(scope="module")
def server(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server on a tiny model, with one adapter of every family uploaded over HTTP."""
    model_dir, root = tiny_model("llama"), tmp_path_factory.mktemp("http-families")
    options = ("--max-num-seqs", "64", "--max-heavy-adapters", "64", "--no-prefix-cache")
    with running_server(root / "home", model_dir, *options) as running:
        for name in NAMES:
            upload(running, name, make_sample(name, model_dir, root / name))
        yield running


def upload(server: RunningServer, name: str, directory: Path) -> None:
    paths = (path for path in sorted(directory.rglob("*")) if path.suffix in STORED)
    files = [("files", (p.relative_to(directory).as_posix(), p.read_bytes())) for p in paths]
    reply = server.post("/v1/adapters", data={"name": name}, files=files)
    assert reply.status_code == 201, (name, reply.text)


def bodies(server: RunningServer) -> dict[str, dict[str, Any]]:
    """What is asked, by a name of its own: every family, the base, and adapters together."""
    (base,) = [m["id"] for m in server.get("/v1/models").json()["data"] if not m.get("parent")]
    asked = {name: {"model": name} for name in NAMES}
    asked |= {f"base{n}": {"model": base} for n in range(3)}
    pairs = [("lora", "rslora"), ("miss", "dora"), ("ia3", "lora-bias"), ("road", "gralora"),
             ("smora", "mola"), ("arrow", "lora"), ("mixlora", "rslora"),
             ("xlora", "dora")]  # fmt: skip
    for one, two in pairs:
        adapters = [{"name": one}, {"name": two}]
        asked[f"{one} + {two}"] = {"model": base, "adapters": adapters}
    asked["scaled"] = {
        "model": base,
        "adapters": [{"name": "lora", "scale": 0.5}, {"name": "rslora", "scale": -0.25}],
    }
    return {name: {**BODY, **body} for name, body in asked.items()}


def outcome(reply: httpx.Response) -> tuple[list[int], list[float]]:
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def test_every_family_and_composition_in_one_step_equals_itself_alone(server) -> None:
    asked = bodies(server)
    for name in NAMES:  # so that all are admitted together
        assert server.post(f"/v1/adapters/{name}/load", json={}).status_code == 200
    alone = {n: outcome(server.post("/v1/completions", json=b)) for n, b in asked.items()}
    before = {b: steps_of_at_most(server, b) for b in (14, 64)}

    async def together() -> dict[str, httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
            replies = await asyncio.gather(
                *(client.post("/v1/completions", json=body) for body in asked.values())
            )
        return dict(zip(asked, replies, strict=True))

    replies = asyncio.run(together())

    after = {b: steps_of_at_most(server, b) for b in (14, 64)}
    num_steps, num_narrow = after[64] - before[64], after[14] - before[14]
    assert num_steps - num_narrow >= NUM_TOKENS // 2, "15 families never shared a step"
    for name, reply in replies.items():
        tokens, logprobs = outcome(reply)
        assert tokens == alone[name][0], name
        assert logprobs == pytest.approx(alone[name][1], abs=2e-3), name
    assert len({tuple(tokens) for tokens, _ in alone.values()}) > 20, "adapters change nothing"


def steps_of_at_most(server: RunningServer, count: int) -> float:
    name = f'polyadapt_step_distinct_adapters_bucket{{le="{float(count)}"}}'
    return server.metric(name)


def test_a_request_chooses_what_an_adapter_lets_it_choose(
    server, tiny_model, tmp_path: Path
) -> None:
    """Two forgetting tasks: both, one, none, and what the adapter does not have."""
    (base,) = [m["id"] for m in server.get("/v1/models").json()["data"] if not m.get("parent")]
    tensors, path = {}, "base_model.model.model.layers.0.mlp.up_proj"
    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(tiny_model("llama"))
    for task in range(2):
        tensors[f"{path}.tasks.{task}.lora_A"] = torch.randn(4, config.hidden_size)
        tensors[f"{path}.tasks.{task}.lora_B"] = torch.randn(config.intermediate_size, 4) * 2
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    tasks = [{"name": name, "r": 4} for name in ("one", "two")]
    text = json.dumps({"peft_type": "GS_LORA", "tasks": tasks, "target_modules": ["up_proj"]})
    (tmp_path / "adapter_config.json").write_text(text)
    upload(server, "forgetting", tmp_path)

    def ask(**options: Any) -> httpx.Response:
        use = {"name": "forgetting", "options": options}
        return server.post("/v1/completions", json={**BODY, "model": base, "adapters": [use]})

    plain = outcome(server.post("/v1/completions", json={**BODY, "model": base}))
    all_of_it = outcome(server.post("/v1/completions", json={**BODY, "model": "forgetting"}))
    assert outcome(ask(tasks=[])) == plain
    assert outcome(ask(tasks=["two", "one"])) == outcome(ask()) == all_of_it
    one, two = outcome(ask(tasks=["one"])), outcome(ask(tasks=["two"]))
    answers = {tuple(tokens) for tokens, _ in (plain, all_of_it, one, two)}
    assert len(answers) == 4
    for options, code, field in [
        ({"tasks": ["three"]}, "invalid_request", "tasks"),
        ({"tempo": 3}, "unsupported_field", "tempo"),
    ]:
        error = ask(**options).json()["error"]
        assert (error["code"], error["param"]) == (code, f"adapters[0].options.{field}")
        assert "tasks" in error["message"]
