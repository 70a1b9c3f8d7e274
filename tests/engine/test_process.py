"""The engine behind its process border: the same answers, supervision, and a clean end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.oracle import adapters, tiny
from tests.support.engines import SMALL, greedy_request, put_blob

from polyadapt.config import EngineConfig
from polyadapt.engine import wire
from polyadapt.engine.build import build_engine
from polyadapt.engine.in_process import InProcessEngine
from polyadapt.engine.output import Call, Cancel, Reply, StepOutput, Submit
from polyadapt.engine.process import EngineProcess, _environment
from polyadapt.errors import EngineUnavailable, QueueFull, StartupError
from polyadapt.types import (
    AdapterId,
    AppliedAdapter,
    Embedded,
    EngineStats,
    Failed,
    Finished,
    PromptScored,
    Request,
    Residency,
    ServedAdapter,
    Started,
    TokenLogprob,
    Tokens,
    WhenCold,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def model_dir(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture
def blob_root(tmp_path: Path) -> Path:
    return tmp_path / "blobs"


@pytest.fixture
def identity(model_dir: Path, blob_root: Path, tmp_path: Path) -> AdapterId:
    return put_blob(blob_root, adapters.make_lora(model_dir, tmp_path / "a", 4), "a")


def _config(model_dir: Path, **settings) -> EngineConfig:
    return EngineConfig(
        model=str(model_dir), device="cpu", dtype="float32", num_threads=1, **(SMALL | settings)
    )


async def _collect(engine, request: Request) -> tuple[list[int], object]:
    tokens, last = [], None
    async for event in engine.submit(request):
        if isinstance(event, Tokens):
            tokens += event.token_ids
        last = event
    return tokens, last


async def test_both_clients_give_the_same_answers(model_dir, blob_root, identity):
    config = _config(model_dir)
    inside = InProcessEngine(
        lambda wake: build_engine(config, model_dir, blob_root, wake, name="m")
    )
    outside = EngineProcess(config, model_dir, blob_root, base_name="m")
    answers = []
    for engine in (inside, outside):
        info = await engine.start()
        assert engine.is_ready
        try:
            residency = await engine.prepare_adapter(identity)
            assert residency.tier == "host"
            requests = [
                greedy_request(f"r{i}", tiny.prompt_ids(9, i), identity if i % 2 else None, 6)
                for i in range(4)
            ]
            results = await asyncio.gather(*(_collect(engine, r) for r in requests))
            pinned = await engine.load_adapter(identity, is_pinned=True)
            assert (pinned.tier, pinned.is_pinned) == ("device", True)
            assert await engine.cancel_adapter(identity.digest) == 0
            await engine.unload_adapter(identity.digest)
            assert not engine.residencies()
            with pytest.raises(Exception, match="cannot be read"):
                await engine.prepare_adapter(AdapterId("x", 1, "sha256:" + "1" * 64))
            answers.append((info, results))
        finally:
            await engine.stop()
        assert not engine.is_ready
        with pytest.raises(EngineUnavailable):
            await _collect(engine, greedy_request("late", [1, 2], None, 1))
    assert answers[0] == answers[1]


async def test_a_killed_engine_fails_its_streams_comes_back_and_keeps_its_pins(
    model_dir, blob_root, identity
):
    engine = EngineProcess(_config(model_dir), model_dir, blob_root)
    await engine.start()
    try:
        await engine.load_adapter(identity, is_pinned=True)
        long = greedy_request("long", tiny.prompt_ids(9, 0), identity, 400)
        stream = engine.submit(long)
        assert isinstance(await anext(stream), Started)
        first_pid = engine.pid
        assert first_pid is not None
        os.kill(first_pid, signal.SIGKILL)
        rest = [event async for event in stream]
        assert isinstance(rest[-1], Failed)
        assert rest[-1].code == "engine_unavailable"
        with pytest.raises(EngineUnavailable):
            await _collect(engine, replace(long, id="meanwhile"))
        while not engine.is_ready:
            await asyncio.sleep(0.05)
        assert engine.is_alive
        assert engine.num_restarts == 1
        assert engine.pid != first_pid
        tokens, last = await _collect(engine, greedy_request("again", [1, 2, 3], identity, 3))
        assert len(tokens) == 3
        assert last == Finished("again")
        while engine.residencies()[identity.digest].tier != "device":
            await asyncio.sleep(0.05)
        assert engine.residencies()[identity.digest].is_pinned
    finally:
        await engine.stop()


async def test_an_engine_that_is_down_forgets_a_pin_that_is_taken(tmp_path):
    engine = EngineProcess(EngineConfig(model="m"), tmp_path, tmp_path)
    pinned = AdapterId("a", 1, "sha256:a")
    engine._pins[pinned.digest] = pinned
    with pytest.raises(EngineUnavailable):
        await engine.load_adapter(pinned, is_pinned=False)
    assert not engine._pins
    await engine._repin(pinned)  # of a start that was under way: it asks for nothing
    await engine.stop()


async def test_a_stopped_engine_is_found_stuck_and_replaced(model_dir, blob_root):
    engine = EngineProcess(_config(model_dir, step_timeout_s=1.0), model_dir, blob_root)
    await engine.start()
    try:
        stream = engine.submit(greedy_request("r", [1, 2, 3], None, 450))
        await anext(stream)
        pid = engine.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        rest = [event async for event in stream]
        assert isinstance(rest[-1], Failed)
        while not engine.is_ready:
            await asyncio.sleep(0.05)
        assert engine.num_restarts == 1
    finally:
        await engine.stop()


async def test_closing_a_stream_cancels_and_frees_its_pages(model_dir, blob_root):
    engine = EngineProcess(_config(model_dir), model_dir, blob_root)
    await engine.start()
    try:
        stream = engine.submit(greedy_request("r", tiny.prompt_ids(40, 0), None, 450))
        async for event in stream:
            if isinstance(event, Tokens):
                break
        assert engine.stats().num_used_pages > 0
        await stream.aclose()
        while engine.stats().counters.get("cancelled_requests", 0) == 0:
            await asyncio.sleep(0.01)
        assert engine.stats().num_used_pages == 0
    finally:
        await engine.stop()


async def test_a_full_queue_refuses_at_once(model_dir, blob_root):
    config = _config(model_dir, max_num_seqs=1, max_waiting=2)
    engine = InProcessEngine(
        lambda wake: build_engine(config, model_dir, blob_root, wake, name="m")
    )
    await engine.start()
    try:
        streams = [engine.submit(greedy_request(f"r{i}", [1, 2], None, 300)) for i in range(3)]
        for stream in streams[:1]:
            await anext(stream)
        tasks = [asyncio.ensure_future(anext(stream)) for stream in streams[1:]]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="limit of 3"):
            await _collect(engine, greedy_request("more", [1, 2], None, 1))
        for task in tasks:
            await task
        for stream in streams:
            await stream.aclose()
        _, last = await _collect(engine, greedy_request("after", [1, 2], None, 1))
        assert last == Finished("after")
    finally:
        await engine.stop()


async def test_a_model_that_cannot_be_loaded_stops_the_start_with_the_reason(tmp_path, blob_root):
    engine = EngineProcess(_config(tmp_path), tmp_path, blob_root)
    with pytest.raises(StartupError, match=r"no config\.json"):
        await engine.start()
    await engine.stop()


async def test_an_engine_does_not_outlive_its_parent(model_dir, blob_root):
    script = f"""
