"""Deltas written into weights do what the naive modules of the families' suite do."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.oracle.marks import write_mark
from tests.oracle.mixture import write_mixlora
from tests.oracle.routed import write_arrow, write_loramoe, write_mola, write_smora
from tests.support.basespec import base_spec
from tests.support.family_suite import IDS, apply, load
from tests.support.peft_adapters import tiny_gpt2, tiny_llama, tiny_phi3
from transformers import PreTrainedModel

from polyadapt.adapters.adapter import Delta
from polyadapt.offline.dense import NotDenseError, write_into
from polyadapt.ops.cells import Router, Routing

LINEAR_PARTS: tuple[tuple[str, ...], ...] = (
    (),
    ("bias",),
    ("out_scale",),
    ("transform",),
    ("swap",),
    ("dense",),
    ("bias", "out_scale", "transform", "swap", "dense"),
)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape) * 0.2


def delta_of(base: PreTrainedModel, path: str, parts: tuple[str, ...]) -> tuple[int, Delta]:
    sites = base_spec(base).sites
    site_id = next(i for i, site in enumerate(sites) if site.path == path)
    num_in, num_out = sites[site_id].in_features, sites[site_id].out_features
    rows, columns = (num_in, num_out) if sites[site_id].kind == "embedding" else (num_out, num_in)
    tensors = {
        "bias": noise(num_out),
        "out_scale": noise(num_out),
        "transform": noise(num_in // 8, 8, 8),
        "swap": noise(2, num_out),
        "dense": noise(rows, columns),
        "weight": 1 + noise(num_out),
    }
    chosen = {part: tensors[part] for part in parts}
    rank = 0 if sites[site_id].kind == "norm" else 3
    return site_id, Delta(
        noise(rank, num_in), noise(num_out, rank), **chosen, group=4 if "swap" in parts else 0
    )


@torch.no_grad()
def check(base: PreTrainedModel, deltas: dict[int, Delta]) -> None:
    expected = apply(base, deltas)(input_ids=IDS).logits
    written = copy.deepcopy(base)
    write_into(written, deltas, base_spec(base))
    found = written(input_ids=IDS).logits
    largest = expected.abs().max()
    assert (expected - base(input_ids=IDS).logits).abs().max() > 1e-3 * largest
    assert (found - expected).abs().max() <= 2e-5 * largest


@pytest.mark.parametrize("parts", LINEAR_PARTS, ids=str)
@pytest.mark.parametrize(
    ("new", "path"),
    [
        (tiny_llama, "model.layers.0.self_attn.v_proj"),
        (tiny_llama, "lm_head"),
        (tiny_gpt2, "transformer.h.0.attn.c_attn"),
    ],
)
def test_every_part_of_a_linear(
    new: Callable[[], PreTrainedModel], path: str, parts: tuple[str, ...]
) -> None:
    base = new()
    check(base, dict([delta_of(base, path, parts)]))


@pytest.mark.parametrize(
    "write",
    [
        write_smora, functools.partial(write_smora, rank=9, kept=4, partition=3, bias=0.0),
        write_loramoe, write_mola, functools.partial(write_arrow, temperature=0.5),
        write_mark, functools.partial(write_mark, has_veto=False, rank=2),
    ],
)  # fmt: skip
def test_components_that_rows_weigh_lie_beside_the_weights(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_llama(has_biases=True)
    deltas = load(write(base, tmp_path), base)[1]
    check(
        base,
        {i: replace(d, bias=noise(len(d.b)), out_scale=noise(len(d.b))) for i, d in deltas.items()},
    )


@pytest.mark.parametrize("options", [{}, {"routing_strategy": "mixlora-dynamic", "top_p": 0.6}])
@pytest.mark.parametrize("new", [tiny_llama, tiny_phi3, tiny_gpt2])
def test_experts_of_a_whole_mlp_stand_in_its_place(
    new: Callable[[], PreTrainedModel], options: dict[str, object], tmp_path: Path
) -> None:
    base = new()
    check(base, load(write_mixlora(base, tmp_path, **options), base)[1])


def test_what_others_weigh_is_no_weight() -> None:
    base = tiny_llama()
    site_id, delta = delta_of(base, "lm_head", ())
    routing = Routing(Router.TABLE, 3, has_router=False)
    with pytest.raises(NotDenseError, match="is not its own input"):
        write_into(copy.deepcopy(base), {site_id: replace(delta, routing=routing)}, base_spec(base))


@pytest.mark.parametrize("parts", [(), ("dense",)], ids=str)
def test_an_embedding_that_shares_its_weight_is_parted(parts: tuple[str, ...]) -> None:
    base = tiny_llama(tied=True)
    check(base, dict([delta_of(base, "model.embed_tokens", parts)]))


@pytest.mark.parametrize(
    ("new", "path", "parts"),
    [
        (tiny_llama, "model.norm", ("weight",)),
        (tiny_gpt2, "transformer.h.1.ln_1", ("weight", "bias")),
    ],
)
def test_norms(new: Callable[[], PreTrainedModel], path: str, parts: tuple[str, ...]) -> None:
    base = new()
    check(base, dict([delta_of(base, path, parts)]))


def test_what_is_no_weight_is_said() -> None:
    base = tiny_llama()
    site_id, delta = delta_of(base, "model.embed_tokens", ())
    scaled = replace(delta, transform=torch.zeros(8, 8, 8))
    with pytest.raises(NotDenseError, match="is an embedding"):
        write_into(base, {site_id: scaled}, base_spec(base))
    strange = SimpleNamespace(path="model.norm", kind="strange")
    spec = SimpleNamespace(sites=[strange], mlps=())
    with pytest.raises(NotDenseError, match="of kind strange"):
        write_into(base, {0: delta}, spec)
