"""What other code wrote comes out as a directory that computes the same."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tests.oracle.routed import routed, write_loramoe, write_mola
from tests.support.family_suite import IDS, apply, load, make_checkpoint
from tests.support.peft_adapters import reload, save, tiny_gpt2, tiny_llama
from torch import nn
from transformers import PreTrainedModel

from polyadapt.adapters.families.conversion import Given
from polyadapt.errors import StartupError
from polyadapt.offline.convert import convert, read_source
from polyadapt.offline.pickled import load_base, load_tensors

RANK, ALPHA = 4, 6


def converted(kind: str, source: Path, out: Path, **given: Any) -> tuple[str, ...]:
    return convert(kind, read_source(source, kind), Given(**given), out, force=False)


def as_pickle(directory: Path, suffix: str = ".bin") -> Path:
    """Replace the weights of a PEFT directory by a pickle, as old versions of PEFT wrote it."""
    weights = directory / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(suffix))
    weights.unlink()
    return directory


@torch.no_grad()
def assert_same(one: nn.Module, two: nn.Module, base: nn.Module, tolerance: float = 2e-5) -> None:
    first, second, plain = (m(input_ids=IDS).logits for m in (one, two, base))
    assert (first - plain).abs().max() > 1e-2 * first.abs().max()
    assert (first - second).abs().max() <= tolerance * first.abs().max()


# --------------------------------------------------------------------------- pickles
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_a_pickled_adapter_is_the_same_in_safetensors(suffix: str, tmp_path: Path) -> None:
    base = tiny_llama()
    directory = make_checkpoint(base, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "in")
    tensors = load_file(directory / "adapter_model.safetensors")
    oracle = reload(base, directory)
    converted("pickle", as_pickle(directory, suffix), tmp_path / "out")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert_same(reload(base, tmp_path / "out"), oracle, base)


class Bomb:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("inside", ["alone", "beside tensors"])
def test_code_in_a_pickle_is_never_run(inside: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "exploded", tmp_path / "w.bin"
    bomb = Bomb(mark)
    torch.save(bomb if inside == "alone" else {"a": torch.ones(2), "b": bomb}, path)
    with pytest.raises(StartupError, match="never run here"):
        load_tensors(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the bomb would not have gone off at all"


@pytest.mark.parametrize(
    ("value", "words"),
    [([1, 2], "holds a list"), ({"a": 3}, "of type int"), ({}, "holds a dict")],
)
def test_what_is_no_state_dict_is_said(value: Any, words: str, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "w.pt")
    with pytest.raises(StartupError, match=words):
        load_tensors(tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.bin", "w.safetensors", "w.txt"])
def test_a_damaged_file_is_one_clear_error(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02nonsense")
    with pytest.raises(StartupError, match=name):
        load_tensors(tmp_path / name)


def test_a_wrapped_state_dict_is_opened(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "w.pt")
    assert list(load_tensors(tmp_path / "w.pt")) == ["a"]


def test_sources_without_meaning_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="does not exist"):
        read_source(tmp_path / "nothing")
    with pytest.raises(StartupError, match="holds none"):
        read_source(tmp_path)
    torch.save({"a": torch.ones(2)}, tmp_path / "one.pt")
    torch.save({"a": torch.ones(2)}, tmp_path / "two.pt")
    with pytest.raises(StartupError, match=r"one.pt, two.pt"):
        read_source(tmp_path)
    with pytest.raises(StartupError, match=r"no adapter_config.json"):
        converted("pickle", tmp_path / "one.pt", tmp_path / "out")
    with pytest.raises(StartupError, match="expected one of: pickle"):
        converted("magic", tmp_path / "one.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over_unless_forced(tmp_path: Path) -> None:
    base = tiny_llama()
    directory = make_checkpoint(base, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "in")
    before = (directory / "adapter_model.safetensors").read_bytes()
    source = read_source(directory)
    with pytest.raises(StartupError, match="--force"):
        convert("pickle", source, Given(), directory, force=False)
    assert (directory / "adapter_model.safetensors").read_bytes() == before
    convert("pickle", source, Given(), directory, force=True)
    assert "lora" in load(directory, base)[0].family


# --------------------------------------------------------------------------- loralib
def loralib_state(base: PreTrainedModel, names: list[str]) -> dict[str, torch.Tensor]:
    """What loralib adds to a model's state_dict."""
    state = {}
    for path, module in base.named_modules():
        if path.rpartition(".")[2] in names:
            out, num_in = module.weight.shape
            state[f"{path}.lora_A"] = torch.randn(RANK, num_in) * 0.2
            state[f"{path}.lora_B"] = torch.randn(out, RANK) * 0.2
    return state


