"""The Python client against the application over a fake engine, and against odd answers."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio.from_thread
import httpx
import pytest

CLIENT = Path(__file__).parents[2] / "clients" / "python"
sys.path.insert(0, str(CLIENT))

from tests.api.conftest import Maker, Server, listening, peft_files  # noqa: E402

from polyadapt_client import (  # noqa: E402
    AdapterRejected,
    ApiError,
    NotFound,
    Option,
    Polyadapt,
    Traits,
    Unavailable,
    Use,
    WorkflowRun,
    generation_fields,
)

FILES = {name: content for _, (name, content) in peft_files("poet")}


class Running:
    """A server in a thread with its own event loop."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._portal = anyio.from_thread.start_blocking_portal("asyncio")
        self.server: Server
        self.port = 0
        self._stop: Any = None

    def __enter__(self) -> Running:
        portal = self._portal.__enter__()
        started = threading.Event()

        async def run() -> None:
            self._stop = anyio.Event()
            async with AsyncExitStack() as stack:
                self.server = await Maker(self._root, stack)()
                self.port = await stack.enter_async_context(listening(self.server.app))
                started.set()
                await self._stop.wait()

        self._task = portal.start_task_soon(run)
        self._live = portal
        started.wait()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.call(self._stop.set)
        self._task.result()
        self._portal.__exit__(None, None, None)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def client(running: Running) -> Iterator[Polyadapt]:
    with Polyadapt(f"http://127.0.0.1:{running.port}") as made:
        yield made
        for adapter in list(made.adapters()):
            made.delete(adapter.name)


def contents(marker: str) -> dict[str, bytes]:
    """Files of another adapter: what a test has deleted under way is not known again."""
    return {name: content for _, (name, content) in peft_files(marker)}


def answering(status: int, **options: Any) -> Polyadapt:
    """Return a client whose server always gives this answer."""
    transport = httpx.MockTransport(lambda request: httpx.Response(status, **options))
    return Polyadapt("http://server", transport=transport)


def test_an_adapter_lives_from_upload_to_deletion(client: Polyadapt) -> None:
    made = client.upload("solo", FILES, description="rhymes", tags=["style"])
    assert (made.name, made.version, made.description, made.tags) == (
        "solo", 1, "rhymes", ("style",)
    )  # fmt: skip
    assert client.adapter("solo@1") == made
    assert client.load("solo", pin=True).residency.pinned
    assert client.unload("solo").residency.tier == "store"
    assert client.delete("solo", mode="now") == [1]
    with pytest.raises(NotFound):
        client.adapter("solo")


def test_a_directory_is_uploaded_one_folder_deep(client: Polyadapt, tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "notes.txt").write_text("x")
    made = client.upload("poet", tmp_path)
    assert set(made.report.unused_files) == {"README.md", "sub/notes.txt"}
    assert made.digest == client.upload("poet", FILES).digest


def test_what_a_request_may_choose_of_an_adapter_is_read(client: Polyadapt) -> None:
    option = {"name": "k", "kind": "count", "summary": "how many", "expected": "1 to 3"}
    traits = {"ranks": [2, 8], "invocation_tokens": [5], "options": [{**option, "default": 2}]}
    files = {name: content for _, (name, content) in peft_files("nested", traits=traits)}
    made = client.upload("nested", files)
    assert made.traits == Traits((2, 8), (5,), (Option(**option, default=2),))
    assert client.upload("poet", FILES).traits is None


