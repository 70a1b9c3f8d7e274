"""Text marks per user: keys, what they favour, how a draw is marked, and who wrote a text.

Pure functions over numpy. A scheme says which words of prf.py favour a token and how that changes
what is drawn; reading adds up the evidence of a text's tokens, whose distribution for a key that
has nothing to do with the text is known exactly. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from polyadapt.errors import InvalidRequest
from polyadapt.types import MarkSettings
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.prf import siphash, spread
from polyadapt.watermark.statistics import binomial_tails, gamma_tails

MAX_CONTEXT = 16
MAX_DEPTH = 32
MAX_BIAS = 20.0
# A token lighter than this part of the likeliest one is neither raised nor does it take part in a
# tournament or a race: it keeps its chance. Together such tokens have next to none, and a whole
# vocabulary is tens of thousands of words to make at every step.
FLOOR = 2.0**-14
_LOG_FLOOR = -math.log(FLOOR)
_CHUNK = 1 << 20  # words that are held at once while many users are compared

Int64 = NDArray[np.int64]
Floats = NDArray[np.float64]


class Scheme(Protocol):
    """How a key favours tokens, as a reader sees it."""

    @property
    def context_width(self) -> int:
        """How many tokens before one decide what is favoured there."""

    @property
    def mean(self) -> float:
        """A token's evidence, expected for a key that has nothing to do with the text."""

    @property
    def deviation(self) -> float:
        """Its standard deviation."""

    def seeds(self, keys: Int64, contexts: Int64) -> Int64:
        """Return what decides at each context: keys [..., 2], contexts [..., width] -> [...]."""

    def evidence(self, seeds: Int64, tokens: Int64) -> NDArray[Any]:
        """Return how much each token speaks for the key: seeds and tokens broadcast."""

    def p_values(self, totals: NDArray[Any], num_tokens: int) -> Floats:
        """Return, for totals over so many tokens, the exact chance that a key which has nothing to
        do with the text reaches as much.
        """


class Raising(Scheme, Protocol):
    """A scheme that adds to the logits of favoured tokens, whose evidence is 1, else 0."""

    @property
    def bias(self) -> float:
        """How much."""


class Reshaping(Scheme, Protocol):
    """A scheme that changes the distribution which is drawn from, so that its mean over all keys is
    the model's own. Within one text it acts on every context once: a second draw with the same
    words would tell of the first.
    """

    def reshape(self, weights: Floats, words: Int64) -> Floats:
        """Return the weights that are drawn from, of the same sum: both [tokens]."""


@dataclass(frozen=True, slots=True)
class GreenList:
    """A keyed share of the vocabulary is green at each context, and its logits are raised.

    Kirchenbauer et al., "A Watermark for Large Language Models" (2023), with a device-independent
    choice in place of a generator's permutation: each token is green by itself.
    """

    ratio: float = 0.25
    bias: float = 2.0
    context_width: int = 2

    def __post_init__(self) -> None:
        _check_context(self.context_width)
        if not 0.0 < self.ratio < 1.0 or not 0.0 < self.bias <= MAX_BIAS:
            raise InvalidRequest(
                f"ratio is {self.ratio} and bias {self.bias}, expected a share below 1 and a "
                f"positive number up to {MAX_BIAS:g}"
            )

    @property
    def mean(self) -> float:
        """The ratio, as the 32-bit share that it is compared as."""
        return self.bound / (1 << 32)

    @property
    def deviation(self) -> float:
        """Of one throw of a coin."""
        return math.sqrt(self.mean * (1 - self.mean))

    @property
    def bound(self) -> int:
        """A token is green if the upper half of its word, unsigned, lies below this."""
        return max(1, round(self.ratio * (1 << 32)))

    def seeds(self, keys: Int64, contexts: Int64) -> Int64:
        """See Scheme."""
        return context_seeds(keys, contexts)

    def evidence(self, seeds: Int64, tokens: Int64) -> NDArray[Any]:
        """Return 1 where a token is green."""
        upper: Int64 = (spread(seeds, tokens) >> 32) & 0xFFFFFFFF
        return (upper < self.bound).astype(np.int64)

    def p_values(self, totals: NDArray[Any], num_tokens: int) -> Floats:
        """Binomial, see Scheme."""
        tails: Floats = binomial_tails(num_tokens, self.mean)[totals]
        return tails


