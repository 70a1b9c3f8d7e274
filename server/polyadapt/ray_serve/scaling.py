"""How many engine replicas there shall be: as many as hold the queued tokens. Knows no Ray.

Ray takes the mean of half a minute, waits upscale_delay_s or downscale_delay_s before it follows,
and keeps the bounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class QueuedTokens:
    """A Ray Serve autoscaling policy: called with an AutoscalingContext."""

    def __init__(self, per_engine: int) -> None:
        """per_engine: tokens, sent and not computed yet, that one engine shall have."""
        if per_engine < 1:
            raise ValueError(f"per_engine is {per_engine}; expected at least 1 token")
        self._per_engine = per_engine

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return the number of replicas, and no state."""
        stated: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
        loads = stated.get("queued_tokens", {})
        wanted = math.ceil(sum(loads.values()) / self._per_engine)
        least = context.capacity_adjusted_min_replicas
        return min(max(wanted, least), context.capacity_adjusted_max_replicas), {}