@torch.no_grad()
def test_a_loralib_state_dict_becomes_nested(tmp_path: Path) -> None:
    base = tiny_llama()
    state = loralib_state(base, ["q_proj", "v_proj"])
    torch.save(base.state_dict() | state, tmp_path / "model.pt")
    base.save_pretrained(tmp_path / "base")

    notes = converted(
        "dylora", tmp_path / "model.pt", tmp_path / "out",
        alpha=ALPHA, min_rank=2, base=load_base(tmp_path / "base"),
    )  # fmt: skip

    assert "base's own" in notes[0]
    plan, deltas = load(tmp_path / "out", base)
    assert (plan.family, plan.traits.nested_rank, plan.traits.min_nested_rank) == (
        "dylora", RANK, 2,
    )  # fmt: skip
    expected = copy.deepcopy(base)
    for key, a in state.items():
        if key.endswith(".lora_A"):
            path = key.removesuffix(".lora_A")
            expected.get_submodule(path).weight += ALPHA / RANK * state[f"{path}.lora_B"] @ a
    assert_same(apply(base, deltas), expected, base)


def test_what_a_loralib_file_does_not_say_is_asked_for(tmp_path: Path) -> None:
    base = tiny_llama()
    state = loralib_state(base, ["q_proj"])
    path, out = tmp_path / "w.pt", tmp_path / "out"

    def refused(tensors: dict[str, torch.Tensor], words: str, **given: Any) -> None:
        torch.save(tensors, path)
        with pytest.raises(StartupError, match=words):
            converted("dylora", path, out, **given)

    first = next(iter(state))
    refused(state, "give --alpha")
    refused(state, "expected 8 everywhere by --rank", alpha=ALPHA, rank=8)
    refused({"a": torch.ones(2)}, r"named <module>.lora_A", alpha=ALPHA)
    refused({k: t for k, t in state.items() if k != first}, "has no lora_A", alpha=ALPHA)
    refused(state | {first: torch.ones(8, 32)}, "merged projections", alpha=ALPHA)
    refused(state | {"classifier.weight": torch.ones(2, 2)}, "give --base", alpha=ALPHA)
    refused(
        state | {"lm_head.weight": torch.ones(64, 32)}, "no place in the adapter", alpha=ALPHA,
        base=base.state_dict(),
    )  # fmt: skip
    torch.save(state | {"classifier.weight": torch.ones(2, 2)}, path)
    notes = converted("dylora", path, out, alpha=ALPHA, deltas_only=True)
    assert "left out unseen" in notes[0]


