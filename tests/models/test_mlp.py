"""MLPs are described where they are proved, and serve experts whether they were fused or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.oracle import tiny
from tests.support.basespec import base_spec
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from polyadapt.engine import kv_cache
from polyadapt.models.base import BaseModel
from polyadapt.models.fuse import fuse
from polyadapt.models.fused import FusedMlp
from polyadapt.models.load import load_base
from polyadapt.models.mlp import AdaptedMlp, adapt_mlps, list_mlps
from polyadapt.models.wrap import list_sites, wrap_sites
from polyadapt.ops import native
from polyadapt.ops.cells import COLUMNS
from polyadapt.ops.plan import PlanBuffers
from polyadapt.ops.strategy import choose

CPU = torch.device("cpu")
# architecture -> (MLPs that are described, of these fused)
EXPECTED = {
    "llama": (3, 3),
    "qwen2": (2, 2),
    "gemma2": (4, 4),
    "phi3": (2, 2),
    "phi": (2, 0),
    "gpt2": (2, 0),
    "mixtral": (0, 0),
    "qwen2_moe": (2, 2),  # the shared expert
}


def load(directory: Path, dtype: torch.dtype = torch.float32) -> BaseModel:
    return load_base(directory, name="m", device=CPU, dtype=dtype, max_model_len=None)


def adapted(directory: Path, *, is_fused: bool) -> BaseModel:
    base = load(directory)
    kv_cache.allocate(base, 4, 16)
    cells = torch.full((1, len(base.spec.sites), COLUMNS), -1)
    wrap_sites(base, torch.empty(0), cells, PlanBuffers(64, CPU), PlanBuffers(64, CPU))
    if is_fused:
        fuse(base, 16, choose(torch.float32, is_exact=False))
    adapt_mlps(base)
    return base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", EXPECTED)
def test_every_mlp_is_described_as_its_names_say(architecture, dtype, tiny_model):
    base = load(tiny_model(architecture), dtype)
    assert len(base.spec.mlps) == EXPECTED[architecture][0]
    assert base.spec.mlps == base_spec(base.module).mlps


def test_attention_of_the_same_shapes_is_no_mlp(tiny_model):
    base = load(tiny_model("phi3"))
    attention = base.module.get_submodule("model.layers.0.self_attn")
    shapes = [attention.qkv_proj.weight.shape, attention.o_proj.weight.shape]
    assert shapes[0][0] == 2 * shapes[1][1], "the example has other shapes by now"
    assert {mlp.path for mlp in base.spec.mlps} == {f"model.layers.{i}.mlp" for i in (0, 1)}


@pytest.mark.parametrize(
    "change",
    [
        lambda y, x: y * 1.001,
        lambda y, x: y + 0.001 * x.roll(1, -1),
        lambda y, x: y.clamp(-20, 20),
    ],
)
def test_a_module_that_computes_anything_else_is_not_described(change, tiny_model, monkeypatch):
    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: change(plain(self, x), x))
    assert load(tiny_model("llama")).spec.mlps == ()


def test_a_module_with_more_weights_is_not_described(tiny_model, monkeypatch):
    plain = Phi3MLP.__init__

    def with_norm(self, config):
        plain(self, config)
        self.scale = nn.Parameter(torch.ones(1))

    monkeypatch.setattr(Phi3MLP, "__init__", with_norm)
    assert load(tiny_model("phi3")).spec.mlps == ()


class Turned(nn.Module):
    """down stands first, and a dropout beside the activation."""

    def __init__(self, act: nn.Module, hidden: int = 12, width: int = 20) -> None:
        super().__init__()
        self.last = nn.Linear(width, hidden)
        self.drop = nn.Dropout(0.5)
        self.first = nn.Linear(hidden, width)
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.last(self.act(self.first(x))))


@pytest.mark.parametrize(
    ("act", "names"),
    [
        (nn.ReLU(), ("relu",)),
        (nn.GELU(), ("gelu", "gelu_python")),
        (nn.GELU("tanh"), ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh",
                           "gelu_accurate")),
        (nn.SiLU(), ("silu", "swish")),
        (nn.Softplus(), ()),
    ],
)  # fmt: skip
def test_an_activation_has_every_name_that_transformers_gives_it(act, names):
    model = nn.Sequential(Turned(act)).eval()
    (mlp,) = list_mlps(model, sites := list_sites(model))
    assert [sites[i].path for i in (*mlp.inputs, mlp.down)] == ["0.first", "0.last"]
    assert not mlp.is_gated
    assert set(mlp.activations) == set(names)


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("architecture", EXPECTED)
def test_every_described_mlp_can_serve_experts(architecture, is_fused, tiny_model):
    if is_fused and not native.is_available():
        pytest.skip("no C compiler")
    base = adapted(tiny_model(architecture), is_fused=is_fused)
    described, fused = EXPECTED[architecture]
    modules = list(base.module.modules())
    wrapped = [m for m in modules if isinstance(m, AdaptedMlp)]
    own = [m for m in modules if isinstance(m, FusedMlp) and m.mixed is not None]
    assert len(own) == (fused if is_fused else 0)
    assert len(own) + len(wrapped) == described == len(base.spec.mlps)
    for spec, module in zip(base.spec.mlps, own or wrapped, strict=True):
        assert tuple(module.mixed.parts[:, 0].tolist()) == spec.inputs
        assert module.mixed.site.id == spec.inputs[0]
        assert module.mixed.down == spec.down
        site = base.spec.sites[spec.down]
        assert (module.mixed.width, module.mixed.num_in) == (site.in_features, site.out_features)


@pytest.mark.parametrize("architecture", ["llama", "phi3", "phi", "gpt2"])
def test_without_experts_a_wrapped_mlp_is_the_module_itself(architecture, tiny_model):
    base, plain = adapted(tiny_model(architecture), is_fused=False), load(tiny_model(architecture))
    for spec in base.spec.mlps:
        x = torch.randn(1, 5, tiny.HIDDEN_SIZE)
        with torch.inference_mode():
            found = base.module.get_submodule(spec.path)(x)
            assert torch.equal(found, plain.module.get_submodule(spec.path)(x))
