"""GS-LoRA against its sum over tasks, computed densely in float32 from the stored tensors."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.basespec import base_spec
from tests.support.family_suite import (
    IDS,
    apply,
    change,
    check_refusals,
    check_refused,
    edit,
    load,
    problems_of,
)
from tests.support.peft_adapters import tiny_gpt2, tiny_llama
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from polyadapt.adapters.adapter import Delta, Traits
from polyadapt.adapters.gates import arrange
from polyadapt.types import AdapterId, AppliedAdapter

PREFIX = "base_model.model."
UP0, DOWN0 = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
UP1, DOWN1 = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"
FEED_FORWARD = [UP0, DOWN0, UP1, DOWN1]
TASKS: list[dict[str, Any]] = [
    {"name": "first", "r": 3},
    {"name": "second", "r": 2, "alpha": 5, "pruned": ["model.layers.0"]},
    {"name": "third", "r": 4, "alpha": 0.5, "pruned": [DOWN1]},
]
NAMES = tuple(task["name"] for task in TASKS)


def made(
    directory: Path,
    base: PreTrainedModel,
    paths: Sequence[str] = FEED_FORWARD,
    tasks: Sequence[dict[str, Any]] = TASKS,
    seed: int = 1,
) -> Path:
    """Write random matrices of every task that does not prune the module."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {site.path: (site.in_features, site.out_features) for site in base_spec(base).sites}
    tensors = {}
    for t, task in enumerate(tasks):
        for path in paths:
            if any(f"{path}.".startswith(f"{name}.") for name in task.get("pruned", ())):
                continue
            num_in, num_out = sizes[path]
            for name, shape in (("A", (task["r"], num_in)), ("B", (num_out, task["r"]))):
                key = f"{PREFIX}{path}.tasks.{t}.lora_{name}"
                tensors[key] = torch.randn(shape, generator=generator) * 0.4
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "GS_LORA",
        "target_modules": sorted({path.rpartition(".")[2] for path in paths}),
        "tasks": list(tasks),
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@torch.no_grad()
def dense(base: PreTrainedModel, directory: Path, chosen: Collection[str]) -> nn.Module:
    """W + alpha / r * B A of every task that is chosen; alpha is 1 if nothing is said."""
    model = copy.deepcopy(base)
    tasks = json.loads((directory / "adapter_config.json").read_text())["tasks"]
    tensors = load_file(directory / "adapter_model.safetensors")
    for key, a in tensors.items():
        path, _, rest = key.removeprefix(PREFIX).partition(".tasks.")
        number, _, name = rest.partition(".")
        task = tasks[int(number)]
        if name != "lora_A" or task["name"] not in chosen:
            continue
        delta = task.get("alpha", 1) / task["r"] * tensors[key[:-1] + "B"] @ a
        module = model.get_submodule(path)
        module.weight += delta.t() if isinstance(module, Conv1D) else delta
    return model


def gated(deltas: dict[int, Delta], traits: Traits, chosen: Collection[str]) -> dict[int, Delta]:
    """What the engine computes for a request that chooses these tasks: rows of A times weights."""
    applied = AppliedAdapter(AdapterId("a", 1, "d"), options=(("tasks", tuple(chosen)),))
    (lane,) = arrange([applied], [traits], ())
    found = {}
    for site_id, delta in deltas.items():
        weights = [*lane.weights, *[1.0] * len(delta.a)][: len(delta.a)]
        found[site_id] = replace(delta, a=delta.a * torch.tensor(weights)[:, None])
    return found


