"""What all families whose components are weighed by the row have in common."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.oracle.mixture import write_mixlora
from tests.oracle.routed import write_arrow, write_loramoe, write_mola, write_smora
from tests.support.basespec import base_spec
from tests.support.family_suite import load
from tests.support.peft_adapters import tiny_llama

from polyadapt.adapters.registry import family_of, read_config
from polyadapt.errors import AdapterRejected
from polyadapt.offline.inspection import inspect_files
from polyadapt_store.checkpoint import Checkpoint

WRITERS = [write_smora, write_loramoe, write_mola, write_arrow, write_mixlora]
HOSTILE: list[Any] = [
    *(None, True, False, 0, 1, -1, 0.5, 4096, 2**63, 10**400, "", "q_proj", "a" * 5000, "\ud800"),
    *([], [None], [[]], [{}], [0], [2, 2], [1] * 5000, ["\ud800"], {}, {"q_proj": None}, {"": 4}),
    *({"(": True}, {"q_proj": 10**400}, {"top_k": []}, {"router_temperature": 10**400}),
]


def writers(test: Callable[..., None]) -> Callable[..., None]:
    names = [write.__name__.removeprefix("write_") for write in WRITERS]
    return pytest.mark.parametrize("write", WRITERS, ids=names)(test)


@writers
def test_no_value_of_any_config_key_breaks_the_plan(write, tmp_path):
    base = tiny_llama()
    spec, directory = base_spec(base), write(base, tmp_path, seed=1)
    config = read_config(directory / "adapter_config.json")
    with Checkpoint(directory / "adapter_model.safetensors") as checkpoint:
        header = checkpoint.header
    spoilt = [config | {key: value} for key in [*config, "top_k", "strange"] for value in HOSTILE]
    if "experts" in config:
        first, *others = config["experts"]
        spoilt += [
            config | {"experts": [first | {key: value}, *others]}
            for key in ("r", "lora_alpha", "peft_type", "target_modules", "rank_pattern", "bias")
            for value in HOSTILE
        ]
    num_served = longest = 0
    for one in spoilt:
        try:
            family_of(one).plan(one, header, spec)
        except AdapterRejected as error:
            longest = max(longest, *(len(problem.message) for problem in error.problems))
        else:
            num_served += 1
    assert 0 < num_served < len(spoilt) / 2
    assert longest < 1200


@writers
def test_a_file_is_judged_without_a_base(write, tmp_path):
    directory = write(tiny_llama(), tmp_path, seed=1)
    assert not inspect_files(directory).problems
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(config | {"use_magic": 1}))
    assert [p.code for p in inspect_files(directory).problems] == ["unknown_config_key"]


@writers
def test_embeddings_and_norms_are_not_touched(write, tmp_path):
    base = tiny_llama()
    spec = base_spec(base)
    _, deltas = load(write(base, tmp_path, seed=1), base)
    assert {spec.sites[site_id].kind for site_id in deltas} == {"linear"}


def test_plans_need_no_torch(tmp_path: Path) -> None:
    base = tiny_llama()
    made = [str(write(base, tmp_path / write.__name__, seed=1)) for write in WRITERS]
    program = f"""
import sys
from pathlib import Path
import msgspec
from polyadapt.adapters.registry import family_of, read_config
from polyadapt.types import BaseSpec
from polyadapt_store.checkpoint import Checkpoint
spec = msgspec.json.decode({msgspec_of(base_spec(base))!r}, type=BaseSpec)
for directory in map(Path, {made!r}):
    config = read_config(directory / "adapter_config.json")
    with Checkpoint(directory / "adapter_model.safetensors") as checkpoint:
        assert family_of(config).plan(config, checkpoint.header, spec).num_elements
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def msgspec_of(spec: Any) -> bytes:
    import msgspec

    return msgspec.json.encode(spec)
