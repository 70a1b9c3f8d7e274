"""Choose a kernel for every attention layer of a base on a device."""

from __future__ import annotations

from collections import Counter

import torch

from polyadapt.models.base import BaseModel
from polyadapt.ops.paged import CUDA_KERNELS, Kernel, choose_kernel


@torch.inference_mode()
def choose_kernels(base: BaseModel, page_size: int) -> str:
    """Give each layer the first kernel that serves it, and say which. The caches are allocated and
    the model was probed.
    """
    found: Counter[str] = Counter()
    chosen: dict[tuple[object, ...], tuple[str, Kernel]] = {}
    for layer in base.layers:
        assert layer.options is not None, "the model was probed at load"
        options = layer.options
        key = (
            options.scale, options.softcap, options.window, options.sinks is None, layer.num_heads,
            layer.k.shape[1:], layer.v.shape[1:],
        )  # fmt: skip
        if key not in chosen:
            kernels = CUDA_KERNELS if base.device.type == "cuda" else {}
            chosen[key] = choose_kernel(
                options, layer.num_heads, layer.k, layer.v, page_size, kernels
            )
        name, layer.kernel = chosen[key]
        found[name] += 1
    return ", ".join(found)
