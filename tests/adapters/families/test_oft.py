"""OFT, with PEFT as the oracle: both Cayley forms, shared blocks, constrained turns, embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import OFTConfig
from tests.support.family_suite import (
    check_equals_peft,
    check_refusals,
    check_refused,
    edit,
    load,
)
from tests.support.peft_variants import Maker

from polyadapt.ops import cells

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "blocks of eight": ("llama", {"oft_block_size": 8, "target_modules": "all-linear"}),
    "exact": (
        "llama",
        {"oft_block_size": 16, "use_cayley_neumann": False, "target_modules": ["q_proj", "v_proj"]},
    ),
    **{
        f"{terms} terms": (
            "llama",
            {"oft_block_size": 8, "num_cayley_neumann_terms": terms, "target_modules": ["v_proj"]},
        )
        for terms in (2, 3, 4, 6, 9)
    },
    "number of blocks": ("llama", {"r": 4, "oft_block_size": 0, "target_modules": ["down_proj"]}),
    # 7 is no divisor of 32 or 48; PEFT takes 8. 20 lies between 16 and 24 of 48.
    "odd block size": ("llama", {"oft_block_size": 7, "target_modules": "all-linear"}),
    "between two sizes": ("llama", {"oft_block_size": 20, "target_modules": ["down_proj"]}),
    "odd number of blocks": (
        "llama",
        {"r": 5, "oft_block_size": 0, "target_modules": ["q_proj", "down_proj"]},
    ),
    "larger than the input": ("llama", {"oft_block_size": 100, "target_modules": ["q_proj"]}),
    "one shared block": (
        "llama",
        {"oft_block_size": 8, "block_share": True, "target_modules": ["q_proj", "down_proj"]},
    ),
    "constrained": (
        "llama",
        {"oft_block_size": 8, "coft": True, "eps": 0.5, "target_modules": ["v_proj", "o_proj"]},
    ),
    "constrained, shared": (
        "llama",
        {
            "oft_block_size": 8,
            "coft": True,
            "eps": 0.7,
            "block_share": True,
            "use_cayley_neumann": False,
            "target_modules": ["v_proj"],
        },
    ),
    "embedding": ("llama", {"oft_block_size": 8, "target_modules": ["embed_tokens", "q_proj"]}),
    "fused projections": (
        "phi3",
        {"oft_block_size": 4, "target_modules": ["qkv_proj", "gate_up_proj"]},
    ),
    "a new norm beside": (
        "llama",
        {"oft_block_size": 8, "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    ),
}


made = Maker(OFTConfig, VARIANTS)


@pytest.mark.parametrize(("seed", "name"), list(enumerate(VARIANTS)))
def test_variants_equal_peft(seed: int, name: str, tmp_path: Path) -> None:
    check_equals_peft(*made(name, tmp_path, seed))


@pytest.mark.parametrize("name", ["number of blocks", "one shared block", "embedding"])
def test_whatever_is_wrong_is_refused(name: str, tmp_path: Path) -> None:
    check_refusals(*made(name, tmp_path))


def test_small_blocks_take_no_dense_matrix(tmp_path: Path) -> None:
    base, directory = made("number of blocks", tmp_path)
    plan, deltas = load(directory, base)
    assert plan.num_elements == 2 * 48 * 12
    assert {delta.parts for delta in deltas.values()} == {cells.TRANSFORM | 12 << cells.GROUP_SHIFT}


@pytest.mark.parametrize("name", ["exact", "embedding"])
def test_what_turns_the_base_is_not_scalable(name: str, tmp_path: Path) -> None:
    base, directory = made(name, tmp_path)
    plan, deltas = load(directory, base)
    assert not plan.traits.is_scalable
    assert len(plan.traits.replaced) == len(deltas)


def test_settings_that_peft_does_not_read_are_refused(tmp_path: Path) -> None:
    base, directory = made("exact", tmp_path)
    edit(directory, r=4)
    check_refused(base, directory, "invalid_config", "r is 4")
    edit(directory, r=0, oft_block_size=0)
    check_refused(base, directory, "invalid_config", "r is 0")
    edit(directory, oft_block_size=8)
    check_refused(base, directory, "shape_mismatch", "needs [4, 28]")


def test_adapters_of_the_first_format_are_refused(tmp_path: Path) -> None:
    base, directory = made("exact", tmp_path)
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["oft_block_size"]
    path.write_text(json.dumps(config))
    check_refused(base, directory, "unsupported_config", "PEFT before 0.14")


def test_a_series_of_another_version_is_noted(tmp_path: Path) -> None:
    base, directory = made("blocks of eight", tmp_path)
    assert not any("series" in note for note in load(directory, base)[0].notes)
    edit(directory, peft_version="0.17.1")
    assert any("ended its series otherwise" in note for note in load(directory, base)[0].notes)
