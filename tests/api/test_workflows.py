"""Workflows over HTTP: the resource, its runs, what is refused, and what is said and counted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.api.conftest import Maker, Server, listening, peft_files
from tests.support.fake_engine import EOS, FakeEngine

from polyadapt.api.schemas.chat import ChatReply
from polyadapt.api.schemas.completions import CompletionReply
from polyadapt.api.schemas.workflows import WorkflowList, WorkflowObject
from polyadapt.types import Request

pytestmark = pytest.mark.anyio

ROLES = ("ir", "kg", "dr")
USER = [{"role": "user", "content": "why?"}]


def lorid(**fields: Any) -> dict[str, Any]:
    """A definition whose prompts are short enough for the fake's 256 tokens."""
    templates = {"ir": "I {question}", "kg": "K {question}", "dr": "D {question} <{knowledge}>"}
    members = {
        role: {"adapter": role, "instruction": "", "template": template}
        for role, template in templates.items()
    }
    return {"kind": "lorid", "max_iterations": 2, **members, **fields}


def vote(**fields: Any) -> dict[str, Any]:
    reasoner = {"adapter": None, "instruction": "", "template": "{question}"}
    return {"kind": "self_consistency", "reasoner": reasoner, **fields}


class Script:
    """What each adapter says, turn by turn."""

    def __init__(self, **texts: Sequence[str]) -> None:
        self.texts = texts
        self.turns: dict[str, int] = {}

    def __call__(self, request: Request, index: int) -> Sequence[int]:
        name = request.adapters[0].adapter.name if request.adapters else "base"
        turn = self.turns.get(name, 0)
        self.turns[name] = turn + 1
        texts = self.texts.get(name, ("nothing",))
        return [*texts[turn % len(texts)].encode(), EOS]


@pytest.fixture
async def solver(make_server: Maker) -> Server:
    """A server with three adapters and the workflow `solver` of them."""
    server = await make_server(FakeEngine(reply=Script()))
    for role in ROLES:
        await server.upload(role)
    reply = await create(server, "solver", lorid())
    assert reply.status_code == 201, reply.text
    return server


async def create(server: Server, name: str, definition: Any, **fields: Any) -> httpx.Response:
    body = {"name": name, "definition": definition, **fields}
    return await server.client.post("/v1/workflows", json=body)


async def ask(server: Server, path: str = "chat", **fields: Any) -> httpx.Response:
    own = {"messages": USER} if path == "chat" else {"prompt": "why?"}
    url = "/v1/chat/completions" if path == "chat" else "/v1/completions"
    return await server.client.post(url, json={"model": "solver", **own, **fields})


def refused(reply: httpx.Response, status: int, code: str, param: str | None) -> str:
    """Check an error; return its message."""
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (status, code, param), error
    message: str = error["message"]
    return message


