"""Inspecting says what uploading and serving would do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tests.oracle import tiny, xlora_oracle
from tests.oracle.marks import write_mark
from tests.oracle.mixture import write_mixlora
from tests.support.family_suite import change, edit, make_checkpoint
from transformers import AutoModelForCausalLM

from polyadapt.adapters import reader
from polyadapt.adapters.adapter import Delta
from polyadapt.config import EngineConfig
from polyadapt.models.load import model_digest
from polyadapt.offline.inspection import Inspection, inspect_adapter, inspect_files
from polyadapt.offline.routing import trace_routing

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model_dir(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture
def adapter_dir(model_dir: Path, tmp_path: Path) -> Path:
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj", "embed_tokens"])
    directory = make_checkpoint(base, config, tmp_path / "mine")
    change(directory, **{key: None for key in tensors_of(directory) if "base_layer" in key})
    return directory


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def engine_config() -> EngineConfig:
    return EngineConfig(
        model="tiny", device="cpu", kv_cache_bytes=1 << 20, max_adapter_bytes=1 << 22
    )


def inspected(directory: Path, model_dir: Path) -> Inspection:
    return inspect_adapter(directory, model_dir, engine_config())


def codes(found: Inspection) -> list[str]:
    return [problem.code for problem in found.problems]


def test_what_a_first_pass_weighs_costs_the_pass_and_is_no_dense_model(
    model_dir: Path, tmp_path: Path
) -> None:
    directory = xlora_oracle.make(model_dir, tmp_path / "x")
    found = inspected(directory, model_dir)
    assert (found.verdict, found.family, found.rank) == ("served", "xlora", 6)
    assert found.num_tensors == 4 + 3 * 2 * 4 * 3
    assert found.parity is None
    assert "its parity with a dense model" in found.unchecked[0]
    assert found.cost is not None
    assert found.cost.compute_share > 0.6, "the base's layers run twice, its head once"
    assert [option.name for option in found.traits.options] == [
        "top_k", "global_scaling_weight", "frozen_after"
    ]  # fmt: skip
    assert inspect_files(directory).family == "xlora"


def test_what_a_first_pass_weighs_is_shown_module_by_module(
    model_dir: Path, tmp_path: Path
) -> None:
    directory = xlora_oracle.make(model_dir, tmp_path / "x")
    ids = tiny.prompt_ids(9, seed=1)
    report = trace_routing(directory, model_dir, engine_config(), ids)
    oracle = xlora_oracle.load(model_dir, directory)
    expected = xlora_oracle.scalings_of(model_dir, oracle, ids).mean(0)  # [modules, experts]
    assert [module.path for module in report.modules] == list(oracle.paths)
    shares = torch.tensor([module.shares for module in report.modules])
    torch.testing.assert_close(shares, expected, rtol=1e-3, atol=1e-3)


def test_an_adapter_is_served_as_its_weights_say(adapter_dir: Path, model_dir: Path) -> None:
    found = inspected(adapter_dir, model_dir)

    assert found.verdict == "served"
    assert (found.family, found.rank, found.num_tensors) == ("lora", 4, 14)
    assert found.target_modules == ("down_proj", "embed_tokens", "q_proj")
    assert found.traits is not None
    assert found.traits.is_scalable
    assert found.parity is not None
    assert found.parity.largest_difference <= found.parity.tolerance
    assert found.parity.largest_effect > 100 * found.parity.tolerance
    assert not found.unchecked

    tensors = tensors_of(adapter_dir)
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    assert found.cost is not None
    assert found.cost.num_elements == sum(tensor.numel() for tensor in tensors.values())
    assert found.cost.num_base_elements == sum(p.numel() for p in base.parameters())
    # A of an embedding is looked up and not multiplied.
    looked_up = sum(t.numel() for key, t in tensors.items() if key.endswith("embedding_A"))
    assert found.cost.num_multiply_adds == found.cost.num_elements - looked_up
    linears = [m.weight.numel() for m in base.modules() if isinstance(m, torch.nn.Linear)]
    assert found.cost.num_base_multiply_adds == sum(linears)


def test_a_wrong_answer_is_seen(
    adapter_dir: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = reader.pack

    def forgetful(modules: dict[int, Delta], *rest: Any) -> Any:
        return pack({site_id: d for site_id, d in modules.items() if site_id != 1}, *rest)

    monkeypatch.setattr(reader, "pack", forgetful)
    found = inspected(adapter_dir, model_dir)
    assert found.verdict == "differs"


def made(model_dir: Path, directory: Path, **options: Any) -> Path:
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    return make_checkpoint(base, LoraConfig(r=5, task_type="CAUSAL_LM", **options), directory)


def test_a_nested_adapter_is_compared_at_several_ranks(model_dir: Path, tmp_path: Path) -> None:
    directory = made(model_dir, tmp_path, target_modules=["q_proj", "up_proj"])
    edit(directory, nested=True, rank_min=2, rank_max=5, scale="alpha/b")
    found = inspected(directory, model_dir)
    assert (found.verdict, found.family) == ("served", "dylora")
    assert found.parity is not None
    assert found.parity.ranks == (2, 3, 5)


def test_experts_are_compared_with_every_one_run_whole(model_dir: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    found = inspected(write_mixlora(base, tmp_path, num_experts=6, top_k=2), model_dir)
    assert found.verdict == "served", found.problems
    assert found.parity is not None
    assert found.parity.is_equal
    assert found.traits is not None
    assert found.traits.token_cost == 2


def test_an_adapter_that_is_invoked_is_compared_behind_its_invocation(
    model_dir: Path, tmp_path: Path
) -> None:
    options = {"target_modules": ["v_proj", "up_proj"], "alora_invocation_tokens": [7, 9]}
    found = inspected(made(model_dir, tmp_path, **options), model_dir)
    assert found.verdict == "served"
    assert not found.unchecked
    assert found.traits is not None
    assert found.traits.invocation == (7, 9)


def test_a_mark_is_compared_at_one_signature(model_dir: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    own = {"base_hash": model_digest(model_dir)}
    found = inspected(write_mark(base, tmp_path / "all", **own), model_dir)
    assert not found.problems
    assert found.parity is not None
    assert found.parity.largest_difference <= found.parity.tolerance < found.parity.largest_effect
    directory = write_mark(base, tmp_path / "first", positions="first_answer", **own)
    (unchecked,) = inspected(directory, model_dir).unchecked
    assert "it acts on one row" in unchecked


def test_slow_parts_are_counted_by_module(model_dir: Path, tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]}
    found = inspected(made(model_dir, tmp_path, **options), model_dir)
    assert found.verdict == "served"
    assert found.cost is not None
    assert found.cost.slow_parts == {"dense": 1, "norm weight": 3}
    assert "lm_head.weight" in found.traits.replaced


def test_what_an_upload_would_refuse_is_refused(adapter_dir: Path, model_dir: Path) -> None:
    change(adapter_dir, **{f"{Q0}.lora_A.weight": torch.ones(4, 7)})
    edit(adapter_dir, use_magic=3)
    found = inspected(adapter_dir, model_dir)
    assert found.verdict == "refused"
    assert set(codes(found)) == {"shape_mismatch", "unknown_config_key"}
    assert found.parity is None


def test_an_adapter_without_effect_is_not_called_equal(adapter_dir: Path, model_dir: Path) -> None:
    change(adapter_dir, **{key: t * 0 for key, t in tensors_of(adapter_dir).items()})
    found = inspected(adapter_dir, model_dir)
    assert found.verdict == "served"
    assert any("changes nothing" in text for text in found.unchecked)


# --------------------------------------------------------------------------- without a base
def test_files_alone_show_what_is_known_and_what_is_not(adapter_dir: Path) -> None:
    found = inspect_files(adapter_dir)
    assert (found.verdict, found.family, found.num_tensors) == ("unknown", "lora", 14)
    assert set(found.files) >= {"adapter_config.json", "adapter_model.safetensors"}
    assert found.cost is None
    assert "give --model" in found.unchecked[0]


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"use_magic": 3}, "unknown_config_key"),
        ({"r": 0}, "invalid_config"),
        ({"layer_replication": [[0, 1]]}, "unsupported_config"),
        ({"peft_type": "NOBODYS"}, "unsupported_family"),
    ],
)
def test_a_config_is_judged_without_a_base(
    values: dict[str, Any], code: str, adapter_dir: Path
) -> None:
    edit(adapter_dir, **values)
    found = inspect_files(adapter_dir)
    assert codes(found) == [code]
    assert found.verdict == "refused"


def test_numbers_and_names_are_judged_without_a_base(adapter_dir: Path) -> None:
    change(
        adapter_dir,
        **{f"{Q0}.lora_A.weight": torch.full((4, 64), torch.nan), f"{Q0}.strange": torch.ones(2)},
    )
    assert set(codes(inspect_files(adapter_dir))) == {"non_finite", "unread_tensor"}


def test_a_pickle_is_pointed_to_convert(adapter_dir: Path) -> None:
    weights = adapter_dir / "adapter_model.safetensors"
    weights.rename(adapter_dir / "adapter_model.bin")
    (problem,) = inspect_files(adapter_dir).problems
    assert problem.code == "missing_file"
    assert "polyadapt convert" in problem.message


def test_a_config_that_is_no_json_is_refused(adapter_dir: Path) -> None:
    (adapter_dir / "adapter_config.json").write_text(json.dumps([1]))
    found = inspect_files(adapter_dir)
    assert codes(found) == ["invalid_json"]
    assert found.family is None
