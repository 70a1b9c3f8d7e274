"""Adapters that replace what the base computes, mixed with others, equal a model edited by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.oracle import peft_oracle, tiny
from tests.support.engines import Driver, LogitsRecorder, greedy_request, new_engine
from torch import nn
from transformers.pytorch_utils import Conv1D

from polyadapt.adapters.adapter import ORDINARY, Delta
from polyadapt.adapters.packing import pack
from polyadapt.engine.engine import Engine
from polyadapt.ops import native
from polyadapt.types import AdapterId, BaseSpec, Request, SiteSpec

NUM_TOKENS = 4
LENGTHS = (20, 1, 17, 33, 5, 9)
GROUP = 4
KINDS = ("everything", "norms", "scales", "low_rank", "tokens")
IDS = {kind: AdapterId(kind, 1, kind) for kind in KINDS}
MAKERS: dict[str, tuple[str, ...]] = {
    "everything": ("transform", "swap", "dense", "out_scale", "bias", "weight", "low_rank"),
    "norms": ("weight",),
    "scales": ("out_scale", "bias"),  # nothing that the native layer does not compute
    "low_rank": ("low_rank",),
}


def delta(kind: str, site_id: int, site: SiteSpec, weight: torch.Tensor) -> Delta | None:
    """What the adapter of this kind does at the site; `weight` is the base's."""
    generator = torch.Generator().manual_seed(100 * site_id + KINDS.index(kind))
    num_in, num_out = site.in_features, site.out_features
    size = 0.3 * float(weight.square().mean().sqrt())

    def noise(*shape: int, of: float = 1.0) -> torch.Tensor:
        return of * torch.randn(shape, generator=generator)

    if kind == "tokens" and site.path[-7:] not in ("lm_head", "_tokens", "tok.wte"):
        return None
    parts = ("dense",) if kind == "tokens" else MAKERS[kind]
    rank = 3 if "low_rank" in parts and site.kind != "norm" else 0
    a, b = noise(rank, num_in), noise(num_out, rank, of=size / math.sqrt(3))
    if site.kind == "norm":
        has = "weight" in parts
        return Delta(
            a, b, weight=weight + noise(num_out, of=size),
            bias=noise(num_out, of=0.2) if "bias" in parts else None,
        ) if has else None  # fmt: skip
    if site.kind == "embedding":
        return Delta(
            a, b,
            bias=noise(num_out, of=size) if "bias" in parts else None,
            out_scale=noise(num_out, of=0.3) if "out_scale" in parts else None,
            dense=noise(num_in, num_out, of=size) if "dense" in parts else None,
        ) if kind != "norms" else None  # fmt: skip
    # Not every site has everything: each of two parts is seen alone as well.
    some = [part for i, part in enumerate(parts) if kind != "everything" or (site_id + i) % 3]
    eye = torch.eye(GROUP).expand(num_in // GROUP, GROUP, GROUP)
    return Delta(
        a, b,
        bias=noise(num_out, of=0.3) if "bias" in some else None,
        out_scale=noise(num_out, of=0.3) if "out_scale" in some else None,
        transform=eye + noise(*eye.shape, of=0.2) if "transform" in some else None,
        swap=noise(2, num_out, of=0.3) if "swap" in some else None,
        dense=noise(num_out, num_in, of=size) if "dense" in some else None,
        group=GROUP if "swap" in some else 0,
    )  # fmt: skip


def deltas(kind: str, base: BaseSpec, weight: Callable[[int], torch.Tensor]) -> dict[int, Delta]:
    found = {
        site_id: delta(kind, site_id, site, weight(site_id).float())
        for site_id, site in enumerate(base.sites)
    }
    return {site_id: one for site_id, one in found.items() if one is not None}


class Served:
    """An engine whose adapters are made here, not read."""

    def __init__(self, model_dir: Path, tmp_path: Path, **settings: object) -> None:
        self.engine: Engine = new_engine(model_dir, tmp_path / "blobs", **settings)
        base = self.engine.runner.base
        self.deltas = {kind: deltas(kind, base.spec, base.weight) for kind in KINDS}
        self.spec = base.spec
        self.engine.pool._read = lambda digest: pack(
            self.deltas[digest], base.spec, base.dtype, ORDINARY
        )
        self.recorder = LogitsRecorder(self.engine)
        self.driver = Driver(self.engine)

    def run(self, requests: list[Request]) -> dict[str, torch.Tensor]:
        self.driver.load(*IDS.values())
        try:
            self.driver.run(*requests)
        finally:
            self.engine.pool.close()
        return {request.id: self.recorder.of(request.id) for request in requests}


def requests() -> list[Request]:
    users = [*KINDS, "base"]
    return [
        greedy_request(
            user, tiny.prompt_ids(length, seed=i), IDS.get(user), NUM_TOKENS, num_prompt_logprobs=0
        )
        for i, (user, length) in enumerate(zip(users, LENGTHS, strict=True))
    ]


@torch.no_grad()
def edited(model_dir: Path, spec: BaseSpec, changes: dict[int, Delta]) -> nn.Module:
    """The model with each site's delta written into its own weights."""
    model = peft_oracle.load_base(model_dir)
    for site_id, change in changes.items():
        path = spec.sites[site_id].path
        module = model.get_submodule(path)
        if spec.sites[site_id].kind == "norm":
            module.weight = nn.Parameter(change.weight)
            if change.bias is not None:
                plain = module.forward
                if getattr(module, "bias", None) is not None:
                    module.bias = nn.Parameter(module.bias + change.bias)
                else:
                    module.forward = lambda x, plain=plain, bias=change.bias: plain(x) + bias
            continue
        low_rank = change.b @ change.a
        if spec.sites[site_id].kind == "embedding":
            table = module.weight
            if change.out_scale is not None:
                table = table * (1 + change.out_scale)
            for part in (change.bias, change.dense):
                table = table if part is None else table + part
            module.weight = nn.Parameter(table + low_rank.t())
            continue
        weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
        num_out, num_in = weight.shape
        bias = torch.zeros(num_out) if module.bias is None else module.bias
        if change.transform is not None:  # u = x M with M block-diagonal
            weight = weight @ torch.block_diag(*change.transform).t()
        if change.swap is not None:
            partner = torch.arange(num_out).view(-1, 2, GROUP // 2).flip(1).flatten()
            first, second = change.swap
            weight = (1 + first)[:, None] * weight + second[:, None] * weight[partner]
            bias = (1 + first) * bias + second * bias[partner]
        if change.out_scale is not None:
            weight, bias = (1 + change.out_scale)[:, None] * weight, (1 + change.out_scale) * bias
        weight = weight + low_rank + (0 if change.dense is None else change.dense)
        linear = nn.Linear(num_in, num_out)
        linear.weight = nn.Parameter(weight)
        linear.bias = nn.Parameter(bias if change.bias is None else bias + change.bias)
        model.set_submodule(path, linear)
    return model


@pytest.fixture(params=["native", "torch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "is_available", lambda: False)
    return request.param


@pytest.mark.parametrize(
    ("form", "architecture", "max_num_batched_tokens"),
    [
        *(
            ("native", architecture, 1024)
            for architecture in ("llama", "qwen3", "gemma3", "gpt2", "phi3", "qwen2")
        ),
        *(("native", architecture, 16) for architecture in ("llama", "gemma3")),
        *(("torch", architecture, 16) for architecture in ("qwen3", "gemma3")),
    ],
    indirect=["form"],
)
def test_every_row_of_a_mixed_batch_equals_a_model_edited_by_hand(
    form, architecture, max_num_batched_tokens, tiny_model, tmp_path
):
    model_dir = tiny_model(architecture)
    served = Served(model_dir, tmp_path, max_num_batched_tokens=max_num_batched_tokens)
    found = served.run(requests())
    if max_num_batched_tokens == 1024:
        assert max(served.recorder.adapters_per_step) == len(KINDS)
    assert served.engine.stats().counters["override_steps"] > 0
    norms = [site.path for site in served.spec.sites if site.kind == "norm"]
    assert any("q_norm" in path for path in norms) is (architecture in ("qwen3", "gemma3"))
    for request in requests():
        changes = served.deltas.get(request.id, {})
        assert changes or request.id == "base"
        oracle = edited(model_dir, served.spec, changes)
        seen = [*request.prompt_ids, *served.driver.transcripts[request.id].tokens[:-1]]
        with torch.inference_mode():
            logits = oracle(input_ids=torch.tensor([seen]), use_cache=False).logits[0]
        peft_oracle.assert_matches(found[request.id], logits)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_exact_mode_gives_every_row_the_bits_that_it_has_alone(architecture, tiny_model, tmp_path):
    model_dir = tiny_model(architecture)
    together = Served(model_dir, tmp_path, exact=True).run(requests())
    for request in requests():
        (alone,) = Served(model_dir, tmp_path, exact=True).run([request]).values()
        assert torch.equal(alone, together[request.id]), request.id


def test_without_exact_mode_neighbours_stay_what_they_are_within_rounding(tiny_model, tmp_path):
    model_dir = tiny_model("llama")
    together = Served(model_dir, tmp_path).run(requests())
    others = [r for r in requests() if r.id in ("base", "low_rank", "scales")]
    alone = Served(model_dir, tmp_path).run(others)
    for request in others:
        largest = float(alone[request.id].abs().max())
        difference = float((alone[request.id] - together[request.id]).abs().max())
        assert difference <= 1e-5 * largest


@pytest.mark.skipif(not native.is_available(), reason="no C compiler")
def test_only_what_replaces_something_in_a_layer_leaves_the_native_layers(tiny_model, tmp_path):
    by_id = {request.id: request for request in requests()}
    steps = {}
    for kind in ("norms", "everything", "scales", "tokens"):
        served = Served(tiny_model("llama"), tmp_path)
        before = served.engine.stats().counters["native_layer_steps"]  # the proof at start has some
        served.run([by_id[kind]])
        counters = served.engine.stats().counters
        steps[kind] = counters["native_layer_steps"] > before, counters["override_steps"] > 0
    assert steps == {
        "norms": (False, True),
        "everything": (False, True),
        "scales": (True, False),
        "tokens": (True, True),  # the embedding and the head alone
    }
