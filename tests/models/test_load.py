"""Loading a base model: what is served, what is refused and why, and what wrapping leaves alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tests.oracle.tiny import LENGTH_DEPENDENT_ROPE
from transformers import AutoModelForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.pytorch_utils import Conv1D

from polyadapt.errors import StartupError
from polyadapt.models import load as load_module
from polyadapt.models.load import BaseModel, load_base, model_digest
from polyadapt.models.wrap import wrap_sites
from polyadapt.ops.cells import COLUMNS
from polyadapt.ops.plan import PlanBuffers

CPU = torch.device("cpu")


def load(directory: Path, max_model_len: int | None = None) -> BaseModel:
    return load_base(
        directory, name="m", device=CPU, dtype=torch.float32, max_model_len=max_model_len
    )


@pytest.mark.parametrize("architecture", LENGTH_DEPENDENT_ROPE)
def test_rotary_embeddings_that_see_the_neighbours_are_refused(architecture, tiny_model):
    with pytest.raises(StartupError, match="longest prompt in the batch"):
        load(tiny_model(architecture))


def test_a_directory_without_a_model_is_refused_by_name(tmp_path):
    with pytest.raises(StartupError, match=r"no config\.json"):
        load(tmp_path)


def test_a_model_without_weights_is_refused_with_transformers_reason(tiny_model, tmp_path):
    shutil.copy(tiny_model("llama") / "config.json", tmp_path)
    with pytest.raises(StartupError, match="cannot load"):
        load(tmp_path)


def test_a_context_beyond_the_models_positions_is_refused(tiny_model):
    with pytest.raises(StartupError, match="512 positions"):
        load(tiny_model("llama"), max_model_len=4096)
    assert load(tiny_model("llama"), max_model_len=100).spec.max_model_len == 100


@pytest.mark.parametrize(
    ("architecture", "is_tied", "num_norms"),
    [("llama", False, 7), ("gemma2", True, 17), ("gemma3", True, 25), ("gpt2", True, 5)],
)
def test_the_description_names_every_site(architecture, is_tied, num_norms, tiny_model):
    base = load(tiny_model(architecture))
    spec = base.spec
    assert spec.is_tied is is_tied
    assert {site.kind for site in spec.sites} == {"linear", "embedding", "norm"}
    assert sum(site.kind == "norm" for site in spec.sites) == num_norms
    assert len({site.path for site in spec.sites}) == len(spec.sites)
    assert {spec.embedding_path, spec.head_path} <= {site.path for site in spec.sites}
    reference = AutoModelForCausalLM.from_pretrained(tiny_model(architecture))
    modules = dict(reference.named_modules())
    for site_id, site in enumerate(spec.sites):
        assert site.path in modules
        if site.kind == "linear":
            shape = modules[site.path].weight.shape
            assert {site.in_features, site.out_features} == set(shape)
        elif site.kind == "norm":
            assert torch.equal(base.weight(site_id), modules[site.path].weight)
            assert site.has_bias is (architecture == "gpt2")
        assert (base.bias(site_id) is not None) is site.has_bias


def test_rows_are_told_from_as_many_heads(tiny_model, monkeypatch):
    monkeypatch.setattr(load_module, "_PROBED", 2)  # as many as key-value heads
    for architecture, row_dim in (("qwen3", 1), ("gemma3", 2)):
        base = load(tiny_model(architecture))
        paths = {base.spec.sites[i].path: dim for i, dim in base.row_dims.items()}
        dims = {path.rpartition(".")[2]: dim for path, dim in paths.items()}
        assert dims["q_norm"] == dims["k_norm"] == row_dim
        assert dims["input_layernorm"] == dims["norm"] == 1


def test_what_was_not_called_as_a_norm_is_none():
    norm, x = torch.nn.LayerNorm(4), torch.randn(1, 3, 4)
    row_dims = load_module._row_dims
    assert row_dims(norm, x, norm(x), 3, 4) == {1}
    assert row_dims(norm, x, (norm(x),), 3, 4) == set()
    assert row_dims(norm, x, norm(x)[:, :2], 3, 4) == set()
    assert row_dims(norm, x, norm(x), 3, 8) == set()
    assert row_dims(norm, x, norm(x), 2, 4) == set()


def test_what_mixes_rows_is_no_norm(tiny_model, monkeypatch):
    plain = Qwen3RMSNorm.forward
    monkeypatch.setattr(  # those of query and key stay
        Qwen3RMSNorm,
        "forward",
        lambda self, x: plain(self, x) + (x.dim() == 3) * x.mean(1, keepdim=True),
    )
    base = load(tiny_model("qwen3"))
    norms = {i: site for i, site in enumerate(base.spec.sites) if site.kind == "norm"}
    assert len(norms) == 4
    assert base.row_dims == dict.fromkeys(norms, 1)
    for site_id, site in enumerate(base.spec.sites):
        assert torch.equal(base.weight(site_id), _module(base, site_id).weight), site.path


def test_wrapping_keeps_a_tied_weight_one_tensor_and_the_base_exact(tiny_model):
    base = load(tiny_model("gpt2"))
    buffers = PlanBuffers(16, CPU), PlanBuffers(16, CPU)
    cells = torch.full((1, len(base.spec.sites), COLUMNS), -1)
    ids = torch.arange(6)[None]
    linears = [i for i, site in enumerate(base.spec.sites) if site.kind == "linear"]
    is_transposed = {i: isinstance(_module(base, i), Conv1D) for i in linears}
    before = {i: base.weight(i).clone() for i in linears}
    wrap_sites(base, torch.empty(0), cells, *buffers)
    paths = {site.path: site_id for site_id, site in enumerate(base.spec.sites)}
    head, embedding = paths[base.spec.head_path], paths[base.spec.embedding_path]
    assert base.weight(head).data_ptr() == base.weight(embedding).data_ptr()
    assert sum(is_transposed.values()) == len(linears) - 1, "all but the head are Conv1D"
    for site_id, weight in before.items():
        site = base.spec.sites[site_id]
        assert tuple(weight.shape) == (site.out_features, site.in_features), "one layout"
        assert torch.equal(base.weight(site_id), weight)
    with torch.inference_mode():
        logits = base.module(input_ids=ids, use_cache=False).logits
    assert torch.isfinite(logits).all()


def _module(base: BaseModel, site_id: int) -> torch.nn.Module:
    return base.module.get_submodule(base.spec.sites[site_id].path)


def test_the_digest_follows_the_bytes(tiny_model, tmp_path):
    source = tiny_model("llama")
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    assert model_digest(copy) == model_digest(source)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert model_digest(copy) != model_digest(source)