def test_an_empty_directory_is_not_sent(client: Polyadapt, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no files"):
        client.upload("poet", tmp_path)


def test_every_page_is_fetched(client: Polyadapt, monkeypatch: pytest.MonkeyPatch) -> None:
    import polyadapt_client.client

    monkeypatch.setattr(polyadapt_client.client, "_PAGE", 2)
    for name in "edcba":
        client.upload(name, {**FILES, "adapter_model.safetensors": name.encode()})
    assert [adapter.name for adapter in client.adapters()] == list("abcde")


def test_versions_are_newest_first(client: Polyadapt) -> None:
    first = client.upload("poet", FILES)
    second = client.upload("poet", {**FILES, "adapter_model.safetensors": b"other"})
    assert second.version == first.version + 1
    assert client.versions("poet") == [second, first]


def test_every_problem_of_a_refused_adapter_is_told(client: Polyadapt) -> None:
    refused = {name: content for _, (name, content) in peft_files(reject=["k1", "k2"])}
    with pytest.raises(AdapterRejected) as caught:
        client.upload("poet", refused)
    assert [problem.where for problem in caught.value.problems] == ["k1", "k2"]
    assert (caught.value.status, caught.value.code) == (422, "adapter_rejected")
    assert caught.value.request_id


def test_tokens_go_there_and_back(client: Polyadapt) -> None:
    tokens = client.tokenize("hé").tokens
    assert tokens == (104, 0xC3, 0xA9)
    assert client.detokenize(tokens) == "hé"


def test_several_adapters_complete_a_text(client: Polyadapt) -> None:
    for name in ("haiku", "pirate"):
        client.upload(name, {**FILES, "adapter_model.safetensors": name.encode()})
    reply = client.complete(
        "hi", model="fake-base", adapters=["haiku", Use("pirate", scale=0.5)], max_tokens=64
    )
    assert reply.text == "I am haiku+pirate 0."
    assert [served.name for served in reply.adapters] == ["haiku", "pirate"]
    assert reply.adapters[0].digest == client.adapter("haiku").digest
    assert not reply.adapters[0].is_approximate
    frozen = Use("haiku", options={"frozen_after": 2})
    assert client.complete("hi", model="fake-base", adapters=[frozen]).adapters[0].is_approximate
    assert client.complete("hi", model="haiku", adapters=[]).adapters == ()
    with pytest.raises(ApiError) as caught:
        client.complete("hi", model="fake-base", adapters=["haiku", "haiku"])
    assert caught.value.param == "adapters[1].name"


def test_a_cold_adapter_is_what_the_caller_said(client: Polyadapt, running: Running) -> None:
    digest = client.upload("poet", FILES).digest
    running.server.engine.cold = {digest}
    try:
        assert client.complete("hi", model="poet", on_cold="base").adapters == ()
        with pytest.raises(Unavailable) as caught:
            client.complete("hi", model="poet", on_cold="fail", cold_timeout_ms=5)
        assert (caught.value.code, caught.value.retry_after_s) == ("adapter_cold", 1)
    finally:
        running.server.engine.cold = set()


def test_a_workflow_lives_and_answers(client: Polyadapt) -> None:
    reasoner = {"adapter": None, "instruction": "", "template": "{question} 7"}
    definition = {"kind": "self_consistency", "reasoner": reasoner, "num_samples": 2}
    made = client.create_workflow("vote", definition, description="counts")
    assert (made.name, made.kind, made.version) == ("vote", "self_consistency", 1)
    assert made.definition["threshold"] == 0.5
    assert client.workflow("vote") == made
    assert client.put_workflow("vote", {**made.definition, "num_samples": 3}).version == 2
    client.put_workflow("other", definition)
    assert [workflow.name for workflow in client.workflows()] == ["other", "vote"]
    reply = client.complete("hi", model="vote", seed=3)
    run = reply.workflow
    assert run is not None
    assert (reply.text, run.answer, run.agreed, run.rule) == ("0", "0", True, "agreement")
    assert (run.name, run.version, run.rounds, run.candidates) == ("vote", 2, 1, ("0",))
    assert [entry.text for entry in run.trace] == ["I am base 0."] * 3
    assert run.total_tokens == sum(entry.tokens + entry.prompt_tokens for entry in run.trace)
    with pytest.raises(ApiError) as caught:
        client.create_workflow("vote", definition)
    assert (caught.value.status, caught.value.code) == (409, "conflict")
    for name in ("vote", "other"):
        client.delete_workflow(name)
    with pytest.raises(NotFound):
        client.workflow("vote")
    assert client.complete("hi", model="fake-base").workflow is None


def test_a_run_is_read_from_openais_client_too() -> None:
    entry = {"round": 1, "role": "ir", "adapter": "a@1", "text": "7", "answer": "7", "tokens": 2,
             "prompt_tokens": 3, "finish_reason": "stop", "seed": 5, "new": True}  # fmt: skip
    body = {"name": "w", "kind": "lorid", "version": 1, "answer": "7", "agreed": True,
            "rule": "agreement", "candidates": ["7"], "rounds": 1, "trace": [entry],
            "usage": {"total_tokens": 5}, "new": True}  # fmt: skip
    run = WorkflowRun.of(body)
    assert (run.trace[0].role, run.trace[0].seed, run.total_tokens) == ("ir", 5, 5)


def test_the_fields_for_openais_client_hold_what_was_given() -> None:
    assert generation_fields() == {}
    assert generation_fields([]) == {"adapters": []}
    uses = ["a", Use("b", scale=0.5, rank=4, options={"x": 1})]
    assert generation_fields(uses, on_cold="fallback:c", cold_timeout_ms=0) == {
        "adapters": [
            {"name": "a", "scale": 1.0},
            {"name": "b", "scale": 0.5, "rank": 4, "options": {"x": 1}},
        ],
        "on_cold": "fallback:c",
        "cold_timeout_ms": 0,
    }


def test_the_server_says_what_it_can_do(client: Polyadapt) -> None:
    found = client.capabilities()
    assert found.model == "fake-base"
    assert "lora" in found.families
    assert found.limits["max_adapters_per_request"] == 4
    assert found.features["composition"] is True


def test_the_server_says_how_it_is(client: Polyadapt) -> None:
    assert client.is_healthy()
    assert client.is_ready()
    assert client.version().model == "fake-base"


def test_auto_is_told_what_adapters_are_for_and_says_what_it_chose(client: Polyadapt) -> None:
    client.upload("zed", contents("zed"), examples=["zzz zz", "z zz"])
    profile = client.profile("zed")
    assert (profile.name, profile.examples, profile.is_fresh) == ("zed", ("zzz zz", "z zz"), True)
    done = client.complete("zz z", model="auto", max_tokens=4)
    assert done.choice is not None
    assert (done.choice.adapter, done.choice.reason) == ("zed", "best")
    assert [candidate.name for candidate in done.choice.candidates] == ["zed"]
    assert [served.name for served in done.adapters] == ["zed"]
    assert client.put_profile("zed", ["qq"]).own_share is None
    done = client.complete("zz z", model="auto")
    assert done.choice is not None
    assert (done.choice.adapter, done.adapters) == (None, ())
    assert client.put_profile("zed").examples == ("qq",)
    client.delete_profile("zed")
    with pytest.raises(NotFound):
        client.profile("zed")
    assert client.complete("hi", model="zed").choice is None


def test_a_policy_is_put_listed_and_removed(client: Polyadapt) -> None:
    client.upload("guard", contents("guard"))
    made = client.put_policy("default", [Use("guard", scale=0.5)])
    assert made == client.policy("default")
    assert list(client.policies()) == [made]
    assert [(a.name, a.version, a.scale) for a in made.adapters] == [("guard", 1, 0.5)]
    (served,) = client.complete("hi", model="fake-base").adapters
    assert (served.name, served.mandatory) == ("guard", True)
    with pytest.raises(ApiError) as caught:
        client.delete("guard")
    assert (caught.value.status, caught.value.code) == (409, "conflict")
    client.delete_policy("default")
    assert client.complete("hi", model="fake-base").adapters == ()
    assert client.complete("hi", model="guard").adapters[0].mandatory is False
    with pytest.raises(NotFound):
        client.policy("default")


def test_a_wrong_field_is_named(client: Polyadapt) -> None:
    with pytest.raises(ApiError) as caught:
        client.upload("../x", FILES)
    assert (caught.value.status, caught.value.param) == (400, "name")


def test_a_busy_server_says_when_to_come_back() -> None:
    body = {"error": {"message": "full", "type": "t", "code": "queue_full", "param": None}}
    with pytest.raises(Unavailable) as caught:
        answering(429, json=body, headers={"retry-after": "7"}).adapter("poet")
    assert caught.value.retry_after_s == 7


def test_a_proxys_answer_is_an_error_too() -> None:
    with pytest.raises(ApiError, match="Bad Gateway") as caught:
        answering(502, text="<html>Bad Gateway").version()
    assert caught.value.code == "http"


def test_the_key_is_sent() -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["authorization"])
        return httpx.Response(200, json={"status": "ok"})

    with Polyadapt("http://x", api_key="sk-1", transport=httpx.MockTransport(answer)) as made:
        made.is_healthy()
    assert seen == ["Bearer sk-1"]


def test_a_server_that_is_not_there_is_httpxs_error() -> None:
    with pytest.raises(httpx.ConnectError), Polyadapt("http://127.0.0.1:9") as made:
        made.version()


def test_the_client_imports_nothing_heavy() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(CLIENT)!r}); import polyadapt_client; "
        "sys.exit(bool({'torch', 'pydantic', 'polyadapt', 'fastapi'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True)
