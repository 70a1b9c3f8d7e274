"""Oracles for sums of adapters and for truncated ones, which PEFT does not serve, and PEFT's own
activated adapter. Imports nothing of polyadapt.
"""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils.warning import PeftWarning
from safetensors.torch import load_file
from tests.oracle import peft_oracle

PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Part:
    """One adapter of a sum: its PEFT directory, its scale, and how many components are kept."""

    directory: Path
    scale: float = 1.0
    rank: int | None = None


def logits(
    model_dir: Path, parts: Sequence[Part], ids: Sequence[int], replacing: Path | None = None
) -> torch.Tensor:
    """Return the logits [len(ids), vocabulary] of W + sum scale * alpha / b * B[:, :b] A[:b].

    b is the rank that is kept: DyLoRA's scale (arXiv 2210.07558), LoRA's when nothing is cut off.
    W is the base's, or what PEFT merges of it and `replacing`. Linears without fan_in_fan_out only.
    """
    model = peft_oracle.load_base(model_dir)
    if replacing is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in peft_oracle.py
            model = PeftModel.from_pretrained(model, str(replacing)).merge_and_unload()
    with torch.inference_mode():
        for part in parts:
            config = json.loads((part.directory / "adapter_config.json").read_text())
            tensors = load_file(part.directory / "adapter_model.safetensors")
            for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
                path = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
                a, b = tensors[key], tensors[f"{PREFIX}{path}.lora_B.weight"]
                rank = part.rank or a.shape[0]
                scale = part.scale * config["lora_alpha"] / rank
                module = model.get_submodule(path)
                delta = scale * (b[:, :rank].double() @ a[:rank].double())
                module.weight = torch.nn.Parameter((module.weight.double() + delta).float())
        return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


def activated_logits(
    model_dir: Path,
    adapter_dir: Path,
    invocation: Sequence[int],
    ids: Sequence[int],
    num_prompt: int,
) -> torch.Tensor:
    """Return PEFT's logits of an adapter that the invocation in the prompt activates."""
    directory = adapter_dir.with_name(f"{adapter_dir.name}-{'-'.join(map(str, invocation))}")
    if not directory.exists():
        shutil.copytree(adapter_dir, directory)
        file = directory / "adapter_config.json"
        config = json.loads(file.read_text()) | {"alora_invocation_tokens": list(invocation)}
        file.write_text(json.dumps(config))
    base = copy.deepcopy(peft_oracle.load_base(model_dir))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=PeftWarning)
        model = PeftModel.from_pretrained(base, str(directory), autocast_adapter_dtype=False)
    from peft.tuners.lora.variants import calculate_alora_offsets

    prompt = torch.tensor([list(ids[:num_prompt])])
    (offset,) = calculate_alora_offsets(model.peft_config, model.active_adapter, prompt)
    # Counted from the end of what is given; what was generated lies behind the prompt.
    offsets = [None if offset is None else offset + len(ids) - num_prompt]
    with torch.inference_mode():
        out = model.float().eval()(
            input_ids=torch.tensor([list(ids)]), use_cache=False, alora_offsets=offsets
        )
    return out.logits[0]
