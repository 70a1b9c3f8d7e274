"""Configs that no trainer writes, at the families of papers: judged, never a crash, never long."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.adapters.families import test_b_lora, test_block_lora, test_dv_lora, test_gs_lora
from tests.support.basespec import base_spec
from tests.support.peft_adapters import tiny_llama

from polyadapt.adapters.registry import family_of, read_config
from polyadapt.errors import AdapterRejected
from polyadapt.offline.inspection import inspect_files
from polyadapt_store.checkpoint import Checkpoint

WRITERS: dict[str, Callable[[Path], Path]] = {
    "gs_lora": lambda path: test_gs_lora.made(path, tiny_llama()),
    "block_lora": lambda path: test_block_lora.made(
        path, tiny_llama(), "rank", test_block_lora.PATHS
    ),
    "dv_lora": lambda path: test_dv_lora.made(path, "llama")[1],
    "b_lora": lambda path: test_b_lora.made(path, tiny_llama(), r=4),
}
HOSTILE: list[Any] = [
    *(None, True, False, 0, 1, -1, 0.5, 4096, 2**63, 10**400, "", "q_proj", "a" * 5000, "\ud800"),
    *([], [None], [[]], [{}], [0], [2, 2], [1] * 5000, ["\ud800"], {}, {"q_proj": None}, {"": 4}),
    *({"(": True}, {"q_proj": 10**400}, {"content": [], "style": 1}, {"a" * 5000: 1}),
]


def writers(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize("name", WRITERS)(test)


@writers
def test_no_value_of_any_config_key_breaks_the_plan(name: str, tmp_path: Path) -> None:
    directory, spec = WRITERS[name](tmp_path), base_spec(tiny_llama())
    config = read_config(directory / "adapter_config.json")
    with Checkpoint(directory / "adapter_model.safetensors") as checkpoint:
        header = checkpoint.header
    spoilt = [config | {key: value} for key in [*config, "strange"] for value in HOSTILE]
    if "tasks" in config:
        first, *others = config["tasks"]
        spoilt += [
            config | {"tasks": [first | {key: value}, *others]}
            for key in ("name", "r", "alpha", "pruned", "a" * 5000)
            for value in HOSTILE
        ]
    if "halves" in config:
        spoilt += [config | {"halves": {"content": value}} for value in HOSTILE]
    num_served = longest = 0
    for one in spoilt:
        try:
            plan = family_of(one).plan(one, header, spec)
        except AdapterRejected as error:
            longest = max(longest, *(len(problem.message) for problem in error.problems))
        else:
            num_served += 1
            json.dumps(plan.notes, ensure_ascii=False).encode()
            for option in plan.traits.options:
                " ".join(option.words).encode()
    assert 0 < num_served < len(spoilt) / 2
    assert longest < 1200


@writers
def test_a_file_is_judged_without_a_base(name: str, tmp_path: Path) -> None:
    directory = WRITERS[name](tmp_path)
    assert not inspect_files(directory).problems
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(config | {"use_magic": 1}))
    assert [p.code for p in inspect_files(directory).problems] == ["unknown_config_key"]
