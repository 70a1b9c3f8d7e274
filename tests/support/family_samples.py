"""One checkpoint of every family, made for a model: what a server is filled with.

Imports nothing of polyadapt.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from tests.oracle import mixture, papers, peft_oracle, routed, xlora_oracle
from torch import nn
from transformers import AutoModelForCausalLM

SOME = ["q_proj", "v_proj", "o_proj", "down_proj"]
NORMS = ["input_layernorm", "norm"]
CAUSAL_LM = "CAUSAL_LM"

# name -> (PEFT's config, standard deviation of what is added to the trained parameters)
SAMPLES: Mapping[str, tuple[Callable[[], peft.PeftConfig], float]] = {
    "lora": (lambda: peft.LoraConfig(r=6, lora_alpha=9, target_modules="all-linear"), 0.15),
    "rslora": (lambda: peft.LoraConfig(r=5, use_rslora=True, target_modules=SOME), 0.15),
    "dora": (lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=SOME), 0.15),
    "lora-bias": (lambda: peft.LoraConfig(r=3, lora_bias=True, target_modules=SOME), 0.15),
    "lora-norms": (
        lambda: peft.LoraConfig(r=4, target_modules=SOME, modules_to_save=NORMS),
        0.1,
    ),
    "lora-head": (
        lambda: peft.LoraConfig(r=4, target_modules=SOME, modules_to_save=["lm_head"]),
        0.1,
    ),
    "lora-tokens": (
        lambda: peft.LoraConfig(r=4, target_modules=SOME, trainable_token_indices=[5, 9, 17]),
        0.15,
    ),
    "pissa": (
        lambda: peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj"]),
        0.1,
    ),
    "adalora": (
        lambda: peft.AdaLoraConfig(init_r=5, target_r=4, total_step=10, target_modules=SOME),
        0.3,
    ),
    "vera": (lambda: peft.VeraConfig(r=8, target_modules=["q_proj", "o_proj"]), 0.5),
    "miss": (lambda: peft.MissConfig(r=4, target_modules=SOME), 0.1),
    "hra": (lambda: peft.HRAConfig(r=4, target_modules=SOME), 0.3),
    "delora": (lambda: peft.DeloraConfig(r=4, target_modules=SOME), 0.3),
    "gralora": (lambda: peft.GraloraConfig(r=4, gralora_k=2, target_modules=SOME), 0.15),
    "loha": (lambda: peft.LoHaConfig(r=2, target_modules=SOME), 0.3),
    "vblora": (
        lambda: peft.VBLoRAConfig(r=4, num_vectors=16, vector_length=16, target_modules=SOME),
        0.3,
    ),
    "ia3": (
        lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        0.3,
    ),
    "oft": (lambda: peft.OFTConfig(oft_block_size=8, target_modules=SOME), 0.1),
    "boft": (lambda: peft.BOFTConfig(boft_block_size=8, target_modules=["q_proj"]), 0.1),
    "road": (lambda: peft.RoadConfig(group_size=16, target_modules=SOME), 0.3),
    "lokr": (lambda: peft.LoKrConfig(r=2, target_modules=SOME), 0.3),
    "c3a": (lambda: peft.C3AConfig(block_size=16, target_modules=SOME), 0.3),
    "fourierft": (lambda: peft.FourierFTConfig(n_frequency=40, target_modules=["q_proj"]), 1.0),
    "deft": (lambda: peft.DeftConfig(r=4, target_modules=SOME), 0.2),
    "hira": (lambda: peft.HiraConfig(r=4, target_modules=SOME), 0.5),
    "pvera": (lambda: peft.PveraConfig(r=8, target_modules=["q_proj", "o_proj"]), 0.5),
    "randlora": (lambda: peft.RandLoraConfig(r=4, target_modules=["q_proj", "v_proj"]), 0.05),
    "waveft": (
        lambda: peft.WaveFTConfig(
            n_frequency=40, wavelet_family="db1", target_modules=["q_proj"], scaling=1.0
        ),
        1.0,
    ),
    "beft": (lambda: peft.BeftConfig(target_modules=["v_proj", "down_proj"]), 0.5),
    "shira": (lambda: peft.ShiraConfig(r=3, target_modules=SOME), 0.3),
    "ln_tuning": (lambda: peft.LNTuningConfig(target_modules=NORMS), 0.3),
    "trainable_tokens": (
        lambda: peft.TrainableTokensConfig(
            target_modules=["embed_tokens"], token_indices=[4, 8, 20]
        ),
        0.5,
    ),
}

# name -> what writes the files of a family that PEFT does not save: (base, directory, seed=...)
ROUTED: Mapping[str, Callable[..., Path]] = {
    "smora": functools.partial(routed.write_smora, rank=9, kept=4, partition=3, bias=0.0),
    "smora-odd": functools.partial(routed.write_smora, rank=7, kept=3),
    "loramoe": routed.write_loramoe,
    "mola": functools.partial(routed.write_mola, num_experts=[2, 5, 4]),
    "arrow": functools.partial(routed.write_arrow, num_experts=5, top_k=3, temperature=0.7),
    "arrow-general": functools.partial(routed.write_arrow, num_general=2),
    "mixlora": functools.partial(mixture.write_mixlora, num_experts=8, top_k=2),
    "mixlora-dynamic": functools.partial(
        mixture.write_mixlora, routing_strategy="mixlora-dynamic", top_p=0.6, temperature=0.9
    ),
}

# name -> what writes a paper's own format, and the base with such an adapter inside
PAPERS: Mapping[str, tuple[Callable[[Path, Path], Path], Callable[..., nn.Module]]] = {
    "dylora": (papers.write_dylora, papers.with_dylora),
    "sora": (
        lambda model_dir, directory: papers.write_sora(peft_oracle.load_base(model_dir), directory),
        papers.with_sora,
    ),
}

# name -> what writes the files where a first pass weighs experts: (model_dir, directory, seed=...)
PROBED: Mapping[str, Callable[..., Path]] = {"xlora": xlora_oracle.make}

NAMES = (*SAMPLES, *ROUTED, *PAPERS, *PROBED)


def oracle_logits(
    name: str, model_dir: Path, directory: Path | None, ids: Sequence[int]
) -> torch.Tensor:
    """What the sample makes of the model, without polyadapt: logits [len(ids), vocabulary]."""
    if name in ROUTED:
        assert directory is not None
        oracle = mixture if name.startswith("mixlora") else routed
        return oracle.logits(model_dir, directory, ids)
    if name in PAPERS:
        model = PAPERS[name][1](peft_oracle.load_base(model_dir), directory)
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=torch.tensor([list(ids)])).logits[0]
        return logits
    if name in PROBED:
        assert directory is not None
        return xlora_oracle.logits(model_dir, xlora_oracle.load(model_dir, directory), ids)
    return peft_oracle.logits(model_dir, directory, ids)


def make_sample(name: str, model_dir: Path, directory: Path, seed: int = 1) -> Path:
    """Have PEFT save the family's checkpoint for the model at `model_dir`, or write it."""
    if name in ROUTED:
        return ROUTED[name](peft_oracle.load_base(model_dir), directory, seed=seed)
    if name in PAPERS:
        return PAPERS[name][0](model_dir, directory)
    if name in PROBED:
        return PROBED[name](model_dir, directory, seed=seed)
    make, std = SAMPLES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base: Any = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, local_files_only=True
        )
        config = make()
        config.task_type = CAUSAL_LM
        model = peft.get_peft_model(base, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
        model.eval().save_pretrained(directory)
    return directory
