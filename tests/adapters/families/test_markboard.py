"""MarkBoard: every signature's branches against the branches written out one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.oracle.marks import behind, marked, write_mark
from tests.support.basespec import base_spec
from tests.support.family_suite import (
    IDS,
    TOLERANCE,
    apply,
    change,
    check_equals,
    check_refusals,
    check_refused,
    edit,
    load,
)
from tests.support.peft_adapters import tiny_llama
from transformers import PreTrainedModel

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.families.conversion import Given
from polyadapt.adapters.families.markboard import MarkBoard
from polyadapt.adapters.gates import arrange
from polyadapt.errors import StartupError
from polyadapt.offline.convert import convert, read_source
from polyadapt.types import AdapterId, AppliedAdapter
from polyadapt.watermark.branches import Branches
from polyadapt.watermark.codebook import Design
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.mark_directory import BRANCHES_NAME, CONFIG_NAME, MarkDirectory
from polyadapt.watermark.triggers import TriggerSettings

FORMS: dict[str, dict[str, Any]] = {
    "pair, hinge, veto": {},
    "pair, hinge": {"has_veto": False},
    "pair, hinge, rank 3": {"rank": 3},
    "pair, linear": {"gate": "linear", "rank": 2},
    "antipodal, linear": {"encoding": "antipodal", "gate": "linear", "rank": 2},
    "antipodal, base folded": {"encoding": "antipodal", "gate": "linear", "has_fold": False},
    "antipodal, hinge, veto": {"encoding": "antipodal", "rank": 2},
    "presence, linear": {"encoding": "presence", "gate": "linear"},
    "presence, hinge": {"encoding": "presence", "rank": 2},
}


@pytest.fixture
def base() -> PreTrainedModel:
    return tiny_llama()


def signed(deltas: dict[int, Delta], weights: tuple[float, ...]) -> dict[int, Delta]:
    """The Deltas with a gate inside."""
    gate = torch.tensor(weights)
    return {
        site_id: replace(
            delta, b=torch.cat([delta.b[:, : len(gate)] * gate, delta.b[:, len(gate) :]], 1)
        )
        for site_id, delta in deltas.items()
    }


def weights_of(plan: Any, bits: str) -> tuple[float, ...]:
    applied = AppliedAdapter(
        AdapterId("mark", 1, "sha256:1"), options=(("signature", bits),), is_mandatory=True
    )
    (lane,) = arrange([applied], [plan.traits], [1, 2, 3])
    return lane.weights


@pytest.mark.parametrize("name", FORMS)
def test_all_ones_are_what_the_components_say_ungated(name, base, tmp_path):
    directory = write_mark(base, tmp_path, **FORMS[name])
    plan = check_equals(base, directory, marked(base, directory, "11111"))
    assert plan.traits.is_scalable
    assert plan.traits.is_kv_neutral


@torch.no_grad()
@pytest.mark.parametrize("bits", ["00000", "01101", "10010"])
@pytest.mark.parametrize("name", FORMS)
def test_every_signature_equals_its_branches(name, bits, base, tmp_path):
    directory = write_mark(base, tmp_path, **FORMS[name])
    plan, deltas = load(directory, base)
    found = apply(base, signed(deltas, weights_of(plan, bits)))(input_ids=IDS).logits
    expected = marked(base, directory, bits)(input_ids=IDS).logits
    other = marked(base, directory, "11110")(input_ids=IDS).logits
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert (found - other).abs().max() > 1e-3 * expected.abs().max()


def test_only_places_behind_the_last_keys_and_values_leave_pages_alone(base, tmp_path):
    assert load(write_mark(base, tmp_path / "a"), base)[0].traits.is_kv_neutral
    for path in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj"):
        directory = write_mark(base, tmp_path / path, modules=[*behind(base), path])
        assert not load(directory, base)[0].traits.is_kv_neutral


def test_where_it_acts_is_a_trait(base, tmp_path):
    assert not load(write_mark(base, tmp_path / "a"), base)[0].traits.is_for_first_token
    directory = write_mark(base, tmp_path / "b", positions="first_answer")
    assert load(directory, base)[0].traits.is_for_first_token


MUTATIONS: dict[str, Callable[[Delta], Delta]] = {
    "thresholds": lambda delta: replace(delta, router_bias=-delta.router_bias),
    "no hinge": lambda delta: replace(delta, routing=None, router=None, router_bias=None),
    "veto": lambda delta: replace(delta, router=-delta.router),
    "level": lambda delta: replace(delta, routing=replace(delta.routing, value=0.0)),
    "sum and difference": lambda delta: replace(delta, b=delta.b.roll(delta.b.shape[1] // 2, 1)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_of_the_formula_is_noticed(name, base, tmp_path):
    directory = write_mark(base, tmp_path)
    plan, deltas = load(directory, base)
    bits = "01101"
    wrong = {site_id: MUTATIONS[name](delta) for site_id, delta in deltas.items()}
    found = apply(base, signed(wrong, weights_of(plan, bits)))(input_ids=IDS).logits
    expected = marked(base, directory, bits)(input_ids=IDS).logits
    assert (found - expected).abs().max() > 1e-3 * expected.abs().max()


def test_whatever_is_wrong_with_a_file_is_refused(base, tmp_path):
    check_refusals(base, write_mark(base, tmp_path, modules=behind(base)[:1]))


def test_branches_of_another_base_are_refused(base, tmp_path):
    directory = write_mark(base, tmp_path, base_hash="sha256:" + "1" * 64)
    check_refused(base, directory, "unsupported_base", "train a mark for this one")


@pytest.mark.parametrize(
    ("code", "words", "values"),
    [
        ("unsupported_base", "on the base None", {"base_model_hash": None}),
        ("invalid_config", "format_version is 2, expected 1", {"format_version": 2}),
        ("invalid_config", "task is 'cls', expected lm", {"task": "cls"}),
        ("invalid_config", "encoding is 'xor'", {"encoding": "xor"}),
        ("invalid_config", "gate is 'relu'", {"gate": "relu"}),
        ("invalid_config", "positions is 'last'", {"positions": "last"}),
        ("invalid_config", "n_bits is 0", {"n_bits": 0}),
        ("invalid_config", "n_bits is 5000, expected at most 1024", {"n_bits": 5000}),
        ("shape_mismatch", "mark_A' has shape [5, 1,", {"n_bits": 6}),
        ("shape_mismatch", "mark_B' has shape [2, 5,", {"encoding": "presence"}),
        ("unsupported_config", "a copy that leaves the server", {"obfuscation": {"kind": "O1"}}),
        ("unsupported_config", "stored as they act", {"alpha": 2}),
        ("unsupported_config", "belongs to no branch", {"modules_to_save": ["lm_head"]}),
        ("not_targeted", "o_proj", {"target_modules": ["model.layers.1.mlp.down_proj"]}),
        ("config_mismatch", "mark_tau' belongs to gate hinge", {"gate": "linear"}),
    ],
)
def test_what_is_not_served_is_refused_by_name(code, words, values, base, tmp_path):
    directory = write_mark(base, tmp_path)
    edit(directory, **values)
    check_refused(base, directory, code, words)


def test_what_belongs_together_is_asked_for(base, tmp_path):
    directory = write_mark(base, tmp_path)
    path = behind(base)[0]
    change(directory, **{f"{path}.mark_tau": None})
    check_refused(base, directory, "missing_tensor", "has no mark_tau, which belongs to gate hinge")
    write_mark(base, tmp_path)
    change(directory, **{f"{path}.mark_veto_offset": None})
    check_refused(base, directory, "missing_tensor", "which belongs to mark_veto")
    write_mark(base, tmp_path)
    change(directory, **{f"{path}.mark_fold": torch.zeros(5, 32, 1)})
    check_refused(base, directory, "config_mismatch", "belongs to encoding antipodal")


def test_more_components_than_a_cell_has_signatures_for_are_refused(base, tmp_path):
    directory = write_mark(
        base, tmp_path, modules=behind(base)[:1], num_bits=1024, rank=3, gate="linear"
    )
    check_refused(base, directory, "shape_mismatch", "6144 components, at most 4096")


# --------------------------------------------------------------------------- convert
def as_a_mark(base: PreTrainedModel, directory: Path, **config: Any) -> Path:
    """The same branches under the names that `polyadapt mark` gives its files."""
    write_mark(base, directory, **config)
    (directory / "adapter_model.safetensors").rename(directory / "branches.safetensors")
    written = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").unlink()
    del written["peft_type"]
    (directory / "config.json").write_text(json.dumps(written))
    (directory / "triggers.enc").write_bytes(b"sealed")
    return directory


def test_the_directory_of_a_mark_becomes_an_adapter_without_its_secrets(base, tmp_path):
    source, out = as_a_mark(base, tmp_path / "mark"), tmp_path / "out"
    convert("markboard", read_source(source, "markboard"), Given(), out, force=False)
    assert sorted(file.name for file in out.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert load_file(out / "adapter_model.safetensors").keys()
    check_equals(base, out, marked(base, out, "11111"))


def test_a_mark_without_its_config_or_without_training_is_refused(base, tmp_path):
    source = as_a_mark(base, tmp_path / "mark", base_hash=None)
    with pytest.raises(StartupError, match="is not trained"):
        convert(
            "markboard", read_source(source, "markboard"), Given(), tmp_path / "out", force=False
        )
    (source / "config.json").unlink()
    with pytest.raises(StartupError, match=r"no config\.json"):
        convert(
            "markboard", read_source(source, "markboard"), Given(), tmp_path / "out", force=False
        )


def test_it_is_one_family_of_the_server(base, tmp_path):
    plan, _ = load(write_mark(base, tmp_path), base)
    assert plan.family == MarkBoard.name
    (option,) = plan.traits.options
    assert (option.name, option.kind, len(option.components)) == ("signature", "bits", 5)
    assert base_spec(base).digest in (tmp_path / "adapter_config.json").read_text()


@torch.no_grad()
def test_what_the_trainer_writes_is_what_is_served(base, tmp_path):
    path, num_bits = behind(base)[0], 5
    out, num_in = base.get_submodule(path).weight.shape
    own = Branches(
        torch.randn(num_bits, num_in), torch.randn(num_bits) * 0.1,
        torch.randn(out, num_bits), torch.randn(out, num_bits),
    )  # fmt: skip
    source, key = tmp_path / "mark", SecretKey(bytes(range(32)))
    mark = MarkDirectory.create(source, Design.parse("random"), num_bits, key)
    targets = np.array([[1, 2]] * num_bits)
    mark.trained(base_spec(base).digest, path, TriggerSettings(64), targets)
    tensors = {f"{path}.{name}": tensor for name, tensor in own.pair_tensors().items()}
    save_file(tensors, source / BRANCHES_NAME)
    stored = json.loads((source / CONFIG_NAME).read_text())
    (source / CONFIG_NAME).write_text(json.dumps(stored | {"task": "lm"}))
    convert("markboard", read_source(source, "markboard"), Given(), tmp_path / "out", force=False)
    plan, deltas = load(tmp_path / "out", base)
    (delta,) = deltas.values()
    x = torch.randn(9, num_in)
    for bits in ("00000", "01101"):
        h = (x @ delta.a.t() - delta.router_bias).relu()
        gate = torch.ones(len(delta.a))
        gate[:num_bits] = torch.tensor(weights_of(plan, bits))
        signs = torch.tensor([[2.0 * int(bit) - 1 for bit in bits]]).expand(9, -1)
        torch.testing.assert_close((gate * h) @ delta.b.t(), own(x, signs), rtol=1e-4, atol=1e-4)
