"""Text marks per user: keys, what they favour, and who wrote a text. Pure functions over numpy.

The offline half: nothing here samples, and nothing in the sampler uses it yet. A scheme says which
words of prf.py favour a token; reading counts favoured tokens, whose number in a text that has
nothing to do with a key is exactly binomial. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from polyadapt.errors import InvalidRequest
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.prf import siphash, spread
from polyadapt.watermark.statistics import binomial_tails, holm

MAX_CONTEXT = 16
MAX_DEPTH = 32
_CHUNK = 1 << 20  # words that are held at once while many users are compared

Int64 = NDArray[np.int64]
Floats = NDArray[np.float64]


class Scheme(Protocol):
    """How a key favours tokens."""

    @property
    def context_width(self) -> int:
        """How many tokens before one decide what is favoured there."""

    @property
    def num_trials(self) -> int:
        """How many coins a token throws."""

    @property
    def rate(self) -> float:
        """The chance of each to fall for a key that has nothing to do with the text, exactly."""

    def count(self, words: Int64) -> Int64:
        """Return how many of a token's coins fell: words of any shape, one per token."""


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
        if not 0.0 < self.ratio < 1.0 or not math.isfinite(self.bias) or self.bias <= 0:
            raise InvalidRequest(
                f"ratio is {self.ratio} and bias {self.bias}, expected a share below 1 and a "
                "positive number"
            )

    @property
    def num_trials(self) -> int:
        """A token is green or not."""
        return 1

    @property
    def rate(self) -> float:
        """The ratio, as the 32-bit share that it is compared as."""
        return self._bound / (1 << 32)

    def count(self, words: Int64) -> Int64:
        """Return 1 where a token is green."""
        return (((words >> 32) & 0xFFFFFFFF) < self._bound).astype(np.int64)

    def raise_logits(self, logits: Floats, seeds: Int64) -> Floats:
        """Return the logits with green tokens raised: logits [rows, vocabulary], seeds [rows]."""
        words = spread(seeds[:, None], np.arange(logits.shape[1])[None])
        return logits + self.bias * self.count(words)

    @property
    def _bound(self) -> int:
        return max(1, round(self.ratio * (1 << 32)))


@dataclass(frozen=True, slots=True)
class Tournament:
    """Tokens meet in `depth` rounds, and in each a keyed coin of theirs decides.

    Dathathri et al., "Scalable watermarking for identifying large language model outputs" (SynthID,
    2024), two contestants a round, in the form that gives the winner's distribution directly. Over
    all keys the mean of the distributions is the model's own.
    """

    depth: int = 30
    context_width: int = 4

    def __post_init__(self) -> None:
        _check_context(self.context_width)
        if not 1 <= self.depth <= MAX_DEPTH:
            raise InvalidRequest(f"depth is {self.depth}, expected 1 to {MAX_DEPTH}")

    @property
    def num_trials(self) -> int:
        """A token has a coin for each round."""
        return self.depth

    @property
    def rate(self) -> float:
        """Coins are fair."""
        return 0.5

    def count(self, words: Int64) -> Int64:
        """Return how many of each token's coins show 1."""
        total = np.zeros_like(words)
        for layer in range(self.depth):
            total += (words >> layer) & 1
        return total

    def reshape(self, probabilities: Floats, seeds: Int64) -> Floats:
        """Return the winner's distribution: probabilities [rows, vocabulary], seeds [rows].

        Semantics, round by round: p[v] = p[v] * (1 + g[v] - sum over u of g[u] p[u]).
        """
        words = spread(seeds[:, None], np.arange(probabilities.shape[1])[None])
        p = probabilities
        for layer in range(self.depth):
            g = (words >> layer) & 1
            p = p * (1 + g - (g * p).sum(axis=1, keepdims=True))
        return p


@dataclass(frozen=True, slots=True)
class TextReading:
    """One key against one text."""

    num_scored: int  # distinct tokens with their contexts
    num_hits: int
    num_coins: int
    z: float  # in standard deviations, for people; nothing is decided by it
    p_value: float  # exact, of a key that has nothing to do with the text


@dataclass(frozen=True, slots=True)
class TextSuspicion:
    """One user's key against one text, among those of all users."""

    user: str
    reading: TextReading
    family_p_value: float  # Holm's, over all users


@dataclass(frozen=True, slots=True)
class TextTrace:
    """Whose text it is. `accused` is empty where nobody can be named."""

    accused: tuple[TextSuspicion, ...]
    ranked: tuple[TextSuspicion, ...]
    num_users: int
    alpha: float

    @property
    def is_nobody(self) -> bool:
        """Whether nobody can be named at this error."""
        return not self.accused


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
    (reading,) = _readings(scheme, key[None], distinct_grams(tokens, scheme.context_width))
    return reading


def trace_text(
    scheme: Scheme,
    master: SecretKey,
    users: Sequence[str],
    tokens: Sequence[int],
    *,
    alpha: float = 1e-3,
    key_version: int = 1,
    num_shown: int = 10,
) -> TextTrace:
    """Return which users' keys a text speaks for; with chance at most `alpha` an innocent is named.

    Raises InvalidRequest for no users or one twice. Finds whole texts: a marked passage inside a
    longer text is diluted, and is found by giving it alone.
    """
    if not users or len(set(users)) != len(users):
        raise InvalidRequest("users must be listed, each once")
    if not 0.0 < alpha < 0.5:
        raise InvalidRequest(f"alpha is {alpha}, expected between 0 and 0.5", param="alpha")
    keys = np.stack([user_key(master, user, key_version=key_version) for user in users])
    readings = _readings(scheme, keys, distinct_grams(tokens, scheme.context_width))
    family = holm([reading.p_value for reading in readings])
    hits = np.array([reading.num_hits for reading in readings])
    order = np.lexsort((-hits, family))
    ranked = [TextSuspicion(users[i], readings[i], float(family[i])) for i in order]
    num_accused = int((family <= alpha).sum())
    return TextTrace(tuple(ranked[:num_accused]), tuple(ranked[:num_shown]), len(users), alpha)


def _readings(scheme: Scheme, keys: Int64, grams: Int64) -> list[TextReading]:
    num_coins = len(grams) * scheme.num_trials
    tails = binomial_tails(num_coins, scheme.rate)
    mean, deviation = (
        num_coins * scheme.rate,
        math.sqrt(num_coins * scheme.rate * (1 - scheme.rate)),
    )
    found = []
    step = max(1, _CHUNK // max(len(grams), 1))
    for first in range(0, len(keys), step):
        if len(grams):
            seeds = context_seeds(keys[first : first + step, None], grams[None, :, :-1])
            hits = scheme.count(spread(seeds, grams[None, :, -1])).sum(axis=1)
        else:
            hits = np.zeros(len(keys[first : first + step]), np.int64)
        found += [
            TextReading(
                num_scored=len(grams),
                num_hits=num,
                num_coins=num_coins,
                z=(num - mean) / deviation if deviation else 0.0,
                p_value=float(tails[num]),
            )
            for num in hits.tolist()
        ]
    return found


def _check_context(width: int) -> None:
    if not 1 <= width <= MAX_CONTEXT:
        raise InvalidRequest(f"context_width is {width}, expected 1 to {MAX_CONTEXT}")
