"""One forward of the wrapped model over arrays that the runner has made, on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from polyadapt.engine.device_tokens import DeviceTokens
from polyadapt.models.base import BaseModel
from polyadapt.ops.attention import AttentionBatch, Chunk, page_slots


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The rows of one step, sequence after sequence, decode rows first; arrays on the host.

    ids and positions int64 [rows]; write_slots int64 [rows], the token slot of each row; starts and
    lengths int64 [sequences], the first row and the rows of each; kv_lens int64 [sequences], with
    the step's rows; page_table int32 [sequences, widest], behind a sequence's last page anything;
    keep int64 [wanted], the rows whose logits are wanted. The first num_decodes sequences have
    one row.
    """

    ids: np.ndarray
    positions: np.ndarray
    write_slots: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    kv_lens: np.ndarray
    page_table: np.ndarray
    num_decodes: int
    keep: np.ndarray


class Forward(Protocol):
    """Runs the wrapped model; the plans are loaded already."""

    def run(
        self, step: StepInputs, previous: DeviceTokens | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits [keep, vocabulary] and final hidden states [rows or more, width], which
        hold until the next run. An id of ~i is the token of row i of `previous`.
        """


class HostForward:
    """On the CPU: attention reads the cache row by row, or prompts' chunks at once."""

    def __init__(self, base: BaseModel, page_size: int, *, is_exact: bool) -> None:
        """is_exact: every row reads the cache by itself, as a decode row does."""
        self.base = base
        self._page_size = page_size
        self._is_exact = is_exact
        self._hidden = watch_hidden(base)

    def run(
        self, step: StepInputs, previous: DeviceTokens | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See Forward."""
        attention = self._attention(step)
        # A step without logits still runs the head, on one row that nobody reads.
        keep = step.keep if len(step.keep) else np.array([len(step.ids) - 1])
        for layer in self.base.layers:
            layer.batch = attention
        ids = torch.from_numpy(step.ids)
        logits = self.base.module(
            input_ids=(ids if previous is None else previous.fill(ids))[None],
            position_ids=torch.from_numpy(step.positions)[None],
            use_cache=False,
            logits_to_keep=torch.from_numpy(keep),
        ).logits[0]
        return logits[: len(step.keep)], self._hidden[0]

    def _attention(self, step: StepInputs) -> AttentionBatch:
        size, num = self._page_size, step.num_decodes
        attention = AttentionBatch(torch.from_numpy(step.write_slots), page_size=size)
        if self._is_exact:
            table = np.repeat(step.page_table, step.lengths, axis=0)
            num = len(table)
        else:
            table = step.page_table[:num]
            for number in range(num, len(step.starts)):
                start, num_keys = int(step.starts[number]), int(step.kv_lens[number])
                slots = page_slots(torch.from_numpy(step.page_table[number]), num_keys, size)
                stop = start + int(step.lengths[number])
                attention.chunks.append(Chunk(start, stop, num_keys, slots))
        if num:
            attention.num_decodes = num
            attention.page_table = torch.from_numpy(table)
            attention.kv_lens = torch.from_numpy((step.positions[:num] + 1).astype(np.int32))
        return attention


def watch_hidden(base: BaseModel) -> list[torch.Tensor]:
    """A list of one: the final hidden states [rows, width] of the last forward, after the norm."""
    found = [torch.empty(0)]

    def keep(_: torch.nn.Module, __: object, output: Any) -> None:
        found[0] = output[0][0]

    decoder: torch.nn.Module = base.module.get_decoder()  # type: ignore[operator]
    decoder.register_forward_hook(keep)
    return found