@dataclass(frozen=True, slots=True)
class Tournament:
    """Tokens meet in `depth` rounds, and in each a keyed coin of theirs decides.

    Dathathri et al., "Scalable watermarking for identifying large language model outputs" (SynthID,
    2024), two contestants a round, in the form that gives the winner's distribution directly. Over
    all keys the mean of the distributions is the model's own.
    """

    depth: int = 12
    context_width: int = 4

    def __post_init__(self) -> None:
        _check_context(self.context_width)
        if not 1 <= self.depth <= MAX_DEPTH:
            raise InvalidRequest(f"depth is {self.depth}, expected 1 to {MAX_DEPTH}")

    @property
    def mean(self) -> float:
        """Half of a token's coins."""
        return self.depth / 2

    @property
    def deviation(self) -> float:
        """Of `depth` fair coins."""
        return math.sqrt(self.depth) / 2

    def seeds(self, keys: Int64, contexts: Int64) -> Int64:
        """See Scheme."""
        return context_seeds(keys, contexts)

    def evidence(self, seeds: Int64, tokens: Int64) -> NDArray[Any]:
        """Return how many of each token's coins show 1."""
        words: Int64 = spread(seeds, tokens)
        total = np.zeros_like(words)
        for layer in range(self.depth):
            total += (words >> layer) & 1
        return total

    def p_values(self, totals: NDArray[Any], num_tokens: int) -> Floats:
        """Binomial, see Scheme."""
        tails: Floats = binomial_tails(num_tokens * self.depth, 0.5)[totals]
        return tails

    def reshape(self, weights: Floats, words: Int64) -> Floats:
        """See Reshaping.

        Semantics, round by round: p[v] = p[v] * (1 + g[v] - sum over u of g[u] p[u]), where the p
        sum to 1.
        """
        coins = ((words >> np.arange(self.depth)[:, None]) & 1).astype(np.float64)
        total = weights.sum()
        p = weights / total
        for own in coins:
            p *= own + (1.0 - own @ p)
        reshaped: Floats = p * total
        return reshaped


@dataclass(frozen=True, slots=True)
class Race:
    """Every token draws a keyed number in (0, 1), and the first in an exponential race wins.

    Aaronson, "My AI Safety Lecture for UT Effective Altruism" (2022); Kuditipudi et al., "Robust
    Distortion-free Watermarks for Language Models" (2023): the smallest -ln(u) / p, which is the
    Gumbel-max trick with keyed noise. The strongest evidence a token can give without bending the
    mean over all keys, at the price that a context and a key leave no choice.
    """

    context_width: int = 4

    def __post_init__(self) -> None:
        _check_context(self.context_width)

    @property
    def mean(self) -> float:
        """Of an exponential variable."""
        return 1.0

    @property
    def deviation(self) -> float:
        """The same."""
        return 1.0

    def seeds(self, keys: Int64, contexts: Int64) -> Int64:
        """See Scheme."""
        return context_seeds(keys, contexts)

    def evidence(self, seeds: Int64, tokens: Int64) -> NDArray[Any]:
        """Return -ln(1 - u)."""
        found: Floats = -np.log1p(-_uniform(spread(seeds, tokens)))
        return found

    def p_values(self, totals: NDArray[Any], num_tokens: int) -> Floats:
        """Of a gamma variable, see Scheme; to the 53 bits that a number has."""
        return gamma_tails(num_tokens, totals)

    def reshape(self, weights: Floats, words: Int64) -> Floats:
        """See Reshaping: the winner gets everything."""
        found = np.zeros_like(weights)
        with np.errstate(divide="ignore"):  # a weight of 0 never arrives
            arrivals = -np.log(_uniform(words)) / weights
        found[arrivals.argmin()] = weights.sum()
        return found


@dataclass(frozen=True, slots=True)
class TextReading:
    """One key against one text."""

    num_scored: int  # distinct tokens with their contexts
    score: float  # their evidence together
    expected: float  # of a key that has nothing to do with the text
    z: float  # in standard deviations, for people; nothing is decided by it
    p_value: float  # exact, of a key that has nothing to do with the text


def scheme_of(settings: MarkSettings) -> GreenList | Tournament | Race:
    """Return the scheme of a policy's settings; raises InvalidRequest for what means nothing, and
    for the compatible form, which text_compatible.py reads.
    """
    if settings.is_lefthash:
        raise InvalidRequest(
            "texts of the lefthash form are read by transformers' WatermarkDetector, or with "
            "polyadapt.watermark.text_compatible"
        )
    if settings.scheme == "kgw":
        return GreenList(settings.ratio, settings.bias, settings.context_width)
    if settings.scheme == "synthid":
        return Tournament(settings.depth, settings.context_width)
    return Race(settings.context_width)