@pytest.mark.parametrize("seed", [1, 2])
@torch.no_grad()
def test_every_choice_of_tasks_equals_the_formula(seed: int, tmp_path: Path) -> None:
    base = tiny_llama(has_biases=True)
    directory = made(tmp_path, base, seed=seed)
    plan, deltas = load(directory, base)
    plain = base(input_ids=IDS).logits
    choices = chain.from_iterable(combinations(NAMES, n) for n in range(len(NAMES) + 1))
    for chosen in choices:
        expected = dense(base, directory, chosen)(input_ids=IDS).logits
        found = apply(base, gated(deltas, plan.traits, chosen))(input_ids=IDS).logits
        largest = expected.abs().max()
        assert (found - expected).abs().max() <= 2e-5 * largest, chosen
        assert ((expected - plain).abs().max() > 1e-2 * largest) == bool(chosen)
    everything = apply(base, deltas)(input_ids=IDS).logits
    assert torch.allclose(everything, expected, atol=1e-4), "all tasks apply by themselves"


@torch.no_grad()
def test_transposed_weights_and_one_task(tmp_path: Path) -> None:
    base = tiny_gpt2()
    paths = [f"transformer.h.{i}.mlp.{name}" for i in range(2) for name in ("c_fc", "c_proj")]
    directory = made(tmp_path, base, paths, [{"name": "only", "r": 3}])
    plan, deltas = load(directory, base)
    expected = dense(base, directory, {"only"})(input_ids=IDS).logits
    found = apply(base, deltas)(input_ids=IDS).logits
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert plan.traits.is_scalable


def test_the_options_of_an_adapter_are_its_tasks(tmp_path: Path) -> None:
    plan, _ = load(made(tmp_path, tiny_llama()), tiny_llama())
    (option,) = plan.traits.options
    assert (option.name, option.words, option.default) == ("tasks", NAMES, NAMES)
    assert any("'first', 'second', 'third'" in note for note in plan.notes)


def test_a_task_has_the_same_components_in_every_module(tmp_path: Path) -> None:
    base = tiny_llama()
    plan, deltas = load(made(tmp_path, base), base)
    (option,) = plan.traits.options
    ranges = dict(zip(option.words, option.components, strict=True))
    sizes = {name: stop - start for name, (start, stop) in ranges.items()}
    assert sizes == {"first": 3, "second": 2, "third": 4}
    assert sorted(i for start, stop in ranges.values() for i in range(start, stop)) == [*range(9)]
    # "second" is pruned in most modules of the base, "third" in one: they lie last, in this order.
    assert (ranges["first"], ranges["third"], ranges["second"]) == ((0, 3), (3, 7), (7, 9))
    sites = base_spec(base).sites
    ranks = {sites[site_id].path: len(delta.a) for site_id, delta in deltas.items()}
    assert ranks == {UP0: 7, DOWN0: 7, UP1: 9, DOWN1: 9}
    down = next(delta for site_id, delta in deltas.items() if sites[site_id].path == DOWN1)
    assert not down.a[3:7].any()
    assert not down.b[:, 3:7].any()
    assert plan.num_elements == sum((32 + 48) * rank for rank in ranks.values())


def test_groups_that_are_zero_are_dropped_and_counted_at_most(tmp_path: Path) -> None:
    base = tiny_llama()
    directory = made(tmp_path, base)
    zero = {f"{PREFIX}{UP0}.tasks.{t}.lora_B": (48, r) for t, r in ((0, 3), (2, 4))}
    zero |= {f"{PREFIX}{UP1}.tasks.1.lora_A": (2, 32), f"{PREFIX}{DOWN0}.tasks.2.lora_B": (32, 4)}
    change(directory, **{key: torch.zeros(shape) for key, shape in zero.items()})
    plan, deltas = load(directory, base)
    sites = base_spec(base).sites
    ranks = {sites[site_id].path: len(delta.a) for site_id, delta in deltas.items()}
    assert ranks == {DOWN0: 3, UP1: 7, DOWN1: 9}, "UP0 is left alone"
    assert plan.num_elements == (32 + 48) * (7 + 7 + 9 + 9)
    assert any("upper bounds" in note for note in plan.notes)
    for chosen in (NAMES, NAMES[:1], NAMES[1:]):
        expected = dense(base, directory, chosen)(input_ids=IDS).logits
        found = apply(base, gated(deltas, plan.traits, chosen))(input_ids=IDS).logits
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_whatever_is_wrong_is_refused(tmp_path: Path) -> None:
    base = tiny_llama()
    check_refusals(base, made(tmp_path, base))


