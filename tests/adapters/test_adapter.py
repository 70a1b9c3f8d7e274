"""Which adapters provably leave keys and values as the base's. No torch."""

from __future__ import annotations

import pytest

from polyadapt.adapters.adapter import keeps_keys_and_values
from polyadapt.types import BaseSpec, SiteSpec

LLAMA = (
    "model.embed_tokens",
    *(
        f"model.layers.{n}.{name}"
        for n in range(11)  # two digits: the last one is 10, not 9
        for name in (
            *(f"self_attn.{x}_proj" for x in "qkvo"),
            *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
        )
    ),
    "model.norm",
    "lm_head",
)
GPT2 = (
    *("transformer.wte", "transformer.wpe"),
    *(
        f"transformer.h.{n}.{name}"
        for n in range(2)
        for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    ),
    *("transformer.ln_f", "lm_head"),
)
PHI3 = (
    "model.embed_tokens",
    *(
        f"model.layers.{n}.{name}"
        for n in range(2)
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ),
    "lm_head",
)
LATENT = (  # its keys and values come from projections that are not known here
    "model.embed_tokens",
    *("model.layers.0.self_attn.kv_a_proj_with_mqa", "model.layers.0.self_attn.o_proj"),
    "lm_head",
)
TWO_STACKS = (*LLAMA, "vision.layers.0.k_proj", "vision.layers.0.v_proj", "vision.layers.0.o_proj")


def base(paths: tuple[str, ...]) -> BaseSpec:
    sites = tuple(SiteSpec(path, "linear", 8, 8, False) for path in paths)
    return BaseSpec("b", "sha256:b", "X", 10, 10, False, paths[0], "lm_head", sites)


def keeps(paths: tuple[str, ...], *changed: str) -> bool:
    return keeps_keys_and_values([paths.index(path) for path in changed], base(paths))


@pytest.mark.parametrize(
    ("paths", "changed"),
    [
        (LLAMA, "model.layers.10.self_attn.q_proj"),
        (LLAMA, "model.layers.10.self_attn.o_proj"),
        (LLAMA, "model.layers.10.mlp.gate_proj"),
        (LLAMA, "model.layers.10.mlp.up_proj"),
        (LLAMA, "model.layers.10.mlp.down_proj"),
        (LLAMA, "model.norm"),
        (LLAMA, "lm_head"),
        (GPT2, "transformer.h.1.attn.c_proj"),
        (GPT2, "transformer.h.1.mlp.c_fc"),
        (GPT2, "transformer.ln_f"),
        (PHI3, "model.layers.1.self_attn.o_proj"),
        (PHI3, "model.layers.1.mlp.gate_up_proj"),
    ],
)
def test_what_comes_behind_the_last_keys_and_values_keeps_them(paths, changed):
    assert keeps(paths, changed)


@pytest.mark.parametrize(
    ("paths", "changed"),
    [
        (LLAMA, "model.layers.10.self_attn.k_proj"),
        (LLAMA, "model.layers.10.self_attn.v_proj"),
        (LLAMA, "model.layers.9.self_attn.o_proj"),
        (LLAMA, "model.layers.9.mlp.down_proj"),
        (LLAMA, "model.layers.1.self_attn.q_proj"),
        (LLAMA, "model.embed_tokens"),
        (GPT2, "transformer.h.1.attn.c_attn"),
        (GPT2, "transformer.h.1.ln_1"),
        (GPT2, "transformer.h.0.mlp.c_proj"),
        (GPT2, "transformer.wpe"),
        (PHI3, "model.layers.1.self_attn.qkv_proj"),
        (LATENT, "model.layers.0.self_attn.o_proj"),
        (LATENT, "lm_head"),
        (TWO_STACKS, "lm_head"),
        (TWO_STACKS, "model.layers.10.mlp.down_proj"),
    ],
)
def test_what_comes_before_them_or_is_unknown_does_not(paths, changed):
    assert not keeps(paths, changed)


def test_one_site_before_them_is_enough():
    assert keeps(LLAMA, "lm_head", "model.layers.10.mlp.up_proj")
    assert not keeps(LLAMA, "lm_head", "model.layers.10.mlp.up_proj", "model.layers.0.mlp.up_proj")