# --------------------------------------------------------------------------- mixtures
@pytest.mark.parametrize("write", [write_loramoe, write_mola])
@torch.no_grad()
def test_a_pickle_of_moe_peft_is_the_same_in_safetensors(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_llama()
    oracle = routed(base, write(base, tmp_path / "in"))
    converted("pickle", as_pickle(tmp_path / "in"), tmp_path / "out")
    assert_same(apply(base, load(tmp_path / "out", base)[1]), oracle, base)


def as_its_authors(directory: Path) -> Path:
    """Rename MoE-PEFT's tensors of MoLA as the authors' own code calls them."""
    renamed = {}
    for key, tensor in load_file(directory / "adapter_model.safetensors").items():
        name = key.replace("mola.layers.", "base_model.model.model.layers.")
        name = re.sub(r"experts\.(\d+)\.(lora_.)", r"\2_\1", name)
        renamed[name.replace("moe_gate", "router.router")] = tensor
    (directory / "adapter_model.safetensors").unlink()
    torch.save(renamed, directory / "adapter_model.bin")
    config = json.loads((directory / "adapter_config.json").read_text())
    kept = ("lora_alpha", "target_modules", "bias", "task_type")
    config = {key: config[key] for key in kept} | {"r": [3, 3], "peft_type": "LORA"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@torch.no_grad()
def test_mola_of_its_authors_is_the_same_with_the_experts_of_each_layer(tmp_path: Path) -> None:
    base = tiny_llama()
    source = write_mola(base, tmp_path / "in", num_experts=[2, 5])
    oracle = routed(base, source)
    as_its_authors(source)
    with pytest.raises(StartupError, match="give --top-k"):
        converted("mola", source, tmp_path / "out")
    converted("mola", source, tmp_path / "out", top_k=2)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["num_experts"], config["r"], config["top_k"]) == ([2, 5], [3, 3], 2)
    assert_same(apply(base, load(tmp_path / "out", base)[1]), oracle, base)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "is none of <module>"),
        ("base_model.model.lm_head.lora_A_0.weight", "is none of <module>"),
        ("base_model.model.model.layers.3.self_attn.q_proj.lora_A_0.weight", "expected all of"),
    ],
)
def test_other_tensors_are_not_mola(name: str, words: str, tmp_path: Path) -> None:
    base = tiny_llama()
    as_its_authors(write_mola(base, tmp_path))
    tensors = torch.load(tmp_path / "adapter_model.bin", weights_only=True)
    torch.save(tensors | {name: torch.ones(3, 32)}, tmp_path / "adapter_model.bin")
    with pytest.raises(StartupError, match=words):
        converted("mola", tmp_path, tmp_path / "out", top_k=2)
    assert not (tmp_path / "out").exists()


def test_what_says_nothing_of_the_number_of_experts_is_said(tmp_path: Path) -> None:
    base, config = tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"])
    source, other = (make_checkpoint(base, config, tmp_path / name) for name in ("one", "two"))
    (note,) = converted("arrow", source, tmp_path / "out", experts=(read_source(other),))
    assert note == "a row takes 2 of 2 experts"
    (other / "adapter_config.json").unlink()
    with pytest.raises(StartupError, match=r"no adapter_config.json"):
        converted("arrow", source, tmp_path / "other", experts=(read_source(other),))


# --------------------------------------------------------------------------- SoRA
@pytest.mark.parametrize("new", [tiny_llama, tiny_gpt2])
@torch.no_grad()
def test_a_whole_model_becomes_its_deltas_and_its_norms(
    new: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    base = new()
    base.save_pretrained(tmp_path / "base")
    linears, norm = {
        "LlamaForCausalLM": (["model.layers.0.self_attn.q_proj"], "model.norm"),
        "GPT2LMHeadModel": (["transformer.h.0.mlp.c_fc"], "transformer.h.1.ln_1"),
    }[type(base).__name__]
    expected = copy.deepcopy(base)
    trained = expected.get_submodule(norm)
    for parameter in trained.parameters():
        parameter += torch.randn(parameter.shape) * 0.3
    state = dict(expected.state_dict())  # the norm is trained, the linears are not
    for path in linears:
        module = expected.get_submodule(path)
        is_transposed = type(module).__name__ == "Conv1D"
        out, num_in = module.weight.t().shape if is_transposed else module.weight.shape
        a, b = torch.randn(RANK, num_in) * 0.3, torch.randn(out, RANK) * 0.3
        gate = torch.tensor([[0.5, 0.0, -2.0, 0.0]])
        state |= {f"{path}.lora.lora_A": a, f"{path}.lora.lora_B": b, f"{path}.lora.gate": gate}
        delta = ALPHA / RANK * b @ torch.diag(gate[0]) @ a
        state[f"{path}.weight"] = module.weight.clone()
        module.weight += delta.t() if is_transposed else delta
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "run" / "pytorch_model.bin")

    converted(
        "sora", tmp_path / "run", tmp_path / "out",
        alpha=ALPHA, base=load_base(tmp_path / "base"),
    )  # fmt: skip

    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 3 * len(linears) + len(list(trained.parameters()))
    plan, deltas = load(tmp_path / "out", base)
    assert plan.family == "sora"
    assert_same(apply(base, deltas), expected, base)


