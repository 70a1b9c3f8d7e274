"""A Llama of random weights, made on its device, and adapters for it: no file of weights is read.

The engine's own parts take it from there: models.load.adopt, adapters.packing.pack.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from polyadapt.adapters.adapter import ORDINARY, Delta
from polyadapt.adapters.packing import PackedAdapter, pack
from polyadapt.models.base import BaseModel
from polyadapt.models.load import ATTENTION, adopt, register_attention
from polyadapt.types import BaseSpec

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_TARGETS = (*ATTENTION_TARGETS, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a Llama, and how long its sequences are when they begin to decode."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int

    def config(self) -> LlamaConfig:
        """For transformers; no token ends a sequence by itself."""
        return LlamaConfig(
            vocab_size=self.vocab, hidden_size=self.hidden, intermediate_size=self.inner,
            num_hidden_layers=self.layers, num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads, max_position_embeddings=131_072,
            tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        )  # fmt: skip

    def write(self, directory: Path) -> Path:
        """Write its config.json, which is all that adapters are made from; return `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        self.config().save_pretrained(directory)
        return directory


LLAMA_8B = Shape("Llama-3.1-8B", 4096, 14_336, 32, 32, 8, 128_256, 1024)
TINY = Shape("a toy Llama", 64, 96, 2, 4, 2, 256, 24)


def new_module(shape: Shape, device: torch.device, dtype: torch.dtype, **options: Any) -> Any:
    """A model as transformers makes it, its weights drawn on `device` from a fixed seed."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(shape.config(), dtype=dtype, **options)
    torch.set_default_dtype(before)
    return module.to(device).eval()


def loader(shape: Shape, made_on: torch.device | None = None) -> Callable[..., BaseModel]:
    """Stands in for load_base; made_on: where weights are drawn, so that two devices get the
    same ones; None: on the device itself.
    """

    def load(
        directory: Path,
        *,
        name: str,
        device: torch.device,
        dtype: torch.dtype,
        max_model_len: int | None,
    ) -> BaseModel:
        register_attention()
        kind = dtype if made_on is None else torch.float32
        module = new_module(shape, made_on or device, kind, attn_implementation=ATTENTION)
        for parameter in module.parameters():  # not the buffers: frequencies stay in float32
            parameter.data = parameter.data.to(dtype)
        digest = hashlib.sha256(json.dumps(asdict(shape), sort_keys=True).encode()).hexdigest()
        return adopt(
            module.to(device),
            name=name,
            digest=f"sha256:{digest}",
            max_model_len=max_model_len,
        )

    return load


def pack_random(
    base: BaseSpec, dtype: torch.dtype, rank: int, targets: Sequence[str]
) -> PackedAdapter:
    """An adapter of the layers' linears that end in `targets`, about as large as a trained one:
    A ~ N(0, 1/in), B ~ N(0, (0.075 / sqrt(rank))^2).
    """
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for site_id in target_sites(base, targets):
        site = base.sites[site_id]
        a = torch.randn(rank, site.in_features, generator=generator)
        b = torch.randn(site.out_features, rank, generator=generator)
        modules[site_id] = Delta(
            a.mul_(1 / math.sqrt(site.in_features)), b.mul_(0.075 / math.sqrt(rank))
        )
    return pack(modules, base, dtype, ORDINARY)


def target_sites(base: BaseSpec, targets: Sequence[str]) -> list[int]:
    """The ids of the sites that an adapter of these targets changes."""
    ends = {f".{target}" for target in targets}
    return [
        site_id
        for site_id, site in enumerate(base.sites)
        if any(site.path.endswith(end) for end in ends)
    ]


def weight_nbytes(base: BaseSpec, itemsize: int) -> int:
    """What a step reads of the base whatever it serves: all linears and the head."""
    linears = [site for site in base.sites if site.kind == "linear"]
    return sum(site.in_features * site.out_features for site in linears) * itemsize


def adapter_nbytes(base: BaseSpec, rank: int, targets: Sequence[str], itemsize: int) -> int:
    """What a step reads of one adapter."""
    sites = [base.sites[site_id] for site_id in target_sites(base, targets)]
    return rank * sum(site.in_features + site.out_features for site in sites) * itemsize
