"""The command line: light to import, one clear line for what the operator must mend."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from polyadapt.cli import app
from polyadapt.config import ServerConfig, load_config
from polyadapt.errors import StartupError
from polyadapt.serve import bind, startup_adapters, url_of

# Help texts are wrapped to the terminal's width.
WIDE = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}


def run(*arguments: str, home: Path) -> tuple[int, str, str]:
    """Run a command in this process; return its status and outputs."""
    done = CliRunner().invoke(app, [*arguments], env={**WIDE, "POLYADAPT_HOME": str(home)})
    return done.exit_code, done.stdout, done.stderr


def test_help_lists_the_commands_without_torch() -> None:
    code = (
        "import sys\nfrom polyadapt.__main__ import main\n"
        "sys.argv = ['polyadapt', 'serve', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n"
        "    heavy = {'torch', 'transformers', 'fastapi', 'sqlalchemy'} & set(sys.modules)\n"
        "    sys.exit(f'imported {heavy}' if heavy else end.code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **WIDE},
    )
    assert done.returncode == 0, done.stderr
    for option in ("--model", "--port", "--adapter", "--max-num-seqs", "--allow-anonymous"):
        assert option in done.stdout


def test_every_engine_setting_is_an_option(tmp_path: Path) -> None:
    from polyadapt.config import EngineConfig

    status, out, _ = run("serve", "--help", home=tmp_path)
    assert status == 0
    for name in EngineConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in out, name


def test_the_serving_process_needs_no_torch() -> None:
    code = "import polyadapt.serve, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--model", "/no/such/model", "--port", "0"], "no model '/no/such/model'"),
        (["serve", "--device", "tpu"], "device"),
        (["serve", "--config", "/no/such/file.yaml"], "cannot read"),
        (["serve", "--adapter", "nameless"], "NAME=DIR"),
        (["serve", "--host", "no-such-host.invalid"], "cannot listen"),
        (["keys", "create", "--scope", "root"], "scopes"),
        (["keys", "create", "--scope", "infer", "--tenant", "a/b"], "is no name"),
        (["keys", "delete", "key-none"], "no API key"),
        (["model", "fetch", "no-such-model"], "no-such-model"),
        (["inspect", "/no/such/adapter"], "is no directory"),
        (["convert", "/no/such/adapter", "/tmp/out"], "does not exist"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(
    tmp_path: Path, arguments: list[str], words: str
) -> None:
    status, _, err = run(*arguments, home=tmp_path)
    assert status == 1
    assert words in err
    assert err.startswith("polyadapt: ")
    assert err.count("\n") == 1, err


DEMO = Path(__file__).parents[1] / "server" / "polyadapt" / "demo" / "pirate"


def test_inspecting_an_adapter_tells_people_and_machines(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    status, out, _ = run("inspect", str(DEMO), home=tmp_path)
    assert status == 0
    assert "lora" in out
    assert "give --model" in " ".join(out.split()), "however wide the table is"

    # Of another base: everything that does not fit is listed.
    arguments = ["inspect", str(DEMO), "--model", str(tiny_model("llama")), "--json"]
    status, out, _ = run(*arguments, home=tmp_path)
    assert status == 1
    found = json.loads(out)
    assert found["verdict"] == "refused"
    assert {problem["code"] for problem in found["problems"]} == {
        "shape_mismatch",
        "unknown_module",
    }
    assert len(found["problems"]) > 100


def test_inspecting_an_adapter_of_the_base_reports_cost_and_parity(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    from tests.oracle import adapters

    model_dir = tiny_model("llama")
    directory = adapters.make_lora(model_dir, tmp_path / "mine", 4, seed=1)
    arguments = ["inspect", str(directory), "--model", str(model_dir)]
    status, out, err = run(*arguments, home=tmp_path)
    assert status == 0, err
    assert "the engine computes what was read" in " ".join(out.split())
    assert "parity" in out

    status, out, _ = run(*arguments, "--json", home=tmp_path)
    found = json.loads(out)
    assert (status, found["verdict"], found["parity"]["is_equal"]) == (0, "served", True)
    elements = found["cost"]["num_elements"]
    assert found["cost"]["device_bytes"] == {"bfloat16": 2 * elements, "float32": 4 * elements}
    assert 0 < found["cost"]["device_share"] < 1


def test_converting_writes_a_directory_and_inspects_it(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file
    from tests.oracle import adapters

    model_dir = tiny_model("llama")
    directory = adapters.make_lora(model_dir, tmp_path / "mine", 4, seed=1)
    weights = directory / "adapter_model.safetensors"
    torch.save(load_file(weights), directory / "adapter_model.bin")
    weights.unlink()
    arguments = ["convert", str(directory), str(tmp_path / "out"), "--base", str(model_dir)]
    status, out, err = run(*arguments, home=tmp_path)
    assert status == 0, err
    assert "the engine computes what was read" in " ".join(out.split())

    status, out, err = run(*arguments, home=tmp_path)
    assert (status, out) == (1, "")
    assert "--force" in err

    # What would be refused is written all the same, and said.
    config = directory / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_magic": 1}))
    status, out, _ = run(*arguments, "--force", home=tmp_path)
    assert status == 1
    assert "unknown_config_key" in out


def test_several_loras_become_one_that_routes_between_them(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    from tests.oracle import adapters

    model_dir = tiny_model("llama")
    one, two, three, general = (
        str(adapters.make_lora(model_dir, tmp_path / name, 4, seed=seed))
        for seed, name in enumerate(("one", "two", "three", "general"))
    )
    status, out, err = run(
        "convert", one, str(tmp_path / "out"), "--from", "arrow", "--expert", two,
        "--expert", three, "--general", general, "--top-k", "2", "--temperature", "0.5",
        "--base", str(model_dir), home=tmp_path,
    )  # fmt: skip
    assert status == 0, err
    assert "the engine computes what was read" in " ".join(out.split())
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (len(config["experts"]), len(config["general"])) == (3, 1)
    assert config["arrow_config"] == {"top_k": 2, "router_temperature": 0.5, "use_gks": True}


def test_converting_is_told_what_the_files_do_not_say(tmp_path: Path) -> None:
    import torch

    factors = {"layers.0.mlp.lora_A": torch.ones(2, 4), "layers.0.mlp.lora_B": torch.ones(3, 2)}
    task = tmp_path / "Backbone_task_1.pth"
    torch.save(factors, task)
    out = tmp_path / "out"
    for flag in ("--merged", "--unmerged"):
        status, _, err = run(
            "convert", str(task), str(out), "--from", "gs_lora", flag, home=tmp_path
        )
        assert status == 1
        assert "give --base" in err
    status, _, err = run("convert", str(task), str(out), "--from", "gs_lora", home=tmp_path)
    assert status == 0, err
    assert json.loads((out / "adapter_config.json").read_text())["tasks"][0]["name"] == "task_1"

    halves = {
        f"layers.{i}.q.lora.{name}.weight": torch.ones(shape)
        for i in range(2)
        for name, shape in (("down", (2, 4)), ("up", (3, 2)))
    }
    torch.save(halves, tmp_path / "halves.bin")
    arguments = ["convert", str(tmp_path / "halves.bin"), str(out), "--from", "b_lora", "--force"]
    status, _, err = run(*arguments, "--half", "style=layers.1", home=tmp_path)
    assert status == 0, err
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["halves"] == {"style": ["layers.1"]}
    status, _, err = run(*arguments, "--half", "form", home=tmp_path)
    assert status == 1
    assert "content or style" in err


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, _, err = run("serve", "--port", str(port), home=tmp_path)
    assert status == 1
    assert f"127.0.0.1:{port}" in err


def test_keys_are_made_listed_and_deleted(tmp_path: Path) -> None:
    status, out, err = run(
        "keys", "create", "--scope", "infer", "--scope", "adapters:read", "--label", "ci",
        "--tenant", "acme", home=tmp_path,
    )  # fmt: skip
    assert status == 0
    assert "of the tenant acme" in err
    secret = out.strip()
    assert secret.startswith("sk-")
    assert secret not in err
    _, out, _ = run("keys", "list", home=tmp_path)
    key_id = next(word for word in out.split() if word.startswith("key-"))
    assert "ci" in out
    assert "acme" in out
    assert secret not in out
    assert run("keys", "delete", key_id, home=tmp_path)[0] == 0
    assert key_id not in run("keys", "list", home=tmp_path)[1]


def test_packaged_models_are_listed(tmp_path: Path) -> None:
    status, out, _ = run("model", "list", home=tmp_path)
    assert status == 0
    assert "smollm2" in out


def test_a_free_port_is_taken_and_shown() -> None:
    with bind(ServerConfig(port=0)) as listener:
        url = url_of(listener)
    assert url.startswith("http://127.0.0.1:")
    assert not url.endswith(":0")


def test_an_address_that_is_not_ours_is_refused() -> None:
    with pytest.raises(StartupError, match="cannot listen"):
        bind(ServerConfig(host="203.0.113.1", port=0))


def test_the_operators_adapter_hides_the_demo_of_its_name(tmp_path: Path) -> None:
    demos = startup_adapters(load_config({"demo": True}, environ={}))
    assert len(demos) >= 3
    name = demos[0].name
    mixed = startup_adapters(
        load_config({"demo": True, "adapters": [f"{name}={tmp_path}"]}, environ={})
    )
    assert len(mixed) == len(demos)
    assert [a.directory for a in mixed if a.name == name] == [tmp_path]
    assert startup_adapters(load_config({}, environ={})) == ()


_FAKE_SERVER = """
import asyncio, sys
from pathlib import Path
from polyadapt.config import load_config
import polyadapt.serve as serve
from tests.support import byte_tokenizer
from tests.support.fake_engine import FakeEngine, say

