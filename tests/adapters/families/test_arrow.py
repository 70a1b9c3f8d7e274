"""Arrow: with PEFT's own router as oracle, and with the papers' formulas token by token."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import ArrowConfig, LoraConfig, create_arrow_model
from safetensors.torch import load_file
from tests.oracle.routed import routed, write_arrow
from tests.support.family_suite import (
    change,
    check_equals,
    check_refusals,
    check_refused,
    edit,
    load,
    make_checkpoint,
)
from tests.support.peft_adapters import tiny_gpt2, tiny_llama
from torch import nn
from transformers import PreTrainedModel

from polyadapt.adapters.families import arrow
from polyadapt.adapters.families.conversion import Given
from polyadapt.offline.convert import convert, read_source

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
NAMES = ["q_proj", "o_proj", "up_proj"]

SHAPES: dict[str, dict[str, Any]] = {
    "two of four": {},
    "odd": {"rank": 3, "num_experts": 5, "top_k": 3},
    "one": {"top_k": 1},
    "all": {"num_experts": 3, "top_k": 3, "temperature": 2.5},
    "sharp": {"temperature": 0.1},
    "one expert alone": {"num_experts": 1, "top_k": 1},
    "of rank one": {"rank": 1},
    "of a rank above the width": {"rank": 40, "num_experts": 2},
    "without the general knowledge": {"num_general": 3},
}


@pytest.fixture
def base() -> PreTrainedModel:
    return tiny_llama()


def loras(
    base: PreTrainedModel, root: Path, count: int, *, first: int = 1, **options: Any
) -> list[Path]:
    """LoRAs that PEFT saved, each with an alpha of its own.

    One component of each is larger than the others, so that the 15 steps of PEFT's power iteration
    come to their end whatever it begins with.
    """
    made = []
    for seed in range(first, first + count):
        config = LoraConfig(**{"r": 4, "target_modules": NAMES, "lora_alpha": 3 + seed} | options)
        made.append(directory := make_checkpoint(base, config, root / f"{seed}", seed=seed))
        tensors = load_file(directory / "adapter_model.safetensors")
        for key in (key for key in tensors if "lora_B" in key):
            tensors[key][:, 0] *= 6
        change(directory, **tensors)
    return made


def of_peft(
    base: PreTrainedModel, experts: list[Path], general: list[Path], **settings: Any
) -> nn.Module:
    """PEFT's model of these directories."""
    config = ArrowConfig(use_gks=bool(general), rng_seed=0, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in peft_adapters.py
        return create_arrow_model(
            copy.deepcopy(base), list(map(str, experts)), config, list(map(str, general))
        ).eval()


def converted(experts: list[Path], general: list[Path], out: Path, **given: Any) -> Path:
    """The directory that `polyadapt convert --from arrow` makes of them."""
    source, *others = map(read_source, experts)
    convert(
        "arrow", source,
        Given(experts=tuple(others), general=tuple(map(read_source, general)), **given),
        out, force=False,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("seed", [1, 20])
@pytest.mark.parametrize(
    ("options", "top_k", "temperature", "num_general"),
    [
        ({}, 2, 1.0, 0),
        ({"r": 5, "use_rslora": True}, 3, 0.4, 0),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 30}}, 1, 1.0, 0),
        ({"r": 3}, 2, 1.5, 2),
    ],
)
def test_it_does_what_peft_does(options, top_k, temperature, num_general, seed, base, tmp_path):
    experts = loras(base, tmp_path, 4, first=seed, **options)
    general = loras(base, tmp_path, num_general, first=seed + 10, **options)
    oracle = of_peft(base, experts, general, top_k=top_k, router_temperature=temperature)
    directory = converted(experts, general, tmp_path / "out", top_k=top_k, temperature=temperature)
    plan = check_equals(base, directory, oracle)
    assert plan.traits.is_scalable
    assert plan.rank == 4 * options.get("r", 4)


