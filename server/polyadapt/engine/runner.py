"""One forward of the wrapped model for the rows that the scheduler picked. Knows no queue and no
sampling.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch

from polyadapt.engine.scheduler import ScheduledRows
from polyadapt.models.base import BaseModel
from polyadapt.ops.attention import AttentionBatch, Chunk, page_slots
from polyadapt.ops.plan import PlanBuffers, RowUse, build_plan


class ModelRunner:
    """Turns scheduled rows into logits; owns the plan buffers of both row spaces.

    The head sees only the rows whose logits are wanted, so it has a plan of its own.
    """

    def __init__(
        self, base: BaseModel, tokens: PlanBuffers, outputs: PlanBuffers, page_size: int
    ) -> None:
        self.base = base
        self.tokens = tokens
        self.outputs = outputs
        self.page_size = page_size

    @torch.inference_mode()
    def run(self, batch: Seq[ScheduledRows]) -> list[torch.Tensor]:
        """Compute the rows, writing their keys and values; returns logits [k, vocabulary] per
        sequence.

        k is 0 for a chunk that does not reach the sequence's newest token, 1 otherwise, and one per
        row where prompt logprobs are wanted. The dtype is the model's.
        """
        device = self.base.device
        starts = np.cumsum([0, *(rows.num_tokens for rows in batch)])
        ids, positions = _inputs(batch)
        attention = self._attention(batch, starts, positions)
        wanted = [_wanted_rows(rows) for rows in batch]
        keep = np.concatenate([start + rows for start, rows in zip(starts, wanted, strict=False)])
        self._load_plans(batch, starts, [len(rows) for rows in wanted])
        # A step without logits still runs the head, on one row that nobody reads.
        indices = keep if len(keep) else starts[-1:] - 1
        for layer in self.base.layers:
            layer.batch = attention
        try:
            logits = self.base.module(
                input_ids=torch.from_numpy(ids)[None].to(device),
                position_ids=torch.from_numpy(positions)[None].to(device),
                use_cache=False,
                logits_to_keep=torch.from_numpy(indices).to(device),
            ).logits[0]
        finally:
            self.tokens.clear()
            self.outputs.clear()
        if not len(keep):
            logits = logits[:0]
        return list(logits.split([len(rows) for rows in wanted]))

    def _load_plans(
        self, batch: Seq[ScheduledRows], starts: np.ndarray, num_outputs: list[int]
    ) -> None:
        token_uses, output_uses = [], []
        out_start = 0
        for rows, start, num in zip(batch, starts, num_outputs, strict=False):
            slots = rows.sequence.slots
            if slots:
                scales = tuple(a.scale for a in rows.sequence.group.request.adapters)
                token_uses.append(RowUse(int(start), int(start) + rows.num_tokens, slots, scales))
                if num:
                    output_uses.append(RowUse(out_start, out_start + num, slots, scales))
            out_start += num
        self.tokens.load(build_plan(token_uses, int(starts[-1])))
        self.outputs.load(build_plan(output_uses, max(out_start, 1)))

    def _attention(
        self, batch: Seq[ScheduledRows], starts: np.ndarray, positions: np.ndarray
    ) -> AttentionBatch:
        device = self.base.device
        size = self.page_size
        write = np.empty(len(positions), np.int64)
        chunks = []
        decodes = [rows for rows in batch if rows.num_tokens == 1]
        for rows, start in zip(batch, starts, strict=False):
            at = positions[start : start + rows.num_tokens]
            pages = np.asarray(rows.sequence.pages, np.int64)
            write[start : start + rows.num_tokens] = pages[at // size] * size + at % size
            if rows.num_tokens > 1:
                num_keys = rows.sequence.num_computed + rows.num_tokens
                slots = page_slots(torch.from_numpy(pages), num_keys, size).to(device)
                chunks.append(Chunk(int(start), int(start) + rows.num_tokens, num_keys, slots))
        attention = AttentionBatch(
            torch.from_numpy(write).to(device), page_size=size, chunks=chunks
        )
        if decodes:
            width = max(len(rows.sequence.pages) for rows in decodes)
            table = np.zeros((len(decodes), width), np.int32)
            for i, rows in enumerate(decodes):
                table[i, : len(rows.sequence.pages)] = rows.sequence.pages
            lens = np.asarray([rows.sequence.num_computed + 1 for rows in decodes], np.int32)
            attention.num_decodes = len(decodes)
            attention.page_table = torch.from_numpy(table).to(device)
            attention.kv_lens = torch.from_numpy(lens).to(device)
        return attention


def _inputs(batch: Seq[ScheduledRows]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and positions int64 [rows], packed in the batch's order."""
    ids: list[int] = []
    positions = []
    for rows in batch:
        first = rows.sequence.num_computed
        ids += rows.sequence.token_ids[first : first + rows.num_tokens]
        positions.append(np.arange(first, first + rows.num_tokens))
    return np.asarray(ids, np.int64), np.concatenate(positions)


def _wanted_rows(rows: ScheduledRows) -> np.ndarray:
    """Which of the sequence's rows, counted from 0, need logits."""
    sequence = rows.sequence
    is_scored = sequence.group.request.sampling.num_prompt_logprobs is not None
    if is_scored and sequence.num_computed < sequence.num_prompt and not sequence.is_scored:
        return np.arange(rows.num_tokens)
    return np.arange(rows.num_tokens - rows.is_last_chunk, rows.num_tokens)
