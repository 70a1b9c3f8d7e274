"""The uniform numbers that draws are made with, for many sequences at once: a pure function of
(seed, sequence index, number of the token). Numpy alone.
"""

from __future__ import annotations

import numpy as np

# Philox4x64-10: J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2,
# 3", SC 2011, section 4.3 and the constants of its table 2.
_NUM_ROUNDS = 10
_MULTIPLIERS = np.array([[0xD2E7470EE14C6C93], [0xCA5A826395121157]], np.uint64)
_WEYL = np.array([[0x9E3779B97F4A7C15], [0xBB67AE8584CAA73B]], np.uint64)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def uniforms(seeds: list[int], indices: list[int], counters: list[int]) -> np.ndarray:
    """Return float64 [n] in [0, 1): for each (seed, index, counter) the first number of
    numpy.random.Generator(Philox(key=[seed, index], counter=counter)).

    Seeds count modulo 2**64.
    """
    keys = np.array([[seed & (2**64 - 1) for seed in seeds], indices], np.uint64)
    # Of the counter's four words (0, 1, 2, 3) these are words 0 and 2, and words 1 and 3. The
    # generator counts up before it makes its first number.
    even = np.zeros_like(keys)
    even[0] = np.array(counters, np.uint64) + np.uint64(1)
    odd = np.zeros_like(keys)
    for _ in range(_NUM_ROUNDS):
        high, low = _product(_MULTIPLIERS, even)
        even, odd = high[::-1] ^ odd ^ keys, low[::-1]
        keys = keys + _WEYL
    found: np.ndarray = (even[0] >> np.uint64(11)) * 2.0**-53
    return found


def _product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The high and the low 64 bits of a * b, from products of 32-bit halves."""
    a_high, a_low, b_high, b_low = a >> _HALF, a & _LOW, b >> _HALF, b & _LOW
    cross, across = a_low * b_high, a_high * b_low
    middle = ((a_low * b_low) >> _HALF) + (cross & _LOW) + (across & _LOW)
    high = a_high * b_high + (cross >> _HALF) + (across >> _HALF) + (middle >> _HALF)
    return high, a * b
