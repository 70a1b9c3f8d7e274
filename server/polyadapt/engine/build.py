"""Put an engine together on one device: model, memory budgets, pool, scheduler. The only place
that knows all.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from polyadapt.adapters.pace import Pace
from polyadapt.adapters.pool import AdapterPool
from polyadapt.adapters.reader import AdapterReader
from polyadapt.config import EngineConfig
from polyadapt.engine import kv_cache
from polyadapt.engine.budget import DEVICE_PAGE, HOST_PAGE, MAX_SLOTS, Budget, needs_of, share
from polyadapt.engine.device_forward import DeviceForward
from polyadapt.engine.engine import Engine
from polyadapt.engine.forward import Forward, HostForward
from polyadapt.engine.pages import PageAllocator
from polyadapt.engine.prefix import PageKeys
from polyadapt.engine.runner import ModelRunner
from polyadapt.engine.scheduler import Scheduler
from polyadapt.engine.usage import RoutingUsage
from polyadapt.errors import StartupError
from polyadapt.models.attention import choose_kernels
from polyadapt.models.base import BaseModel
from polyadapt.models.fuse import fuse
from polyadapt.models.load import load_base
from polyadapt.models.mlp import adapt_mlps
from polyadapt.models.wrap import wrap_sites
from polyadapt.ops import triton_op
from polyadapt.ops.cells import COLUMNS
from polyadapt.ops.device import Device, open_device
from polyadapt.ops.device_plan import DevicePlan
from polyadapt.ops.gated_matmul import strategy
from polyadapt.ops.plan import PlanBuffers
from polyadapt.ops.slot_table import SlotTable
from polyadapt.ops.strategy import choose
from polyadapt.types import BaseSpec, EngineInfo
from polyadapt_store.sealed_files import FileSealer

logger = logging.getLogger(__name__)


def build_engine(
    config: EngineConfig,
    model_dir: Path,
    blob_root: Path,
    wake: Callable[[], None],
    *,
    name: str,
    num_sharing: int = 1,
    device: Device | None = None,
    sealer: FileSealer | None = None,
    load: Callable[..., BaseModel] = load_base,
) -> Engine:
    """Load the model and allocate its memory; raises StartupError with the reason.

    num_sharing: engines that share the device, each with its part of what is free there. `device`
    is the one that the configuration names, unless it is given. sealer: see AdapterReader. load:
    what brings the model, called as load_base.
    """
    device = device or open_device(config.device)
    dtype = _dtype(config.dtype, device.torch_device)
    page_size = config.page_size or (DEVICE_PAGE if device.is_asynchronous else HOST_PAGE)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    base = load(
        model_dir,
        name=name,
        device=device.torch_device,
        dtype=dtype,
        max_model_len=config.max_model_len,
    )
    budget = _budget(config, base, dtype, page_size, device, num_sharing)
    num_pages, adapter_bytes = budget.num_pages, budget.adapter_bytes
    base.spec = _limited(base.spec, num_pages * page_size, config.max_model_len)
    kv_cache.allocate(base, num_pages, page_size)

    # Not zeroed: no cell points anywhere yet, and untouched memory costs nothing.
    arena = torch.empty(adapter_bytes // dtype.itemsize, dtype=dtype, device=device.torch_device)
    cells = torch.zeros(MAX_SLOTS, len(base.spec.sites), COLUMNS, dtype=torch.int64)
    max_rows = max(config.max_num_batched_tokens, config.max_num_seqs)
    has_overrides = np.zeros(MAX_SLOTS, np.bool_)
    slots = _slot_table(config, device, cells, base)
    tokens, outputs = (
        PlanBuffers(
            max_rows,
            device.torch_device,
            cells,
            has_overrides,
            DevicePlan(max_rows, device, slots) if slots or device.is_asynchronous else None,
        )
        for _ in range(2)
    )
    usage = RoutingUsage(cells, device.torch_device)
    tokens.usage = usage.table
    wrap_sites(base, arena, cells, tokens, outputs, None if slots is None else slots.cells)
    chosen = choose(dtype, is_exact=config.exact)
    fused = fuse(base, page_size, chosen)
    adapt_mlps(base)

    counters: Counter[str] = Counter()
    forward: Forward
    if device.is_asynchronous:
        fused = f"{fused}; attention by {choose_kernels(base, page_size)}"
        forward = DeviceForward(
            base, device, tokens, outputs, counters, page_size=page_size, num_pages=num_pages,
            max_rows=max_rows, max_sequences=config.max_num_seqs,
        )  # fmt: skip
        forward.capture_base()
    else:
        forward = HostForward(base, page_size, is_exact=chosen.is_exact)
    pace = Pace()
    pool = AdapterPool(
        arena=arena,
        cells=cells,
        has_overrides=has_overrides,
        on_bind=usage.forget,
        on_change=(lambda slot: None) if slots is None else slots.update,
        read=AdapterReader(
            blob_root,
            base.spec,
            base,
            dtype,
            pace,
            int(config.packed_cache_bytes),
            max_elements=arena.numel(),
            sealer=sealer,
        ),
        host_bytes=int(config.host_adapter_bytes),
        counters=counters,
        wake=wake,
        pace=pace,
        # On the CPU a copy would be the same bytes in the same memory: the blob's file in the
        # page cache takes the place of the host tier.
        keeps_host_copies=device.is_asynchronous,
        device=device,
    )
    kv_dtype = str(dtype).removeprefix("torch.")
    page_keys = PageKeys(
        base_digest=base.spec.digest,
        kv_dtype=kv_dtype,
        page_size=page_size,
        is_exact=config.exact,
    )
    scheduler = Scheduler(
        PageAllocator(num_pages, page_size),
        pool,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        counters=counters,
        page_keys=page_keys if config.prefix_cache else None,
        speculative_tokens=config.speculative_tokens,
        max_model_len=base.spec.max_model_len,
        max_heavy_adapters=config.max_heavy_adapters,
    )
    info = EngineInfo(
        base=base.spec,
        eos_token_ids=base.eos_token_ids,
        device=str(device.torch_device),
        dtype=kv_dtype,
        num_pages=num_pages,
        page_size=page_size,
        max_num_seqs=config.max_num_seqs,
        max_waiting=config.max_waiting,
        adapter_bytes=adapter_bytes,
        strategy=f"{strategy(has_triton=config.triton)}; {fused}",
        max_adapters=MAX_SLOTS,
    )
    runner = ModelRunner(base, tokens, outputs, page_size, chosen, pool.ranks, forward)
    logger.info(
        "serving %s on %s in %s with %d threads: %d KV pages of %d tokens, %d MiB for adapters, %s",
        base.spec.architecture, info.device, info.dtype, torch.get_num_threads(), num_pages,
        page_size, adapter_bytes >> 20, info.strategy,
    )  # fmt: skip
    return Engine(
        info=info,
        scheduler=scheduler,
        runner=runner,
        pool=pool,
        pace=pace,
        counters=counters,
        usage=usage,
        device=device,
    )


def _slot_table(
    config: EngineConfig, device: Device, cells: torch.Tensor, base: BaseModel
) -> SlotTable | None:
    """What the Triton kernels read of the slots, if they serve."""
    if not config.triton:
        return None
    reason = triton_op.unavailable_reason(device.torch_device)
    if reason is not None:
        raise StartupError(f"--triton cannot be served: {reason}")
    is_linear = torch.tensor([site.kind == "linear" for site in base.spec.sites])
    return SlotTable(cells, device, is_linear)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the device multiplies it natively, else float32, with the reason
    logged.
    """
    if name != "auto":
        return torch.float32 if name == "float32" else torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16
    capability = torch.cpu.get_capabilities()
    is_native = bool(capability.get("amx_bf16") or capability.get("avx512_bf16"))
    if not is_native:
        logger.info("dtype float32: this processor has no bfloat16 products, which would be slower")
    return torch.bfloat16 if is_native else torch.float32