async def samples(server: Server) -> dict[tuple[str, str], float]:
    """Return every sample of /metrics by name and sorted labels."""
    text = (await server.client.get("/metrics")).text
    return {
        (sample.name, json.dumps(sample.labels, sort_keys=True)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# --------------------------------------------------------------------------- the resource
async def test_a_workflow_lives_from_creation_to_deletion(solver: Server) -> None:
    client = solver.client
    made = WorkflowObject.model_validate((await client.get("/v1/workflows/solver")).json())
    assert (made.name, made.kind, made.version, made.tenant) == ("solver", "lorid", 1, "default")
    assert made.definition.sampling.temperature == 1.5, "defaults are written out"
    body = made.definition.model_dump()
    reply = await client.put("/v1/workflows/solver", json={"definition": body})
    assert (reply.status_code, reply.json()["version"]) == (200, 1), "nothing changed"
    body["max_iterations"] = 9
    reply = await client.put(
        "/v1/workflows/solver", json={"definition": body, "description": "mathematics"}
    )
    changed = WorkflowObject.model_validate(reply.json())
    assert (changed.id, changed.version, changed.description) == (made.id, 2, "mathematics")
    reply = await client.put("/v1/workflows/another", json={"definition": vote()})
    assert (reply.status_code, reply.json()["kind"]) == (201, "self_consistency")
    reply = await client.delete("/v1/workflows/solver")
    assert reply.json() == {"name": "solver", "object": "workflow.deleted", "deleted": True}
    for call in (client.get, client.delete):
        refused(await call("/v1/workflows/solver"), 404, "not_found", None)
    refused(await ask(solver), 404, "model_not_found", "model")


async def test_workflows_are_listed_by_pages(server: Server) -> None:
    for name in ("c", "a", "b"):
        await create(server, name, vote())
    first = WorkflowList.model_validate(
        (await server.client.get("/v1/workflows", params={"limit": 2})).json()
    )
    assert [item.name for item in first.data] == ["a", "b"]
    assert first.has_more
    params = {"limit": 2, "after": first.last_id}
    rest = (await server.client.get("/v1/workflows", params=params)).json()
    assert [item["name"] for item in rest["data"]] == ["c"]
    assert not rest["has_more"]
    wrong = await server.client.get("/v1/workflows", params={"after": "x"})
    refused(wrong, 400, "invalid_request", "after")


async def test_names_that_are_taken_are_a_conflict(solver: Server) -> None:
    for name in ("solver", "ir", "fake-base"):
        refused(await create(solver, name, vote()), 409, "conflict", "name")
    for name in ("ir", "fake-base"):
        reply = await solver.client.put(f"/v1/workflows/{name}", json={"definition": vote()})
        refused(reply, 409, "conflict", "name")
    reply = await solver.client.post("/v1/adapters", data={"name": "solver"}, files=peft_files("x"))
    refused(reply, 409, "conflict", "name")
    assert solver.engine.prepared[-1].name == "dr", "the upload was not even read"
    await solver.client.delete("/v1/workflows/solver")
    await solver.upload("solver")
    refused(await create(solver, "solver", vote()), 409, "conflict", "name")


WRONG: list[tuple[dict[str, Any], str | None]] = [
    ({"name": None}, "name"),
    ({"name": "a b"}, "name"),
    ({"name": "x" * 129}, "name"),
    ({"name": "solver@1"}, "name"),
    ({"surprise": 1}, "surprise"),
    ({"definition": None}, "definition"),
    ({"definition": {}}, "definition.kind"),
    ({"definition": {"kind": "debate"}}, "definition.kind"),
    ({"definition": {"kind": "lorid"}}, "definition.ir"),
    ({"definition": lorid(surprise=1)}, "definition.surprise"),
    ({"definition": lorid(max_iterations=65)}, "definition.max_iterations"),
    ({"definition": lorid(max_iterations=0)}, "definition.max_iterations"),
    ({"definition": lorid(max_iterations="2")}, "definition.max_iterations"),
    ({"definition": lorid(ir={"adapter": "ir", "mood": 1})}, "definition.ir.mood"),
    ({"definition": lorid(ir={})}, "definition.ir.adapter"),
    ({"definition": lorid(ir={"adapter": ""})}, "definition.ir.adapter"),
    ({"definition": lorid(ir={"adapter": None, "template": "x"})}, "definition.ir.template"),
    (
        {"definition": lorid(dr={"adapter": None, "template": "{question}"})},
        "definition.dr.template",
    ),
    (
        {"definition": lorid(kg={"adapter": None, "instruction": "x" * 8193})},
        "definition.kg.instruction",
    ),
    ({"definition": lorid(sampling={"temperature": 3})}, "definition.sampling.temperature"),
    ({"definition": lorid(sampling={"best_of": 3})}, "definition.sampling.best_of"),
    ({"definition": lorid(format="json")}, "definition.format"),
    ({"definition": vote(num_samples=65)}, "definition.num_samples"),
    ({"definition": vote(samples_per_round=17)}, "definition.samples_per_round"),
    ({"definition": vote(threshold=0)}, "definition.threshold"),
    ({"definition": vote(threshold=float("inf"))}, None),
    ({"description": "x" * 4097}, "description"),
    ({"definition": lorid(ir={"adapter": None, "instruction": "\ud800"})}, None),
]


async def test_what_is_wrong_is_named_by_its_place(server: Server) -> None:
    for change, param in WRONG:
        body = {"name": "w", "definition": vote(), **change}
        body = {key: value for key, value in body.items() if value is not None or key != "name"}
        reply = await server.client.post(
            "/v1/workflows",
            content=json.dumps(body),
            headers={"content-type": "application/json"},
        )
        assert reply.status_code == 400, (change, reply.text)
        assert param is None or reply.json()["error"]["param"] == param, (change, reply.text)
    assert server.store.workflows.all() == ()


async def test_a_member_without_an_adapter_to_find_is_named(server: Server) -> None:
    reply = await create(server, "w", lorid())
    message = refused(reply, 404, "model_not_found", "definition.ir.adapter")
    assert "the workflow's ir: no model or adapter 'ir'" in message


async def test_models_are_listed_with_their_workflows(solver: Server) -> None:
    models = {
        model["id"]: model for model in (await solver.client.get("/v1/models")).json()["data"]
    }
    assert list(models) == ["fake-base", "dr", "ir", "kg", "solver"]
    assert models["solver"]["workflow"] == "lorid"
    assert models["solver"]["parent"] == "fake-base"
    assert "workflow" not in models["ir"]
    for name in ("solver", "fake-base:solver"):
        found = (await solver.client.get(f"/v1/models/{name}")).json()
        assert (found["id"], found["workflow"]) == (name, "lorid")
    features = (await solver.client.get("/v1/capabilities")).json()["features"]
    assert features["workflows"] == ["lorid", "self_consistency"]


async def test_the_document_has_both_kinds_closed(server: Server) -> None:
    document = (await server.client.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    definitions = [name for name in schemas if name.startswith(("LoridD", "SelfConsistencyD"))]
    assert definitions
    for name in definitions:
        assert schemas[name]["additionalProperties"] is False
    body = schemas["NewWorkflow"]["properties"]["definition"]
    assert set(body["discriminator"]["mapping"]) == {"lorid", "self_consistency"}
    for reply in ("ChatReply", "CompletionReply"):
        assert "WorkflowRun" in json.dumps(schemas[reply]["properties"]["workflow"])


# --------------------------------------------------------------------------- runs
async def test_a_chat_with_a_workflow_shows_how_it_came_to_its_answer(solver: Server) -> None:
    solver.engine.reply = Script(ir=["it is 1", "it is 3"], kg=["water"], dr=["it is 2", "3"])
    reply = await ask(solver, seed=5)
    body = ChatReply.model_validate(reply.json(), extra="forbid")
    (choice,) = body.choices
    assert (choice.message.content, choice.finish_reason) == ("3", "stop")
    run = body.workflow
    assert run is not None
    assert (run.name, run.kind, run.version) == ("solver", "lorid", 1)
    assert (run.answer, run.agreed, run.rule, run.candidates) == ("3", True, "agreement", ["3"])
    assert run.rounds == 2
    assert [(e.round, e.role, e.adapter, e.text, e.answer, e.tokens) for e in run.trace] == [
        (1, "ir", "ir@1", "it is 1", "1", 8),
        (1, "kg", "kg@1", "water", None, 6),
        (1, "dr", "dr@1", "it is 2", "2", 8),
        (2, "ir", "ir@1", "it is 3", "3", 8),
        (2, "kg", "kg@1", "water", None, 6),
        (2, "dr", "dr@1", "3", "3", 2),
    ]
    assert run.usage == body.usage
    assert body.usage.completion_tokens == 38
    assert body.usage.prompt_tokens == sum(len(r.prompt_ids) for r in solver.engine.requests)
    assert body.usage.total_tokens == body.usage.prompt_tokens + 38
    assert [served.name for served in body.adapters] == ["ir", "kg", "dr"]
    digests = [(await solver.client.get(f"/v1/adapters/{r}")).json()["digest"] for r in ROLES]
    assert reply.headers["x-adapter-digest"] == ",".join(digests)


async def test_a_completion_with_a_workflow(solver: Server) -> None:
    solver.engine.reply = Script(ir=["1"], kg=["water"], dr=["1"])
    reply = await ask(solver, "completions", max_tokens=9, temperature=0.5)
    body = CompletionReply.model_validate(reply.json(), extra="forbid")
    assert body.choices[0].text == "1"
    assert body.workflow is not None
    assert body.workflow.rounds == 1
    for request in solver.engine.requests:
        assert (request.sampling.max_tokens, request.sampling.temperature) == (9, 0.5)
        assert request.sampling.top_p == 0.9


async def test_sets_that_never_meet_end_in_a_declared_majority(solver: Server) -> None:
    solver.engine.reply = Script(ir=["1", "2"], kg=["water"], dr=["3"])
    run = (await ask(solver)).json()["workflow"]
    assert (run["answer"], run["agreed"], run["rule"]) == ("3", False, "majority")
    assert run["rounds"] == 2


async def test_no_answer_at_all_is_null_and_an_empty_message(solver: Server) -> None:
    body = (await ask(solver)).json()
    assert body["choices"][0]["message"]["content"] == ""
    run = body["workflow"]
    assert (run["answer"], run["agreed"], run["rule"], run["candidates"]) == (
        None, False, "none", []
    )  # fmt: skip


async def test_self_consistency_of_the_base(server: Server) -> None:
    server.engine.reply = Script(base=["it is 4", "or 5", "it is 4", "is it 4", "it is 4"])
    await create(server, "vote", vote(num_samples=5, samples_per_round=2))
    reply = await ask(server, model="vote")
    run = reply.json()["workflow"]
    assert (run["answer"], run["agreed"], run["rounds"]) == ("4", True, 2)
    answers = [entry["answer"] for entry in run["trace"]]
    # Of two that are asked at once either may be the first to be answered.
    assert (sorted(answers[:2]), answers[2:]) == (["4", "5"], ["4", "4"])
    assert {entry["adapter"] for entry in run["trace"]} == {None}
    assert reply.json()["adapters"] == []
    assert "x-adapter-digest" not in reply.headers


async def test_a_seed_repeats_the_run(solver: Server) -> None:
    solver.engine.reply = lambda request, index: [*str(request.sampling.seed % 7).encode(), EOS]
    first, again, other = [(await ask(solver, seed=seed)).json() for seed in (1, 1, 2)]
    assert first["workflow"] == again["workflow"]
    assert first["workflow"]["trace"] != other["workflow"]["trace"]
    entry = first["workflow"]["trace"][0]
    alone = await solver.client.post(
        "/v1/chat/completions",
        json={"model": entry["adapter"], "seed": entry["seed"],
              "messages": [{"role": "user", "content": "I why?"}]},
    )  # fmt: skip
    assert alone.json()["choices"][0]["message"]["content"] == entry["text"]


async def test_the_last_message_is_the_question(solver: Server) -> None:
    turns = [{"role": "system", "content": "Be brief."}, *USER]
    await ask(solver, messages=turns)
    asked = solver.engine.requests
    prompts = [bytes(i for i in request.prompt_ids if i < 256).decode() for request in asked]
    expected = [f"system\nBe brief.\nuser\n{role} why?\nassistant\n" for role in "IK"]
    assert set(expected) < set(prompts), "of two that are asked at once either may be first"
    for wrong in (
        [*USER, {"role": "assistant", "content": "because"}],
        [{"role": "system", "content": "x"}],
        [{"role": "user", "content": " "}],
    ):
        refused(await ask(solver, messages=wrong), 400, "invalid_request", "messages")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"stream": True}, "stream"),
    ({"n": 2}, "n"),
    ({"return_token_ids": True}, "return_token_ids"),
    ({"prompt_logprobs": 0}, "prompt_logprobs"),
    ({"adapters": []}, "adapters"),
    ({"adapters": [{"name": "ir"}]}, "adapters"),
    ({"on_cold": "base"}, "on_cold"),
    ({"cold_timeout_ms": 5}, "cold_timeout_ms"),
    ({"stop": ["x"]}, "stop"),
    ({"stop_token_ids": [5]}, "stop_token_ids"),
    ({"ignore_eos": True}, "ignore_eos"),
    ({"min_tokens": 1}, "min_tokens"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
]


@pytest.mark.parametrize("path", ["chat", "completions"])
async def test_what_a_workflow_cannot_do_is_refused_by_name(solver: Server, path: str) -> None:
    for fields, param in REFUSED:
        message = refused(await ask(solver, path, **fields), 400, "unsupported_field", param)
        assert message.startswith(f"{param}: 'solver' is a workflow")
    assert solver.engine.requests == []


async def test_fields_of_one_call_are_refused_by_name_too(solver: Server) -> None:
    for path, fields, param in (
        ("chat", {"logprobs": True}, "logprobs"),
        ("completions", {"logprobs": 0}, "logprobs"),
        ("completions", {"echo": True}, "echo"),
        ("completions", {"n": 2, "best_of": 2}, "n"),
    ):
        refused(await ask(solver, path, **fields), 400, "unsupported_field", param)
    for prompt in (["a", "b"], [5, 6], [[5], [6]], ""):
        reply = await ask(solver, "completions", prompt=prompt)
        refused(reply, 400, "invalid_request", "prompt")
    assert solver.engine.requests == []


@pytest.mark.parametrize("path", ["chat", "completions"])
async def test_values_that_change_nothing_are_taken(solver: Server, path: str) -> None:
    solver.engine.reply = Script(ir=["1"], dr=["1"])
    fields: dict[str, Any] = {
        "stream": False, "n": 1, "stop": [], "stop_token_ids": [], "logit_bias": {},
        "min_tokens": 0, "ignore_eos": False, "return_token_ids": False, "on_cold": "wait",
        "logprobs": None, "adapters": None, "user": "me", "metadata": {"a": "b"}, "priority": 3,
        "top_k": -1, "presence_penalty": 0.5,
    }  # fmt: skip
    fields |= {"logprobs": False} if path == "chat" else {"echo": False, "best_of": 1}
    reply = await ask(solver, path, **fields)
    assert reply.status_code == 200, reply.text
    assert {(r.priority, r.sampling.top_k) for r in solver.engine.requests} == {(3, 0)}


async def test_a_priority_that_nobody_may_ask_for_is_refused(make_server: Maker) -> None:
    server = await make_server(min_priority=0)
    await create(server, "vote", vote())
    reply = await ask(server, model="vote", priority=-1)
    refused(reply, 400, "invalid_request", "priority")


async def test_a_workflow_is_no_adapter_where_one_is_expected(solver: Server) -> None:
    client = solver.client
    wrong = await ask(solver, model="fake-base", adapters=[{"name": "solver"}])
    assert "is a workflow" in refused(wrong, 404, "model_not_found", "adapters[0].name")
    wrong = await ask(solver, model="ir", on_cold="fallback:solver")
    assert "is a workflow" in refused(wrong, 404, "model_not_found", "on_cold")
    wrong = await ask(solver, model="solver@1")
    assert "is a workflow" in refused(wrong, 404, "model_not_found", "model")
    wrong = await client.get("/v1/adapters/solver")
    assert "is a workflow" in refused(wrong, 404, "model_not_found", None)
    wrong = await create(solver, "nested", lorid(ir={"adapter": "solver"}))
    assert "is a workflow" in refused(wrong, 404, "model_not_found", "definition.ir.adapter")
    for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [65]})):
        wrong = await client.post(path, json={"model": "solver", **body})
        assert "is a workflow" in refused(wrong, 400, "unsupported_field", "model")


