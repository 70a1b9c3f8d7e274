"""Keyed pseudo-random words that are the same on every device: 64-bit integer arithmetic alone.

Every function takes and returns int64 arrays of at least one dimension, of numpy or of torch: both
wrap on overflow, so that a text that was marked on one device is read on any other. Knows neither
library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Ints = Any  # an int64 array of numpy or torch; the operators below are all that is asked of it

_GOLDEN = 0x9E3779B97F4A7C15
_SIP = (0x736F6D6570736575, 0x646F72616E646F6D, 0x6C7967656E657261, 0x7465646279746573)


def siphash(key_0: Ints, key_1: Ints, words: Sequence[Ints]) -> Ints:
    """Return SipHash-2-4 of 64-bit words under a 128-bit key, element by element.

    Aumasson and Bernstein, "SipHash: a fast short-input PRF" (2012); the message is the words'
    little-endian bytes. Shapes broadcast.
    """
    state = [key_0 ^ _SIP[0], key_1 ^ _SIP[1], key_0 ^ _SIP[2], key_1 ^ _SIP[3]]
    # The last block holds the length in bytes, modulo 256, in its highest byte.
    length = words[0] * 0 + _signed(((8 * len(words)) & 0xFF) << 56)
    for word in (*words, length):
        state[3] = state[3] ^ word
        state = _rounds(state, 2)
        state[0] = state[0] ^ word
    state[2] = state[2] ^ 0xFF
    v0, v1, v2, v3 = _rounds(state, 4)
    return v0 ^ v1 ^ v2 ^ v3


def spread(seeds: Ints, ids: Ints) -> Ints:
    """Return the word of each id under each seed; shapes broadcast.

    Output number id + 1 of splitmix64 (Steele, Lea and Flood, 2014) begun at the seed: a tenth of
    SipHash's work per vocabulary entry. It is no PRF in itself: who learns a whole word learns its
    seed, which serves one context alone and tells nothing of the key that SipHash made it from.
    """
    x = seeds + (ids + 1) * _signed(_GOLDEN)
    x = (x ^ _right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _right(x, 31)


def _rounds(state: list[Ints], num_rounds: int) -> list[Ints]:
    v0, v1, v2, v3 = state
    for _ in range(num_rounds):
        v0 = v0 + v1
        v1 = _rotate(v1, 13) ^ v0
        v0 = _rotate(v0, 32)
        v2 = v2 + v3
        v3 = _rotate(v3, 16) ^ v2
        v0 = v0 + v3
        v3 = _rotate(v3, 21) ^ v0
        v2 = v2 + v1
        v1 = _rotate(v1, 17) ^ v2
        v2 = _rotate(v2, 32)
    return [v0, v1, v2, v3]


def _rotate(x: Ints, by: int) -> Ints:
    return (x << by) | _right(x, 64 - by)


def _right(x: Ints, by: int) -> Ints:
    # A shift of signed numbers fills with the sign, which is masked away.
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
