"""The text mark of each row of a step: which scheme, and what its key says at this context.

Follows the sequences' own lists of tokens, so that neither the batch nor a preemption nor drafts
change a mark; the newest token has to be known. Knows no logits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from polyadapt.engine.request import Sequence
from polyadapt.types import SamplingParams, TextMark
from polyadapt.watermark.text import (
    GreenList,
    Int64,
    Race,
    Tournament,
    context_seeds,
    raise_favoured,
    reshape_kept,
    scheme_of,
)
from polyadapt.watermark.text_compatible import LeftHash


@dataclass(frozen=True, slots=True)
class RowMark:
    """What marks one row of a step. seed int64 [1]."""

    scheme: GreenList | LeftHash | Tournament | Race
    seed: Int64

    @property
    def raising(self) -> GreenList | LeftHash | None:
        """The scheme, if it changes scores."""
        return self.scheme if isinstance(self.scheme, GreenList | LeftHash) else None

    @property
    def reshaping(self) -> Tournament | Race | None:
        """The scheme, if it changes the weights of a draw."""
        return self.scheme if isinstance(self.scheme, Tournament | Race) else None

    def raise_scores(self, row: np.ndarray, best: int, params: SamplingParams) -> np.ndarray:
        """Return float32 scores [vocabulary] as the mark has them, of which `best` is a largest."""
        scheme = self.raising
        if scheme is None:
            return row
        return raise_favoured(scheme, row, best, params.temperature, self.seed)

    def reshape(self, weights: np.ndarray, tokens: np.ndarray | None) -> np.ndarray:
        """Return the weights [tokens] that are drawn from; tokens None: 0, 1, ..."""
        scheme = self.reshaping
        return weights if scheme is None else reshape_kept(scheme, weights, tokens, self.seed)


class TextMarker:
    """The mark of one sequence.

    A scheme that raises scores reads the prompt's last tokens as well, so that a text which is
    asked for piece by piece is marked all through. One that reshapes draws does not, for every
    answer to one prompt would begin alike, and acts on each context of its output once.
    """

    def __init__(self, mark: TextMark, num_prompt: int, num_vocab: int) -> None:
        settings = mark.settings
        self.scheme: GreenList | LeftHash | Tournament | Race
        if settings.is_lefthash:
            self.scheme = LeftHash.of(settings, mark.key, num_vocab)
        else:
            self.scheme = scheme_of(settings)
        self.key = mark.key
        self.width = self.scheme.context_width
        self._is_reshaping = isinstance(self.scheme, Tournament | Race)
        self._first = num_prompt if self._is_reshaping else 0
        self._num_read = self._first + self.width  # the first position that has a context
        self._seen: set[tuple[int, ...]] = set()

    def context(self, token_ids: list[int]) -> tuple[int, ...] | None:
        """Return the tokens that decide the mark of the one behind `token_ids`; None: it has no
        mark.
        """
        num, width = len(token_ids), self.width
        if num - self._first < width:
            return None
        context = tuple(token_ids[num - width :])
        assert min(context) >= 0, "a context is read before its tokens are known"
        if not self._is_reshaping:
            return context
        for position in range(self._num_read, num):
            self._seen.add(tuple(token_ids[position - width : position]))
        self._num_read = max(self._num_read, num)
        return None if context in self._seen else context


def row_marks(sequences: Seq[Sequence], num_vocab: int) -> list[RowMark | None]:
    """Return for each sequence what marks its next token; None: nothing does."""
    found: list[RowMark | None] = [None] * len(sequences)
    marked: dict[tuple[int, bool], list[_Marked]] = defaultdict(list)
    for row, sequence in enumerate(sequences):
        mark = sequence.group.request.text_mark
        if mark is None:
            continue
        marker = sequence.marker
        if marker is None:
            marker = sequence.marker = TextMarker(mark, sequence.num_prompt, num_vocab)
        context = marker.context(sequence.token_ids)
        if context is not None:
            is_lefthash = mark.settings.is_lefthash
            marked[marker.width, is_lefthash].append(_Marked(row, marker, context))
    # One pass for all rows of a width: it is some hundred operations on arrays, however short.
    for (_, is_lefthash), members in marked.items():
        contexts = np.array([each.context for each in members], np.int64)
        keys = np.array([each.marker.key for each in members], np.int64)
        seeds = contexts[:, -1] if is_lefthash else context_seeds(keys, contexts)
        for each, seed in zip(members, seeds[:, None], strict=True):
            found[each.row] = RowMark(each.marker.scheme, seed)
    return found


@dataclass(frozen=True, slots=True)
class _Marked:
    row: int
    marker: TextMarker
    context: tuple[int, ...]
