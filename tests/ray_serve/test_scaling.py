"""As many engines as hold the queued tokens, within the bounds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from polyadapt.ray_serve.scaling import QueuedTokens


@pytest.mark.parametrize(
    ("loads", "wanted"),
    [([], 1), ([0.0], 1), ([100.0], 1), ([101.0], 2), ([150.0, 150.0], 3), ([9000.0], 5)],
)
def test_replicas_grow_with_the_tokens_that_wait(loads: list[float], wanted: int):
    context = SimpleNamespace(
        aggregated_metrics={"queued_tokens": dict(enumerate(loads))} if loads else None,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=5,
    )
    assert QueuedTokens(per_engine=100)(context) == (wanted, {})


def test_a_target_without_tokens_is_refused():
    with pytest.raises(ValueError, match="at least 1 token"):
        QueuedTokens(per_engine=0)
