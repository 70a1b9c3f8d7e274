"""One forward on a device: inputs in fixed tensors, decode steps as captured graphs.

A graph is captured for a number of rows and for what the plans need; rows that are missing are
padded with rows that write to a page of nobody's and belong to no adapter. Everything that a graph
reads lies in tensors that stay where they are, so that adapters, rows and gates change under it.
What no graph serves runs module by module and is counted.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import torch

from polyadapt.engine.device_tokens import DeviceTokens
from polyadapt.engine.forward import StepInputs, watch_hidden
from polyadapt.models.base import BaseModel
from polyadapt.ops.device import Device, Graph, Staging
from polyadapt.ops.paged import PagedBatch, Span
from polyadapt.ops.plan import PlanBuffers

logger = logging.getLogger(__name__)


def list_buckets(max_rows: int) -> list[int]:
    """Row counts that graphs are captured for; of a graph's rows fewer than a third are padding."""
    buckets = [1, 2, 3, 4, 6, 8, 12, 16]
    while buckets[-1] < max_rows:
        step = max(8, 1 << (buckets[-1].bit_length() - 3))
        buckets.append(buckets[-1] + step)
    return sorted({min(bucket, max_rows) for bucket in buckets})


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: Graph
    logits: torch.Tensor  # [bucket, vocabulary]
    hidden: torch.Tensor  # [bucket, width]


