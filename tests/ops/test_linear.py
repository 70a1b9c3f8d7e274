"""The native dense kernels equal float64 torch, and a row's bits never depend on its neighbours."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from polyadapt.ops import native
from polyadapt.ops.linear import DenseWeight, PackedWeight
from polyadapt.ops.native import dense

pytestmark = pytest.mark.skipif(not native.is_available(), reason="no C compiler")

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 13, 40, 131)
SHAPES = ((1, 1), (7, 5), (16, 16), (48, 33), (131, 577), (300, 64))  # (out, in)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("is_half_weight", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_equals_float64(shape, is_half_weight, threads):
    num_out, num_in = shape
    weight = _random(num_out, num_in, seed=1)
    weight = weight.bfloat16().float() if is_half_weight else weight
    packed = PackedWeight.pack([weight])
    assert (packed.panels.dtype is torch.bfloat16) is is_half_weight
    bias = _random(num_out, seed=2)
    for rows in ROWS:
        x = _random(rows, num_in, seed=rows)
        for b in (None, bias):
            expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
            error = (packed.product(x, b).double() - expected).abs().max()
            assert error <= 2e-6 * num_in**0.5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("gemm_rows", [1, 1 << 60])
def test_some_columns_have_the_bits_of_the_whole_product(gemm_rows):
    weight, bias, x = _random(131, 77), _random(131, seed=1), _random(9, 77, seed=2)
    packed = PackedWeight.pack([weight], gemm_rows)
    for start, stop in ((0, 131), (0, 16), (16, 48), (5, 6), (30, 35), (100, 131), (130, 131)):
        for b in (None, bias):
            found = packed.columns(x, b, start, stop)
            expected = packed.product(x, b)[:, start:stop]
            if gemm_rows == 1:
                torch.testing.assert_close(found, expected)
            else:
                assert torch.equal(found, expected)
            torch.testing.assert_close(DenseWeight(weight).columns(x, b, start, stop), expected)


def test_a_rows_bits_do_not_depend_on_the_other_rows_or_the_threads():
    packed = PackedWeight.pack([_random(1000, 300).bfloat16().float()])
    x = _random(200, 300, seed=3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([packed.product(row[None], None) for row in x])
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for size in (2, 3, 5, 17, 64, 200):
                together = torch.cat([packed.product(part, None) for part in x.split(size)])
                assert torch.equal(together, alone), (threads, size)
    finally:
        torch.set_num_threads(before)


def test_strided_rows_and_bfloat16_rows():
    weight = _random(40, 24).bfloat16()
    packed = PackedWeight.pack([weight])
    wide = _random(9, 60, seed=4)
    strided = wide[:, 10:34]
    expected = strided @ weight.float().t()
    assert torch.allclose(packed.product(strided, None), expected, atol=1e-5)
    half = packed.product(strided.bfloat16(), None)
    assert half.dtype is torch.bfloat16
    exact = strided.bfloat16().double() @ weight.double().t()
    assert torch.allclose(half.double(), exact, rtol=2**-8, atol=1e-6)


def test_packing_joins_parts_and_gives_every_row_back():
    parts = [_random(rows, 9, seed=rows) for rows in (5, 20, 7)]
    packed = PackedWeight.pack(parts)
    whole = torch.cat(parts)
    assert packed.shape == (32, 9)
    assert torch.equal(packed.block(0, 32), whole)
    assert torch.equal(packed.block(5, 25), parts[1])
    ids = torch.tensor([[0, 31, 7], [16, 15, 16]])
    assert torch.equal(packed.take(ids), whole[ids])
    dense_weight = DenseWeight(whole)
    assert torch.equal(dense_weight.block(5, 25), parts[1])
    assert torch.equal(dense_weight.take(ids), whole[ids])


def test_a_weight_is_halved_only_when_nothing_is_lost():
    exact = _random(4, 8).bfloat16().float()
    assert PackedWeight.pack([exact]).nbytes == 16 * 8 * 2
    nearly = exact.clone()
    nearly[3, 7] += 1e-6
    kept = PackedWeight.pack([exact, nearly])
    assert kept.panels.dtype is torch.float32
    assert torch.equal(kept.block(4, 8), nearly)


def test_nan_stays_in_its_row():
    packed = PackedWeight.pack([_random(20, 6)])
    x = _random(3, 6)
    x[1, 2] = float("nan")
    y = packed.product(x, None)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_a_misfit_names_both_shapes():
    packed = PackedWeight.pack([_random(20, 6)])
    with pytest.raises(ValueError, match=r"x \(3, 7\).*panels \(2, 6, 16\)"):
        packed.product(_random(3, 7), None)
    with pytest.raises(ValueError, match=r"bias must be float32 \[20\]"):
        packed.product(_random(3, 6), _random(19))
    with pytest.raises(ValueError, match="weight"):
        dense.rms_norm(_random(3, 6), _random(5), 1e-5)
    with pytest.raises(ValueError, match="two halves"):
        dense.gated_activation(_random(3, 7), 0)
    with pytest.raises(ValueError, match="angles"):
        dense.rope_(_random(3, 2, 6), _random(3, 8), _random(3, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 8, 24, 100, 577])
def test_the_norm_equals_float64(width, dtype):
    weight = _random(width, seed=5)
    for shape in ((1, width), (33, width), (70, 3, width)):
        for scale in (1.0, 1e-4):
            x = (_random(*shape) * scale).to(dtype)
            exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
            tolerance = 2**-8 if dtype is torch.bfloat16 else 1e-6
            found = dense.rms_norm(x, weight, 1e-5)
            assert found.dtype is dtype
            assert torch.allclose(found.double(), exact, rtol=tolerance, atol=tolerance * 1e-2)


def test_the_norm_of_a_slice_equals_the_norm_of_its_copy():
    x = _random(5, 7, 16)
    weight = _random(16, seed=1)
    part = x[:, 2:5]
    assert torch.equal(
        dense.rms_norm(part, weight, 1e-6), dense.rms_norm(part.contiguous(), weight, 1e-6)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", range(len(dense.ACTIVATIONS)))
@pytest.mark.parametrize("width", [3, 16, 50, 1536])
def test_the_gated_activation_equals_float64(width, kind, dtype):
    x = (_random(23, 2 * width) * 6).to(dtype)
    gate, up = x.double().chunk(2, -1)
    act = F.silu(gate) if kind == 0 else F.gelu(gate, approximate="tanh")
    tolerance = 2**-8 if dtype is torch.bfloat16 else 2e-6
    found = dense.gated_activation(x, kind).double()
    assert torch.allclose(found, act * up, rtol=tolerance, atol=tolerance)


def test_activations_at_the_ends():
    gate = torch.tensor([[-1e4, -100.0, -88.5, 0.0, 88.5, 1e4, float("nan")]])
    x = torch.cat([gate, torch.ones_like(gate)], -1)
    for kind, act in enumerate((F.silu, lambda v: F.gelu(v, approximate="tanh"))):
        found = dense.gated_activation(x, kind)
        assert torch.allclose(found, act(gate), atol=1e-30, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize(("dim", "rotary"), [(16, 16), (24, 24), (64, 64), (24, 8)])
def test_rotary_embedding_equals_its_formula(dim, rotary):
    x = _random(11, 3, dim + 5)[:, :, :dim]
    angles = _random(11, rotary, seed=6)
    cos, sin = angles.cos(), angles.sin()
    head, rest = x[..., :rotary].double(), x[..., rotary:].clone()
    low, high = head.chunk(2, -1)
    turned = torch.cat([-high, low], -1)
    exact = head * cos[:, None].double() + turned * sin[:, None].double()
    dense.rope_(x, cos, sin)
    assert torch.allclose(x[..., :rotary].double(), exact, atol=1e-6)
    assert torch.equal(x[..., rotary:], rest)


def test_rows_alone_have_the_bits_of_rows_together():
    weight, x = _random(40), _random(90, 40, seed=8)
    cos, sin = _random(90, 8, seed=9), _random(90, 8, seed=10)
    together = (
        dense.rms_norm(x, weight, 1e-5),
        dense.gated_activation(x, 0),
        _roped(x.view(90, 5, 8), cos, sin),
    )
    for i in (0, 17, 89):
        row = slice(i, i + 1)
        assert torch.equal(dense.rms_norm(x[row], weight, 1e-5), together[0][row])
        assert torch.equal(dense.gated_activation(x[row], 0), together[1][row])
        assert torch.equal(_roped(x[row].view(1, 5, 8), cos[row], sin[row]), together[2][row])


def _roped(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    dense.rope_(x, cos, sin)
    return x


def test_many_rows_may_be_left_to_torch():
    weight, bias = _random(40, 24).bfloat16().float(), _random(40, seed=1)
    packed = PackedWeight.pack([weight], gemm_rows=5)
    for rows in (4, 5):
        x = _random(rows, 24, seed=2)
        assert torch.allclose(packed.product(x, bias), F.linear(x, weight, bias), atol=1e-5)


def test_no_rows_are_no_work():
    assert PackedWeight.pack([_random(20, 6)]).product(torch.empty(0, 6), None).shape == (0, 20)