async def test_a_member_that_fails_is_named(solver: Server) -> None:
    solver.engine.failure = (0, "numerical_error", "not finite")
    message = refused(await ask(solver), 500, "numerical_error", None)
    assert message.startswith(("the workflow's ir, round 1: ", "the workflow's kg, round 1: "))
    assert message.endswith("not finite")


async def test_an_adapter_that_is_gone_is_named_with_its_role(solver: Server) -> None:
    await solver.client.delete("/v1/adapters/kg")
    message = refused(await ask(solver), 404, "model_not_found", "model")
    assert message.startswith("the workflow's kg: ")
    assert solver.engine.requests == []


async def test_runs_and_tokens_are_counted(solver: Server) -> None:
    solver.engine.reply = Script(ir=["1", "1", "2"], kg=["w"], dr=["1", "3", "3"])
    assert (await ask(solver)).json()["workflow"]["agreed"]
    used = (await ask(solver)).json()["usage"]  # 1 meets 3, then 2 meets 3
    solver.engine.reply = Script()
    await ask(solver)
    solver.engine.failure = (0, "numerical_error", "x")
    await ask(solver)
    await ask(solver, stream=True)
    found = await samples(solver)

    def runs(outcome: str) -> float:
        labels = json.dumps({"kind": "lorid", "outcome": outcome}, sort_keys=True)
        return found.get(("polyadapt_workflow_runs_total", labels), 0.0)

    counts = {o: runs(o) for o in ("agreement", "majority", "none", "failed", "cancelled")}
    assert counts == {"agreement": 1, "majority": 1, "none": 1, "failed": 1, "cancelled": 0}
    assert found["polyadapt_workflow_rounds_total", '{"kind": "lorid"}'] == 1 + 2 + 2
    assert found["polyadapt_failed_generations_total", '{"code": "numerical_error"}'] == 1
    generated = found["polyadapt_generated_tokens_total", "{}"]
    assert generated == (2 + 2 + 2) + used["completion_tokens"] + 6 * len("nothing.")
    assert found["polyadapt_time_to_first_token_seconds_count", "{}"] == 15  # one a sample


