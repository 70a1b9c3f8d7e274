"""Owns the device memory of keys and values: one pair of tensors per attention layer."""

from __future__ import annotations

import torch

from polyadapt.models.base import BaseModel


def token_nbytes(base: BaseModel) -> int:
    """Bytes of keys and values that one token takes over all layers."""
    width = sum(s.num_kv_heads * (s.key_dim + s.value_dim) for s in base.layer_shapes)
    return width * base.dtype.itemsize


def allocate(base: BaseModel, num_pages: int, page_size: int) -> None:
    """Give every attention layer caches [(num_pages + 1) * page_size, kv heads, dim]; left as
    they come: nothing reads a slot before it is written, and untouched memory costs nothing.

    The last page is nobody's: rows that only fill a captured step up write there.
    """
    for layer in base.layers:
        shape = layer.shape
        assert shape is not None, "the model was probed at load"
        slots = (num_pages + 1) * page_size
        layer.k = torch.empty(
            (slots, shape.num_kv_heads, shape.key_dim), dtype=base.dtype, device=base.device
        )
        layer.v = torch.empty(
            (slots, shape.num_kv_heads, shape.value_dim), dtype=base.dtype, device=base.device
        )
