"""The mean of a prompt's hidden states, gathered chunk by chunk. Knows no model and no requests."""

from __future__ import annotations

import numpy as np
import torch


def add_rows(total: np.ndarray | None, hidden: torch.Tensor) -> np.ndarray:
    """Return total [width] plus the rows of hidden [rows, width], float64; None is zero.

    The rows are added one after the other, which numpy does along an axis that is not the fastest:
    so the bits of the sum do not depend on where chunks end.
    """
    rows = hidden.double().cpu().numpy()
    if total is not None:
        rows = np.concatenate([total[None], rows])
    found: np.ndarray = np.add.reduce(rows, axis=0)
    return found


def mean_of(total: np.ndarray, num_rows: int) -> tuple[float, ...] | None:
    """Return the mean rounded to float32, or None when it is not finite."""
    mean = (total / num_rows).astype(np.float32)
    return tuple(mean.tolist()) if np.isfinite(mean).all() else None