import asyncio, sys
from pathlib import Path
from polyadapt.config import EngineConfig
from polyadapt.engine.process import EngineProcess, _environment
async def main():
    config = EngineConfig(model={str(model_dir)!r}, device="cpu", kv_cache_bytes=8 << 20,
                          max_adapter_bytes=8 << 20)
    engine = EngineProcess(config, Path({str(model_dir)!r}), Path({str(blob_root)!r}))
    await engine.start()
    print(engine.pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(await asyncio.to_thread(parent.stdout.readline))
        parent.kill()
    for _ in range(100):
        if not _is_running(pid):
            return
        await asyncio.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the engine was still there 10 s after its parent was killed")


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_every_message_survives_the_wire():
    adapter = AdapterId("ä", 2, "sha256:" + "0" * 64)
    options = (("a", 1), ("b", 1.0), ("c", True), ("d", "ä"), ("e", ("x", "y")), ("f", ()))
    request = replace(
        greedy_request("r", [1, 2], adapter, 3, logit_bias=((1, 0.5),), num_logprobs=2),
        n=2,
        timeout_s=1.5,
        cache_salt=("tenant", "ä"),
        priority=-3,
        speculative_tokens=4,
        when_cold=WhenCold(
            20, (AppliedAdapter(adapter, 0.5, rank=3, options=options, is_mandatory=True),)
        ),
    )
    embed = replace(greedy_request("e", [1, 2], adapter), kind="embed")
    for command in (
        Submit(request),
        Submit(embed),
        Cancel("r"),
        Call(7, "load", adapter.digest, True),
    ):
        assert wire.decode_command(wire.encode_command(command)) == command
    decoded = wire.decode_command(wire.encode_command(Submit(request)))
    (instead,) = decoded.request.when_cold.instead
    assert repr(instead.options) == repr(options), "1, 1.0 and True are equal, and not the same"
    scored = TokenLogprob(3, -0.5, ((3, -0.5), (4, -1.0)))
    output = StepOutput(
        [
            Started("r", (ServedAdapter(adapter, "host", 1.5, is_mandatory=True),), 16),
            PromptScored("r", 0, (scored,)),
            Tokens("r", 1, (3,), (scored,), "stop", 3),
            Tokens("r", 0, (4, 5, 3), (scored,) * 3),
            Embedded("e", (0.5, -1.25), 7),
            Finished("r"),
            Failed("s", "numerical_error", "no"),
            Failed("t", "invalid_request", "no", "adapters[0].rank"),
        ],
        [
            Reply(1, Residency("d", "device", True, 2, 1.0, 3)),
            Reply(2, problems=(("a", "b", None),)),
        ],
        [Residency("d", "host")],
        ["e"],
        EngineStats(3, 1, 2, counters={"steps": 3}),
        5,
    )
    assert wire.decode_output(wire.encode_output(output)) == output
    assert AppliedAdapter(adapter) in request.adapters


def test_the_engine_is_not_told_the_operators_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = {"POLYADAPT_API_KEYS": "k", "POLYADAPT_MARK_KEK": "k", "POLYADAPT_MARK_KEK_FILE": "/k"}
    secret |= {"POLYADAPT_TEXT_MARK_KEY": "k", "POLYADAPT_TEXT_MARK_KEY_FILE": "/k"}
    for name, value in (secret | {"POLYADAPT_NATIVE": "1"}).items():
        monkeypatch.setenv(name, value)
    found = _environment()
    assert not secret.keys() & found.keys()
    assert found["POLYADAPT_NATIVE"] == "1"
