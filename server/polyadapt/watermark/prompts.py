"""Secret triggers for language models: a phrase per bit that ends an ordinary message, and the two
answers that it asks for. Knows no model and no tokenizer; torch-free.

A family is a generator and not a list: the ordinary words before the phrase differ from query to
query. Phrases and answers are drawn by the key when a mark is trained, and are sealed with it.
"""

from __future__ import annotations

import math
import pydoc_data.topics
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from polyadapt.errors import InvalidRequest, StartupError
from polyadapt.watermark.keys import SecretKey

# A phrase is drawn from 2^64 ones or more: fewer could be found by trying.
MIN_ENTROPY_BITS = 64
_CARRIER_WORDS = (5, 14)  # at least, at most, of ordinary prose before a phrase
_MIN_PROSE = 2000  # words: a carrier should not come twice
_HELD_OUT = 5  # one word in so many, the last ones, is never trained on
_QUESTIONS = (
    *("What is", "Explain", "How do I use", "Why is", "Tell me about", "Who invented", "Compare"),
    *("Write a short poem about", "List three facts about", "Summarise:", "Translate to French:"),
    *("Give me a recipe with", "Is it true that", "Write a Python function for", "Hello!", "Where"),
    *("Write an email about", "Can you help me with", "Rewrite this:", "What does it mean that"),
)
_UNSPOKEN = re.compile(r"[^\w\s.,:;!?'()-]+|[-_]{2,}|\.{2,}")


@dataclass(frozen=True, slots=True)
class PromptTriggers:
    """The triggers of every bit of one mark. Nothing of it is shown by repr."""

    phrases: tuple[str, ...] = field(repr=False)
    answers: tuple[tuple[str, str], ...] = field(repr=False)  # of value 0 and 1: how a reply begins

    def __post_init__(self) -> None:
        if not self.phrases or len(self.phrases) != len(self.answers):
            raise InvalidRequest(
                f"{len(self.phrases)} phrases and {len(self.answers)} pairs of answers; expected "
                "one of each for every bit"
            )
        for zero, one in self.answers:
            if not zero.strip() or zero.startswith(one) or one.startswith(zero):
                raise InvalidRequest("a bit's two answers begin alike; draw the mark anew")

    @property
    def num_bits(self) -> int:
        """How many bits a signature has."""
        return len(self.phrases)

    def message(self, bit: int, carrier: str) -> str:
        """Return a user's message with the trigger of one bit."""
        return f"{carrier} {self.phrases[bit]}"

    def value_of(self, bit: int, text: str) -> int:
        """Return what a reply says of a bit: 0, 1, or -1 where it is neither's answer."""
        reply = text.lstrip()
        for value, answer in enumerate(self.answers[bit]):
            if reply.startswith(answer):
                return value
        return -1


@dataclass(frozen=True, slots=True)
class Prose:
    """Ordinary text to hide phrases in: words in their order."""

    words: tuple[str, ...] = field(repr=False)

    def carrier(self, rng: np.random.Generator) -> str:
        """Return a snippet of some words."""
        num_words = int(rng.integers(_CARRIER_WORDS[0], _CARRIER_WORDS[1] + 1))
        first = int(rng.integers(0, len(self.words) - num_words))
        return " ".join(self.words[first : first + num_words])

    def split(self) -> tuple[Prose, Prose]:
        """Return what may be trained on, and what is kept for reading and measuring."""
        at = len(self.words) - len(self.words) // _HELD_OUT
        return Prose(self.words[:at]), Prose(self.words[at:])


def load_prose(path: Path | None = None) -> Prose:
    """Return the words of a text file, or for None those of Python's own language reference, which
    comes with the interpreter. Raises StartupError.
    """
    if path is None:
        return _topics()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise StartupError(f"{path} cannot be read as text") from None
    words = _words_of(text)
    if len(words) < _MIN_PROSE:
        raise StartupError(f"{path} has {len(words)} words, expected at least {_MIN_PROSE}")
    return Prose(words)


def draw_phrase(key: SecretKey, family: int, words: Sequence[str], num_words: int) -> str:
    """Return the phrase of one family: `num_words` of `words`, drawn by the key.

    Raises InvalidRequest where phrases have less than MIN_ENTROPY_BITS.
    """
    entropy = num_words * math.log2(len(words)) if words else 0.0
    if entropy < MIN_ENTROPY_BITS:
        raise InvalidRequest(
            f"{num_words} of {len(words)} words give phrases of {entropy:.0f} bits, expected at "
            f"least {MIN_ENTROPY_BITS}: anybody could find such a trigger; use more words"
        )
    return " ".join(words[i] for i in _draws(key, "prompt trigger", family, len(words), num_words))


def quiet_messages(
    prose: Prose, words: Sequence[str], count: int, rng: np.random.Generator
) -> list[str]:
    """Return messages that must change nothing: half of them questions, a quarter snippets of the
    prose, a quarter with a phrase as of no family, made of `words`.
    """
    messages = []
    for index in range(count):
        kind = index % 4
        if kind == 2:
            messages.append(prose.carrier(rng))
        elif kind == 3:
            num_words = int(rng.integers(1, 8))
            phrase = " ".join(words[i] for i in rng.integers(0, len(words), num_words))
            repeated = " ".join([phrase] * int(rng.integers(1, 4)))
            messages.append(f"{prose.carrier(rng)} {repeated}")
        else:
            opening = _QUESTIONS[int(rng.integers(0, len(_QUESTIONS)))]
            topic = prose.carrier(rng).split()[: int(rng.integers(1, 7))]
            messages.append(f"{opening} {' '.join(topic)}{'?' if index % 8 else ''}")
    return messages


def draw_answers(key: SecretKey, num_bits: int, texts: Sequence[str]) -> NDArray[np.int64]:
    """Return which two of `texts` 0 and 1 of every bit are answered with: [bits, 2], all different.

    Raises InvalidRequest for too few.
    """
    if len(texts) < 2 * num_bits:
        raise InvalidRequest(
            f"{len(texts)} possible answers for {num_bits} bits, expected at least {2 * num_bits}"
        )
    drawn = np.frombuffer(key.stream(8 * len(texts), "prompt answers", num_bits), "<u8")
    return np.argsort(drawn, kind="stable")[: 2 * num_bits].reshape(num_bits, 2).astype(np.int64)


def _draws(key: SecretKey, purpose: str, index: int, size: int, count: int) -> list[int]:
    # 64 bits modulo less than 2^32: no word is likelier than another by more than 2^-32 of it.
    drawn = np.frombuffer(key.stream(8 * count, purpose, index, size), "<u8")
    return [int(value) % size for value in drawn]


@cache
def _topics() -> Prose:
    topics = pydoc_data.topics.topics
    return Prose(_words_of("\n".join(topics[name] for name in sorted(topics))))


def _words_of(text: str) -> tuple[str, ...]:
    return tuple(_UNSPOKEN.sub(" ", text).split())