def test_the_norms_of_a_whole_model_need_the_base(tmp_path: Path) -> None:
    base = tiny_llama()
    path = "model.layers.0.self_attn.q_proj.lora"
    state = base.state_dict() | {
        f"{path}.lora_A": torch.ones(4, 32),
        f"{path}.lora_B": torch.ones(32, 4),
        f"{path}.gate": torch.ones(1, 4),
    }
    torch.save(state, tmp_path / "w.bin")
    with pytest.raises(StartupError, match="give --base"):
        converted("sora", tmp_path / "w.bin", tmp_path / "out", alpha=ALPHA)
    with pytest.raises(StartupError, match="give --alpha"):
        converted("sora", tmp_path / "w.bin", tmp_path / "out")
    with pytest.raises(StartupError, match="began with"):
        converted("sora", tmp_path / "w.bin", tmp_path / "out", alpha=ALPHA, rank=8)


# --------------------------------------------------------------------------- changed bases
OPTIONS: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "rank-stabilised": {"init_lora_weights": "pissa", "use_rslora": True},
    "patterns": {
        "init_lora_weights": "pissa",
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"up_proj": 11},
    },
}


def trained_from(base: PreTrainedModel, root: Path, **options: Any) -> nn.Module:
    """Save an adapter before and after its training; returns PEFT's trained model."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "up_proj"], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base), config)
    save(model, root / "initial")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape) * 0.2
    save(model, root / "trained")
    return model.eval()


@pytest.mark.parametrize("name", OPTIONS)
def test_an_adapter_of_a_changed_base_becomes_one_of_the_intact_base(
    name: str, tmp_path: Path
) -> None:
    base = tiny_llama()
    model = trained_from(base, tmp_path, **OPTIONS[name])

    converted(
        "pissa", tmp_path / "trained", tmp_path / "out", initial=read_source(tmp_path / "initial")
    )

    # By PEFT on the base as it is, and by the family.
    assert_same(reload(base, tmp_path / "out"), model, base, 1e-4)
    plan, deltas = load(tmp_path / "out", base)
    assert (plan.family, plan.rank) == ("lora", 2 * RANK)
    assert_same(apply(base, deltas), model, base, 1e-4)


def test_what_does_not_belong_together_is_not_converted(tmp_path: Path) -> None:
    base = tiny_llama()
    trained_from(base, tmp_path, init_lora_weights="pissa")
    initial, out = tmp_path / "initial", tmp_path / "out"

    def refused(words: str, **values: Any) -> None:
        path = tmp_path / "trained" / "adapter_config.json"
        original = path.read_text()
        path.write_text(json.dumps(json.loads(original) | values))
        with pytest.raises(StartupError, match=words):
            converted("pissa", tmp_path / "trained", out, initial=read_source(initial))
        path.write_text(original)

    refused("can be uploaded as it is", init_lora_weights=True)
    refused("can be uploaded as it is", init_lora_weights="gaussian")
    refused("quantised base", init_lora_weights="loftq")
    refused("no sum of two adapters", use_dora=True)
    refused("lora_alpha is 7 and 6", lora_alpha=7)
    with pytest.raises(StartupError, match="give --initial"):
        converted("pissa", tmp_path / "trained", out)
    foreign = make_checkpoint(
        base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["k_proj"]), tmp_path / "other"
    )
    with pytest.raises(StartupError, match="--initial holds no"):
        converted("pissa", tmp_path / "trained", out, initial=read_source(foreign))
    assert not out.exists()