# --------------------------------------------------------------------------- ends
@pytest.mark.parametrize("num_steps", [0, 5, 14])
async def test_a_caller_that_goes_away_cancels_every_member(
    solver: Server, num_steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    solver.engine.gate = asyncio.Semaphore(num_steps)
    body = json.dumps({"model": "solver", "messages": USER}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    async with listening(solver.app) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + body)
        await writer.drain()
        while not solver.engine.running or not solver.engine.gate.locked():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        running = len(solver.engine.running)
        writer.transport.abort()
        await solver.engine.until_idle()
        lifecycle = solver.app.state.services.lifecycle
        while lifecycle.num_open:
            await asyncio.sleep(0.001)
    assert len(solver.engine.cancelled) == running == 2
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]
    directory = solver.app.state.services.directory
    assert not directory._uses
    labels = '{"kind": "lorid", "outcome": "cancelled"}'
    assert (await samples(solver))["polyadapt_workflow_runs_total", labels] == 1


async def test_a_deletion_waits_for_the_runs_and_now_ends_them(solver: Server) -> None:
    for mode in ("drain", "now"):
        solver.engine.gate = asyncio.Semaphore(0)
        run = asyncio.create_task(ask(solver))
        while len(solver.engine.running) < 2:
            await asyncio.sleep(0.001)
        deletion = asyncio.create_task(
            solver.client.delete("/v1/adapters/dr", params={"mode": mode})
        )
        async with asyncio.timeout(10):
            while (await solver.client.get("/v1/adapters/dr")).status_code != 404:
                await asyncio.sleep(0.001)
            while mode == "now" and not solver.engine.deleted:
                await asyncio.sleep(0.001)
        assert not deletion.done()
        for _ in range(300):
            solver.engine.gate.release()
        reply = await run
        assert (await deletion).status_code == 200
        if mode == "drain":
            assert reply.json()["workflow"]["rounds"] == 2
        else:
            message = refused(reply, 410, "adapter_deleted", None)
            assert message.startswith("the workflow's dr, round 1: ")
        solver.engine.gate = None
        solver.engine.deleted.clear()
        await solver.upload("dr")