def _budget(
    config: EngineConfig,
    base: BaseModel,
    dtype: torch.dtype,
    page_size: int,
    device: Device,
    num_sharing: int,
) -> Budget:
    """After the weights are loaded: what is free now is what is left beside them."""
    needs = needs_of(
        base.spec,
        config,
        token_nbytes=kv_cache.token_nbytes(base),
        page_size=page_size,
        itemsize=dtype.itemsize,
        has_own_memory=device.is_asynchronous,
    )
    return share(
        needs,
        memory_bytes=config.memory_bytes,
        kv_cache_bytes=config.kv_cache_bytes,
        max_adapter_bytes=config.max_adapter_bytes,
        free_bytes=device.free_bytes() // num_sharing,
    )


def _limited(spec: BaseSpec, num_tokens: int, asked: int | None) -> BaseSpec:
    """The context that one sequence can really have: the KV memory bounds it."""
    if num_tokens >= spec.max_model_len:
        return spec
    if asked is not None:
        raise StartupError(
            f"the KV memory holds {num_tokens} tokens, fewer than --max-model-len {asked}; "
            "raise --kv-cache-bytes or lower --max-model-len"
        )
    logger.warning(
        "the KV memory holds %d tokens: the context is cut from %d to that",
        num_tokens, spec.max_model_len,
    )  # fmt: skip
    return replace(spec, max_model_len=num_tokens)
