"""A decode step of PEFT's mixed batch (adapter_names) on the same device, shape and adapters."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence

import peft
import torch
from bench.gpu_model import Shape, new_module
from transformers import DynamicCache


def time_mixed_batch(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_rows: int,
    num_adapters: int,
    rank: int,
    targets: Sequence[str],
    num_steps: int,
    make_s: float,
    sync: Callable[[], None],
    check_time: Callable[[], None],
) -> tuple[list[float], int]:
    """Seconds of each decode step of num_rows rows, in turns with the adapters, behind contexts of
    random keys and values, and how many adapters were made: no more after make_s seconds. The first
    step warms up and is not among them.
    """
    began = time.monotonic()
    module = new_module(shape, device, dtype)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(module, config, adapter_name="0", autocast_adapter_dtype=False)
        num_made = 1
        while num_made < num_adapters and time.monotonic() < began + make_s:
            model.add_adapter(str(num_made), config)
            num_made += 1
    model = model.to(device).eval()
    head = shape.hidden // shape.heads
    cache = DynamicCache(config=module.config)
    for layer_id in range(shape.layers):
        keys, values = (
            torch.randn(
                num_rows, shape.kv_heads, shape.context - 1, head, device=device, dtype=dtype
            )
            for _ in range(2)
        )
        cache.update(keys, values, layer_id)
    names = [str(number % num_made) for number in range(num_rows)]
    ids = torch.randint(3, shape.vocab, (num_rows, 1), device=device)
    times: list[float] = []
    with torch.inference_mode():
        for _ in range(num_steps + 1):
            check_time()
            sync()
            started = time.perf_counter()
            logits = model(
                input_ids=ids, past_key_values=cache, use_cache=True, adapter_names=names
            ).logits
            ids = logits[:, -1:].argmax(-1)
            sync()
            times.append(time.perf_counter() - started)
    return times[1:], num_made