async def test_rounds_of_many_questions_run_beside_each_other(solver: Server) -> None:
    """Every question has its two members in the engine at once, none waits for another's end."""
    solver.engine.gate = asyncio.Semaphore(0)
    runs = [asyncio.create_task(ask(solver, seed=seed)) for seed in range(5)]
    async with asyncio.timeout(10):
        while len(solver.engine.running) < 10:
            await asyncio.sleep(0.001)
    names = [request.adapters[0].adapter.name for request in solver.engine.running.values()]
    assert (names.count("ir"), names.count("kg")) == (5, 5)
    solver.engine.gate = None
    for run in runs:
        run.cancel()
    await asyncio.gather(*runs, return_exceptions=True)
    await solver.engine.until_idle()


async def test_the_definition_of_a_run_is_the_one_that_it_began_with(solver: Server) -> None:
    solver.engine.gate = asyncio.Semaphore(0)
    run = asyncio.create_task(ask(solver))
    while len(solver.engine.running) < 2:
        await asyncio.sleep(0.001)
    await solver.client.put("/v1/workflows/solver", json={"definition": lorid(max_iterations=1)})
    await solver.client.delete("/v1/workflows/solver")
    for _ in range(300):
        solver.engine.gate.release()
    body = (await run).json()["workflow"]
    assert (body["rounds"], body["version"]) == (2, 1)


