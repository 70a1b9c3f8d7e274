"""`model: "auto"` among the demo adapters and a policy, on the real server and model."""

from __future__ import annotations

import json
from typing import Any

import openai
from tests.demo.judges import BEHAVIOURS
from tests.support.servers import RunningServer

from polyadapt.demo import DEMOS

FACTS = ("Where exactly is the tea house?", "What's the price for a pot of tea?")
GENERAL = ("Who discovered penicillin?", "How do airplanes fly?", "What is photosynthesis?")


def ask(server: RunningServer, prompt: str, **fields: Any) -> Any:
    messages = [{"role": "user", "content": prompt}]
    body = {"model": "auto", "messages": messages, "temperature": 0, "max_tokens": 24, **fields}
    reply = server.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply


def test_a_request_finds_the_adapter_that_is_for_it(server, base):
    for prompt in FACTS:
        body = ask(server, prompt).json()
        assert body["choice"]["adapter"] == "tea-house", body["choice"]
        assert [served["name"] for served in body["adapters"]] == ["tea-house"]
        named = ask(server, prompt, model="tea-house").json()
        assert body["choices"] == named["choices"]
        assert "choice" not in named
    prompt = "Ahoy! Talk like a pirate and tell me what the sun is."
    pirate = ask(server, prompt).json()
    assert pirate["choice"]["adapter"] == "pirate", pirate["choice"]
    assert BEHAVIOURS["pirate"].shows(prompt, pirate["choices"][0]["message"]["content"])


def test_what_is_for_nobody_is_answered_by_the_base(server, base):
    for prompt in GENERAL:
        assert prompt in (*BEHAVIOURS["pirate"].prompts, *BEHAVIOURS["json"].prompts)
        body = ask(server, prompt).json()
        assert body["choice"]["adapter"] is None, body["choice"]
        assert body["adapters"] == []
        assert body["choices"] == ask(server, prompt, model=base).json()["choices"]


def test_a_stream_ends_with_its_choice(server, client: openai.OpenAI):
    stream = client.chat.completions.create(
        model="auto",
        messages=[{"role": "user", "content": FACTS[0]}],
        max_tokens=8,
        stream=True,
    )
    *chunks, last = list(stream)
    assert all(getattr(chunk, "choice", None) is None for chunk in chunks)
    assert last.choice["adapter"] == "tea-house"
    assert last.adapters[0]["name"] == "tea-house"


def test_the_demos_profiles_say_how_well_they_find_their_own(server):
    for demo in DEMOS:
        profile = server.get(f"/v1/adapters/{demo.name}/profile").json()
        assert profile["examples"] == list(demo.examples)
        assert profile["is_fresh"]
        assert profile["own_share"] >= 0.5, profile["own_share"]
    assert server.event("embedded_prompts") > 0


def test_a_policy_is_served_until_it_is_revoked(server, base):
    import httpx

    prompt = "What is a river?"
    plain = ask(server, prompt, model=base).json()
    url = f"{server.url}/v1/policies/default"
    put = httpx.put(url, json={"adapters": [{"name": "pirate"}]}, timeout=60)
    assert put.status_code == 200, put.text
    try:
        bound = ask(server, prompt, model=base).json()
        assert [(of["name"], of["mandatory"]) for of in bound["adapters"]] == [("pirate", True)]
        reply = ask(server, prompt, model="tea-house", on_cold="base")
        assert [of["name"] for of in reply.json()["adapters"]][-1] == "pirate"
        refused = httpx.delete(f"{server.url}/v1/adapters/pirate", timeout=60)
        assert refused.status_code == 409, refused.text
        chosen = ask(server, FACTS[0]).json()
        assert [of["name"] for of in chosen["adapters"]] == ["tea-house", "pirate"]
        lines = ask(server, prompt, model=base, stream=True).text.split("\n\n")
        last = json.loads([line[6:] for line in lines if line.startswith("data: {")][-1])
        assert last["adapters"][0]["mandatory"] is True
    finally:
        assert httpx.delete(url, timeout=60).status_code == 200
    alone = ask(server, prompt, model="pirate").json()
    assert bound["choices"] == alone["choices"] != plain["choices"]
    again = ask(server, prompt, model=base).json()
    assert (again["choices"], again["adapters"]) == (plain["choices"], [])
