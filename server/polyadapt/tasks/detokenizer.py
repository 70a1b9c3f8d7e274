"""Exact incremental decoding of one sequence: tokens in, text out as soon as it is certain.

Knows no requests; the tokenizer decides what text a run of tokens has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"
# A UTF-8 character has at most four bytes, so among this many borders of tokens that are not empty
# at least one does not cut a character.
_SPLIT_SEARCH = 8
_MAX_WINDOW = 48


class Decoder(Protocol):
    """What incremental decoding needs of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids without special tokens."""

    def is_special(self, token_id: int) -> bool:
        """Whether decode leaves the token out."""

    def is_byte_fallback(self, token_id: int) -> bool:
        """Whether the token's text depends on the byte tokens that follow it."""

    def lone_text(self, token_id: int) -> str | None:
        """Return the text that the token adds behind any complete text; None when decode must
        tell.
        """


class Detokenizer:
    """The text of a growing token sequence.

    The pieces returned by `push` and `flush`, joined, equal `decode` of all ids. Only a window of
    the newest tokens is decoded again: it starts at a border where the text was complete, one
    piece further back than needed, so that a decoder which strips the first token's leading space
    strips it from both sides of every difference.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._window: list[int] = []
        self._num_read = 0  # tokens of the window whose text was complete
        self._num_emitted = 0  # characters of the window's text that were returned
        self._next_search = _MAX_WINDOW

    def push(self, token_id: int) -> str:
        """Take one token and return the text that has become certain; often "", never wrong."""
        if self._num_read == len(self._window):  # the text was complete before this token
            text = self._decoder.lone_text(token_id)
            if text is not None:
                self._window = [token_id]
                self._num_read, self._num_emitted = 1, len(text)
                return text
        if self._decoder.is_special(token_id):
            return ""
        self._window.append(token_id)
        if self._decoder.is_byte_fallback(token_id):
            # One wrong byte turns its whole run into replacement characters: wait for its end.
            return ""
        text = self._decoder.decode(self._window)
        is_complete = not text.endswith(_REPLACEMENT)
        certain = text if is_complete else text[: -len(_REPLACEMENT)]
        piece = certain[self._num_emitted :]
        self._num_emitted += len(piece)
        if is_complete and piece:
            self._drop(self._num_read)
            self._num_read = len(self._window)
        elif len(self._window) >= self._next_search:
            self._split(text)
        return piece

    def flush(self) -> str:
        """End the sequence and return what was held back."""
        piece = self._decoder.decode(self._window)[self._num_emitted :]
        self._window, self._num_read, self._num_emitted = [], 0, 0
        return piece

    def _drop(self, count: int) -> None:
        """Forget the window's first `count` tokens, whose text is complete and was returned."""
        if count == 0:
            return
        del self._window[:count]
        self._num_emitted = len(self._decoder.decode(self._window))

    def _split(self, text: str) -> None:
        """Shorten a window that never became complete (a run of invalid bytes)."""
        for k in range(len(self._window) - 1, len(self._window) - 1 - _SPLIT_SEARCH, -1):
            head = self._decoder.decode(self._window[:k])
            tail = self._decoder.decode(self._window[k:])
            if tail and head + tail == text and len(head) <= self._num_emitted:
                del self._window[:k]
                self._num_read = 0
                self._num_emitted -= len(head)
                self._next_search = _MAX_WINDOW
                return
        self._next_search = 2 * len(self._window)