def test_another_layout_of_a_linear(tmp_path):
    base = tiny_gpt2()
    experts = loras(base, tmp_path, 3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    oracle = of_peft(base, experts, [], top_k=2)
    check_equals(base, converted(experts, [], tmp_path / "out", top_k=2), oracle)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", SHAPES)
def test_it_equals_the_formula(name, seed, base, tmp_path):
    directory = write_arrow(base, tmp_path, seed=seed, **SHAPES[name])
    check_equals(base, directory, routed(base, directory))


@pytest.mark.parametrize(
    ("slip", "options"),
    [
        ("softmax over all", {}),
        ("signed", {}),
        ("direction of the input", {}),
        ("direction of A", {}),
        ("temperature", {"temperature": 0.3}),
        ("nothing taken off", {"num_general": 2}),
    ],
)
def test_the_usual_mistakes_would_be_seen(slip, options, base, tmp_path):
    directory = write_arrow(base, tmp_path, **options)
    with pytest.raises(AssertionError, match="differs by"):
        check_equals(base, directory, routed(base, directory, slip=slip))


MUTATIONS: dict[str, Callable[[Any], Any]] = {
    "top-k": lambda delta: replace(delta, routing=replace(delta.routing, top_k=1)),
    "temperature": lambda delta: replace(delta, routing=replace(delta.routing, value=3.0)),
    "order of experts": lambda delta: replace(delta, router=delta.router.flip(0).contiguous()),
    "scale": lambda delta: replace(delta, b=delta.b / 2),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_of_the_formula_is_noticed(name, base, tmp_path, monkeypatch):
    directory, made = write_arrow(base, tmp_path), arrow._delta
    oracle = routed(base, directory)
    check_equals(base, directory, oracle)
    monkeypatch.setattr(arrow, "_delta", lambda *arguments: MUTATIONS[name](made(*arguments)))
    with pytest.raises(AssertionError, match="differs by"):
        check_equals(base, directory, oracle)


@pytest.mark.parametrize("rank", [1, 3, 8, 12, 20])
def test_a_direction_is_the_first_right_singular_vector(rank):
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        a, b = (torch.randn(*shape, generator=generator) for shape in ((rank, 12), (10, rank)))
        expected = torch.linalg.svd(b.double() @ a.double()).Vh[0].float()
        assert abs(float(arrow._direction(a, b) @ expected)) == pytest.approx(1, abs=1e-6)
        assert not arrow._direction(a, torch.zeros(10, rank)).any()
    # No direction is lost to the square of a product: B A has two values that far apart.
    tiny = arrow._direction(torch.eye(2, 12), torch.eye(10, 2) * torch.tensor([1e-18, 1e-20]))
    assert tiny.abs().tolist() == [1.0, *[0.0] * 11]


def test_an_expert_that_does_nothing_still_takes_part(base, tmp_path):
    """PEFT's search ends at zero where B A is zero: such an expert scores last."""
    experts = loras(base, tmp_path, 3)
    for layer in (0, 1):
        zeros = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_B.weight"
        change(experts[1], **{zeros: torch.zeros(32, 4)})
    oracle = of_peft(base, experts, [], top_k=3)
    check_equals(base, converted(experts, [], tmp_path / "out", top_k=3), oracle)


def test_the_prefix_of_peft_may_be_left_out(base, tmp_path):
    experts = loras(base, tmp_path, 2)
    directory = converted(experts, [], tmp_path / "out")
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["arrow_config"]["top_k"] == 2
    plan, _ = load(directory, base)
    assert "experts.1.model.layers.0.self_attn.q_proj.lora_A.weight" in {r.key for r in plan.reads}
    load(write_arrow(base, tmp_path / "prefixed"), base)


def test_whatever_is_wrong_with_a_file_is_refused(base, tmp_path):
    check_refusals(base, write_arrow(base, tmp_path, num_experts=2, names=("q_proj",)))
    write_arrow(base, tmp_path, num_experts=2, num_general=1, top_k=1, names=("q_proj",))
    check_refusals(base, tmp_path)


def member(tmp_path: Path, number: int, **values: Any) -> None:
    """Change keys of one expert's config."""
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["experts"][number] |= values
    edit(tmp_path, experts=config["experts"])


@pytest.mark.parametrize(
    ("code", "words", "values"),
    [
        (
            "unsupported_config",
            "experts.1: use_dora is not served: Arrow takes",
            {"use_dora": True},
        ),
        ("unsupported_config", "lora_bias is not", {"lora_bias": True}),
        ("unsupported_config", "modules_to_save is not", {"modules_to_save": ["norm"]}),
        ("unsupported_config", "bias is not served", {"bias": "all"}),
        ("unsupported_config", "of another base", {"init_lora_weights": "pissa"}),
        ("unsupported_config", "peft_type is 'ADALORA'", {"peft_type": "ADALORA"}),
        ("unknown_config_key", "experts.1: config key 'use_magic'", {"use_magic": True}),
        ("rank_mismatch", "experts.1: model.layers.0.self_attn.q_proj has rank 3", {"r": 4}),
        ("not_targeted", "experts.1: the checkpoint adapts", {"target_modules": ["q_proj"]}),
    ],
)
def test_loras_that_mean_something_else_are_refused(code, words, values, base, tmp_path):
    write_arrow(base, tmp_path)
    member(tmp_path, 1, **values)
    check_refused(base, tmp_path, code, words)


@pytest.mark.parametrize(
    ("code", "words", "values"),
    [
        ("invalid_config", "at most the number of experts, which is 4", {"top_k": 5}),
        ("invalid_config", "router_temperature is 0", {"router_temperature": 0}),
        ("invalid_config", "router_temperature is -1", {"router_temperature": -1}),
        ("invalid_config", "false beside 0 general adapters", {"use_gks": True}),
        ("unknown_config_key", "use_sparse", {"use_sparse": True}),
    ],
)
def test_routers_that_cannot_be_meant_are_refused(code, words, values, base, tmp_path):
    write_arrow(base, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    edit(tmp_path, arrow_config=config["arrow_config"] | values)
    check_refused(base, tmp_path, code, words)


def test_general_adapters_are_not_left_out_unsaid(base, tmp_path):
    write_arrow(base, tmp_path, num_general=1)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    edit(tmp_path, arrow_config=config["arrow_config"] | {"use_gks": False})
    check_refused(base, tmp_path, "invalid_config", "true beside 1 general adapters")


@pytest.mark.parametrize("value", [None, [], {}, [3], [{}] * 65])
def test_experts_are_a_list_of_configs(value, base, tmp_path):
    write_arrow(base, tmp_path)
    edit(tmp_path, experts=value)
    check_refused(base, tmp_path, "invalid_config", "a list of 1 to 64 configs of LoRAs")


def test_all_adapt_the_same_modules_with_one_rank(base, tmp_path):
    path = "model.layers.0.self_attn.q_proj"
    keys = [f"experts.2.base_model.model.{path}.lora_{factor}.weight" for factor in "AB"]
    write_arrow(base, tmp_path)
    change(tmp_path, **dict.fromkeys(keys))
    check_refused(base, tmp_path, "missing_tensor", f"experts.2 adapts no {path}, which experts.0")
    change(tmp_path, **{keys[0]: torch.ones(5, 32), keys[1]: torch.ones(32, 5)})
    member(tmp_path, 2, rank_pattern={r"layers\.0\.self_attn\.q_proj": 5})
    check_refused(base, tmp_path, "rank_mismatch", f"{path} has rank 5 in experts.2 and 3 in")


@pytest.mark.parametrize(
    ("words", "key", "shape"),
    [
        ("begins with none of experts.0", f"experts.4.{Q0}.lora_A.weight", (3, 32)),
        ("begins with none of experts.0", f"{Q0}.lora_A.weight", (3, 32)),
        ("Arrow takes A and B", f"experts.0.{Q0}.lora_magnitude_vector", (32,)),
        (
            "no input that a router could read",
            "experts.0.base_model.model.model.embed_tokens.lora_embedding_A",
            (3, 64),
        ),
        ("the base's own", "experts.0.base_model.model.lm_head.weight", (64, 32)),
    ],
)
def test_tensors_beside_a_and_b_are_refused(words, key, shape, base, tmp_path):
    write_arrow(base, tmp_path)
    change(tmp_path, **{key: torch.ones(shape)})
    check_refused(base, tmp_path, "unread_tensor", words)


def test_what_has_no_effect_is_noted_once(base, tmp_path):
    experts = loras(base, tmp_path, 3, lora_dropout=0.1)
    plan, _ = load(converted(experts, [], tmp_path / "out", top_k=1), base)
    assert plan.notes.count("lora_dropout has no effect when serving") == 1


def test_loras_that_ask_for_a_router_are_pointed_to_convert(base, tmp_path):
    (directory,) = loras(base, tmp_path, 1)
    edit(directory, arrow_config={"top_k": 2})
    check_refused(base, directory, "unsupported_config", "polyadapt convert --from arrow")
