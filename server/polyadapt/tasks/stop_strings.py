"""Finds stop strings in a text that arrives in pieces, holding back what may still become one.

Literal matching only, one automaton per string (Knuth, Morris, Pratt 1977). Knows no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scan:
    """What a piece of text led to: text to release, and whether a stop string has ended it."""

    text: str
    is_stopped: bool


class StopStrings:
    """Several stop strings over one text; the first that is completed ends it and is left out."""

    def __init__(self, strings: Sequence[str]) -> None:
        """Watch for `strings`; none of them may be empty."""
        self._strings = tuple(strings)
        self._failures = tuple(_failures(string) for string in self._strings)
        self._states = [0] * len(self._strings)  # length of the prefix that the text ends with
        self._held = ""

    def push(self, piece: str) -> Scan:
        """Take a piece; what is held is the longest ending that some stop string begins with."""
        if not self._strings:
            return Scan(piece, False)
        text = self._held + piece
        for position in range(len(self._held), len(text)):
            matched = self._step(text[position])
            if matched:
                self._held = ""
                return Scan(text[: position + 1 - matched], True)
        cut = len(text) - max(self._states)
        self._held = text[cut:]
        return Scan(text[:cut], False)

    def skip(self, piece: str) -> Scan:
        """Take a piece that no stop string may end or reach into."""
        released = self.flush() + piece
        self._states = [0] * len(self._strings)
        return Scan(released, False)

    def flush(self) -> str:
        """End the text and return what was held back."""
        held, self._held = self._held, ""
        return held

    def _step(self, char: str) -> int:
        """Advance every automaton; return the length of the longest string completed here, or 0."""
        longest = 0
        for i, string in enumerate(self._strings):
            state = self._states[i]
            while state and string[state] != char:
                state = self._failures[i][state - 1]
            if string[state] == char:
                state += 1
            self._states[i] = state
            if state == len(string):
                longest = max(longest, state)
        return longest


def _failures(string: str) -> list[int]:
    """Return for each prefix the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(string)
    length = 0
    for position in range(1, len(string)):
        while length and string[position] != string[length]:
            length = table[length - 1]
        if string[position] == string[length]:
            length += 1
        table[position] = length
    return table
