"""Guesses at a sequence's next tokens: what followed its last few tokens when they last occurred.

Prompt lookup decoding (apoorvumang/prompt-lookup-decoding): no second model, the text itself is the
draft. Torch-free; knows token ids only. A wrong guess costs rows and never changes an output.
"""

from __future__ import annotations

from collections.abc import Sequence

_NGRAM_SIZES = (4, 3, 2)  # the longest match is the likeliest to go on
_NUM_INDEXED = 4096  # tokens of a prompt; all of them are indexed within one step
_FIRST_LENGTH = 2
_FIRST_PAUSE, _LAST_PAUSE = 4, 64  # tokens without a guess after guesses that failed


class NgramIndex:
    """Position behind the latest occurrence of every n-gram that ends in one stretch of a text."""

    __slots__ = ("_behind", "_next_end")

    @classmethod
    def of_prompt(cls, prompt_ids: Sequence[int]) -> NgramIndex:
        """Cover the n-grams that have a token of the prompt behind them and end in its last
        _NUM_INDEXED tokens: what came earlier in a longer prompt is never found.
        """
        stop = len(prompt_ids) - 1
        index = cls(max(0, stop - _NUM_INDEXED))
        index.extend(prompt_ids, stop)
        return index

    def __init__(self, start: int) -> None:
        """Cover n-grams whose last token is at position `start` or later."""
        self._behind: dict[tuple[int, ...], int] = {}
        self._next_end = start

    def extend(self, token_ids: Sequence[int], stop: int) -> None:
        """Take in the n-grams whose last token is before position `stop`; earlier ones once."""
        behind = self._behind
        for end in range(self._next_end, stop):
            for size in _NGRAM_SIZES:
                if size <= end + 1:
                    behind[tuple(token_ids[end + 1 - size : end + 1])] = end + 1
        self._next_end = max(self._next_end, stop)

    def find(self, ngram: tuple[int, ...]) -> int | None:
        """Position behind its latest occurrence, or None."""
        return self._behind.get(ngram)


class PromptLookup:
    """The guesses of one sequence, and how well they went.

    The number of tokens that are guessed doubles when all were right and halves when not; at
    0 it pauses, longer each time, so that a text without repeats is decoded at its usual cost.
    """

    __slots__ = ("_index", "_length", "_max_length", "_num_paused", "_pause", "_prompt_index")

    def __init__(self, prompt_index: NgramIndex, num_prompt: int, max_length: int) -> None:
        """Guess at most `max_length` tokens. `prompt_index` is the prompt's, see
        NgramIndex.of_prompt; it is shared by the sequences of one prompt.
        """
        self._prompt_index = prompt_index
        self._index = NgramIndex(num_prompt - 1)
        self._max_length = max_length
        self._length = min(_FIRST_LENGTH, max_length)
        self._pause = _FIRST_PAUSE
        self._num_paused = 0

    def propose(self, token_ids: Sequence[int], limit: int) -> tuple[int, ...]:
        """Guess what follows `token_ids`: at most `limit` tokens, none when nothing is known."""
        if self._num_paused:
            self._num_paused -= 1
            return ()
        length = min(limit, self._length)
        if length <= 0:
            return ()
        # Without the n-gram that ends the text: it would find itself.
        self._index.extend(token_ids, len(token_ids) - 1)
        for size in _NGRAM_SIZES:
            ngram = tuple(token_ids[-size:])
            start = self._index.find(ngram) or self._prompt_index.find(ngram)
            if start is not None:
                return _copy(token_ids, start, length)
        return ()

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """Learn how many of the tokens guessed last were right."""
        if num_accepted == num_drafted:
            self._length = min(self._max_length, 2 * self._length)
        else:
            self._length = max(num_accepted, self._length // 2)
        if num_accepted:
            self._pause = _FIRST_PAUSE
        if self._length == 0:
            self._length = 1
            self._num_paused = self._pause
            self._pause = min(2 * self._pause, _LAST_PAUSE)


def _copy(token_ids: Sequence[int], start: int, length: int) -> tuple[int, ...]:
    """`length` tokens from `start` on; a copy that reaches the end goes on in itself, as in LZ77,
    so that a short period can fill a long guess.
    """
    copied: list[int] = list(token_ids[start : start + length])
    period = len(token_ids) - start
    while len(copied) < length:
        copied.append(copied[len(copied) - period])
    return tuple(copied)
