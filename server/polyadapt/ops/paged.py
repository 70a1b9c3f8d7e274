"""Attention over paged keys and values with all rows of a step in one call: the form for devices.

Which kernel serves a layer is decided once, at load: the first that the installed libraries have,
that takes the layer's options, and that gives on random pages what the torch form gives.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from polyadapt.ops.attention import AttentionOptions, attend, page_slots

logger = logging.getLogger(__name__)

# Of bfloat16 products whose sums are float32, relative to the largest output of the torch form.
_TOLERANCE = 2e-2


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [start, stop) are the newest tokens of a sequence that has num_keys with them."""

    start: int
    stop: int
    num_keys: int


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Where a step's rows read and write the cache, sequence after sequence; all on the device.

    Each sequence has max_rows rows at most and max_keys keys at most; a kernel may rely on both.
    spans say the same as starts and kv_lens on the host; None where every sequence has one row.
    """

    write_slots: torch.Tensor  # int64 [rows], the token slot of each row
    starts: torch.Tensor  # int32 [sequences + 1], the first row of each
    kv_lens: torch.Tensor  # int32 [sequences], with the newest tokens
    page_table: torch.Tensor  # int32 [sequences, pages]
    page_size: int
    max_rows: int
    max_keys: int
    spans: tuple[Span, ...] | None = None


# query [rows, heads, dim], caches [token slots, kv heads, dim] -> [rows, heads, value dim]
Kernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, PagedBatch, AttentionOptions], torch.Tensor
]


def write_and_attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    options: AttentionOptions,
    kernel: Kernel,
) -> torch.Tensor:
    """Write the rows' keys and values, then attend each row to its own sequence, causally.

    query [rows, heads, dim], key and value [rows, kv heads, dim], caches [token slots, kv heads,
    dim], all of one dtype. Returns [rows, heads, value dim].
    """
    k_cache.index_copy_(0, batch.write_slots, key)
    v_cache.index_copy_(0, batch.write_slots, value)
    return kernel(query, k_cache, v_cache, batch, options)


# --------------------------------------------------------------------------- the torch form
def gathered(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    options: AttentionOptions,
) -> torch.Tensor:
    """Copy every sequence's pages out of the cache, then plain attention: the specification.

    With one row per sequence nothing is read on the host: all sequences are as long as the page
    table is wide, and masked.
    """
    if batch.spans is None:
        return _decode(query, k_cache, v_cache, batch, options)
    out = query.new_empty(query.shape[0], query.shape[1], v_cache.shape[2])
    for number, span in enumerate(batch.spans):
        slots = page_slots(batch.page_table[number], span.num_keys, batch.page_size)
        out[span.start : span.stop] = attend(
            query[span.start : span.stop], k_cache[slots], v_cache[slots], scale=options.scale,
            softcap=options.softcap, window=options.window, sinks=options.sinks,
        )  # fmt: skip
    return out


def _decode(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    options: AttentionOptions,
) -> torch.Tensor:
    num_pages = min(-(-batch.max_keys // batch.page_size), batch.page_table.shape[1])
    pages = batch.page_table[:, :num_pages].long()
    k = _pages(k_cache, batch.page_size)[pages].flatten(1, 2)  # [sequences, keys, kv heads, dim]
    v = _pages(v_cache, batch.page_size)[pages].flatten(1, 2)
    at = torch.arange(k.shape[1], device=k.device)
    lens = batch.kv_lens[:, None]
    is_seen = at < lens  # [sequences, keys]
    if options.window:
        is_seen &= at >= lens - options.window
    # Behind a sequence's last key a page may hold anything, and a mask lets NaN through.
    k = k.masked_fill(~is_seen[:, :, None, None], 0)
    v = v.masked_fill(~is_seen[:, :, None, None], 0)
    q = query.unsqueeze(2)  # [sequences, heads, 1, dim]
    k, v, mask = k.transpose(1, 2), v.transpose(1, 2), is_seen[:, None, None]
    if not options.softcap and options.sinks is None:
        is_grouped = query.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(
            q, k, v, mask, scale=options.scale, enable_gqa=is_grouped
        )
        return y.squeeze(2)
    groups = query.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1).float(), v.repeat_interleave(groups, 1).float()
    scores = (q.float() @ k.transpose(-1, -2)) * options.scale  # [sequences, heads, 1, keys]
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if options.sinks is not None:
        extra = options.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, extra], -1)
    weights = torch.softmax(scores, -1)[..., : k.shape[2]]
    return (weights @ v).to(query.dtype).squeeze(2)


def _pages(cache: torch.Tensor, page_size: int) -> torch.Tensor:
    return cache.view(-1, page_size, *cache.shape[1:])


# --------------------------------------------------------------------------- libraries
def _torch_varlen(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    options: AttentionOptions,
) -> torch.Tensor:
    """torch's own flash attention; without a split of the keys a row's bits do not depend on how
    long its neighbours are.
    """
    from torch.nn.attention.varlen import varlen_attn

    _refuse(options, "torch.nn.attention.varlen")
    out = varlen_attn(
        query, _pages(k_cache, batch.page_size), _pages(v_cache, batch.page_size), batch.starts,
        None, batch.max_rows, batch.max_keys, scale=options.scale,
        window_size=(options.window - 1 if options.window else -1, 0),
        enable_gqa=query.shape[1] != k_cache.shape[1], seqused_k=batch.kv_lens,
        block_table=batch.page_table, num_splits=1,
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)
    return out


def _flash_attn(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    options: AttentionOptions,
) -> torch.Tensor:
    """The flash-attn package, which knows softcaps as well."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    if options.sinks is not None:
        raise ValueError("flash-attn adds no sinks to the softmax")
    zero = batch.kv_lens.new_zeros(1)
    out = flash_attn_varlen_func(
        query, _pages(k_cache, batch.page_size), _pages(v_cache, batch.page_size), batch.starts,
        torch.cat([zero, batch.kv_lens.cumsum(0, dtype=torch.int32)]), batch.max_rows,
        batch.max_keys, softmax_scale=options.scale, causal=True, softcap=options.softcap,
        window_size=(options.window - 1 if options.window else -1, 0),
        block_table=batch.page_table,
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)
    return out


