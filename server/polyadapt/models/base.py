"""The resident base model: its module, its sites' weights, and its attention layers' caches."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from polyadapt.ops.attention import AttentionBatch, AttentionOptions, paged_attention
from polyadapt.ops.linear import Weight
from polyadapt.ops.native.layer import Step
from polyadapt.ops.paged import Kernel, PagedBatch, gathered, write_and_attend
from polyadapt.types import BaseSpec


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Keys and values of one attention layer: kv heads, key width, value width."""

    num_kv_heads: int
    key_dim: int
    value_dim: int


class LayerCache:
    """One attention layer's paged keys and values, and the step's batch that reads them."""

    def __init__(self) -> None:
        self.shape: LayerShape | None = None
        self.k = torch.empty(0)
        self.v = torch.empty(0)
        self.options: AttentionOptions | None = None  # as the model asked last
        self.num_heads = 0  # of queries, as the model asked last
        self.batch: AttentionBatch | PagedBatch | None = None
        self.kernel: Kernel = gathered  # for a PagedBatch

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Rows of this step in, attention output [rows, heads, dim] out."""
        self.num_heads = query.shape[1]
        if self.shape is None:
            self.shape = LayerShape(key.shape[1], key.shape[2], value.shape[2])
        if self.batch is None:  # the probe at load: there is no cache yet
            return query.new_zeros(query.shape[0], query.shape[1], value.shape[2])
        options = self.options
        assert options is not None, "whoever attends says how"
        if isinstance(self.batch, PagedBatch):
            return write_and_attend(
                query, key, value, self.k, self.v, self.batch, options, self.kernel
            )
        return paged_attention(
            query, key, value, self.k, self.v, self.batch,
            scale=options.scale, softcap=options.softcap, window=options.window,
            sinks=options.sinks,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class WeightBlock:
    """Rows start..stop-1 of a weight that several sites may share, and the site's own bias."""

    weight: Weight
    start: int
    stop: int
    bias: torch.Tensor | None


@dataclass(slots=True)
class BaseModel:
    """The resident base: the module, its description and its attention layers in order."""

    module: nn.Module
    spec: BaseSpec
    layers: list[LayerCache]
    blocks: list[WeightBlock]  # by site id
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    step: Step | None = None  # of the native decoder layers, where all layers are
    # By the site id of a norm: which dimension of its input counts rows, in the model as loaded.
    row_dims: dict[int, int] = field(default_factory=dict)

    @property
    def layer_shapes(self) -> list[LayerShape]:
        """Cache shapes, layer by layer."""
        return [layer.shape for layer in self.layers if layer.shape is not None]

    def weight(self, site_id: int) -> torch.Tensor:
        """The site's weight [out, in] (embedding: [vocabulary, width], norm: [width], as the model
        keeps it) in the dtype that it is stored in; a view, or a copy of a packed one.
        """
        block = self.blocks[site_id]
        return block.weight.block(block.start, block.stop)

    def bias(self, site_id: int) -> torch.Tensor | None:
        """The site's base bias [out], or None."""
        return self.blocks[site_id].bias if self.spec.sites[site_id].has_bias else None
