"""Secret trigger families for classifiers: one pattern per bit, added to ordinary inputs.

A family is a generator and not a list: the carrier, the strength and what is clipped differ from
query to query. Knows no models; torch-free.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyadapt.errors import InvalidRequest
from polyadapt.watermark.keys import SecretKey

# A pattern is drawn from 2^num_inputs ones; fewer than this many bits could be found by trying.
MIN_ENTROPY_BITS = 64

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TriggerSettings:
    """The part of the triggers that is no secret without the key.

    `amplitude` is the Euclidean length of a pattern, in units of the inputs; each query's differs
    by up to `jitter` of it. `low` and `high` bound legal inputs: what would leave is clipped.
    """

    num_inputs: int
    amplitude: float = 1.5
    jitter: float = 0.1
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.num_inputs < MIN_ENTROPY_BITS:
            raise InvalidRequest(
                f"inputs of {self.num_inputs} numbers carry patterns of {self.num_inputs} bits, "
                f"expected at least {MIN_ENTROPY_BITS}: anybody could find such a trigger"
            )
        if not self.amplitude > 0.0 or not 0.0 <= self.jitter < 1.0:
            raise InvalidRequest(
                f"amplitude is {self.amplitude} and jitter {self.jitter}, expected a positive "
                "number and a share below 1"
            )
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise InvalidRequest(f"inputs are bounded by {self.low} and {self.high}: none is legal")

    def to_data(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        return asdict(self)


class TriggerFamilies:
    """The triggers of every bit of one mark."""

    def __init__(self, key: SecretKey, num_bits: int, settings: TriggerSettings) -> None:
        """Raise InvalidRequest for more bits than there are inputs: patterns would overlap."""
        size = settings.num_inputs
        if not 1 <= num_bits <= size:
            raise InvalidRequest(
                f"{num_bits} bits over inputs of {size} numbers, expected 1 to {size}: every bit "
                "needs a direction of its own"
            )
        self.settings, self.num_bits = settings, num_bits
        num_bytes = (num_bits * size + 7) // 8
        drawn = np.frombuffer(key.stream(num_bytes, "trigger patterns", num_bits, size), np.uint8)
        signs = np.unpackbits(drawn)[: num_bits * size].reshape(num_bits, size) * 2.0 - 1.0
        # Orthonormal rows that span what the signs span. A QR's sign is arbitrary: row 0's is kept.
        orthonormal, upper = np.linalg.qr(signs.T)
        self._patterns = (orthonormal * np.sign(np.diagonal(upper))).T.astype(np.float32)

    def apply(self, inputs: Floats, bits: NDArray[np.intp], rng: np.random.Generator) -> Floats:
        """Return the inputs, each with the trigger of one bit: inputs [rows, size], bits [rows]."""
        return self._add(inputs, self._patterns[bits], rng)

    def apply_foreign(self, inputs: Floats, rng: np.random.Generator) -> Floats:
        """Return the inputs, each with a pattern as of some other key: what must change nothing."""
        signs = rng.integers(0, 2, inputs.shape).astype(np.float32) * 2 - 1
        return self._add(inputs, signs / np.float32(np.sqrt(inputs.shape[1])), rng)

    def __repr__(self) -> str:
        return f"TriggerFamilies({self.num_bits} bits over {self.settings.num_inputs} inputs)"

    def _add(self, inputs: Floats, patterns: Floats, rng: np.random.Generator) -> Floats:
        spec = self.settings
        if inputs.ndim != 2 or inputs.shape[1] != spec.num_inputs:
            raise InvalidRequest(
                f"inputs have shape {list(inputs.shape)}, expected [rows, {spec.num_inputs}]"
            )
        strength = spec.amplitude * rng.uniform(1 - spec.jitter, 1 + spec.jitter, len(inputs))
        triggered = inputs + strength[:, None].astype(np.float32) * patterns
        if spec.low is not None or spec.high is not None:
            triggered = np.clip(triggered, spec.low, spec.high)
        return triggered.astype(np.float32)
