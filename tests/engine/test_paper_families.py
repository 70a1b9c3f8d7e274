"""Families of papers in one batch: four ranks of one adapter, and norms of its own."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tests.oracle import papers, peft_oracle, tiny
from tests.support.engines import Driver, LogitsRecorder, greedy_request, new_engine, put_blob
from torch import nn
from transformers import AutoModelForCausalLM

from polyadapt.types import AppliedAdapter, Options, Request, SamplingParams

NUM_TOKENS = 5


@torch.no_grad()
def test_four_ranks_of_one_adapter_and_gates_in_one_batch(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model_dir = tiny_model("llama")
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    nested_dir = papers.write_dylora(model_dir, tmp_path / "nested")
    gated_dir = papers.write_sora(base, tmp_path / "gated")
    nested = put_blob(tmp_path / "blobs", nested_dir, "nested")
    gated = put_blob(tmp_path / "blobs", gated_dir, "gated")
    oracles = {f"rank{b}": papers.with_dylora(base, nested_dir, b) for b in (1, 2, 4, 8)}
    oracles |= {"gated": papers.with_sora(base, gated_dir), "base": base}

    def request(name: str, seed: int) -> Request:
        ids = tiny.prompt_ids(9 + seed, seed=seed)
        if not name.startswith("rank"):
            adapter = gated if name == "gated" else None
            return greedy_request(name, ids, adapter, NUM_TOKENS, num_prompt_logprobs=0)
        sampling = SamplingParams(
            max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, num_prompt_logprobs=0
        )
        return Request(name, tuple(ids), sampling, (AppliedAdapter(nested, rank=int(name[4:])),))

    engine = new_engine(model_dir, tmp_path / "blobs")
    recorder, driver = LogitsRecorder(engine), Driver(engine)
    driver.load(nested, gated)
    requests = [request(name, seed) for seed, name in enumerate(oracles)]
    transcripts = driver.run(*requests)
    driver.engine.pool.close()

    assert driver.rows_per_step.count(len(requests)) >= NUM_TOKENS - 1, "not in one batch"
    for one in requests:
        seen = [*one.prompt_ids, *transcripts[one.id].tokens[:-1]]
        expected = oracles[one.id](input_ids=torch.tensor([seen])).logits[0]
        try:
            peft_oracle.assert_matches(recorder.of(one.id), expected)
        except AssertionError as error:
            raise AssertionError(f"{one.id}: {error}") from error


# --------------------------------------------------------------------------- tasks and halves
TASK_RANKS = {"a": 3, "b": 2, "c": 4}
CHOICES: dict[str, tuple[str, ...] | None] = {
    "said nothing": None, "all": ("c", "a", "b"), "a": ("a",), "bc": ("b", "c"), "none": (),
}  # fmt: skip


def tasks_adapter(base: nn.Module, directory: Path) -> Path:
    """Three tasks in the feed-forward parts, the second pruned in the first block."""
    directory.mkdir()
    tensors, tasks = {}, []
    for number, (name, rank) in enumerate(TASK_RANKS.items()):
        pruned = ["model.layers.0"] if name == "b" else []
        tasks.append({"name": name, "r": rank, "pruned": pruned})
        for layer in range(1 if pruned else 0, 3):
            for module in ("up_proj", "down_proj"):
                path = f"model.layers.{layer}.mlp.{module}"
                out, num_in = base.get_submodule(path).weight.shape
                key = f"base_model.model.{path}.tasks.{number}.lora_"
                tensors[f"{key}A"] = torch.randn(rank, num_in) * 0.4
                tensors[f"{key}B"] = torch.randn(out, rank) * 0.4
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "GS_LORA", "tasks": tasks, "target_modules": ["up_proj", "down_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@torch.no_grad()
def dense_of_tasks(base: nn.Module, directory: Path, chosen: tuple[str, ...]) -> nn.Module:
    """W + 1 / r * B A of every chosen task."""
    model, tensors = copy.deepcopy(base), load_file(directory / "adapter_model.safetensors")
    names = list(TASK_RANKS)
    for key, a in tensors.items():
        path, _, rest = key.removeprefix("base_model.model.").partition(".tasks.")
        if rest.endswith("lora_A") and (name := names[int(rest[0])]) in chosen:
            update = tensors[f"{key[:-1]}B"] @ a / TASK_RANKS[name]
            model.get_submodule(path).weight += update
    return model


@torch.no_grad()
def test_choices_of_tasks_in_one_batch_and_a_revoked_one_is_the_base_to_the_bit(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model_dir = tiny_model("llama")
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    directory = tasks_adapter(base, tmp_path / "tasks")
    adapter = put_blob(tmp_path / "blobs", directory, "tasks")
    prompt = tiny.prompt_ids(12, seed=4)

    def request(name: str, chosen: tuple[str, ...] | None) -> Request:
        options: Options = () if chosen is None else (("tasks", chosen),)
        plain = greedy_request(name, prompt, None, NUM_TOKENS, num_prompt_logprobs=0)
        return replace(plain, adapters=(AppliedAdapter(adapter, options=options),))

    engine = new_engine(model_dir, tmp_path / "blobs", prefix_cache=False)
    recorder, driver = LogitsRecorder(engine), Driver(engine)
    driver.load(adapter)
    requests = [request(name, chosen) for name, chosen in CHOICES.items()]
    plain = greedy_request("base", prompt, None, NUM_TOKENS, num_prompt_logprobs=0)
    transcripts = driver.run(*requests, plain)
    driver.engine.pool.close()

    assert driver.rows_per_step.count(len(requests) + 1) >= NUM_TOKENS - 1, "not in one batch"
    assert torch.equal(recorder.of("none"), recorder.of("base"))
    for name, chosen in CHOICES.items():
        seen = [*prompt, *transcripts[name].tokens[:-1]]
        oracle = dense_of_tasks(base, directory, tuple(TASK_RANKS) if chosen is None else chosen)
        expected = oracle(input_ids=torch.tensor([seen])).logits[0]
        peft_oracle.assert_matches(recorder.of(name), expected)


def half_adapter(base: nn.Module, directory: Path, half: str, layer: int, mode: str) -> Path:
    directory.mkdir()
    tensors, block = {}, f"model.layers.{layer}"
    for module in ("q_proj", "v_proj", "o_proj"):
        path = f"{block}.self_attn.{module}"
        out, num_in = base.get_submodule(path).weight.shape
        tensors[f"{path}.lora.down.weight"] = torch.randn(4, num_in) * 0.3
        tensors[f"{path}.lora.up.weight"] = torch.randn(out, 4) * 0.3
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "B_LORA", "halves": {half: [block]}, "scale_mode": mode,
              "target_modules": ["q_proj", "v_proj", "o_proj"]}  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@torch.no_grad()
def test_content_of_one_adapter_and_style_of_another_with_scales_that_act_squared(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model_dir = tiny_model("llama")
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    content_dir = half_adapter(base, tmp_path / "content", "content", 0, "blora_squared")
    style_dir = half_adapter(base, tmp_path / "style", "style", 2, "linear")
    content = put_blob(tmp_path / "blobs", content_dir, "content")
    style = put_blob(tmp_path / "blobs", style_dir, "style")
    cases = {"both": (0.5, 1.5), "negative": (-1.5, -0.5), "content": (2.0, 0.0), "one": (1.0, 1.0)}

    engine = new_engine(model_dir, tmp_path / "blobs")
    recorder, driver = LogitsRecorder(engine), Driver(engine)
    driver.load(content, style)
    prompt = tiny.prompt_ids(12, seed=4)
    transcripts = driver.run(
        *(
            replace(
                greedy_request(name, prompt, None, NUM_TOKENS, num_prompt_logprobs=0),
                adapters=(AppliedAdapter(style, style_scale), AppliedAdapter(content, scale)),
            )
            for name, (scale, style_scale) in cases.items()
        )
    )
    driver.engine.pool.close()

    for name, (scale, style_scale) in cases.items():
        model = copy.deepcopy(base)
        for directory, factor in ((content_dir, scale), (style_dir, style_scale)):
            is_squared = directory is content_dir
            tensors = load_file(directory / "adapter_model.safetensors")
            for key in [key for key in tensors if key.endswith("lora.down.weight")]:
                # The original multiplies every tensor of the file.
                down, up = tensors[key] * factor, tensors[key.replace("down", "up")]
                up = up * factor if is_squared else up
                path = key.removesuffix(".lora.down.weight")
                model.get_submodule(path).weight += up @ down
        seen = [*prompt, *transcripts[name].tokens[:-1]]
        expected = model(input_ids=torch.tensor([seen])).logits[0]
        peft_oracle.assert_matches(recorder.of(name), expected)