@pytest.mark.parametrize(
    ("tasks", "code", "words"),
    [
        (None, "invalid_config", "a list of 1 to 64 objects"),
        ([], "invalid_config", "a list of 1 to 64 objects"),
        ([{"name": "x", "r": 1}] * 65, "invalid_config", "a list of 1 to 64 objects"),
        (["first"], "invalid_config", "tasks[0] is 'first', expected an object"),
        ([{"r": 3}], "invalid_config", "tasks[0].name is None"),
        ([{"name": "", "r": 3}], "invalid_config", "a name of 1 to 64 printable characters"),
        ([{"name": "a\n", "r": 3}], "invalid_config", "printable"),
        ([{"name": "x"}], "invalid_config", "tasks[0].r is None"),
        ([{"name": "x", "r": 3, "alpha": "1"}], "invalid_config", "tasks[0].alpha is '1'"),
        ([{"name": "x", "r": 3, "scale": 1}], "invalid_config", "tasks[0]['scale'] is 1"),
        ([{"name": "x", "r": 3, "pruned": "y"}], "invalid_config", "a list of paths"),
        ([{"name": "x", "r": 3, "pruned": ["y"]}], "unknown_module", "tasks[0].pruned names 'y'"),
        ([*TASKS[:2], TASKS[0]], "invalid_config", "every name once"),
        (TASKS[:2], "config_mismatch", "is of task 2, and `tasks` has 2"),
        ([*TASKS, {"name": "x", "r": 2}], "missing_tensor", "no tasks.3.lora_A of task 'x'"),
        (
            [*TASKS, {"name": "x", "r": 2, "pruned": ["model"]}], "missing_tensor",
            "holds no tensor of tasks[3], 'x'",
        ),
        ([TASKS[0] | {"pruned": [UP0]}, *TASKS[1:]], "config_mismatch", "pruned names model"),
        ([TASKS[0], TASKS[1] | {"pruned": []}, TASKS[2]], "missing_tensor", "of task 'second'"),
        ([TASKS[0] | {"r": 4}, *TASKS[1:]], "shape_mismatch", "needs [4, 32]"),
    ],
)  # fmt: skip
def test_tasks_that_are_not_what_is_stored_are_refused(
    tasks: Any, code: str, words: str, tmp_path: Path
) -> None:
    base = tiny_llama()
    directory = made(tmp_path, base)
    edit(directory, tasks=tasks)
    check_refused(base, directory, code, words)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("bias", "all", "belongs to no task"),
        ("modules_to_save", ["lm_head"], "belongs to no task"),
        ("trainable_token_indices", [3], "belongs to no task"),
        ("use_dora", True, "row norms"),
    ],
)
def test_what_belongs_to_no_task_is_refused(
    key: str, value: Any, words: str, tmp_path: Path
) -> None:
    base = tiny_llama()
    directory = made(tmp_path, base)
    edit(directory, **{key: value})
    check_refused(base, directory, "unsupported_config", words)


def test_the_weight_of_an_original_file_is_never_read_beside_the_tasks(tmp_path: Path) -> None:
    """It may hold the update already, which would then count twice."""
    base = tiny_llama()
    directory = made(tmp_path, base)
    change(directory, **{f"{PREFIX}{UP0}.weight": torch.ones(48, 32)})
    check_refused(base, directory, "unread_tensor", "replaces the weight")


def test_half_a_group_is_refused(tmp_path: Path) -> None:
    base = tiny_llama()
    directory = made(tmp_path, base)
    change(directory, **{f"{PREFIX}{UP0}.tasks.0.lora_B": None})
    assert ("missing_tensor", UP0) in problems_of(base, directory)
