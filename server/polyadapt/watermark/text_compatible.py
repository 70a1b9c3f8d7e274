"""The green lists of transformers' `lefthash` watermark, so that its texts can be read here.

Compatible with transformers.WatermarkingConfig(seeding_scheme="lefthash") on the CPU. One key for
everybody, the last token alone as context whatever `context_width` says, and a permutation by
torch's generator, which differs between devices: for texts that were made that way, not for new
marks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from polyadapt.errors import InvalidRequest
from polyadapt.watermark.statistics import binomial_tail
from polyadapt.watermark.text import TextReading, distinct_grams

_MAX_CACHED = 4096


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

    def green_ids(self, last_token: int) -> frozenset[int]:
        """Return the ids that are green after this token."""
        return _green_ids(self, last_token)

    def detect(self, tokens: Sequence[int]) -> TextReading:
        """Count as WatermarkDetector(ignore_repeated_ngrams=True), with the tail of a binomial.

        The p-value is not exact as in text.py: tokens after the same one share a green list.
        """
        grams = distinct_grams(tokens, self.context_width)
        hits = sum(int(gram[-1]) in self.green_ids(int(gram[-2])) for gram in grams)
        rate = self.greenlist_ratio
        deviation = math.sqrt(len(grams) * rate * (1 - rate))
        return TextReading(
            num_scored=len(grams),
            num_hits=hits,
            num_coins=len(grams),
            z=(hits - len(grams) * rate) / deviation if deviation else 0.0,
            p_value=binomial_tail(hits, len(grams), rate),
        )


@functools.lru_cache(_MAX_CACHED)
def _green_ids(settings: LeftHash, last_token: int) -> frozenset[int]:
    generator = torch.Generator()
    generator.manual_seed(settings.hashing_key * last_token % (2**64 - 1))
    order = torch.randperm(settings.vocab_size, generator=generator)
    return frozenset(order[: int(settings.vocab_size * settings.greenlist_ratio)].tolist())