def user_key(master: SecretKey, user: str, *, key_version: int = 1) -> Int64:
    """Return the two words of a user's key, [2]: 128 bits of HMAC-SHA256(master, user)."""
    if not user:
        raise InvalidRequest("a user's name is empty; give what the key or tenant is called")
    return np.frombuffer(master.derive("text", key_version, user)[:16], "<i8").astype(np.int64)


def context_seeds(keys: Int64, contexts: Int64) -> Int64:
    """Return what decides the favoured tokens: keys [..., 2], contexts [..., width] -> [...]."""
    columns = [contexts[..., i] for i in range(contexts.shape[-1])]
    found: Int64 = siphash(keys[..., 0], keys[..., 1], columns)
    return found


def raise_favoured(
    scheme: Raising,
    scores: NDArray[np.float32],
    best: int,
    temperature: float,
    seed: Int64,
) -> NDArray[np.float32]:
    """Return float32 scores [vocabulary] with favoured tokens raised, as far as `reach` says below
    `best`, a largest one. seed [1].
    """
    ids = np.flatnonzero(scores >= scores[best] - np.float32(reach(scheme, temperature)))
    raised = scores.copy()
    raised[ids[scheme.evidence(seed, ids) == 1]] += np.float32(scheme.bias)
    return raised


def reach(scheme: Raising, temperature: float) -> float:
    """How far below the best score tokens are raised: as far as that may give them FLOOR of the
    best one's weight, and at temperature 0 as far as it could make them the best.
    """
    return scheme.bias + temperature * _LOG_FLOOR


def reshape_kept(
    scheme: Reshaping, weights: NDArray[Any], tokens: Int64 | None, seed: Int64
) -> NDArray[Any]:
    """Return the weights with those from FLOOR of the largest on reshaped: float [tokens], of the
    same dtype. tokens: whose they are, None being 0, 1, ...; seed [1].
    """
    at = np.flatnonzero(weights >= weights.max() * FLOOR)
    words = spread(seed, at if tokens is None else tokens[at])
    found = weights.copy()
    found[at] = scheme.reshape(weights[at].astype(np.float64), words)
    return found


def distinct_grams(tokens: Sequence[int], width: int) -> Int64:
    """Return each context with its token once, [grams, width + 1].

    Once only: what is repeated throws no new coin, and counting it again would make a text of
    repetitions anybody's.
    """
    ids = np.asarray(tokens, dtype=np.int64)
    if len(ids) <= width:
        return np.zeros((0, width + 1), np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(ids, width + 1)
    return np.unique(windows, axis=0)


def detect(scheme: Scheme, key: Int64, tokens: Sequence[int]) -> TextReading:
    """Return how a key's favoured tokens are represented in the text."""
    (reading,) = read_keys(scheme, key[None], tokens)
    return reading


def read_keys(scheme: Scheme, keys: Int64, tokens: Sequence[int]) -> list[TextReading]:
    """Return the same for each of many keys [users, 2]."""
    grams = distinct_grams(tokens, scheme.context_width)
    num = len(grams)
    step = max(1, _CHUNK // max(num, 1))
    totals = []
    for first in range(0, len(keys), step):
        own = keys[first : first + step, None]
        if num:
            seeds = scheme.seeds(own, grams[None, :, :-1])
            totals.append(scheme.evidence(seeds, grams[None, :, -1]).sum(axis=1))
        else:
            totals.append(np.zeros(len(own), np.int64))
    scores = np.concatenate(totals)
    mean, deviation = num * scheme.mean, math.sqrt(num) * scheme.deviation
    return [
        TextReading(
            num_scored=num,
            score=float(score),
            expected=mean,
            z=(score - mean) / deviation if num else 0.0,
            p_value=p_value,
        )
        for score, p_value in zip(
            scores.tolist(), scheme.p_values(scores, num).tolist(), strict=True
        )
    ]


def _uniform(words: Int64) -> Floats:
    """The upper 53 bits as a number in (0, 1)."""
    upper: Int64 = (words >> 11) & ((1 << 53) - 1)
    return (upper.astype(np.float64) + 0.5) * 2.0**-53


def _check_context(width: int) -> None:
    if not 1 <= width <= MAX_CONTEXT:
        raise InvalidRequest(f"context_width is {width}, expected 1 to {MAX_CONTEXT}")
