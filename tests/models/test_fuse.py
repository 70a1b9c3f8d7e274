"""Fusion happens where it is proved and nowhere else; the model computes what it did before."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tests.oracle import tiny
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from polyadapt.engine import kv_cache
from polyadapt.errors import StartupError
from polyadapt.models import fuse as fuse_module
from polyadapt.models.adapted import AdaptedLinear
from polyadapt.models.base import BaseModel
from polyadapt.models.fuse import fuse
from polyadapt.models.fused import FusedAttention, FusedLayer, FusedMlp, FusedNorm
from polyadapt.models.load import load_base
from polyadapt.models.wrap import wrap_sites
from polyadapt.ops import native
from polyadapt.ops.cells import COLUMNS
from polyadapt.ops.linear import DenseWeight, PackedWeight
from polyadapt.ops.plan import PlanBuffers
from polyadapt.ops.strategy import EXACT, choose

pytestmark = pytest.mark.skipif(not native.is_available(), reason="no C compiler")

CPU = torch.device("cpu")
PLAIN = choose(torch.float32, is_exact=False)
# architecture -> (attention, mlp, norm) modules that are fused
EXPECTED = {
    "llama": (3, 3, 7),
    "qwen2": (2, 2, 5),
    "qwen3": (2, 2, 9),
    "mistral": (2, 2, 5),
    "gemma2": (4, 4, 17),
    "gemma3": (4, 4, 25),
    "phi3": (2, 2, 5),
    "gpt2": (0, 0, 0),
    "mixtral": (2, 0, 5),
    "qwen2_moe": (2, 2, 5),
    "qwen3_moe": (2, 0, 9),
}
# Layers that are one native call; Gemma's have two norms more, experts are no MLP of this form.
NATIVE_LAYERS = {"llama": 3, "qwen2": 2, "qwen3": 2, "mistral": 2, "phi3": 2}


def wrapped(model_dir, dtype=torch.float32) -> BaseModel:
    base = load_base(model_dir, name="base", device=CPU, dtype=dtype, max_model_len=None)
    kv_cache.allocate(base, 4, 16)
    cells = torch.full((1, len(base.spec.sites), COLUMNS), -1)
    wrap_sites(base, torch.empty(0), cells, PlanBuffers(64, CPU), PlanBuffers(64, CPU))
    return base


def _kinds(base: BaseModel) -> Counter[type]:
    return Counter(type(module) for module in base.module.modules())


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_family_is_fused_as_far_as_it_can_be_proved(tiny_model, architecture):
    base = wrapped(tiny_model(architecture))
    reference = AutoModelForCausalLM.from_pretrained(tiny_model(architecture))
    weights = {site.path: base.weight(i).clone() for i, site in enumerate(base.spec.sites)}
    said = fuse(base, 16, PLAIN)
    kinds = _kinds(base)
    found = (kinds[FusedAttention], kinds[FusedMlp], kinds[FusedNorm])
    assert found == EXPECTED[architecture]
    assert kinds[FusedLayer] == NATIVE_LAYERS.get(architecture, 0)
    layers = [module for module in base.module.modules() if isinstance(module, FusedLayer)]
    assert all(layer.native is not None for layer in layers)
    assert ("FusedNorm" in said) is (found[2] > 0)
    linears = [module for module in base.module.modules() if isinstance(module, AdaptedLinear)]
    assert linears
    assert all(isinstance(linear.weight, PackedWeight) for linear in linears)
    for i, site in enumerate(base.spec.sites):
        assert torch.equal(base.weight(i), weights[site.path]), site.path
    modules = dict(reference.named_modules())
    for i, site in enumerate(base.spec.sites):
        if site.has_bias:
            assert torch.equal(base.bias(i), modules[site.path].bias)


def test_a_module_that_computes_something_else_is_left_alone(tiny_model, monkeypatch):
    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: plain(self, x) * 1.001)
    base = wrapped(tiny_model("llama"))
    said = fuse(base, 16, PLAIN)
    assert "FusedMlp" not in said
    assert _kinds(base)[LlamaMLP] == 3
    assert _kinds(base)[FusedAttention] == 3


def test_a_module_that_differs_only_far_out_or_for_large_rows_is_left_alone(
    tiny_model, monkeypatch
):
    plain = LlamaAttention.forward

    def stretched(self, hidden_states, position_embeddings=None, **kwargs):
        factor = 1 + 0.1 * (kwargs["position_ids"][0, :, None] > 300)
        return plain(self, hidden_states * factor, position_embeddings, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", stretched)
    assert "FusedAttention" not in fuse(wrapped(tiny_model("llama")), 16, PLAIN)
    monkeypatch.setattr(
        LlamaAttention,
        "forward",
        lambda self, hidden_states, *rest, **kwargs: plain(
            self, hidden_states.clamp(-20, 20), *rest, **kwargs
        ),
    )
    mlp = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: mlp(self, x.clamp(-20, 20)))
    said = fuse(wrapped(tiny_model("llama")), 16, PLAIN)
    assert "FusedAttention" not in said
    assert "FusedMlp" not in said


def test_a_module_that_cannot_be_tried_is_left_alone(tiny_model, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(fuse_module, "_joined", broken)
    monkeypatch.setattr(fuse_module, "_pack_rest", lambda _: None)
    said = fuse(wrapped(tiny_model("llama")), 16, PLAIN)
    assert "FusedNorm" in said
    assert "FusedMlp" not in said


def test_a_whole_that_differs_is_refused(tiny_model, monkeypatch):
    base = wrapped(tiny_model("llama"))
    # Proofs of the parts that are too lenient must not go unseen.
    monkeypatch.setattr(fuse_module, "_is_equal", lambda *_: True)
    plain = FusedMlp.forward
    monkeypatch.setattr(FusedMlp, "forward", lambda self, x: plain(self, x) * 1.01)
    with pytest.raises(StartupError, match=r"POLYADAPT_NATIVE=0"):
        fuse(base, 16, PLAIN)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_without_native_kernels_the_same_is_fused_in_torch(tiny_model, monkeypatch, architecture):
    monkeypatch.setattr(native, "is_available", lambda: False)
    base = wrapped(tiny_model(architecture))
    weights = {site.path: base.weight(i).clone() for i, site in enumerate(base.spec.sites)}
    fuse(base, 16, PLAIN)
    kinds = _kinds(base)
    found = (kinds[FusedAttention], kinds[FusedMlp], kinds[FusedNorm])
    assert found == EXPECTED[architecture]
    modules = list(base.module.modules())
    assert all(layer.native is None for layer in modules if isinstance(layer, FusedLayer))
    linears = [module for module in modules if isinstance(module, AdaptedLinear)]
    assert all(isinstance(linear.weight, DenseWeight) for linear in linears)
    for site_id, site in enumerate(base.spec.sites):
        assert torch.equal(base.weight(site_id), weights[site.path]), site.path


def test_a_tied_embedding_shares_the_packed_head(tiny_model):
    base = wrapped(tiny_model("qwen2"))
    paths = {site.path: site_id for site_id, site in enumerate(base.spec.sites)}
    head, embedding = paths[base.spec.head_path], paths[base.spec.embedding_path]
    fuse(base, 16, PLAIN)
    assert base.blocks[head].weight is base.blocks[embedding].weight
    assert not list(base.module.get_submodule(base.spec.embedding_path).parameters())


def test_a_bfloat16_model_is_fused_too(tiny_model):
    base = wrapped(tiny_model("llama"), torch.bfloat16)
    fuse(base, 16, PLAIN)
    assert _kinds(base)[FusedMlp] == 3


def test_exact_mode_is_promised_where_every_layer_is_fused_and_refused_elsewhere(tiny_model):
    assert "FusedRotary" in fuse(wrapped(tiny_model("qwen3")), 16, EXACT)
    with pytest.raises(StartupError, match=r"--exact cannot be promised for GPT2.*0 of 2 layers"):
        fuse(wrapped(tiny_model("gpt2")), 16, EXACT)
    with pytest.raises(StartupError, match=r"0 of 2 layers have an exact form"):
        fuse(wrapped(tiny_model("mixtral")), 16, EXACT)
    # Shared experts are as many gated MLPs as layers; the routed ones still are torch's.
    with pytest.raises(StartupError, match=r"0 of 2 layers have an exact form"):
        fuse(wrapped(tiny_model("qwen2_moe")), 16, EXACT)
    # Gemma caps its logits and turns two kinds of angles in torch.
    with pytest.raises(StartupError, match=r"0 of 4 layers have an exact form"):
        fuse(wrapped(tiny_model("gemma3")), 16, EXACT)


def test_exact_mode_is_refused_where_angles_are_computed_in_a_step(tiny_model, monkeypatch):
    monkeypatch.setattr(fuse_module, "_MAX_TABLE_BYTES", 0)
    with pytest.raises(StartupError, match=r"rotary_emb.*has no exact form"):
        fuse(wrapped(tiny_model("llama")), 16, EXACT)


def test_exact_mode_without_native_kernels_is_refused(tiny_model, monkeypatch):
    base = wrapped(tiny_model("llama"))
    monkeypatch.setattr(native, "is_available", lambda: False)
    with pytest.raises(StartupError, match="needs the native kernels"):
        fuse(base, 16, EXACT)


def test_a_model_whose_bits_follow_the_batch_is_refused_in_exact_mode(tiny_model, monkeypatch):
    base = wrapped(tiny_model("llama"))
    plain = FusedNorm.forward
    monkeypatch.setattr(
        FusedNorm, "forward", lambda self, x: plain(self, x) * (1 + 1.2e-7 * (x.shape[-2] == 1))
    )
    with pytest.raises(StartupError, match="one by one gave different bits"):
        fuse(base, 16, EXACT)
