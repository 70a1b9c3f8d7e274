"""The plan beside an engine that is really built: the same figures, and as many adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.oracle.adapters import make_lora
from tests.support.engines import Driver, new_engine, put_blob
from typer.testing import CliRunner

from polyadapt.cli import app
from polyadapt.config import EngineConfig
from polyadapt.engine import kv_cache
from polyadapt.errors import StartupError
from polyadapt.models.load import load_base, outline_base
from polyadapt.offline.plan import adapter_nbytes, make_plan

MEMORY = 3 << 20
SETTINGS = {
    "memory_bytes": MEMORY, "kv_cache_bytes": None, "max_adapter_bytes": None, "max_num_seqs": 4,
    "max_model_len": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


def plan_of(model: Path, **options):
    config = EngineConfig(model=str(model), device="cpu", dtype="float32", **SETTINGS)
    return make_plan(model, config, device_nbytes=1 << 30, has_own_memory=False, **options)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "mixtral"])
def test_the_outline_is_that_of_the_loaded_model(architecture, tiny_model):
    model = tiny_model(architecture)
    outline = outline_base(model, dtype=torch.float32, max_model_len=None)
    base = load_base(
        model, name="m", device=torch.device("cpu"), dtype=torch.float32, max_model_len=None
    )

    def linears(spec):
        return [site for site in spec.sites if site.kind in ("linear", "embedding")]

    assert linears(outline.spec) == linears(base.spec)
    assert outline.token_nbytes == kv_cache.token_nbytes(base)
    parameters = {id(p): p.nbytes for p in base.module.parameters()}
    buffers = sum(b.nbytes for b in base.module.buffers())
    # A scalar buffer, such as the scale of embeddings, is in bfloat16 in one of them.
    assert abs(outline.weight_nbytes - sum(parameters.values()) - buffers) <= 8
    for name in ("max_model_len", "vocab_size", "is_tied", "embedding_path", "head_path"):
        assert getattr(outline.spec, name) == getattr(base.spec, name)


def test_the_engine_has_what_the_plan_says_and_holds_as_many_adapters(llama, tmp_path):
    planned = plan_of(llama, rank=4)
    engine = new_engine(llama, tmp_path, **SETTINGS)
    assert engine.info.adapter_bytes == planned.adapter_bytes
    assert engine.info.num_pages * engine.info.page_size == planned.chosen.num_kv_tokens
    assert engine.info.page_size == planned.page_size
    driver = Driver(engine)
    count = planned.chosen.num_fitting
    assert 2 < count < 70
    adapters = [
        put_blob(tmp_path, make_lora(llama, tmp_path / f"a{i}", 4, seed=i), f"a{i}")
        for i in range(count + 1)
    ]
    driver.load(*adapters[:count])
    on_device = [r for r in driver.residencies.values() if r.tier == "device"]
    assert len(on_device) == count
    assert {r.nbytes for r in on_device} == {planned.chosen.adapter_nbytes}
    driver.load(adapters[count])
    on_device = [r for r in driver.residencies.values() if r.tier == "device"]
    assert len(on_device) == count, "one had to leave for one more"


def test_adapters_that_are_asked_for_get_their_bytes_and_pages_the_rest(llama):
    size = plan_of(llama, rank=4).chosen.adapter_nbytes
    planned = plan_of(llama, rank=4, num_adapters=3)
    assert planned.adapter_bytes == 3 * size
    assert planned.chosen.num_fitting == 3
    assert planned.is_enough
    page = (MEMORY - 3 * size) // (planned.chosen.num_kv_tokens // planned.page_size)
    cost = plan_of(llama, rank=4, num_adapters=4)
    fewer = planned.chosen.num_kv_tokens - cost.chosen.num_kv_tokens
    assert abs(fewer - planned.chosen.kv_tokens_per_adapter) <= planned.page_size
    assert page >= planned.chosen.adapter_nbytes / planned.chosen.kv_tokens_per_adapter * 16
    with pytest.raises(StartupError, match="two pages"):
        plan_of(llama, rank=4, num_adapters=100_000)


def test_targets_are_the_modules_that_are_adapted(llama):
    outline = outline_base(llama, dtype=torch.float32, max_model_len=None)
    each = [
        sum(4 * 3 * (s.in_features + s.out_features) for s in outline.spec.sites
            if s.path.endswith(f".{name}"))
        for name in ("q_proj", "down_proj")
    ]  # fmt: skip
    assert adapter_nbytes(outline.spec, 3, 4, ("q_proj", "down_proj")) == sum(each)
    with pytest.raises(StartupError, match="q_prj"):
        adapter_nbytes(outline.spec, 3, 4, ("q_prj",))


def test_a_step_reads_weights_keys_values_and_each_adapter_once(llama):
    planned = plan_of(llama, rank=4, bandwidth=1e9, context=32).chosen
    outline = outline_base(llama, dtype=torch.float32, max_model_len=64)
    assert planned.num_sequences == 4
    read = outline.weight_nbytes + 4 * 32 * outline.token_nbytes
    assert planned.base_step_s == pytest.approx(read / 1e9)
    assert planned.step_s == pytest.approx((read + 4 * planned.adapter_nbytes) / 1e9)
    assert planned.tokens_per_s == pytest.approx(4 / planned.step_s)
    assert plan_of(llama).chosen.step_s is None


def run(*arguments: str):
    environ = {"COLUMNS": "200", "POLYADAPT_DTYPE": "float32"}
    return CliRunner().invoke(app, ["plan", *arguments], env=environ)


def test_the_command_prints_a_table_or_json_and_needs_no_weights(llama, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((llama / "config.json").read_bytes())
    done = run("--model", str(bare), "--gpu", "h100", "--adapters", "10", "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["is_enough"]
    assert data["chosen"]["num_fitting"] >= 10
    assert [each["rank"] for each in data["others"]] == [8, 32, 64, 128]
    table = run("--model", str(bare), "--device-memory", "4GiB")
    assert table.exit_code == 0, table.output
    assert "fit at once" in table.stdout
    assert "tokens/s" not in table.stdout, "no bandwidth is known"
    most = run("--model", str(bare), "--device-memory", "4GiB", "--max-adapter-bytes", "1MiB",
               "--adapters", "1000")  # fmt: skip
    assert most.exit_code == 1
    assert "DO NOT fit" in most.stdout


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--gpu", "tpu"), "h100"),
        ((), "--device-memory"),
        (("--device-memory", "big"), "80GiB"),
        (("--gpu", "h100", "--context", "100000"), "more than the model's"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_line(llama, arguments, why):
    done = run("--model", str(llama), *arguments)
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1
    assert why in done.stderr


def test_a_model_that_serve_refuses_is_not_planned(llama, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run("--model", str(tmp_path), "--gpu", "h100")
    assert (done.exit_code, "'dynamic' rotary" in done.stderr) == (1, True), done.output
