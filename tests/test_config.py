"""Settings: one precedence, one clear line for everything that is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from polyadapt.config import Config, EngineConfig, ServerConfig, default_home, load_config
from polyadapt.errors import StartupError


def test_the_command_line_wins_over_the_environment_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "polyadapt.yaml"
    file.write_text("engine: {max_num_seqs: 1, page_size: 8}\nserver: {port: 1}\ndtype: float32\n")
    environ = {"POLYADAPT_MAX_NUM_SEQS": "2", "POLYADAPT_PORT": "2"}
    config = load_config({"port": 3, "host": None}, environ=environ, file=file)
    assert (config.server.port, config.engine.max_num_seqs, config.engine.page_size) == (3, 2, 8)
    assert config.engine.dtype == "float32"
    assert config.engine.max_num_batched_tokens == 512


def test_the_environment_may_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("port: 77")
    assert load_config(environ={"POLYADAPT_CONFIG": str(file)}).server.port == 77


def test_sizes_are_read_with_units() -> None:
    config = load_config({"max_upload_bytes": "2MiB"}, environ={"POLYADAPT_KV_CACHE_BYTES": "64"})
    assert (config.limits.max_upload_bytes, config.engine.kv_cache_bytes) == (2 << 20, 64)


def test_adapters_are_read_as_pairs() -> None:
    config = load_config(environ={"POLYADAPT_ADAPTERS": "a=/x,b=/y"})
    assert config.adapters == {"a": Path("/x"), "b": Path("/y")}
    assert load_config({"adapters": ["c=/z"]}, environ={}).adapters == {"c": Path("/z")}


def test_prefix_pools_are_read_from_every_source(tmp_path: Path) -> None:
    expected = {"legal": ("a", "b"), "rest": ("c",)}
    assert load_config(environ={}).prefix_pools == {}
    for config in (
        load_config(environ={"POLYADAPT_PREFIX_POOLS": "legal=a+b,rest=c"}),
        load_config({"prefix_pools": ["legal=a+b", "rest=c"]}, environ={}),
    ):
        assert config.prefix_pools == expected
    file = tmp_path / "config.yaml"
    file.write_text("prefix_pools: {legal: [a, b], rest: [c]}")
    assert load_config(environ={}, file=file).prefix_pools == expected


def test_home_follows_the_variables_in_order() -> None:
    both = {"POLYADAPT_HOME": "/own", "XDG_CACHE_HOME": "/cache"}
    assert default_home(both) == Path("/own")
    assert default_home({"XDG_CACHE_HOME": "/cache"}) == Path("/cache/polyadapt")
    assert default_home({}) == Path.home() / ".cache/polyadapt"
    assert load_config(environ=both).home == Path("/own")
    assert load_config({"home": "/cli"}, environ=both).home == Path("/cli")


@pytest.mark.parametrize(
    ("cli", "environ", "words"),
    [
        ({}, {"POLYADAPT_PROT": "1"}, ["POLYADAPT_PROT"]),
        ({}, {"POLYADAPT_PORT": "http"}, ["port", "environment", "'http'"]),
        ({"port": 70000}, {}, ["port", "command line", "65535"]),
        ({"device": "tpu"}, {}, ["device", "tpu"]),
        ({"adapters": ["nameless"]}, {}, ["adapters", "NAME=DIR"]),
        ({"adapters": ["a=/x", "a=/y"]}, {}, ["adapters", "twice"]),
        ({"prefix_pools": ["legal"]}, {}, ["prefix_pools", "POOL=TENANT+TENANT"]),
        ({"prefix_pools": ["p=a", "p=b"]}, {}, ["prefix_pools", "each pool once"]),
        ({"prefix_pools": ["p=a+b", "q=b"]}, {}, ["prefix_pools", "'b'", "one pool"]),
        ({"prefix_pools": ["p=a+"]}, {}, ["prefix_pools", "empty"]),
        ({"kv_cache_bytes": "much"}, {}, ["kv_cache_bytes"]),
        ({"min_priority": 1}, {}, ["min_priority", "0"]),  # it would refuse who asks for nothing
    ],
)
def test_a_wrong_setting_stops_the_start_and_is_named(
    cli: dict[str, object], environ: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(StartupError) as caught:
        load_config(cli, environ=environ)
    assert all(word in caught.value.message for word in words), caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "text", ["engine: {pages: 3}", "speed: 3", "- a list", "a: [", "engine: 7"]
)
def test_a_wrong_file_stops_the_start(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(StartupError):
        load_config(environ={}, file=file)


def test_an_absent_file_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="cannot read"):
        load_config(environ={}, file=tmp_path / "none.yaml")


def test_a_key_is_shown_by_neither_repr_nor_error() -> None:
    config = load_config({"api_key": "sk-canary-canary"}, environ={})
    assert "canary" not in repr(config)
    with pytest.raises(StartupError) as caught:
        load_config({"api_key": ["sk-canary-canary"]}, environ={})
    assert "canary" not in caught.value.message


def test_settings_are_frozen() -> None:
    config = load_config(environ={})
    assert isinstance(config, Config)
    with pytest.raises(ValidationError):
        config.engine.page_size = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        EngineConfig(pages=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("x", False)],
)
def test_loopback_addresses_are_known(host: str, is_loopback: bool) -> None:
    assert ServerConfig(host=host).is_loopback is is_loopback


def test_the_suites_own_variables_are_left_alone() -> None:
    load_config(environ={"POLYADAPT_TEST_MODEL": "/somewhere"})


def test_reading_settings_imports_neither_torch_nor_a_web_framework() -> None:
    code = "import polyadapt.config, sys; print({'torch', 'fastapi'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_engines_that_share_a_device_share_its_budgets() -> None:
    config = load_config(
        {"device": "cpu", "engines": 3, "memory_bytes": "3MiB", "host_adapter_bytes": "30KiB",
         "num_threads": None, "max_num_seqs": 7},
        environ={},
    )  # fmt: skip
    configs = config.engine_configs()
    assert list(configs) == ["cpu/0", "cpu/1", "cpu/2"]
    for each in configs.values():
        assert (each.device, each.memory_bytes, each.host_adapter_bytes) == ("cpu", 1 << 20, 10240)
        assert (each.kv_cache_bytes, each.max_adapter_bytes, each.max_num_seqs) == (None, None, 7)
        assert each.num_threads == max((os.cpu_count() or 1) // 3, 1)
    given = load_config({"device": "cpu", "engines": 3, "num_threads": 5}, environ={})
    assert given.engine_configs()["cpu/0"].num_threads == 5


def test_engines_on_devices_of_their_own_share_the_host_alone() -> None:
    config = load_config(
        {"devices": "cuda:0, cuda:1", "memory_bytes": "3MiB", "host_adapter_bytes": "30KiB"},
        environ={},
    )
    configs = config.engine_configs()
    assert [each.device for each in configs.values()] == list(configs) == ["cuda:0", "cuda:1"]
    for each in configs.values():
        assert (each.memory_bytes, each.host_adapter_bytes) == (3 << 20, 15360)
        assert each.num_threads is None


def test_one_engine_is_configured_as_it_is_written() -> None:
    config = load_config({"device": "cuda:3", "memory_bytes": "3MiB"}, environ={})
    assert config.engine_configs() == {"cuda:3": config.engine}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"devices": "cuda:0", "device": "cuda:1"}, "contradict"),
        ({"devices": "cuda:0,cuda:0"}, "twice"),
        ({"devices": "cuda"}, "cpu or cuda:N"),
        ({"engines": 2}, "--device cpu"),
        ({"engines": 2, "device": "cuda:0"}, "--devices"),
        ({"engines": 2, "devices": "cuda:0"}, "--devices"),
        ({"engines": 0, "device": "cpu"}, "greater than or equal to 1"),
    ],
)
def test_a_fleet_that_cannot_be_is_refused_in_one_line(given: dict[str, object], why: str) -> None:
    with pytest.raises(StartupError, match=why) as refused:
        load_config(given, environ={})
    assert "\n" not in refused.value.message