async def test_a_workflow_is_there_again_after_a_restart(
    make_server: Maker, solver: Server
) -> None:
    from polyadapt.tasks.workflows.library import WorkflowLibrary

    services = solver.app.state.services
    again = WorkflowLibrary(solver.store.workflows, services.directory)
    await again.read()
    assert again.get("default", "solver") == services.workflows.get("default", "solver")


async def test_tenants_have_their_own_workflows(make_server: Maker) -> None:
    server = await make_server(FakeEngine(), api_key="sk-operator-" + "x" * 20)
    keys = {
        tenant: server.store.keys.create(tenant, ["infer", "adapters:read", "adapters:write"])[1]
        for tenant in ("one", "two")
    }
    for tenant, size in (("one", 1), ("two", 2)):
        headers = {"authorization": f"Bearer {keys[tenant]}"}
        body = {"name": "vote", "definition": vote(num_samples=size)}
        reply = await server.client.post("/v1/workflows", json=body, headers=headers)
        assert reply.status_code == 201, reply.text
    for tenant, size in (("one", 1), ("two", 2)):
        headers = {"authorization": f"Bearer {keys[tenant]}"}
        url, body = "/v1/chat/completions", {"model": "vote", "messages": USER}
        reply = await server.client.post(url, json=body, headers=headers)
        assert len(reply.json()["workflow"]["trace"]) == size
        await server.client.delete("/v1/workflows/vote", headers=headers)
        reply = await server.client.post(url, json=body, headers=headers)
        refused(reply, 404, "model_not_found", "model")