def _refuse(options: AttentionOptions, library: str) -> None:
    if options.softcap or options.sinks is not None:
        raise ValueError(f"{library} knows neither softcaps nor sinks")


# For CUDA and half precision alone; the first that serves a layer is taken.
CUDA_KERNELS: Mapping[str, Kernel] = {
    "torch varlen_attn": _torch_varlen,
    "flash-attn": _flash_attn,
}


def choose_kernel(
    options: AttentionOptions,
    num_heads: int,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_size: int,
    kernels: Mapping[str, Kernel],
) -> tuple[str, Kernel]:
    """Return the first kernel that serves such a layer, and its name; the torch form if none does.

    Each is tried on pages of random numbers; whatever it raises, the next one is tried. The caches
    [token slots, kv heads, dim] say what they are like and are not touched.
    """
    for name, kernel in kernels.items():
        try:
            difference = _difference(kernel, options, num_heads, k_cache, v_cache, page_size)
        except Exception as error:  # a library that is missing, or refuses a shape in its own way
            logger.info("attention: not %s: %s", name, str(error).split("\n")[0])
            continue
        if difference <= _TOLERANCE:
            return name, kernel
        logger.warning(
            "attention: not %s: it differs from the torch form by %.1e of the largest output",
            name, difference,
        )  # fmt: skip
    return "torch over gathered pages", gathered


def _difference(
    kernel: Kernel,
    options: AttentionOptions,
    num_heads: int,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_size: int,
) -> float:
    """Largest difference to the torch form, of its largest element, over two batches: prompts of
    which one goes on behind cached keys, and single rows.
    """
    device, generator = k_cache.device, torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, k_cache.dtype)

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    k, v = noise(5 * page_size, *k_cache.shape[1:]), noise(5 * page_size, *v_cache.shape[1:])
    short = max(page_size // 2, 1)
    long = page_size + short
    worst = 0.0
    for first, second in ((min(3, short), min(2, short)), (1, 1)):
        batch = PagedBatch(
            write_slots=torch.zeros(0, dtype=torch.int64, device=device),
            starts=ints(0, first, first + second),
            kv_lens=ints(long, short),
            page_table=torch.stack([ints(3, 0), ints(1, 4)]),
            page_size=page_size,
            max_rows=max(first, second),
            max_keys=long,
            spans=(Span(0, first, long), Span(first, first + second, short)),
        )
        query = noise(first + second, num_heads, k_cache.shape[2])
        expected = gathered(query, k, v, batch, options).float()
        found = kernel(query, k, v, batch, options).float()
        if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
            return float("inf")
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    return worst
