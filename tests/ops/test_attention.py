"""Paged attention over mixed decode rows and chunks equals plain attention per sequence."""

from __future__ import annotations

import pytest
import torch

from polyadapt.ops import native
from polyadapt.ops.attention import AttentionBatch, Chunk, page_slots, paged_attention

PAGE = 4
HEADS, KV_HEADS, DIM, VALUE_DIM = 6, 2, 16, 16


@pytest.fixture(params=["torch", "native"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "is_available", lambda: False)
    elif not native.is_available():
        pytest.fail(f"the native kernel must build where tests run: {native.unavailable_reason()}")
    return request.param


def naive(q, keys, values, *, scale, softcap, window, sinks) -> torch.Tensor:
    """One row at a time, one head at a time, in float64."""
    rows, num_keys = q.shape[0], keys.shape[0]
    out = torch.zeros(rows, HEADS, VALUE_DIM, dtype=torch.float64)
    for i in range(rows):
        last = num_keys - rows + i
        first = max(0, last - window + 1) if window else 0
        for h in range(HEADS):
            kv = h // (HEADS // KV_HEADS)
            scores = keys[first : last + 1, kv].double() @ q[i, h].double() * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            extra = torch.tensor([float(sinks[h])] if sinks is not None else []).double()
            weights = torch.softmax(torch.cat([scores, extra]), 0)[: len(scores)]
            out[i, h] = weights @ values[first : last + 1, kv].double()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("softcap", "window", "has_sinks"),
    [(0.0, 0, False), (5.0, 0, False), (0.0, 6, False), (5.0, 6, True), (0.0, 0, True)],
)
def test_mixed_rows_equal_plain_attention(form, softcap, window, has_sinks, dtype):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    # (tokens in the cache before the step, new rows): decode rows first.
    sequences = [(7, 1), (0, 1), (30, 1), (0, 9), (5, 11), (13, 2)]
    num_slots = 40 * PAGE
    # What no sequence owns is NaN: reading it anywhere would show.
    k_cache = torch.full((num_slots, KV_HEADS, DIM), float("nan"), dtype=dtype)
    v_cache = torch.full((num_slots, KV_HEADS, VALUE_DIM), float("nan"), dtype=dtype)
    free = torch.randperm(40, generator=generator).tolist()
    sinks = torch.randn(HEADS, generator=generator) if has_sinks else None
    pages, histories, start = [], [], 0
    chunks, write = [], []
    for cached, new in sequences:
        total = cached + new
        mine = torch.tensor([free.pop() for _ in range(-(-total // PAGE))])
        slots = page_slots(mine, total, PAGE)
        keys, values = randn(total, KV_HEADS, DIM), randn(total, KV_HEADS, VALUE_DIM)
        k_cache[slots[:cached]], v_cache[slots[:cached]] = keys[:cached], values[:cached]
        write.append(slots[cached:])
        pages.append(mine)
        histories.append((keys, values))
        if new > 1:
            chunks.append(Chunk(start, start + new, total, slots))
        start += new
    num_decodes = sum(new == 1 for _, new in sequences)
    table = torch.zeros(num_decodes, max(len(p) for p in pages), dtype=torch.int32)
    for row, mine in enumerate(pages[:num_decodes]):
        table[row, : len(mine)] = mine
    batch = AttentionBatch(
        torch.cat(write),
        num_decodes,
        table,
        torch.tensor([c + 1 for c, n in sequences if n == 1], dtype=torch.int32),
        PAGE,
        chunks,
    )
    query = randn(start, HEADS, DIM)
    key = torch.cat([k[c:] for (c, _), (k, _) in zip(sequences, histories, strict=True)])
    value = torch.cat([v[c:] for (c, _), (_, v) in zip(sequences, histories, strict=True)])
    options = {"scale": 0.3, "softcap": softcap, "window": window, "sinks": sinks}
    out = paged_attention(query, key, value, k_cache, v_cache, batch, **options)
    at = 0
    for (_, new), (keys, values) in zip(sequences, histories, strict=True):
        expected = naive(query[at : at + new], keys, values, **options)
        tolerance = 1e-5 if dtype is torch.float32 else 2e-2
        assert torch.allclose(out[at : at + new].double(), expected, atol=tolerance, rtol=tolerance)
        at += new


def test_page_slots_follow_the_page_table():
    assert page_slots(torch.tensor([5, 2]), 6, 4).tolist() == [20, 21, 22, 23, 8, 9]
