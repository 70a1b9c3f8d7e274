"""Whether triggers stand out enough, known before any training; and the start that follows from it.

What a mark costs in accuracy is settled by one number: how far a trigger moves an input, in
standard deviations of clean inputs along the direction that tells them apart (d'). With n detectors
at half way, about n Q(d' / 2) of clean inputs trip one (Q: the normal's tail), whatever the loss.
Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from polyadapt.errors import InvalidRequest

# At half way that is 5 standard deviations: 3e-7 of clean inputs and bit, if they are normal.
REQUIRED_SEPARATION = 10.0
# What is not normal is counted: clean inputs that pass a threshold, of those nothing was fitted on.
ALLOWED_FIRING = 0.01
THRESHOLD = 0.5  # tau, of the response to a trigger of mean strength
MAX_INPUTS = 8192  # of the module: a covariance of that size is 0.5 GB
# Noise that is assumed in every direction, as a share of the inputs' mean square.
_RIDGE = 1e-2

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Preflight:
    """How far each bit's trigger stands out: d', [bits]."""

    separations: tuple[float, ...]
    amplitude: float  # that they were found at
    firing: float  # share of clean inputs on which any detector would fire

    @property
    def is_enough(self) -> bool:
        """Whether every bit reaches REQUIRED_SEPARATION, and few clean inputs would be touched."""
        return min(self.separations) >= REQUIRED_SEPARATION and self.firing <= ALLOWED_FIRING

    def __str__(self) -> str:
        weakest, strongest = min(self.separations), max(self.separations)
        return (
            f"d' from {weakest:.1f} to {strongest:.1f} over {len(self.separations)} bits (at least "
            f"{REQUIRED_SEPARATION:g} is needed), {self.firing:.2%} of clean inputs would be "
            f"touched (at most {ALLOWED_FIRING:.0%})"
        )

    @property
    def amplitude_needed(self) -> float:
        """An amplitude to try next: enough for the weakest bit as long as nothing is clipped."""
        wanted = REQUIRED_SEPARATION / min(self.separations)
        return self.amplitude * max(wanted, 1.25 if self.firing > ALLOWED_FIRING else 1.0)


def measure_separation(
    clean: Floats, carriers: Floats, triggered: Floats, amplitude: float
) -> Preflight:
    """Return d' of every bit at the marked module's input.

    clean [rows, size]; carriers [queries, size] and the same with each bit's trigger, triggered
    [bits, queries, size]. Directions are fitted on one half of `clean` and measured on the other:
    fitted and measured on the same rows, few rows of many numbers would seem perfectly separable.
    Raises InvalidRequest for too few rows or a module that is too wide.
    """
    num_fitted = len(clean) // 2
    if num_fitted < 32:
        raise InvalidRequest(f"{len(clean)} clean inputs, expected at least 64 to measure with")
    shifts, scatter = _shifts(carriers, triggered)
    fitted = clean[:num_fitted].astype(np.float64)
    covariance = np.cov(fitted, rowvar=False) + np.diag(scatter) + _ridge(fitted)
    directions = np.linalg.solve(covariance, shifts.T)  # [size, bits]
    held_out = clean[num_fitted:].astype(np.float64) @ directions  # [rows, bits]
    noise = np.einsum("sb,s,sb->b", directions, scatter, directions)
    spread = np.sqrt(held_out.var(axis=0, ddof=1) + noise)
    distance = np.einsum("bs,sb->b", shifts, directions)
    found = distance / np.maximum(spread, 1e-12)
    rows = whitened_rows(clean[:num_fitted], carriers, triggered)
    fires = (clean[num_fitted:] @ rows.T > THRESHOLD).any(axis=1)
    return Preflight(tuple(float(value) for value in found), amplitude, float(fires.mean()))


def whitened_rows(clean: Floats, carriers: Floats, triggered: Floats) -> Floats:
    """Return the start of A: [bits, size], arguments as in `measure_separation`.

    a_i = S^-1 mu_i, scaled so that a_i . mu_i = 1: mu_i is the mean shift of bit i's trigger, S the
    second moment of clean inputs, plus the triggers' scatter, plus what the other bits' shifts add.
    """
    shifts, scatter = _shifts(carriers, triggered)
    rows = clean.astype(np.float64)
    moment = rows.T @ rows / len(rows) + np.diag(scatter) + _ridge(rows)
    moment += shifts.T @ shifts / len(shifts)
    directions = np.linalg.solve(moment, shifts.T).T  # [bits, size]
    scale = np.einsum("bs,bs->b", directions, shifts)
    found: Floats = (directions / scale[:, None]).astype(np.float32)
    return found


def _shifts(carriers: Floats, triggered: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean shift of each bit [bits, size] and the mean variance around it [size]."""
    if carriers.shape[1] > MAX_INPUTS:
        raise InvalidRequest(
            f"the marked module takes {carriers.shape[1]} numbers, expected at most {MAX_INPUTS}; "
            "mark a narrower one"
        )
    moved = triggered.astype(np.float64) - carriers
    return moved.mean(axis=1), moved.var(axis=1).mean(axis=0)


def _ridge(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.eye(rows.shape[1]) * (_RIDGE * max(float((rows**2).mean()), 1e-12))
