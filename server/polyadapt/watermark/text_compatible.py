"""The green lists of transformers' `lefthash` watermark: to write what it reads, and to read it.

Compatible with transformers.WatermarkingConfig(seeding_scheme="lefthash") on the CPU: the last
token alone as context whatever `context_width` says, and a permutation by torch's generator, which
differs between devices and takes 32 bits of seed. For texts that its detector is to read, not for
marks that are to be secret.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from polyadapt.errors import InvalidRequest
from polyadapt.types import MarkSettings
from polyadapt.watermark.statistics import binomial_tails
from polyadapt.watermark.text import Floats, Int64, TextReading, detect

_MAX_CACHED = 4096  # green lists, of a bit a token


@dataclass(frozen=True, slots=True)
class LeftHash:
    """The fields of WatermarkingConfig, with its defaults."""

    vocab_size: int
    greenlist_ratio: float = 0.25
    bias: float = 2.0
    hashing_key: int = 15485863
    context_width: int = 1

    def __post_init__(self) -> None:
        if not 0.0 < self.greenlist_ratio < 1.0 or self.vocab_size < 2 or self.context_width < 1:
            raise InvalidRequest(
                f"vocab_size {self.vocab_size}, greenlist_ratio {self.greenlist_ratio} and "
                f"context_width {self.context_width}: expected at least 2, a share, and at least 1"
            )

    @classmethod
    def of(cls, settings: MarkSettings, key: tuple[int, int], vocab_size: int) -> LeftHash:
        """Return the scheme of one user's key: 31 of its bits are the hashing key."""
        return cls(vocab_size, settings.ratio, settings.bias, hashing_key_of(key))

    @property
    def mean(self) -> float:
        """The share that transformers' detector counts with."""
        return self.greenlist_ratio

    @property
    def deviation(self) -> float:
        """Of one throw of a coin."""
        return math.sqrt(self.mean * (1 - self.mean))

    def seeds(self, keys: Int64, contexts: Int64) -> Int64:
        """Return the last tokens: the key is in `hashing_key`."""
        found: Int64 = contexts[..., -1]
        return found

    def evidence(self, seeds: Int64, tokens: Int64) -> NDArray[Any]:
        """Return 1 where a token is green."""
        last, ids = np.broadcast_arrays(seeds, tokens)
        found = np.zeros(ids.shape, np.int64)
        for token in np.unique(last).tolist():
            at = last == token
            found[at] = self.is_green(token)[ids[at]]
        return found

    def p_values(self, totals: NDArray[Any], num_tokens: int) -> Floats:
        """Binomial, and not exact as in text.py: tokens after the same one share a green list."""
        tails: Floats = binomial_tails(num_tokens, self.mean)[totals]
        return tails

    def is_green(self, last_token: int) -> NDArray[np.uint8]:
        """Return 1 for the ids that are green after this token: [vocabulary]."""
        return np.unpackbits(_packed(self, last_token), count=self.vocab_size)

    def detect(self, tokens: Sequence[int]) -> TextReading:
        """Count as WatermarkDetector(ignore_repeated_ngrams=True), with the tail of a binomial."""
        return detect(self, np.zeros(2, np.int64), tokens)  # the key is in `hashing_key`


def hashing_key_of(key: tuple[int, int]) -> int:
    """Return what WatermarkingConfig(hashing_key=...) needs to read a user's texts."""
    return (key[0] & 0x7FFFFFFF) | 1


@functools.lru_cache(_MAX_CACHED)
def _packed(settings: LeftHash, last_token: int) -> NDArray[np.uint8]:
    generator = torch.Generator()
    generator.manual_seed(settings.hashing_key * last_token % (2**64 - 1))
    order = torch.randperm(settings.vocab_size, generator=generator)
    is_green = np.zeros(settings.vocab_size, np.uint8)
    is_green[order[: int(settings.vocab_size * settings.greenlist_ratio)].numpy()] = 1
    return np.packbits(is_green)