class DeviceForward:
    """Owns the input tensors and the graphs of one engine."""

    def __init__(
        self,
        base: BaseModel,
        device: Device,
        tokens: PlanBuffers,
        outputs: PlanBuffers,
        counters: Counter[str],
        *,
        page_size: int,
        num_pages: int,
        max_rows: int,
        max_sequences: int,
        uses_graphs: bool = True,
    ) -> None:
        """The caches have one page more than num_pages; padded rows write there."""
        self.base = base
        self._device = device
        self._tokens, self._outputs = tokens, outputs
        self._counters = counters
        self._page_size = page_size
        self._spare_page = num_pages
        self._width = -(-base.spec.max_model_len // page_size)
        self._hidden = watch_hidden(base)
        self._buckets = list_buckets(max_sequences) if uses_graphs and device.can_capture else []
        self._graphs: dict[tuple[int, Hashable], _Captured | None] = {}
        int64, int32 = np.dtype(np.int64), np.dtype(np.int32)
        self._staging = Staging(
            device,
            {
                "ids": ((max_rows,), int64),
                "positions": ((max_rows,), int64),
                "write_slots": ((max_rows,), int64),
                "keep": ((max_rows,), int64),
                "starts": ((max_sequences + 1,), int32),
                "kv_lens": ((max_sequences,), int32),
                "page_table": ((max_sequences, self._width), int32),
            },
        )
        for host in self._staging.hosts:  # behind a sequence's pages there are others, but pages
            host["page_table"].fill(0)
        for name in (
            "graph_steps", "eager_steps", "graph_captures", "graph_failures", "padded_rows"
        ):  # fmt: skip
            counters[name] += 0  # listed from the start

    @torch.inference_mode()
    def capture_base(self) -> None:
        """Capture the graphs of base rows, the largest first: the others fit into its memory."""
        started = time.monotonic()
        for bucket in reversed(self._buckets):
            self._write(_nothing(), bucket)
            self._find(bucket, None)
        if self._buckets:
            logger.info(
                "captured %d graphs of decode steps in %.1f s",
                sum(graph is not None for graph in self._graphs.values()),
                time.monotonic() - started,
            )

    def run(
        self, step: StepInputs, previous: DeviceTokens | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See forward.Forward."""
        num = len(step.ids)
        bucket = self._bucket(step)
        self._write(step, bucket or len(step.starts))
        tensors = self._staging.tensors
        if previous is not None:
            tensors["ids"][:num] = previous.fill(tensors["ids"][:num])
        captured = self._find(bucket, self._form()) if bucket else None
        if captured is not None:
            self._counters["graph_steps"] += 1
            assert bucket is not None, "a graph is captured for a bucket"
            self._counters["padded_rows"] += bucket - num
            captured.graph.replay()
            logits, hidden = captured.logits[:num], captured.hidden[:num]
            if len(step.keep) < num:
                logits = logits[tensors["keep"][: len(step.keep)]]
            return logits, hidden
        self._counters["eager_steps"] += 1
        num_sequences = len(step.starts)
        spans = None
        if step.num_decodes < num_sequences:
            ends = step.starts + step.lengths
            rows = zip(step.starts.tolist(), ends.tolist(), step.kv_lens.tolist(), strict=True)
            spans = tuple(Span(start, stop, keys) for start, stop, keys in rows)
        batch = PagedBatch(
            write_slots=tensors["write_slots"][:num],
            starts=tensors["starts"][: num_sequences + 1],
            kv_lens=tensors["kv_lens"][:num_sequences],
            page_table=tensors["page_table"][:num_sequences],
            page_size=self._page_size,
            max_rows=int(step.lengths.max()),
            max_keys=int(step.kv_lens.max()),
            spans=spans,
        )
        # A step without logits still runs the head, on one row that nobody reads.
        logits = self._forward(num, batch, tensors["keep"][: max(len(step.keep), 1)])
        return logits[: len(step.keep)], self._hidden[0]

    def _form(self) -> Hashable | None:
        """What the loaded plans need of a graph, or None if none serves them."""
        ours, heads = self._tokens.capture_form, self._outputs.capture_form
        return (ours, heads) if ours is not None and heads is not None else None

    def _bucket(self, step: StepInputs) -> int | None:
        """The rows of the graph that may serve the step."""
        num = len(step.ids)
        if step.num_decodes < len(step.starts) or not self._buckets or self._form() is None:
            return None
        at = bisect_left(self._buckets, num)
        return self._buckets[at] if at < len(self._buckets) else None

    def _write(self, step: StepInputs, num_sequences: int) -> None:
        """Send the step's arrays, padded to so many sequences if it is a decode step."""
        host = self._staging.begin()
        num, own = len(step.ids), len(step.starts)
        host["ids"][:num], host["positions"][:num] = step.ids, step.positions
        host["write_slots"][:num] = step.write_slots
        host["keep"][: len(step.keep)] = step.keep
        if not len(step.keep):
            host["keep"][0] = max(num - 1, 0)
        host["starts"][:own] = step.starts
        host["starts"][own] = num
        host["kv_lens"][:own] = step.kv_lens
        host["page_table"][:own, : step.page_table.shape[1]] = step.page_table
        num_padded = num_sequences - own
        if num_padded:
            rows = slice(num, num + num_padded)
            host["ids"][rows] = host["positions"][rows] = 0
            host["write_slots"][rows] = self._spare_page * self._page_size
            host["starts"][own + 1 : num_sequences + 1] = np.arange(num + 1, rows.stop + 1)
            host["kv_lens"][own:num_sequences] = 1
            host["page_table"][own:num_sequences, 0] = self._spare_page
        self._staging.send("page_table", num_sequences)

    def _find(self, bucket: int, form: Hashable) -> _Captured | None:
        """The graph for so many rows and what the loaded plans need; None if it has none."""
        key = (bucket, form if form is not None else self._form())
        if key not in self._graphs:
            self._graphs[key] = self._capture(bucket)
        return self._graphs[key]

    def _capture(self, bucket: int) -> _Captured | None:
        tensors = self._staging.tensors
        batch = PagedBatch(
            write_slots=tensors["write_slots"][:bucket],
            starts=tensors["starts"][: bucket + 1],
            kv_lens=tensors["kv_lens"][:bucket],
            page_table=tensors["page_table"][:bucket],
            page_size=self._page_size,
            max_rows=1,
            max_keys=self._width * self._page_size,
        )
        keep = torch.arange(bucket, device=self._device.torch_device)
        try:
            with self._tokens.widened(bucket), self._outputs.widened(bucket):
                graph, logits = self._device.capture(lambda: self._forward(bucket, batch, keep))
        except Exception:
            # Such steps go on module by module, which is slower and never wrong.
            logger.exception("a decode step of %d rows cannot be captured", bucket)
            self._counters["graph_failures"] += 1
            return None
        self._counters["graph_captures"] += 1
        return _Captured(graph, logits, self._hidden[0])

    def _forward(self, num_rows: int, batch: PagedBatch, keep: torch.Tensor) -> torch.Tensor:
        for layer in self.base.layers:
            layer.batch = batch
        tensors = self._staging.tensors
        logits: torch.Tensor = self.base.module(
            input_ids=tensors["ids"][None, :num_rows],
            position_ids=tensors["positions"][None, :num_rows],
            use_cache=False,
            logits_to_keep=keep,
        ).logits[0]
        return logits


def _nothing() -> StepInputs:
    none = np.zeros(0, np.int64)
    return StepInputs(none, none, none, none, none, none, np.zeros((0, 0), np.int32), 0, none)
