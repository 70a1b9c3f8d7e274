"""One generation as its caller sees it: how long it queued, its tokens came and all of it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from polyadapt.errors import PolyadaptError
from polyadapt.tasks.sequence_text import TextDelta
from polyadapt.tasks.text import Accepted, Completed, Queued, TextEvent
from polyadapt.types import ServedAdapter

if TYPE_CHECKING:
    from polyadapt.api.metrics import Metrics
    from polyadapt.api.tracing import RequestTrace


class GenerationWatch:
    """Shown every event of one generation while it is entered; counts it, and keeps what its log
    line says.
    """

    def __init__(
        self,
        metrics: Metrics,
        model: str = "",
        trace: RequestTrace | None = None,
        *,
        is_sample: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """The request begins now. is_sample: of a workflow, which counts its failure itself."""
        self.model = model
        self._trace = trace
        self._metrics = metrics
        self._is_sample = is_sample
        self._counts = metrics.generations
        self._clock = clock
        self._began = clock()
        self._submitted = self._began
        self._latest: dict[int, float] = {}  # by sequence, when its last tokens came
        self.served: tuple[ServedAdapter, ...] = ()
        self._is_text_marked = False
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.num_generated_tokens = 0
        self.queue_s: float | None = None
        self.first_token_s: float | None = None

    def see(self, event: TextEvent) -> None:
        """Count an event; of one request, in their order."""
        if isinstance(event, TextDelta):
            now = self._clock()
            num_tokens = len(event.token_ids)
            self.num_generated_tokens += num_tokens
            self._counts.num_generated_tokens += num_tokens
            latest = self._latest.get(event.index)
            if latest is None:
                self._see_first(now)
            elif num_tokens:
                self._counts.inter_token_seconds.observe((now - latest) / num_tokens, num_tokens)
            self._latest[event.index] = now
        elif isinstance(event, Accepted):
            self._submitted = self._clock()
            self.num_prompt_tokens = sum(map(len, event.prompt_ids))
            self._counts.num_prompt_tokens += self.num_prompt_tokens
            self._is_text_marked = event.is_text_marked
            if event.choice is not None:
                self._metrics.choices.labels(event.choice.reason).inc()
        elif isinstance(event, Queued):
            self.served = event.served
            self.queue_s = self._clock() - self._submitted
            self._counts.queue_seconds.observe(self.queue_s)
            self._counts.count_uses(event.served)
        elif isinstance(event, Completed):
            self.num_cached_tokens = event.num_cached_tokens
            self._counts.seconds.observe(self._clock() - self._began)

    def __enter__(self) -> Callable[[TextEvent], None]:
        """Return what is to be shown the events."""
        return self.see

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        """Count how the generation ended, and what is counted by adapter."""
        if isinstance(error, PolyadaptError) and not self._is_sample:
            self._metrics.failed_generations.labels(error.code).inc()
        for adapter in self.served:
            self._counts.by_adapter.add(adapter.adapter.name, self.num_generated_tokens)
        if any(adapter.is_mandatory for adapter in self.served):
            self._counts.num_mandatory += 1
            self._counts.num_mandatory_tokens += self.num_generated_tokens
        if self._is_text_marked:
            self._counts.num_text_marked += 1
            self._counts.num_text_marked_tokens += self.num_generated_tokens

    def about(self) -> dict[str, object]:
        """Return the fields of the request's log line."""
        return describe([self])

    def _see_first(self, now: float) -> None:
        if self.first_token_s is None:
            self.first_token_s = now - self._began
            self._counts.first_token_seconds.observe(self.first_token_s)
            if self._trace is not None:
                self._trace.note_first_token()


def describe(watches: Sequence[GenerationWatch]) -> dict[str, object]:
    """Return what a log line says of the generations of one request; None is left out of it."""
    found = {adapter.adapter: None for watch in watches for adapter in watch.served}
    waits = [watch.queue_s for watch in watches if watch.queue_s is not None]
    firsts = [watch.first_token_s for watch in watches if watch.first_token_s is not None]
    # Not what nobody serves: it may be anything that a caller wrote.
    models = {watch.model for watch in watches if watch.num_prompt_tokens}
    return {
        "model": models.pop() if len(models) == 1 else None,
        "adapters": [f"{adapter.name}@{adapter.version}" for adapter in found],
        "prompt_tokens": sum(watch.num_prompt_tokens for watch in watches),
        "cached_tokens": sum(watch.num_cached_tokens for watch in watches),
        "generated_tokens": sum(watch.num_generated_tokens for watch in watches),
        "queue_ms": round(1000 * max(waits), 1) if waits else None,
        "first_token_ms": round(1000 * min(firsts), 1) if firsts else None,
    }
