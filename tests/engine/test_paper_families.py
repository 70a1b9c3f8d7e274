"""Families of papers in one batch: four ranks of one adapter, and norms of its own."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tests.oracle import adapters, peft_oracle, tiny
from tests.support.engines import Driver, LogitsRecorder, greedy_request, new_engine, put_blob
from torch import nn
from transformers import AutoModelForCausalLM

from polyadapt.types import AppliedAdapter, Request, SamplingParams

RANK, ALPHA, NUM_TOKENS = 8, 10, 5


def nested_adapter(model_dir: Path, directory: Path) -> Path:
    directory = adapters.make_lora(model_dir, directory, RANK, seed=2, alpha=ALPHA, strength=0.6)
    path = directory / "adapter_config.json"
    nested = {"nested": True, "rank_min": 1, "rank_max": RANK, "scale": "alpha/b"}
    path.write_text(json.dumps(json.loads(path.read_text()) | nested))
    return directory


def gated_adapter(base: nn.Module, directory: Path) -> Path:
    directory.mkdir()
    tensors, gates = {}, [[1.0, 0.0, -0.5, 0.0], [0.0] * 4, [0.3, 0.2, -1.0, 2.0]]
    linears = [f"model.layers.{i}.self_attn.o_proj" for i in range(3)]
    for path, gate in zip(linears, gates, strict=True):
        out, num_in = base.get_submodule(path).weight.shape
        tensors[f"{path}.lora.lora_A"] = torch.randn(4, num_in) * 0.2
        tensors[f"{path}.lora.lora_B"] = torch.randn(out, 4) * 0.2
        tensors[f"{path}.lora.gate"] = torch.tensor([gate])
    for path in ("model.norm", "model.layers.1.input_layernorm"):
        weight = base.get_submodule(path).weight.detach()
        tensors[f"{path}.weight"] = weight + torch.randn(weight.shape) * 0.2
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "SORA", "r": 4, "lora_alpha": ALPHA, "target_modules": ["o_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@torch.no_grad()
def dense_at_rank(base: nn.Module, directory: Path, b: int) -> nn.Module:
    """W + alpha / b * B[:, :b] A[:b]."""
    model, tensors = copy.deepcopy(base), load_file(directory / "adapter_model.safetensors")
    for key, a in tensors.items():
        path, _, name = key.removeprefix("base_model.model.").partition(".lora_")
        if name == "A.weight":
            factor = tensors[key.replace("lora_A", "lora_B")]
            model.get_submodule(path).weight += ALPHA / b * factor[:, :b] @ a[:b]
    return model


@torch.no_grad()
def dense_with_gates(base: nn.Module, directory: Path) -> nn.Module:
    """W + alpha / r_max * B diag(g) A, and the stored norms."""
    model, tensors = copy.deepcopy(base), load_file(directory / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(".")
        if name == "lora_A":
            gated = tensors[f"{path}.lora_B"] @ torch.diag(tensors[f"{path}.gate"][0]) @ tensor
            model.get_submodule(path.removesuffix(".lora")).weight += ALPHA / 4 * gated
        elif name == "weight":
            model.get_submodule(path).weight.copy_(tensor)
    return model


@torch.no_grad()
def test_four_ranks_of_one_adapter_and_gates_in_one_batch(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model_dir = tiny_model("llama")
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    nested_dir = nested_adapter(model_dir, tmp_path / "nested")
    gated_dir = gated_adapter(base, tmp_path / "gated")
    nested = put_blob(tmp_path / "blobs", nested_dir, "nested")
    gated = put_blob(tmp_path / "blobs", gated_dir, "gated")
    oracles = {f"rank{b}": dense_at_rank(base, nested_dir, b) for b in (1, 2, 4, 8)}
    oracles |= {"gated": dense_with_gates(base, gated_dir), "base": base}

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
