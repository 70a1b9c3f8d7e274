"""What a marked row draws, from the papers alone: whole vocabulary, whole numbers, one at a time.

Imports nothing of polyadapt. tests/engine/test_text_marks.py checks its hashes against published
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

M = (1 << 64) - 1
FLOOR = 2.0**-14


def rotl(x: int, by: int) -> int:
    return (x << by | x >> (64 - by)) & M


def siphash_of(key: tuple[int, int], words: Sequence[int]) -> int:
    k0, k1 = key[0] & M, key[1] & M
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D]
    v += [k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]

    def rounds(count: int) -> None:
        for _ in range(count):
            v[0] = (v[0] + v[1]) & M
            v[1] = rotl(v[1], 13) ^ v[0]
            v[0] = rotl(v[0], 32)
            v[2] = (v[2] + v[3]) & M
            v[3] = rotl(v[3], 16) ^ v[2]
            v[0] = (v[0] + v[3]) & M
            v[3] = rotl(v[3], 21) ^ v[0]
            v[2] = (v[2] + v[1]) & M
            v[1] = rotl(v[1], 17) ^ v[2]
            v[2] = rotl(v[2], 32)

    for word in [*words, (8 * len(words) & 0xFF) << 56]:
        v[3] ^= word & M
        rounds(2)
        v[0] ^= word & M
    v[2] ^= 0xFF
    rounds(4)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


def word_of(seed: int, token: int) -> int:
    x = (seed + (token + 1) * 0x9E3779B97F4A7C15) & M
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & M
    x = (x ^ x >> 27) * 0x94D049BB133111EB & M
    return x ^ x >> 31


def context_of(scheme: str, tokens: Sequence[int], num_prompt: int, width: int) -> list[int] | None:
    """The context of the token behind `tokens`, None where the scheme leaves it alone."""
    text = list(tokens) if scheme == "kgw" else list(tokens[num_prompt:])
    if len(text) < width:
        return None
    context = text[len(text) - width :]
    earlier = [text[i - width : i] for i in range(width, len(text))]
    return None if scheme != "kgw" and context in earlier else context


def marked_scores(
    scores: np.ndarray, key: tuple[int, int], context: Sequence[int], ratio: float, bias: float,
    temperature: float,
) -> np.ndarray:  # fmt: skip
    """Kirchenbauer et al.: logits of the green list are raised, here as far as it can matter."""
    seed = siphash_of(key, context)
    bound = round(ratio * 2**32)
    found = scores.astype(np.float32).copy()
    least = scores.max() - np.float32(bias + temperature * -math.log(FLOOR))
    for token in range(len(scores)):
        if word_of(seed, token) >> 32 < bound and scores[token] >= least:
            found[token] += np.float32(bias)
    return found


def marked_probs(
    probs: np.ndarray, key: tuple[int, int], context: Sequence[int], scheme: str, depth: int
) -> np.ndarray:
    """Dathathri et al.'s tournament or Aaronson's race among the tokens that are not too light."""
    seed = siphash_of(key, context)
    inside = [i for i in range(len(probs)) if probs[i] >= probs.max() * FLOOR]
    words = [word_of(seed, i) for i in inside]
    mass = math.fsum(probs[i] for i in inside)
    p = [probs[i] / mass for i in inside]
    if scheme == "synthid":
        for layer in range(depth):
            g = [word >> layer & 1 for word in words]
            mean = math.fsum(a * b for a, b in zip(g, p, strict=True))
            p = [a * (1 + b - mean) for a, b in zip(p, g, strict=True)]
    else:
        arrivals = [
            -math.log(((word >> 11) + 0.5) / 2**53) / a for word, a in zip(words, p, strict=True)
        ]
        first = arrivals.index(min(arrivals))
        p = [float(i == first) for i in range(len(p))]
    found = probs.astype(np.float64).copy()
    found[inside] = np.array(p) * mass
    return found