home = Path(sys.argv[1])
engine = FakeEngine(reply=say("x" * 40))
engine.gate = asyncio.Semaphore(0)

async def tick():
    while True:
        await asyncio.sleep(float(sys.argv[2]))
        engine.gate.release()

def make(*arguments, **options):
    asyncio.get_running_loop().create_task(tick())
    return engine

serve.EngineProcess = make
config = load_config({"home": home, "port": 0, "drain_grace_s": float(sys.argv[3])}, environ={})
listener = serve.bind(config.server)
model = byte_tokenizer.write(home / "model")
asyncio.run(serve.serve(config, listener, model, lambda config, url: print(url, flush=True)))
print("ended", engine.num_stops, flush=True)
"""


class _Drained:
    """A server process over a fake engine, and one stream that runs in it."""

    def __init__(self, root: Path, step_s: float, grace_s: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _FAKE_SERVER, str(root), str(step_s), str(grace_s)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline().rpartition(":")[2])

    async def open_stream(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        body = json.dumps(
            {"model": "fake-base", "prompt": "hi", "stream": True, "max_tokens": 100}
        ).encode()
        return await self.ask(b"POST /v1/completions", body)

    async def ask(
        self, what: bytes, body: bytes = b""
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = b"%s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" % what
        head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        writer.write(head + body)
        await writer.drain()
        return reader, writer

    def end(self) -> tuple[int, str]:
        assert self.process.stdout is not None
        with self.process.stdout as out:
            rest = out.read()
        return self.process.wait(timeout=60), rest


async def _drain(server: _Drained) -> tuple[bytes, bytes]:
    """Open a stream, send SIGTERM; return the answer of /ready after it and the whole stream."""
    reader, writer = await server.open_stream()
    received = b""
    while received.count(b"data:") < 2:
        received += await reader.read(4096)
    server.process.send_signal(signal.SIGTERM)
    while True:
        ready_reader, ready_writer = await server.ask(b"GET /ready")
        ready = await ready_reader.read()
        ready_writer.close()
        await ready_writer.wait_closed()
        if b" 503 " in ready.partition(b"\r\n")[0]:
            break
    received += await reader.read()
    writer.close()
    await writer.wait_closed()
    return ready, received


def test_a_terminated_server_finishes_its_streams(tmp_path: Path) -> None:
    server = _Drained(tmp_path, 0.03, 60)
    try:
        ready, stream = asyncio.run(_drain(server))
    finally:
        server.process.terminate()
    assert b"shutting down" in ready
    assert stream.count(b'"text":"x"') == 40
    assert b"[DONE]" in stream
    assert server.end() == (0, "ended 1\n")


def test_streams_that_outlast_the_grace_end_with_an_error(tmp_path: Path) -> None:
    server = _Drained(tmp_path, 0.2, 0.5)
    try:
        _, stream = asyncio.run(_drain(server))
    finally:
        server.process.terminate()
    assert b"event: error" in stream
    assert b"engine_unavailable" in stream
    assert b"[DONE]" not in stream
    assert server.end() == (0, "ended 1\n")


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    server = _Drained(tmp_path, 1000, 1000)
    try:
        asyncio.run(_interrupt_twice(server))
    finally:
        server.process.kill()


async def _interrupt_twice(server: _Drained) -> None:
    _, writer = await server.open_stream()
    reader, other = await server.ask(b"GET /ready")  # answered after the request before it
    await reader.read()
    other.close()
    server.process.send_signal(signal.SIGINT)
    while True:
        reader, other = await server.ask(b"GET /ready")
        answer = await reader.read()
        other.close()
        if b" 503 " in answer.partition(b"\r\n")[0]:
            break
    server.process.send_signal(signal.SIGINT)
    await asyncio.to_thread(server.end)
    writer.close()
