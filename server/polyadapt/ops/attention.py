"""Attention over paged keys and values: the torch form and the choice of a kernel for decode rows.

Shapes follow one packed batch: decode rows first (one query each), then prefill chunks. Knows pages
and token slots, never sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from polyadapt.ops import native


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What a layer asks of attention beside its rows; see paged_attention."""

    scale: float
    softcap: float = 0.0
    window: int = 0
    sinks: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows [start, stop) are the newest tokens of one sequence that has `num_keys` tokens with
    them.
    """

    start: int
    stop: int
    num_keys: int
    slots: torch.Tensor  # int64 [num_keys], token slots of positions 0..num_keys-1


@dataclass(slots=True)
class AttentionBatch:
    """Where this step's rows read and write the cache; the runner replaces it before each
    forward.
    """

    write_slots: torch.Tensor  # int64 [rows], the token slot of each row
    num_decodes: int = 0  # rows [0, num_decodes) are one query each
    page_table: torch.Tensor | None = None  # int32 [num_decodes, pages]
    kv_lens: torch.Tensor | None = None  # int32 [num_decodes], with the new token
    page_size: int = 1
    chunks: list[Chunk] = field(default_factory=list)


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write the rows' keys and values, then attend each row to its own sequence, causally.

    query [rows, heads, dim], key and value [rows, kv heads, dim], caches [token slots, kv heads,
    dim], all of one dtype. softcap 0 and window 0 mean off; a window counts the row itself. sinks
    [heads] float32 adds one logit without a value to each head's softmax. Returns [rows, heads,
    value dim].
    """
    k_cache.index_copy_(0, batch.write_slots, key)
    v_cache.index_copy_(0, batch.write_slots, value)
    out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
    num = batch.num_decodes
    if num:
        assert batch.page_table is not None
        assert batch.kv_lens is not None
        if native.serves(query):
            out[:num] = native.paged_attention(
                query[:num], k_cache, v_cache, batch.page_table, batch.kv_lens, batch.page_size,
                scale, softcap, window, sinks,
            )  # fmt: skip
        else:
            for row in range(num):
                num_keys = int(batch.kv_lens[row])
                slots = page_slots(batch.page_table[row], num_keys, batch.page_size)
                out[row : row + 1] = attend(
                    query[row : row + 1], k_cache[slots], v_cache[slots],
                    scale=scale, softcap=softcap, window=window, sinks=sinks,
                )  # fmt: skip
    for chunk in batch.chunks:
        rows = slice(chunk.start, chunk.stop)
        if chunk.num_keys == chunk.stop - chunk.start:  # the whole sequence is in this batch
            keys, values = key[rows], value[rows]
        else:
            keys, values = k_cache[chunk.slots], v_cache[chunk.slots]
        out[rows] = attend(
            query[rows], keys, values, scale=scale, softcap=softcap, window=window, sinks=sinks
        )
    return out


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of a sequence's last rows. query [rows, heads, dim], keys [keys, kv heads,
    dim].

    Row i stands at position keys - rows + i. Grouped heads: head h reads kv head h // (heads / kv
    heads).
    """
    rows, num_keys = query.shape[0], keys.shape[0]
    q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, keys, values))
    is_grouped = query.shape[1] != keys.shape[1]
    if softcap or sinks is not None:
        return _attend_explicitly(q, k, v, scale, softcap, _mask(rows, num_keys, window, q), sinks)
    is_plain = not window or window >= num_keys
    if is_plain and (rows == num_keys or rows == 1):
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=rows > 1, scale=scale, enable_gqa=is_grouped
        )
    else:
        mask = _mask(rows, num_keys, window, q)
        y = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=is_grouped)
    return y[0].transpose(0, 1)


def page_slots(pages: torch.Tensor, num_tokens: int, page_size: int) -> torch.Tensor:
    """Token slots int64 [num_tokens] of positions 0.. from a row of page ids [pages]."""
    positions = torch.arange(num_tokens, device=pages.device)
    return pages[positions // page_size].long() * page_size + positions % page_size


def _mask(rows: int, num_keys: int, window: int, like: torch.Tensor) -> torch.Tensor:
    at = torch.arange(num_keys - rows, num_keys, device=like.device)[:, None]
    key = torch.arange(num_keys, device=like.device)[None, :]
    allowed = key <= at
    if window:
        allowed &= key > at - window
    return allowed  # [rows, keys]


def _attend_explicitly(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    softcap: float,
    mask: torch.Tensor,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1).float(), v.repeat_interleave(groups, 1).float()
    scores = (q.float() @ k.transpose(-1, -2)) * scale  # [1, heads, rows, keys]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        extra = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat([scores, extra], -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    return (weights @ v).to(q.dtype)[0].transpose(0, 1)
