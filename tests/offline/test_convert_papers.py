"""Files of GS-LoRA, DV-LoRA, B-LoRA and ExPLoRA come out as directories that compute the same."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.family_suite import IDS, apply, load
from tests.support.peft_adapters import reload, tiny_gpt2, tiny_llama, tiny_phi3
from torch import nn
from transformers import PreTrainedModel

from polyadapt.adapters.families.conversion import Given
from polyadapt.errors import StartupError
from polyadapt.offline.convert import convert, read_source

State = dict[str, torch.Tensor]
FEED_FORWARD = [
    f"model.layers.{i}.mlp.{name}" for i in range(2) for name in ("up_proj", "down_proj")
]


def converted(kind: str, source: Path, out: Path, **given: Any) -> tuple[str, ...]:
    return convert(kind, read_source(source, kind), Given(**given), out, force=False)


def refused(kind: str, source: Path, words: str, **given: Any) -> None:
    out = source.parent / "refused"
    with pytest.raises(StartupError, match=words):
        converted(kind, source, out, **given)
    assert not out.exists(), "something was written"


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


def assert_same(one: nn.Module, two: nn.Module, base: nn.Module, tolerance: float = 2e-5) -> None:
    first, second = logits(one), logits(two)
    assert (first - logits(base)).abs().max() > 1e-2 * first.abs().max(), "it changes nothing"
    assert (first - second).abs().max() <= tolerance * first.abs().max()


def config_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "adapter_config.json").read_text())
    return found


# --------------------------------------------------------------------------- GS-LoRA
RANK = 4


@torch.no_grad()
def trained(
    root: Path, *, is_merged: bool, num_tasks: int = 3
) -> tuple[PreTrainedModel, nn.Module]:
    """Write what GS-LoRA's trainer leaves after each task, by loralib's rules; return the base and
    the model that it ends with.

    loralib's layer adds B A / r to its weight when it turns to eval mode, and takes it away when it
    turns back; the next task begins on the merged weight with a new A and B.
    """
    base = tiny_llama()
    model = copy.deepcopy(base)
    root.mkdir()
    for task in range(num_tasks):
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        for path in FEED_FORWARD:
            weight = model.get_submodule(path).weight
            a, b = torch.randn(RANK, weight.shape[1]), torch.randn(weight.shape[0], RANK) * 0.3
            if (task, path) in [(1, FEED_FORWARD[0]), (2, FEED_FORWARD[1])]:
                b.zero_()  # a group that was pruned
            state[f"{path}.lora_A"], state[f"{path}.lora_B"] = a, b
            weight += b @ a / RANK
            if is_merged:
                state[f"{path}.weight"] = weight.clone()
        torch.save(state, root / f"Backbone_task_{task}.pth")
    return base, model


@pytest.mark.parametrize("is_merged", [True, False])
def test_the_models_of_all_tasks_become_one_adapter_and_no_update_counts_twice(
    is_merged: bool, tmp_path: Path
) -> None:
    base, model = trained(tmp_path / "run", is_merged=is_merged)
    flag = {} if is_merged else {"is_merged": False}
    notes = converted("gs_lora", tmp_path / "run", tmp_path / "out", base=base.state_dict(), **flag)
    assert any("alpha is taken to be 1" in note for note in notes)
    plan, deltas = load(tmp_path / "out", base)
    assert plan.family == "gs_lora"
    assert_same(apply(base, deltas), model, base)
    tasks = config_of(tmp_path / "out")["tasks"]
    assert [task["name"] for task in tasks] == ["task_0", "task_1", "task_2"]
    assert [task["pruned"] for task in tasks] == [[], [FEED_FORWARD[0]], [FEED_FORWARD[1]]]
    # The mistake that is to be avoided: the file's own weights, and what lies beside them as well.
    state = torch.load(tmp_path / "run" / "Backbone_task_2.pth", weights_only=True)
    twice = copy.deepcopy(base)
    twice.load_state_dict(state, strict=False)
    wrong = logits(apply(twice, deltas)) - logits(model)
    assert wrong.abs().max() > 1e-2 * logits(model).abs().max()


def test_a_given_alpha_is_that_of_every_task(tmp_path: Path) -> None:
    base, _ = trained(tmp_path / "run", is_merged=True, num_tasks=1)
    source = tmp_path / "run" / "Backbone_task_0.pth"
    refused("gs_lora", source, "is neither", base=base.state_dict(), alpha=2.0)
    converted("gs_lora", source, tmp_path / "out", deltas_only=True, alpha=2.0)
    assert config_of(tmp_path / "out")["tasks"][0]["alpha"] == 2


def test_a_base_that_holds_the_task_is_not_given_it_again(tmp_path: Path) -> None:
    """By the numbers alone it is that of before the task, saved while training."""
    _, model = trained(tmp_path / "run", is_merged=True, num_tasks=1)
    source, after = tmp_path / "run" / "Backbone_task_0.pth", model.state_dict()
    refused("gs_lora", source, "would count twice, then give the base of before", base=after)
    refused("gs_lora", source, "on this base it would count twice", base=after, is_merged=True)


def test_what_the_weights_hold_is_not_taken_on_trust(tmp_path: Path) -> None:
    base, _ = trained(tmp_path / "merged", is_merged=True)
    unmerged_base, _ = trained(tmp_path / "unmerged", is_merged=False)
    before = base.state_dict()
    refused("gs_lora", tmp_path / "merged", "which --unmerged denies", base=before, is_merged=False)
    refused("gs_lora", tmp_path / "unmerged", "give --unmerged", base=unmerged_base.state_dict())
    refused("gs_lora", tmp_path / "merged", "give --base", deltas_only=True, is_merged=True)
    refused("gs_lora", tmp_path / "merged", "give --base")
    last = tmp_path / "merged" / "Backbone_task_2.pth"
    refused("gs_lora", last, "files of earlier tasks are missing", base=before)
    (tmp_path / "merged" / "Backbone_task_1.pth").unlink()
    refused("gs_lora", tmp_path / "merged", "files of earlier tasks are missing", base=before)
    notes = converted("gs_lora", last, tmp_path / "out", deltas_only=True)
    assert any("would count twice on one that holds them" in note for note in notes)


def test_files_that_are_no_series_of_tasks_are_refused(tmp_path: Path) -> None:
    base, _ = trained(tmp_path / "run", is_merged=True)
    first, second = (tmp_path / "run" / f"Backbone_task_{t}.pth" for t in range(2))
    before, path = base.state_dict(), FEED_FORWARD[0]
    state = torch.load(second, weights_only=True)

    def changed(words: str, given: dict[str, Any] | None = None, **tensors: Any) -> None:
        merged = {**state, **tensors}
        torch.save({k: t for k, t in merged.items() if t is not None}, second)
        refused("gs_lora", tmp_path / "run", words, base=before, **(given or {}))
        torch.save(state, second)

    changed("has no lora_B", **{f"{path}.lora_B": None})
    changed("in other modules", **{f"{path}.lora_A": None, f"{path}.lora_B": None})
    changed("have no place", **{"lm_head.weight": torch.ones(64, 32)})
    changed("holds no model.layers.0.mlp.up_proj.weight", **{f"{path}.weight": None})
    changed(
        r"expected 4 everywhere",
        **{f"{path}.lora_A": torch.ones(2, 32), f"{path}.lora_B": torch.ones(48, 2)},
    )
    changed(
        "an update of shape",
        **{f"{path}.lora_A": torch.ones(RANK, 8), f"{path}.lora_B": torch.ones(8, RANK)},
    )
    mixed = torch.load(first, weights_only=True)
    mixed[f"{FEED_FORWARD[3]}.weight"] = before[f"{FEED_FORWARD[3]}.weight"]
    torch.save(mixed, first)
    refused("gs_lora", first, "put together from several models", base=before)
    first.rename(first.with_name("first.pth"))
    refused("gs_lora", tmp_path / "run", "no number at its end", base=before)
    refused("gs_lora", tmp_path / "nothing", "does not exist")
    (tmp_path / "empty").mkdir()
    refused("gs_lora", tmp_path / "empty", "holds no file of weights")


def test_a_task_that_changes_nothing_is_left_out_aloud(tmp_path: Path) -> None:
    base, _ = trained(tmp_path / "run", is_merged=False)
    first = tmp_path / "run" / "Backbone_task_0.pth"
    state = torch.load(first, weights_only=True)
    torch.save({k: t * 0 if k.endswith("lora_B") else t for k, t in state.items()}, first)
    notes = converted("gs_lora", tmp_path / "run", tmp_path / "out", deltas_only=True)
    assert "Backbone_task_0 changes nothing and was left out" in notes
    tasks = config_of(tmp_path / "out")["tasks"]
    assert [task["name"] for task in tasks] == ["task_1", "task_2"]
    (option,) = load(tmp_path / "out", base)[0].traits.options
    assert option.words == ("task_1", "task_2")


def test_tasks_that_change_nothing_are_no_adapter(tmp_path: Path) -> None:
    path = FEED_FORWARD[0]
    zero = {f"{path}.lora_A": torch.ones(2, 32), f"{path}.lora_B": torch.zeros(48, 2)}
    torch.save(zero, tmp_path / "Backbone_task_0.pth")
    refused("gs_lora", tmp_path / "Backbone_task_0.pth", "no task changes anything")


# --------------------------------------------------------------------------- DV-LoRA
@torch.no_grad()
def with_vectors(base: PreTrainedModel) -> tuple[State, nn.Module]:
    state, model = dict(base.state_dict()), copy.deepcopy(base)
    for path in FEED_FORWARD:
        weight = model.get_submodule(path).weight
        out, num_in = weight.shape
        a, b = torch.randn(RANK, num_in) * 0.4, torch.randn(out, RANK) * 0.4
        u, v = torch.randn(RANK, 1), torch.randn(out, 1)
        names = zip("ABUV", (a, b, u, v), strict=True)
        state |= {f"{path}.lora_{name}": tensor for name, tensor in names}
        weight += (v * b) @ (u * a)
    return state, model


def test_a_model_with_vectors_becomes_its_deltas(tmp_path: Path) -> None:
    base = tiny_llama()
    state, model = with_vectors(base)
    source = tmp_path / "depth_model.pth"
    # The trainer stores the size of its images beside the tensors.
    torch.save({**state, "height": 224, "width": 280, "use_stereo": False}, source)
    notes = converted("dv_lora", source, tmp_path / "out", base=base.state_dict())
    assert any("alpha is taken to be the rank, 4" in note for note in notes)
    plan, deltas = load(tmp_path / "out", base)
    assert (plan.family, plan.rank) == ("dv_lora", RANK)
    assert_same(apply(base, deltas), model, base)
    converted("dv_lora", source, tmp_path / "scaled", base=base.state_dict(), alpha=6.0, rank=RANK)
    assert config_of(tmp_path / "scaled")["lora_alpha"] == 6


def test_what_is_no_part_of_a_language_model_is_refused_or_left_out_aloud(tmp_path: Path) -> None:
    base = tiny_llama()
    state, _ = with_vectors(base)
    source = tmp_path / "depth_model.pth"
    torch.save(state | {"depth_head.conv_depth_1.head.0.weight": torch.ones(2, 2)}, source)
    refused("dv_lora", source, "have no place in the adapter: 'depth_head", base=base.state_dict())
    refused("dv_lora", source, "--deltas-only")
    notes = converted("dv_lora", source, tmp_path / "out", deltas_only=True)
    assert "left out unseen" in notes[0]
    torch.save({**state, "depth": 3}, source)
    refused("dv_lora", source, "'depth' of type int")
    torch.save({**state, "height": 3}, source)
    refused("dylora", source, "'height' of type int")
    torch.save({k: t for k, t in state.items() if not k.endswith("lora_U")}, source)
    refused("dv_lora", source, "has no lora_U")
    torch.save(state, source)
    refused("dv_lora", source, "expected 3 everywhere", rank=3)


# --------------------------------------------------------------------------- B-LoRA
CONTENT, STYLE = "model.layers.0", "model.layers.1"
HALVES = {"content": CONTENT, "style": STYLE}


@torch.no_grad()
def with_halves(base: PreTrainedModel, prefix: str = "unet.") -> tuple[State, nn.Module]:
    state, model = {}, copy.deepcopy(base)
    for layer in (CONTENT, STYLE):
        for name in ("q_proj", "v_proj", "o_proj"):
            path = f"{layer}.self_attn.{name}"
            weight = model.get_submodule(path).weight
            down, up = (
                torch.randn(RANK, weight.shape[1]) * 0.3,
                torch.randn(len(weight), RANK) * 0.3,
            )
            state[f"{prefix}{path}.lora.down.weight"] = down
            state[f"{prefix}{path}.lora.up.weight"] = up
            weight += up @ down
    return state, model


def test_a_file_of_both_halves_becomes_one_adapter_or_two(tmp_path: Path) -> None:
    base = tiny_llama()
    state, model = with_halves(base)
    (tmp_path / "run").mkdir()
    save_file(state, tmp_path / "run" / "pytorch_lora_weights.safetensors")
    notes = converted("b_lora", tmp_path / "run", tmp_path / "both", halves=HALVES)
    assert any("acts squared" in note for note in notes)
    plan, both = load(tmp_path / "both", base)
    assert plan.traits.is_scale_squared
    assert_same(apply(base, both), model, base)
    found: dict[int, Any] = {}
    for half, block in HALVES.items():
        out = tmp_path / half
        notes = converted("b_lora", tmp_path / "run", out, halves={half: block})
        assert notes[0] == "3 modules outside of the half were left out"
        assert config_of(out)["halves"] == {half: [block]}
        _, deltas = load(out, base)
        assert len(deltas) == 3
        found |= deltas
    assert_same(apply(base, found), model, base)


def test_the_blocks_of_sdxl_are_known_by_the_names_of_the_halves(tmp_path: Path) -> None:
    state: State = {}
    blocks = {"content": "up_blocks.0.attentions.0", "style": "up_blocks.0.attentions.1"}
    for block in blocks.values():
        path = f"unet.{block}.transformer_blocks.0.attn1.to_out.0.lora"
        state |= {f"{path}.down.weight": torch.ones(2, 3), f"{path}.up.weight": torch.ones(3, 2)}
    source = tmp_path / "w.safetensors"
    save_file(state, source)
    converted("b_lora", source, tmp_path / "both")
    assert config_of(tmp_path / "both")["halves"] == {h: [b] for h, b in blocks.items()}
    converted("b_lora", source, tmp_path / "style", halves={"style": None})
    keys = load_file(tmp_path / "style" / "adapter_model.safetensors").keys()
    assert all(key.startswith(f"{blocks['style']}.transformer_blocks.0.attn1") for key in keys)
    refused("b_lora", source, "--half is 'form'", halves={"form": None})
    refused("b_lora", source, "no module of the source lies in x", halves={"content": "x"})
    other = "unet.up_blocks.0.attentions.2.transformer_blocks.0.attn1.to_q.lora"
    third = {f"{other}.down.weight": torch.ones(2, 3), f"{other}.up.weight": torch.ones(3, 2)}
    save_file(state | third, source)
    refused("b_lora", source, "1 modules lie in neither half")
    save_file(state | {"text_encoder.alpha": torch.ones(1)}, source)
    refused("b_lora", source, "tensors of other kinds")
    converted("b_lora", source, tmp_path / "rest", deltas_only=True)


# --------------------------------------------------------------------------- ExPLoRA
@torch.no_grad()
def extended(base: PreTrainedModel, rank: int = 3, seed: int = 5) -> PreTrainedModel:
    """LoRA on queries and values of all blocks but the last, which is trained whole, and norms; all
    of it merged, as ExPLoRA publishes it.
    """
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    *_, last = (path for path, _ in model.named_modules() if path.endswith((".0", ".1")))
    for path, module in model.named_modules():
        if not hasattr(module, "weight") or path.endswith(("embed_tokens", "lm_head")):
            continue
        if module.weight.dim() == 1 or path.startswith(f"{last}."):
            for parameter in module.parameters():
                parameter += torch.randn(parameter.shape) * 0.1
        elif path.endswith((".q_proj", ".v_proj")):
            out, num_in = module.weight.shape
            module.weight += torch.randn(out, rank) @ torch.randn(rank, num_in) * 0.1
        elif path.endswith("qkv_proj"):
            size, num_in = base.config.hidden_size, module.weight.shape[1]
            for rows in (slice(0, size), slice(size + size // 2, None)):
                piece = module.weight[rows]
                piece += torch.randn(len(piece), rank) @ torch.randn(rank, num_in) * 0.1
    return model


@pytest.mark.parametrize("has_biases", [False, True])
def test_a_merged_model_becomes_an_ordinary_adapter(has_biases: bool, tmp_path: Path) -> None:
    base = tiny_llama(has_biases=has_biases)
    model = extended(base)
    torch.save(model.state_dict(), tmp_path / "merged.pth")
    notes = converted("explora", tmp_path / "merged.pth", tmp_path / "out", base=base.state_dict())
    plan, deltas = load(tmp_path / "out", base)
    assert plan.family == "lora"
    assert_same(apply(base, deltas), model, base)
    assert_same(reload(base, tmp_path / "out"), model, base)
    config = config_of(tmp_path / "out")
    linears = [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj")]
    assert (config["r"], config["target_modules"]) == (3, linears)
    assert "model.layers.1.mlp.up_proj" in config["modules_to_save"]
    assert "model.norm" in config["modules_to_save"]
    assert "model.layers.0.mlp.up_proj" not in config["modules_to_save"]
    assert "difference of rank 3;" in notes[0]
    cut_off = float(notes[0].partition("at most ")[2].split()[0])
    assert 0 < cut_off < 2e-7, "as much as float32 rounds these weights"


def test_ranks_may_differ_and_rows_that_are_equal_stay_so(tmp_path: Path) -> None:
    """A fused projection: queries and values have a LoRA each, the keys between them none."""
    base = tiny_phi3()
    model = extended(base)
    with torch.no_grad():
        gate = model.get_submodule("model.layers.0.mlp.gate_up_proj").weight
        gate += torch.randn(len(gate), 1) @ torch.randn(1, gate.shape[1]) * 0.1
    torch.save(model.state_dict(), tmp_path / "merged.pth")
    converted("explora", tmp_path / "merged.pth", tmp_path / "out", base=base.state_dict())
    _, deltas = load(tmp_path / "out", base)
    assert_same(apply(base, deltas), model, base)
    assert_same(reload(base, tmp_path / "out"), model, base)
    config = config_of(tmp_path / "out")
    assert config["r"] == 6
    assert config["rank_pattern"] == {"model.layers.0.mlp.gate_up_proj": 1}
    key = "base_model.model.model.layers.0.self_attn.qkv_proj.lora_B.weight"
    b = load_file(tmp_path / "out" / "adapter_model.safetensors")[key]
    size = base.config.hidden_size
    assert not b[size : size + size // 2].any(), "the keys' rows are the base's, bit for bit"


@pytest.mark.parametrize("is_base_rounded", [True, False])
def test_weights_that_were_rounded_have_the_rank_of_their_training(
    is_base_rounded: bool, tmp_path: Path
) -> None:
    """A bfloat16 checkpoint of a float32 base, or the other way round."""
    base = tiny_llama()
    model = extended(base)
    before, after = base.state_dict(), model.state_dict()
    rounded = {k: t.bfloat16() for k, t in (before if is_base_rounded else after).items()}
    before, after = (rounded, after) if is_base_rounded else (before, rounded)
    torch.save(after, tmp_path / "merged.pth")
    notes = converted("explora", tmp_path / "merged.pth", tmp_path / "out", base=before)
    config = config_of(tmp_path / "out")
    assert config["r"] == 3
    assert config["rank_pattern"] == {}
    assert not any(".layers.0.mlp." in f".{path}" for path in config["modules_to_save"])
    assert "tensors are the base's own" in notes[1]
    _, deltas = load(tmp_path / "out", base)
    assert_same(apply(base, deltas), model, base, tolerance=2e-2)


def test_larger_ranks_than_the_given_one_are_replaced_whole(tmp_path: Path) -> None:
    base = tiny_llama()
    model = extended(base)
    with torch.no_grad():
        o_proj = model.get_submodule("model.layers.0.self_attn.o_proj").weight
        o_proj += torch.randn(32, 5) @ torch.randn(5, 32) * 0.1
    torch.save(model.state_dict(), tmp_path / "merged.pth")
    given = {"base": base.state_dict()}
    converted("explora", tmp_path / "merged.pth", tmp_path / "out", **given)
    assert config_of(tmp_path / "out")["r"] == 5
    converted("explora", tmp_path / "merged.pth", tmp_path / "limited", rank=3, **given)
    config = config_of(tmp_path / "limited")
    assert config["r"] == 3
    assert "model.layers.0.self_attn.o_proj" in config["modules_to_save"]
    _, deltas = load(tmp_path / "limited", base)
    assert_same(apply(base, deltas), model, base)


def test_what_is_no_extension_of_the_base_is_refused(tmp_path: Path) -> None:
    base = tiny_llama()
    before, after = base.state_dict(), extended(base).state_dict()
    source = tmp_path / "merged.pth"

    def check(words: str, given: State | None = None, **tensors: torch.Tensor) -> None:
        torch.save(after | tensors, source)
        refused("explora", source, words, base=before if given is None else given)

    torch.save(after, source)
    refused("explora", source, "give --base")
    check("none of the base's: 'head.weight'", **{"head.weight": torch.ones(2, 2)})
    check("has shape", **{"lm_head.weight": torch.ones(8, 32)})
    check("a trained embedding", **{"model.embed_tokens.weight": torch.ones(64, 32)})
    check("NaN or infinity", **{"model.norm.weight": torch.full((32,), float("nan"))})
    extra = "model.layers.0.scale"
    check("no place in an adapter", before | {extra: torch.ones(2)}, **{extra: torch.zeros(2)})
    torch.save(before, source)
    refused("explora", source, "there is no adapter in the source", base=before)
    noise = {k: t * 1.001 for k, t in before.items() if "embed" not in k}
    torch.save(before | noise, source)
    refused("explora", source, "there is no adapter in the source", base=before)
    other = tiny_gpt2()
    changed = {
        k: t + 1 if k.endswith("c_attn.weight") else t for k, t in other.state_dict().items()
    }
    torch.save(changed, source)
    refused("explora", source, "input first", base=other.state_dict())


def test_a_tied_head_and_a_part_of_the_model_are_read(tmp_path: Path) -> None:
    base = tiny_llama(tied=True)
    model = extended(base)
    before = {k: t for k, t in base.state_dict().items() if k != "lm_head.weight"}
    after = {k: t for k, t in model.state_dict().items() if "layers.0.mlp" not in k}
    torch.save(after, tmp_path / "merged.pth")
    notes = converted("explora", tmp_path / "merged.pth", tmp_path / "out", base=before)
    assert any("3 tensors of the base are not in the source" in note for note in notes)
    _, deltas = load(tmp_path / "out", base)
    assert_same(apply(base, deltas), model, base)
