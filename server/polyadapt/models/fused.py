"""The modules that models/fuse.py puts where they provably compute the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from polyadapt.models.adapted import AdaptedLinear, adapt_norm_
from polyadapt.models.base import LayerCache
from polyadapt.ops import pointwise
from polyadapt.ops.attention import AttentionBatch
from polyadapt.ops.gated_matmul import Site
from polyadapt.ops.linear import PackedWeight
from polyadapt.ops.mixture import MixedMlp, add_mixed_, mix_
from polyadapt.ops.native.layer import Layer, LayerSpec, Product, Step


class FusedNorm(nn.Module):
    """Root mean square norm in one step, and each row's adapter. weight float32 [width]: what the
    last product uses, which is `offset` more than the model keeps.

    row_dim: which dimension of x counts the plan's rows; site None: no adapter can change it.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        eps: float,
        *,
        offset: float = 0.0,
        site: Site | None = None,
        row_dim: int = 0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps
        self.offset = offset
        self.site = site
        self.row_dim = row_dim

    def forward(self, x: torch.Tensor, row_dim: int | None = None) -> torch.Tensor:
        """x [..., width] -> the same shape and dtype."""
        y = pointwise.rms_norm(x, self.weight, self.eps)
        if self.site is not None and self.site.id in self.site.plan.overrides:
            adapt_norm_(
                y, x, self.site, self.row_dim if row_dim is None else row_dim, self._with_weight
            )
        return y

    def _with_weight(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return pointwise.rms_norm(x, weight.float() + self.offset, self.eps)


class FusedRotary(nn.Module):
    """Rotary angles from a table by position: no trigonometry in a step, and the same bits for a
    position wherever it stands in the batch.
    """

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        super().__init__()
        self.cos = cos  # [positions, rotary]
        self.sin = sin

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids int64 [1, rows] -> cos and sin [1, rows, rotary]; x is not looked at."""
        at = position_ids[0]
        return self.cos[at][None], self.sin[at][None]


class FusedMlp(nn.Module):
    """down(act(gate x) * up x) with one product for gate and up, and one step between."""

    def __init__(self, gate_up: AdaptedLinear, down: AdaptedLinear, activation: int) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down
        self.activation = activation
        self.mixed: MixedMlp | None = None  # set where the MLP can serve experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden] -> [..., hidden]."""
        rows = x.reshape(-1, x.shape[-1])
        both = self.gate_up(rows)
        inner = pointwise.gated_activation(both, self.activation)
        if self.mixed is None or self.mixed.site.plan.mixtures is None:
            y: torch.Tensor = self.down(inner)
            return y.view(x.shape)
        h = mix_(inner, both, rows, self.mixed)
        y = self.down(inner)
        add_mixed_(y, h, self.mixed)
        return y.view(x.shape)


class FusedAttention(nn.Module):
    """Attention with one product for query, key and value, and rotary embedding in place."""

    def __init__(
        self,
        qkv: AdaptedLinear,
        output: AdaptedLinear,
        norms: tuple[FusedNorm, FusedNorm] | None,
        cache: LayerCache,
        num_heads: int,
    ) -> None:
        super().__init__()
        self.qkv = qkv
        self.output = output
        self.q_norm: FusedNorm | None = norms[0] if norms else None
        self.k_norm: FusedNorm | None = norms[1] if norms else None
        self.cache = cache
        self.num_heads = num_heads

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, None]:
        """hidden_states [1, rows, hidden], cos and sin [1, rows, rotary] -> the same shape, and
        no weights.
        """
        assert position_embeddings is not None, "the reference forward had them"
        shape = self.cache.shape
        assert shape is not None
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        rows, heads, kv_heads, dim = x.shape[0], self.num_heads, shape.num_kv_heads, shape.key_dim
        qkv = self.qkv(x).view(rows, heads + 2 * kv_heads, dim)
        cos, sin = position_embeddings[0][0], position_embeddings[1][0]
        value = qkv[:, heads + kv_heads :]
        if self.q_norm is None or self.k_norm is None:
            pointwise.rope_(qkv[:, : heads + kv_heads], cos, sin)
            query, key = qkv[:, :heads], qkv[:, heads : heads + kv_heads]
        else:
            query = self.q_norm(qkv[:, :heads], row_dim=0)
            key = self.k_norm(qkv[:, heads : heads + kv_heads], row_dim=0)
            pointwise.rope_(query, cos, sin)
            pointwise.rope_(key, cos, sin)
        out = self.cache.attend(query, key, value)
        return self.output(out.view(rows, -1)).view(hidden_states.shape), None


class FusedLayer(nn.Module):
    """x + attention(norm x), then + MLP(norm of that): in one native call where every row reads the
    cache by itself, else module by module.
    """

    def __init__(
        self, norms: tuple[FusedNorm, FusedNorm], attention: FusedAttention, mlp: FusedMlp
    ) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = norms
        self.attention = attention
        self.mlp = mlp
        self.native: tuple[Layer, Step] | None = None  # set once all layers are known

    def forward(
        self,
        hidden_states: torch.Tensor,
        *_: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **__: Any,
    ) -> torch.Tensor:
        """hidden_states [1, rows, hidden], cos and sin [1, rows, rotary] -> [1, rows, hidden],
        which may be the same tensor.
        """
        assert position_embeddings is not None, "the reference forward had them"
        batch = self.attention.cache.batch
        if self.native is not None and isinstance(batch, AttentionBatch):
            layer, step = self.native
            cos, sin = position_embeddings
            block = step.block(hidden_states[0], cos[0], sin[0], batch)
            if block is not None:
                layer.run(block)
                return hidden_states
        mixed, _ = self.attention(self.before_attention(hidden_states), position_embeddings)
        hidden: torch.Tensor = hidden_states + mixed
        mlp: torch.Tensor = self.mlp(self.before_mlp(hidden))
        return hidden + mlp

    def spec(self) -> LayerSpec | None:
        """The layer for the native call, or None where a part has no packed float32 form."""
        attention, cache = self.attention, self.attention.cache
        qkv, output = _product(attention.qkv), _product(attention.output)
        gate_up, down = _product(self.mlp.gate_up), _product(self.mlp.down)
        options, norms = cache.options, (attention.q_norm, attention.k_norm)
        heads = [norm for norm in norms if isinstance(norm, FusedNorm)]
        is_whole = cache.k.dtype is torch.float32 and cache.k.shape == cache.v.shape
        if options is None or not is_whole or len(heads) not in (0, 2):
            return None
        if qkv is None or output is None or gate_up is None or down is None:
            return None
        pair = (self.before_attention, self.before_mlp)
        return LayerSpec(
            qkv=qkv,
            output=output,
            gate_up=gate_up,
            down=down,
            norms=((pair[0].weight, pair[0].eps), (pair[1].weight, pair[1].eps)),
            norm_sites=tuple(norm.site.id for norm in (*pair, *heads) if norm.site is not None),
            head_norms=(
                ((heads[0].weight, heads[0].eps), (heads[1].weight, heads[1].eps))
                if heads
                else None
            ),
            k_cache=cache.k,
            v_cache=cache.v,
            num_heads=attention.num_heads,
            activation=self.mlp.activation,
            scale=options.scale,
            softcap=options.softcap,
            window=options.window,
            sinks=options.sinks,
        )


def _product(linear: AdaptedLinear) -> Product | None:
    weight = linear.weight
    if not isinstance(weight, PackedWeight):
        return None
    return Product(weight.panels, weight.num_out, linear.bias, linear.columns)
