"""Attention over pages with all rows in one call: every form against loops over single keys."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import pytest
import torch

from polyadapt.ops.attention import AttentionOptions
from polyadapt.ops.paged import (
    CUDA_KERNELS,
    PagedBatch,
    Span,
    choose_kernel,
    gathered,
    write_and_attend,
)

PAGE = 4
HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 8, 6
PAGES = [[5, 1, 7], [2], [0, 6]]  # of three sequences
NUM_KEYS = [11, 3, 8]
OPTIONS = [
    AttentionOptions(0.3),
    AttentionOptions(0.3, window=3),
    AttentionOptions(0.3, softcap=2.0, window=5),
    AttentionOptions(0.3, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
]


def slot_of(sequence: int, position: int) -> int:
    return PAGES[sequence][position // PAGE] * PAGE + position % PAGE


def attend_by_keys(
    query: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequence: int,
    position: int,
    options: AttentionOptions,
) -> torch.Tensor:
    """One row, key by key in Python's own numbers: [heads, value dim]."""
    out = torch.zeros(HEADS, v.shape[2])
    for head in range(HEADS):
        first = max(0, position + 1 - options.window) if options.window else 0
        slots = [slot_of(sequence, at) for at in range(first, position + 1)]
        scores = []
        for slot in slots:
            pair = zip(query[head].tolist(), k[slot, head // 2].tolist(), strict=True)
            score = sum(a * b for a, b in pair) * options.scale
            scores.append(
                options.softcap * math.tanh(score / options.softcap) if options.softcap else score
            )
        weights = [math.exp(score) for score in scores]
        total = sum(weights)
        if options.sinks is not None:
            total += math.exp(float(options.sinks[head]))
        for weight, slot in zip(weights, slots, strict=True):
            out[head] += weight / total * v[slot, head // 2]
    return out


def new_batch(lengths: list[int], value_dim: int = VALUE_DIM) -> tuple[Any, ...]:
    """Queries of each sequence's last rows, caches whose unused slots are NaN, and the batch."""
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    k = torch.full((9 * PAGE, KV_HEADS, DIM), float("nan"))
    v = torch.full((9 * PAGE, KV_HEADS, value_dim), float("nan"))
    for sequence, num_keys in enumerate(NUM_KEYS):
        for position in range(num_keys):
            k[slot_of(sequence, position)] = torch.randn(KV_HEADS, DIM)
            v[slot_of(sequence, position)] = torch.randn(KV_HEADS, value_dim)
    table = torch.zeros(3, 4, dtype=torch.int32)
    for sequence, pages in enumerate(PAGES):
        table[sequence, : len(pages)] = torch.tensor(pages)
    spans = tuple(Span(starts[i], starts[i + 1], NUM_KEYS[i]) for i in range(3))
    batch = PagedBatch(
        write_slots=torch.zeros(0, dtype=torch.int64),
        starts=torch.tensor(starts, dtype=torch.int32),
        kv_lens=torch.tensor(NUM_KEYS, dtype=torch.int32),
        page_table=table,
        page_size=PAGE,
        max_rows=max(lengths),
        max_keys=max(NUM_KEYS),
        spans=None if max(lengths) == 1 else spans,
    )
    return torch.randn(sum(lengths), HEADS, DIM), k, v, batch, spans


def expected(
    query: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spans: tuple[Span, ...],
    options: AttentionOptions,
) -> torch.Tensor:
    rows = [
        attend_by_keys(
            query[row], k, v, sequence, span.num_keys - (span.stop - span.start) + number, options
        )
        for sequence, span in enumerate(spans)
        for number, row in enumerate(range(span.start, span.stop))
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", [[1, 1, 1], [4, 3, 1], [2, 1, 8]])
def test_the_torch_form_attends_each_row_to_its_own_sequence(options, lengths):
    query, k, v, batch, spans = new_batch(lengths)
    found = gathered(query, k, v, batch, options)
    torch.testing.assert_close(found, expected(query, k, v, spans, options), rtol=1e-5, atol=1e-5)


def test_a_page_table_that_is_wider_than_the_keys_changes_nothing():
    query, k, v, batch, spans = new_batch([1, 1, 1])
    wide = PagedBatch(
        batch.write_slots, batch.starts, batch.kv_lens, batch.page_table, PAGE, 1, 4 * PAGE
    )
    found = gathered(query, k, v, wide, OPTIONS[0])
    torch.testing.assert_close(found, expected(query, k, v, spans, OPTIONS[0]))


def test_rows_are_written_before_they_are_read():
    query, k, v, batch, spans = new_batch([1, 1, 1])
    slots = [slot_of(sequence, num - 1) for sequence, num in enumerate(NUM_KEYS)]
    key, value = k[slots].clone(), v[slots].clone()
    k[slots], v[slots] = float("nan"), float("nan")
    batch = PagedBatch(
        torch.tensor(slots), batch.starts, batch.kv_lens, batch.page_table, PAGE, 1, 12
    )
    found = write_and_attend(query, key, value, k, v, batch, OPTIONS[0], gathered)
    torch.testing.assert_close(found, expected(query, k, v, spans, OPTIONS[0]))


# ------------------------------------------------------------------------- libraries' kernels
def varlen_as_documented(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    **rest: Any,
) -> torch.Tensor:
    """What torch documents of varlen_attn with a block table; key and value [pages, size, ...]."""
    assert cu_seq_k is None
    assert rest["enable_gqa"] is (query.shape[1] != key.shape[2])
    assert rest["num_splits"] == 1, "else bits follow the neighbours"
    left, right = rest["window_size"]
    assert right == 0, "causal"
    out = torch.empty(query.shape[0], query.shape[1], value.shape[3])
    for i, num_keys in enumerate(rest["seqused_k"].tolist()):
        start, stop = cu_seq_q[i : i + 2].tolist()
        assert stop - start <= max_q
        assert num_keys <= max_k
        pages = rest["block_table"][i, : -(-num_keys // key.shape[1])].long()
        k, v = key[pages].flatten(0, 1)[:num_keys], value[pages].flatten(0, 1)[:num_keys]
        k, v = (t.repeat_interleave(query.shape[1] // k.shape[1], 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", query[start:stop], k) * rest["scale"]
        at = torch.arange(num_keys - (stop - start), num_keys)[:, None]
        behind = at - torch.arange(num_keys)
        is_seen = (behind >= 0) & ((behind <= left) | (left < 0))
        weights = scores.masked_fill(~is_seen, float("-inf")).softmax(-1)
        out[start:stop] = torch.einsum("hqk,khd->qhd", weights, v)
    return out


def flash_as_documented(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **rest: Any,
) -> torch.Tensor:
    assert rest["causal"]
    assert not rest["softcap"], "as far as this one goes"
    return varlen_as_documented(
        q, k, v, cu_seqlens_q, None, max_seqlen_q, max_seqlen_k, scale=rest["softmax_scale"],
        window_size=rest["window_size"], enable_gqa=q.shape[1] != k.shape[2], num_splits=1,
        seqused_k=cu_seqlens_k.diff(), block_table=rest["block_table"],
    )  # fmt: skip


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_as_documented)
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_as_documented  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.mark.parametrize("name", CUDA_KERNELS)
@pytest.mark.parametrize("options", OPTIONS[:2])
@pytest.mark.parametrize("lengths", [[1, 1, 1], [4, 3, 1]])
def test_a_librarys_kernel_is_asked_for_what_the_torch_form_gives(
    libraries, name, options, lengths
):
    query, k, v, batch, spans = new_batch(lengths)
    found = CUDA_KERNELS[name](query, k, v, batch, options)
    torch.testing.assert_close(found, expected(query, k, v, spans, options), rtol=1e-5, atol=1e-5)


def _chosen(kernels: dict[str, Any], options: AttentionOptions = OPTIONS[0]) -> str:
    k = torch.zeros(8 * PAGE, KV_HEADS, DIM)
    return choose_kernel(options, HEADS, k, k, PAGE, kernels)[0]


def test_the_first_kernel_that_serves_a_layer_is_taken(libraries):
    assert _chosen(dict(CUDA_KERNELS)) == "torch varlen_attn"
    assert _chosen(dict(CUDA_KERNELS), OPTIONS[3]) == "torch over gathered pages", "sinks"
    assert _chosen({}) == "torch over gathered pages"


@pytest.mark.parametrize("page_size", [1, 2, 16, 256])
def test_a_kernel_can_be_tried_on_pages_of_any_size(libraries, page_size):
    k = torch.zeros(2 * page_size, KV_HEADS, DIM)
    name, kernel = choose_kernel(OPTIONS[0], HEADS, k, k, page_size, CUDA_KERNELS)
    assert (name, kernel) == ("torch varlen_attn", CUDA_KERNELS["torch varlen_attn"])


def test_a_kernel_that_raises_or_is_wrong_is_passed_over(caplog):
    def refuses(*_: Any) -> torch.Tensor:
        raise RuntimeError("Paged KV cache block size must be divisible by 256\nand more")

    def shifted(*args: Any) -> torch.Tensor:
        return gathered(*args) * 1.1

    def not_finite(*args: Any) -> torch.Tensor:
        return gathered(*args) / 0

    def blind_to_the_window(query: Any, k: Any, v: Any, batch: Any, _: Any) -> torch.Tensor:
        return gathered(query, k, v, batch, OPTIONS[0])

    wrong = {"a": refuses, "b": shifted, "c": not_finite, "d": blind_to_the_window}
    with caplog.at_level("INFO"):
        assert _chosen({**wrong, "e": gathered}, OPTIONS[1]) == "e"
    assert "not a: Paged KV cache block size must be divisible by 256" in caplog.text
    assert "not b: it differs from the torch form by 1.0e-01" in caplog.text
